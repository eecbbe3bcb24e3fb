"""How good an energy is, in one call: likelihood of held-out data, tests of fit, and how its chains mix.

    log p(x) = log base(x) - U(x) - log Z                       Z = E_base[exp(-U)]

    group                dimensions        what it says
    log_likelihood       event             log p of each event; its mean, the errors of that by data and by log Z
    log_z                chain             the estimate by run, its error, and bounds from below and above
    tests                test              of data and of draws against the density, and of one against the other
    modes                centre            shares of data and of draws nearest to each centre
    energies_data, energies_samples, energies_base              U of held-out data, of draws, of noise
    posterior, sample_stats, convergence                        draws of the density (the negatives), their R-hat, ESS

The tests are

    stein_data      data from the density?                      `stein_test`
    stein_samples   draws from the density?                     the same: is it the sampler that is wrong
    mmd             data and draws from one distribution?       `mmd_test`
    classifier      the same                                    `classifier_test`

References:
    Grosse, Ghahramani and Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo; and those
    of each part.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from ebm_ppl import evidence
from ebm_ppl.arviz import as_lines, log_z_to_datatree
from ebm_ppl.distribution import EnergyDistribution, energy_factor
from ebm_ppl.evaluate.chains import SHORTEST, mode_weights, thinned
from ebm_ppl.evaluate.significance import Significance, check_simulations, holm
from ebm_ppl.evaluate.stein import stein_test
from ebm_ppl.evaluate.two_sample import classifier_test, mmd_test
from ebm_ppl.inference import sample
from ebm_ppl.logz.bdmc import BDMC
from ebm_ppl.logz.integral import Estimator
from ebm_ppl.logz.tempering import ParallelTempering
from ebm_ppl.mcmc import Sampler
from ebm_ppl.smc import SMC
from ebm_ppl.target import Target, target
from ebm_ppl.train.objective import Density, check_base, flat
from ebm_ppl.typing import Array, ArrayLike, EnergyError, EnergyShapeError, EnergyWarning, LogZ, PRNGKey, as_key

if TYPE_CHECKING:
    import xarray as xr

Columns = dict[str, Any]
"""Variables of a group, as `xarray.Dataset` takes them."""
LARGEST_RHAT = 1.01
FEW = 100.0
"""Effective draws below which chains say little."""
OUTSIDE = 3.0
"""Standard errors beyond its bounds at which an estimate is in doubt."""
LOG_Z, BOUNDS, SAMPLES, NOISE, CHOICE, TESTS = range(NUM_PARTS := 6)
"""What is folded into the key for each part."""
AT_ONCE = 1024
"""Points whose energies are found at once."""
MISSING = "No base, so no log Z and no log likelihood: pass base=..., or log_z=... where it is known."


def evaluate(
    key: PRNGKey,
    energy: Callable[[Array], Array],
    data: ArrayLike,
    *,
    base: dist.Distribution | None = None,
    log_z: LogZ | float | None = None,
    method: SMC | Estimator | None = None,
    bounds: BDMC | None = BDMC(),  # noqa: B008  # frozen
    samples: ArrayLike | None = None,
    sampler: Sampler | SMC | ParallelTempering | None = None,
    num_chains: int | None = None,
    num_warmup: int | None = None,
    num_draws: int | None = None,
    centres: ArrayLike | None = None,
    tests: bool = True,
    num_points: int = 2000,
    num_simulations: int = 1000,
    progress_bar: bool = False,
) -> xr.DataTree:
    """How good an energy is for data that it was not trained on.

    What speaks against a number (an uncertain log Z, chains that have not mixed, energies that are not finite, a test
    that could not be made) is warned of, and is in the attribute `doubts`, a line for each.

    Args:
        energy: U, a callable on one event, in nats.
        data: held-out events, independent, shape (num, *event_shape).
        base: a normalised NumPyro distribution of events, as it was in training; the density is `exp(-U(x)) / Z`
            without one. Then log Z cannot be estimated, and without `log_z` there is no likelihood. A discrete one
            wants both `log_z` and `samples`, has no bounds, and no tests that take gradients.
        log_z: log of `E_base[exp(-U)]`, or of the integral of `exp(-U)` without a base, where it is known already.
        method: the estimator of log Z, as in `ebm_ppl.log_z`.
        bounds: bidirectional Monte Carlo, which brackets log Z; None for no bounds. They are heuristic, since there
            are no exact draws of the density: what SMC does not find is missing from the upper one.
        samples: draws of the density, shape (chain, draw, *event_shape), instead of new ones.
        sampler, num_chains, num_warmup, num_draws: of new ones, as in `ebm_ppl.sample`. Modes that lie far apart want
            `ParallelTempering()` or `SMC()`.
        centres: of modes whose weights are wanted, shape (num_centres, *event_shape).
        tests: whether to make the tests.
        num_points: at most so many points of each sample are tested (of chains, four of each at least), chosen at
            random, or evenly along chains; the cost goes as its square.
        num_simulations: of the bootstrap and of the permutations.
        progress_bar: whether to show the progress of the chains.

    Returns:
        A DataTree, whose groups are those of the module's table; it survives a round trip through netCDF.

    Raises:
        EnergyError: for data that are not finite, a discrete base without log Z and samples, or settings out of range.
        EnergyShapeError: where data, base and samples are of different events, or an energy is not one number.
        NoReferenceError: where log Z is infinite.
        NonFiniteEnergyError: where chains find no finite point to start from.

    Example:
        >>> tree = ebm_ppl.evaluate(key, fitted.energy, held_out, base=base)
        >>> tree["log_likelihood"]["mean"].item(), tree["tests"]["p_value_holm"].to_series()
        >>> ebm_ppl.plot_energy_histograms(tree)
    """
    import xarray as xr

    key, (points, event_shape) = as_key(key), flat(data, "data")
    density = Density(energy, base, event_shape)
    check_base(base, event_shape, "data")
    if density.is_discrete and (log_z is None or samples is None):
        raise EnergyError(
            "The base is discrete, of which evaluate neither finds log Z nor makes draws: pass log_z=... "
            "(relative to the base: enumerate_log_z of U - log base, say, or the last log_z that Jarzynski() told) and "
            "samples=..., by Gibbs(), say."
        )
    if num_points < 1:
        raise EnergyError(f"num_points is 1 at least; got {num_points}.")
    check_simulations(num_simulations, "num_simulations")
    keys = [jax.random.fold_in(key, part) for part in range(NUM_PARTS)]
    if log_z is not None and not isinstance(log_z, LogZ):
        log_z = LogZ(float(log_z), 0.0, "given")
    if base is not None and not density.is_discrete:
        model = target(as_model, density)
        found = evidence.log_z(keys[LOG_Z], model, method) if log_z is None else log_z
        log_z = _bracketed(keys[BOUNDS], model, bounds, found)
    if samples is not None:
        tree = _given(samples, event_shape)
    else:
        tree = sample(
            keys[SAMPLES],
            target(as_model, density),
            sampler,
            num_chains=num_chains,
            num_warmup=num_warmup,
            num_samples=num_draws,
            init="uniform" if base is None else "reference",
            progress_bar=progress_bar,
        )
    drawn = np.asarray(tree["posterior"].to_dataset()["x"])

    groups = {"convergence": _convergence(tree)} | _energies(keys[NOISE], density, points, drawn)
    if log_z is not None:
        groups["log_likelihood"] = _log_likelihood(density, points, log_z)
        tree["log_z"] = log_z_to_datatree(log_z)["log_z"]
    if centres is not None:
        groups["modes"] = _modes(points.reshape(-1, *event_shape), drawn, centres)
    failures: list[str] = []
    if tests:
        chosen = _some(keys[CHOICE], points, num_points).reshape(-1, *event_shape)
        groups["tests"], failures = _tests(keys[TESTS], density, chosen, drawn, num_points, num_simulations)
    for name, columns in groups.items():
        tree[name] = xr.DataTree(xr.Dataset(columns))
    told = [] if log_z is None else list(log_z.doubts)
    doubts = [*_contradiction(log_z), *_of_chains(groups["convergence"]), *_of_energies(groups), *failures]
    for doubt in doubts:  # those of log Z were warned of when it was found
        warnings.warn(doubt, EnergyWarning, stacklevel=2)
    tree.attrs |= {
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "num_data": len(points),
        "num_simulations": num_simulations,
        "doubts": as_lines((*told, *doubts)),
        "missing": MISSING if log_z is None else "",
    }
    return tree


def as_model(density: Density | EnergyDistribution) -> None:
    """The density as a NumPyro model: log Z is that of its loss; without a base it has none."""
    improper = dist.ImproperUniform(constraints.real, (), density.event_shape)
    x: Any = numpyro.sample("x", improper if density.base is None else density.base)
    energy_factor("energy", density.tilt(x), role="loss")


# log Z and the likelihood


def _bracketed(key: PRNGKey, model: Target, bounds: BDMC | None, found: LogZ) -> LogZ:
    """An estimate of log Z with its bounds."""
    if bounds is None:
        return found
    bracket = evidence.log_z(key, model, bounds)
    return dataclasses.replace(
        found,
        lower=bracket.lower,
        upper=bracket.upper,
        story=(*found.story, *bracket.story),
        doubts=(*found.doubts, *bracket.doubts),
    )


def _contradiction(found: LogZ | None) -> list[str]:
    """An estimate outside of its bounds, which chance alone seldom makes."""
    if found is None or found.lower is None or found.upper is None:
        return []
    slack = OUTSIDE * found.std_error
    if found.lower - slack <= found.value <= found.upper + slack:
        return []
    return [
        f"log Z is {found} by {found.method}, but between {found.lower:.3f} and {found.upper:.3f} by bidirectional "
        "Monte Carlo: one of them misses a part of the density. More num_stages or num_moves of `bounds` help it, and "
        "another `method` is a second opinion."
    ]


def _log_likelihood(density: Density, points: Array, found: LogZ) -> Columns:
    """Of each event, and their mean with both of its errors."""
    each = -np.asarray(_values(density, points)[1], float) - found.value
    with np.errstate(invalid="ignore"):  # an event of zero density
        mean, spread = float(np.mean(each)), float(np.std(each, ddof=1)) if len(each) > 1 else math.nan
    numbers = {"mean": mean, "std_error_data": spread / math.sqrt(len(each)), "std_error_log_z": found.std_error}
    if found.lower is not None and found.upper is not None:
        numbers |= {"lower": mean + found.value - found.upper, "upper": mean + found.value - found.lower}
    return {"x": ("event", each), **numbers}


@eqx.filter_jit
def _values(density: Density, points: Array) -> tuple[Array, Array]:
    """U and V = U - log base of each point."""
    return jax.lax.map(lambda x: (density.tilt(x), density.total(x)), points, batch_size=AT_ONCE)


# Draws of the density


def _given(samples: ArrayLike, event_shape: tuple[int, ...]) -> xr.DataTree:
    """Draws that the user has."""
    from arviz_base import from_dict

    draws = np.asarray(samples)
    if draws.ndim < 2 or draws.shape[2:] != event_shape or draws.shape[1] < SHORTEST:
        raise EnergyShapeError(
            f"samples have shape {draws.shape}; expected (chain, draw, *event_shape) of events of shape {event_shape}, "
            "and four draws at least. Independent ones are a single chain: samples[None]."
        )
    if bad := int(np.sum(~np.isfinite(draws.reshape(*draws.shape[:2], -1)).all(axis=-1))):
        raise EnergyError(f"{bad} of {draws.shape[0] * draws.shape[1]} samples are not finite.")
    tree = from_dict({"posterior": {"x": draws}})
    tree.attrs |= {"inference_library": "ebm_ppl", "sampler": "given"}
    return tree


def _convergence(tree: xr.DataTree) -> Columns:
    """R-hat and ESS of every coordinate, by ArviZ; of a single chain, R-hat of its halves."""
    import xarray as xr
    from arviz_stats import ess, rhat

    draws = halves = tree["posterior"].to_dataset()[["x"]]
    if draws.sizes["chain"] == 1 and (half := draws.sizes["draw"] // 2) >= SHORTEST:
        places = draws.drop_vars("draw")
        parts = places.isel(draw=slice(half)), places.isel(draw=slice(half, 2 * half))
        halves = xr.concat(parts, "chain").assign_coords(chain=range(2))
    with np.errstate(divide="ignore", invalid="ignore"):  # coordinates that never change
        found = {"rhat": rhat(halves), "ess_bulk": ess(draws), "ess_tail": ess(draws, method="tail")}
    return {name: each["x"].drop_attrs() for name, each in found.items()}


def _of_chains(convergence: Columns) -> list[str]:
    worst, least = float(convergence["rhat"].max()), float(convergence["ess_bulk"].min())
    if worst <= LARGEST_RHAT and least >= FEW:
        return []
    return [
        f"The chains have an R-hat of up to {worst:.3f} and {least:.0f} effective draws at least: they are no fair "
        "draws of the density, and what is said of them holds for these chains alone. More num_draws help, or, where "
        "modes lie apart, sampler=ParallelTempering()."
    ]


def _energies(key: PRNGKey, density: Density, points: Array, drawn: np.ndarray) -> dict[str, Columns]:
    """U of data, of draws, and of as many draws of the base as there are data."""

    def of(rows: Array, dims: tuple[str, ...], shape: tuple[int, ...]) -> Columns:
        return {"energy": (dims, np.asarray(_values(density, rows)[0]).reshape(shape))}

    num, lead = len(points), drawn.shape[:2]
    rows = jnp.asarray(drawn, points.dtype).reshape(math.prod(lead), -1)
    found = {"energies_data": of(points, ("event",), (num,)), "energies_samples": of(rows, ("chain", "draw"), lead)}
    if density.base is not None:
        found["energies_base"] = of(density.draw_base(key, num).astype(points.dtype), ("event",), (num,))
    return found


def _of_energies(groups: dict[str, Columns]) -> list[str]:
    energies = {name.removeprefix("energies_"): x["energy"][1] for name, x in groups.items() if "energy" in x}
    # Noise may well lie where there is no density.
    bad = {name: ~np.isfinite(each) & ((name != "base") | ~np.isposinf(each)) for name, each in energies.items()}
    return [
        f"The energy is not finite at {np.sum(where)} of {where.size} points of {name}, of which "
        f"{np.sum(np.isnan(energies[name]))} are NaN."
        for name, where in bad.items()
        if np.any(where)
    ]


def _modes(data: Array, drawn: np.ndarray, centres: ArrayLike) -> Columns:
    found = {"data": mode_weights(data, centres), "samples": mode_weights(drawn, centres, chains=True)}
    columns = {name: ("centre", each.weight) for name, each in found.items()}
    return columns | {f"{name}_std_error": ("centre", each.std_error) for name, each in found.items()}


# Tests


def _tests(
    key: PRNGKey, density: Density, data: Array, drawn: np.ndarray, num_points: int, num_simulations: int
) -> tuple[Columns, list[str]]:
    """Every test of the module's table; one that cannot be made is NaN, with the reason."""
    keys = jax.random.split(key, 5)
    apart = _some(keys[0], jnp.asarray(thinned(drawn)), num_points)
    every = min(math.ceil(drawn.shape[0] * drawn.shape[1] / num_points), drawn.shape[1] // SHORTEST)
    stein: dict[str, Any] = {"base": density.base, "num_bootstrap": num_simulations}
    made: dict[str, Callable[[], Significance]] = {
        "stein_data": lambda: stein_test(keys[1], density.energy, data, **stein),
        "stein_samples": lambda: stein_test(keys[2], density.energy, drawn[:, ::every], chains=True, **stein),
        "mmd": lambda: mmd_test(keys[3], data, apart, num_permutations=num_simulations),
        "classifier": lambda: classifier_test(keys[4], data, apart),
    }
    if density.is_discrete:
        made = {name: test for name, test in made.items() if not name.startswith("stein")}
    found, failures = [], []
    for name, test in made.items():
        try:
            found.append(test())
        except EnergyError as error:
            failures.append(f"The test {name!r} could not be made: {error}")
            found.append(Significance(math.nan, math.nan, 0))
    columns = {name: [getattr(each, name) for each in found] for name in Significance._fields}
    columns["p_value_holm"] = list(holm(columns["p_value"]))
    return {name: ("test", column) for name, column in (columns | {"test": list(made)}).items()}, failures


def _some(key: PRNGKey, points: Array, num: int) -> Array:
    return points if len(points) <= num else jax.random.permutation(key, points)[:num]
