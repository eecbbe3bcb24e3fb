"""log p(x) of each event from below and from above, alike for every kind of model.

    exact             a normalised distribution, a flow                 lower = upper = log p(x)
    one constant      base(x) exp(-U(x)) / Z                            log Z between the bounds of `BDMC`, or as given
    latents           p(x) = int p(x, z) dz, a `LatentModel`            annealed chains for each event

For latents there are chains in both directions on the path of `annealed.py`,

    E_F[exp(A)] = p(x)              lower = log mean exp(A)
    E_R[exp(-A)] = 1 / p(x)         upper = -log mean exp(-A)

which hold in expectation (Jensen). The reverse chains are exact where z is known to be a draw of p(z | x), as it is of
an event that was drawn together with it. Events of the world have no such z: their reverse chains start where forward
ones have ended, and the upper bound is heuristic. What it is worth is said by events that are drawn from the model
here, with their z, and whose gap between both bounds is true.

References:
    Wu, Burda, Salakhutdinov and Grosse (2017), On the quantitative analysis of decoder-based generative models; Grosse,
    Ghahramani and Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo; Neal (2001),
    Annealed importance sampling; Talts, Betancourt, Simpson, Vehtari and Gelman (2018), Validating Bayesian inference
    algorithms with simulation-based calibration.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ebm_ppl import evidence
from ebm_ppl.arviz import as_lines
from ebm_ppl.distribution import EnergyDistribution
from ebm_ppl.evaluate.evaluate import as_model
from ebm_ppl.logz.bdmc import BDMC
from ebm_ppl.models.annealed import Annealed, Bounds, bracket, find_path
from ebm_ppl.models.latent import LatentModel
from ebm_ppl.target import target
from ebm_ppl.train.objective import log_prob
from ebm_ppl.typing import Array, ArrayLike, EnergyError, EnergyShapeError, EnergyWarning, LogZ, PRNGKey, as_key

if TYPE_CHECKING:
    import xarray as xr

LARGE_GAP = 1.0
"""Nats between the bounds of an event, on average, beyond which they say little."""
CHANCE = 4.0
"""Standard errors that are left to it."""
CHAINS, SIMULATED, CONSTANT = range(3)
"""What is folded into the key for each part."""


def log_likelihood_bounds(
    key: PRNGKey,
    model: Any,
    data: ArrayLike,
    *,
    annealed: Annealed | None = None,
    latents: ArrayLike | None = None,
    num_simulated: int = 32,
    log_z: LogZ | None = None,
) -> xr.DataTree:
    """log p(x) of each event between two bounds: exact, by one log Z, or by annealed chains; see the module docstring.

    What speaks against them (a wide gap, bounds in the wrong order, starts that are no draws of the posterior, a log Z
    in doubt) is warned of, and in the attribute `doubts`, a line for each.

    Args:
        model: a `LatentModel`; an `EnergyDistribution`; a NumPyro distribution or a `FlowModel`, which are exact.
        data: events, shape (num, *event_shape).
        annealed: chains of a `LatentModel`; `Annealed()` where None.
        latents: z of each event where these were drawn together from a `LatentModel`, shape (num, latent_dim): the
            upper bound is true then. Draws of an approximation will not do, and are found out where they lie too high
            or too low in energy.
        num_simulated: events drawn from a `LatentModel`, on which the bounds are true and the gap is reported.
        log_z: of a tilt, where it is known: of the `EnergyDistribution`, or of the prior of a `LatentModel`.

    Returns:
        A DataTree with the groups

        - `log_likelihood`: (chain, draw, event), one chain and draw: log p(x), or its lower bound;
        - `bounds`: (event) `lower`, `upper`, and `effective_chains` of a `LatentModel`; their means and, of those, the
          standard errors over events;
        - `simulated`: (event) `lower`, `upper` and `gap` of the events that were drawn.

        Attribute `bounds` is `"exact"`, `"true"` or `"heuristic"`. `arviz_stats.compare` takes `held_out_elpd` of it.

    Raises:
        EnergyShapeError: where events or latents have another shape than the model's.
        EnergyError: for what has no likelihood.

    References: Wu et al. (2017); Grosse, Ghahramani and Adams (2015).

    Example:
        >>> tree = ebm_ppl.log_likelihood_bounds(key, fitted.energy, held_out)
        >>> tree["bounds"]["mean_lower"].item(), tree["simulated"]["gap"].mean().item()
    """
    key, data = as_key(key), jnp.asarray(data)
    density = getattr(model, "distribution", model)
    if isinstance(model, LatentModel):
        _check_shapes(data, model.event_shape, "data")
        return _of_latents(key, model, data, annealed or Annealed(), latents, num_simulated, log_z)
    if not isinstance(density, dist.Distribution):
        raise EnergyError(
            f"{type(model).__name__} has no likelihood: give a LatentModel, an EnergyDistribution, a FlowModel or a "
            "distribution of NumPyro."
        )
    if latents is not None:
        raise EnergyError(f"latents are those of a LatentModel; {type(model).__name__} has none.")
    _check_shapes(data, density.event_shape, "data")
    if not isinstance(density, EnergyDistribution) or density.is_normalized:
        values = np.asarray(eqx.filter_jit(jax.vmap(lambda x: log_prob(density, x)))(data), float)
        return _tree({"lower": values, "upper": values}, values, "exact", [])
    found = _bracketed(key, density) if log_z is None else log_z
    unnormalised = np.asarray(eqx.filter_jit(jax.vmap(density.log_prob))(data), float)
    lower, upper = _bounds_of(found)
    columns = {"lower": unnormalised - upper, "upper": unnormalised - lower}
    return _tree(columns, unnormalised - found.value, "heuristic", list(found.doubts))


def held_out_elpd(tree: xr.DataTree) -> Any:
    """The log likelihoods of events that a model has not seen, as ArviZ's `ELPDData`.

    `arviz_stats.compare` ranks those. They need no leave-one-out, whose importance sampling has nothing to weigh where
    parameters are fixed.

    Args:
        tree: of `log_likelihood_bounds`.

    Example:
        >>> arviz_stats.compare({name: ebm_ppl.held_out_elpd(tree) for name, tree in trees.items()})
    """
    from arviz_stats.utils import ELPDData

    each: Any = tree["log_likelihood"].to_dataset()["x"].isel(chain=0, draw=0, drop=True)
    num = each.size
    std_error = float(math.sqrt(num) * each.std(ddof=1)) if num > 1 else math.nan
    return ELPDData("held_out", float(each.sum()), std_error, 0.0, 1, num, "log", False, math.nan, elpd_i=each)


def _check_shapes(array: Array, event_shape: tuple[int, ...], name: str) -> None:
    if array.shape[1:] != event_shape or not len(array):
        raise EnergyShapeError(f"{name} has shape {array.shape}; expected (num, {', '.join(map(str, event_shape))}).")


def _bounds_of(found: LogZ) -> tuple[float, float]:
    """From below and above; two standard errors where the method has no bounds."""
    if found.lower is None or found.upper is None:
        return found.value - 2 * found.std_error, found.value + 2 * found.std_error
    return found.lower, found.upper


# One constant


def _bracketed(key: PRNGKey, density: EnergyDistribution) -> LogZ:
    """log Z of a tilt."""
    if density.batch_shape:
        raise EnergyShapeError(f"The EnergyDistribution has batch shape {density.batch_shape}; expected one event.")
    return evidence.log_z(jax.random.fold_in(key, CONSTANT), target(as_model, density), BDMC())


# Latents


def _of_latents(
    key: PRNGKey,
    model: LatentModel,
    data: Array,
    settings: Annealed,
    latents: ArrayLike | None,
    num_simulated: int,
    log_z: LogZ | None,
) -> xr.DataTree:
    import xarray as xr

    constant = LogZ(0.0, 0.0, "known")
    prior: Any = model.prior
    if model.energy is not None and model.log_partition is None:
        constant = _bracketed(key, prior) if log_z is None else log_z
    key_chains, key_simulated = jax.random.fold_in(key, CHAINS), jax.random.fold_in(key, SIMULATED)
    path = find_path(key_chains, model, data, settings)
    starts = None
    if latents is not None:
        starts = jnp.asarray(latents, path.beta.dtype)
        _check_shapes(starts, (model.latent_dim,), "latents")
        if len(starts) != len(data):
            raise EnergyShapeError(f"There are {len(starts)} latents for {len(data)} events.")
    found = _shifted(bracket(key_chains, model, data, path, settings, starts), constant)
    kind = "heuristic" if latents is None or constant.std_error else "true"
    doubts = [] if latents is None else _of_starts(found)
    simulated = {}
    if num_simulated and model.energy is None:
        z, x = _simulated(key_simulated, model, num_simulated)
        own = bracket(key_simulated, model, x, path, settings, z)
        simulated = {"lower": own.lower, "upper": own.upper, "gap": own.upper - own.lower}
        doubts += [f"On events drawn from the model: {doubt}" for doubt in (*_of_starts(own), *_of_gap(own))]
    elif kind == "true":
        doubts += _of_gap(found)
    for doubt in doubts:  # those of log Z were warned of when it was found
        warnings.warn(doubt, EnergyWarning, stacklevel=3)
    columns = {"lower": found.lower, "upper": found.upper, "effective_chains": found.effective}
    tree = _tree(columns, found.lower, kind, [*constant.doubts, *doubts])
    if simulated:
        tree["simulated"] = xr.DataTree(xr.Dataset({name: ("event", each) for name, each in simulated.items()}))
    return tree


def _shifted(found: Bounds, constant: LogZ) -> Bounds:
    """With log Z of the prior taken off."""
    lower, upper = _bounds_of(constant)
    return found._replace(lower=found.lower - upper, upper=found.upper - lower)


@eqx.filter_jit
def _simulated(key: PRNGKey, model: LatentModel, num: int) -> tuple[Array, Array]:
    """Exact draws of z and x together."""
    key_z, key_x = jax.random.split(key)
    z: Any = model.base.sample(key_z, (num,))
    return z, model.given(z).sample(key_x)


# What speaks against them


def _of_starts(found: Bounds) -> list[str]:
    """Starts of reverse chains that are no draws of the posterior: too often high or low in energy."""
    if len(found.rank) == 1:
        return []
    doubts, rank, gap = [], float(np.mean(found.rank)), float(np.mean(found.upper - found.lower))
    if abs(_score(found.rank - 0.5, 0.05)) > CHANCE:
        doubts.append(
            f"The latents are no draws of the posterior of their events: on average their joint energy is "
            f"{'above' if rank > 0.5 else 'below'} that of {100 * max(rank, 1 - rank):.0f} % of it. "
            "The upper bound holds for latents that were drawn together with the events, and for no others."
        )
    if _score(found.upper - found.lower, 1e-6) < -CHANCE:
        doubts.append(
            f"The upper bounds lie {-gap:.3g} nats below the lower ones on average: the latents are no draws of the "
            "posterior of their events."
        )
    return doubts


def _score(values: np.ndarray, least: float) -> float:
    """The mean over events in its standard errors, with events that spread by so much at least."""
    return float(np.mean(values) / max(np.std(values, ddof=1), least) * math.sqrt(len(values)))


def _of_gap(found: Bounds) -> list[str]:
    gap = float(np.mean(found.upper - found.lower))
    if gap <= LARGE_GAP:
        return []
    return [
        f"The bounds are {gap:.2g} nats apart on average: the chains lag behind the path. More num_stages of Annealed, "
        "or an encoder that is nearer to the posterior, help."
    ]


def _tree(columns: dict[str, np.ndarray], values: np.ndarray, kind: str, doubts: list[str]) -> xr.DataTree:
    import xarray as xr

    num = len(values)
    summary = {}
    for name in ("lower", "upper"):
        spread = float(np.std(columns[name], ddof=1)) if num > 1 else math.nan
        summary |= {f"mean_{name}": float(np.mean(columns[name])), f"std_error_{name}": spread / math.sqrt(num)}
    groups = {
        "log_likelihood": xr.Dataset({"x": (("chain", "draw", "event"), values[None, None])}),
        "bounds": xr.Dataset({name: ("event", each) for name, each in columns.items()} | summary),
    }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {
        "inference_library": "ebm_ppl",
        "bounds": kind,
        "doubts": as_lines(doubts),
    }
    return tree
