"""The questions that are asked of a target: draws, the partition function, and predictions.

data  = sample(key, target, NUTS())          draws of p(z), as a DataTree
log_z = log_z(key, target, SMC())            the log evidence, with its standard error
prior_predictive, posterior_predictive       draws of the data, from the tilted prior or the posterior
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import Predictive

from ebm_ppl import mcmc, smc
from ebm_ppl.arviz import Coords, Dims, data_id, from_groups, prepare, to_datatree
from ebm_ppl.kernels import NUTS
from ebm_ppl.mcmc import ChainState
from ebm_ppl.probe import check_tails
from ebm_ppl.smc import SMC, UNSETTLED
from ebm_ppl.target import Target, energies_model, predictive_model
from ebm_ppl.typing import Array, Draws, EnergyError, EnergyWarning, LogZ, PRNGKey, log_mean

if TYPE_CHECKING:
    import xarray as xr

LARGE_ENERGY = 1e6
UNLIKELY = 5.0
"""Standard errors from its known value at which an estimate is called wrong."""


def sample(
    key: PRNGKey,
    target: Target,
    sampler: mcmc.Sampler | SMC | None = None,
    *,
    num_chains: int = 4,
    num_warmup: int | None = None,
    num_samples: int | None = None,
    thin: int = 1,
    init: str | dict[str, Any] = "uniform",
    state: ChainState | None = None,
    return_state: bool = False,
    progress_bar: bool = True,
    coords: Coords | None = None,
    dims: Dims | None = None,
    log_likelihood: bool = True,
) -> Any:
    """Draws from a target, as an ArviZ-schema DataTree.

    Args:
        key: from `jax.random.key`.
        target: from `ebm_ppl.target`.
        sampler: `NUTS()` (default), `HMC()`, `MALA()`, `MCLMC()` or `SMC()`.
        num_chains: chains, on the CPU each in a thread, elsewhere batched; independent runs for `SMC`.
        num_warmup: warm-up steps of each chain (default 500), which learn step size and metric from all chains.
        num_samples: draws of each chain (default 1000); for `SMC` they are the sampler's `num_particles`.
        thin: keep every `thin`-th draw.
        init: `"uniform"` on (-2, 2) in unconstrained space, `"reference"` for draws of the reference, or a
            dictionary of values of the latent sites.
        state: continue a run from its returned state, without a warm-up; the same sampler must be passed.
        return_state: return `(data, state)`.
        progress_bar: show progress, in a terminal or a notebook.
        coords, dims: as in ArviZ; the names of plates are used where they are silent.
        log_likelihood: whether to keep the pointwise log likelihood, which `arviz.loo` needs.

    Returns:
        A DataTree with groups `posterior`, `sample_stats`, `log_likelihood`, `observed_data`, and for `SMC` also
        `particles`, `smc` and `log_z`.

    Raises:
        IntractablePartitionError: where a partition function depends on latent sites and is not known.
        NonFiniteEnergyError: where no finite starting point is found, or an energy is -inf.

    Example:
        >>> data = ebm_ppl.sample(jax.random.key(0), ebm_ppl.target(model, y=y))
    """
    key = _as_key(key)
    sampler = NUTS() if sampler is None else sampler
    target.require_tractable()
    if isinstance(sampler, SMC):
        if num_samples is not None or num_warmup is not None or state is not None or thin != 1:
            raise EnergyError(
                "SMC has particles instead of draws and no warm-up: set SMC(num_particles=...), and leave "
                "num_samples, num_warmup, thin and state alone."
            )
        check_tails(target, needs_normalisation=True)
        draws = _weigh(key, target, sampler, num_chains, progress_bar)
        return to_datatree(target, draws, coords=coords, dims=dims, log_likelihood=log_likelihood)
    if state is None:
        check_tails(target, needs_normalisation=False)
    draws, state = mcmc.run(
        key,
        target,
        sampler,
        num_chains=num_chains,
        num_warmup=500 if num_warmup is None else num_warmup,
        num_samples=1000 if num_samples is None else num_samples,
        thin=thin,
        init=init,
        state=state,
        progress_bar=progress_bar,
        meanwhile=lambda z: prepare(target, z, log_likelihood),
    )
    data = to_datatree(target, draws, coords=coords, dims=dims, log_likelihood=log_likelihood)
    return (data, state) if return_state else data


def log_z(
    key: PRNGKey,
    target: Target,
    method: SMC | None = None,
    *,
    num_runs: int = 1,
    progress_bar: bool = False,
) -> LogZ:
    """The log evidence of a model (log Z of its prior where it has no data), in nats, with a standard error.

    Args:
        key: from `jax.random.key`.
        target: from `ebm_ppl.target`.
        method: the estimator, `SMC()` by default.
        num_runs: independent runs. With one, the error comes from the run's genealogy; with more, from the larger of
            the spread between runs and their genealogies.

    Returns:
        `LogZ`; differences of two are log Bayes factors.

    Raises:
        NoReferenceError: for improper, masked or scaled latent sites, and densities that cannot be normalised.
        IntractablePartitionError: where the evidence lacks an unknown partition function.
    """
    key = _as_key(key)
    method = SMC() if method is None else method
    target.require_tractable()
    target.require_reference()
    target.require_known_constant()
    check_tails(target, needs_normalisation=True)
    draws = _weigh(key, target, method, num_runs, progress_bar)
    return _summarise(draws, data_id(target))


def _weigh(key: PRNGKey, target: Target, sampler: SMC, num_runs: int, progress_bar: bool) -> Draws:
    """SMC, with what its numbers say about themselves."""
    draws = smc.run(key, target, sampler, num_runs=num_runs, progress_bar=progress_bar)
    _check_particles(draws)
    _check_prior(draws, target)
    return draws


def read_log_z(data: xr.DataTree) -> LogZ:
    """The `LogZ` of a result of `sample(key, target, SMC())`, from its group `log_z`."""
    if "log_z" not in data.children:
        raise EnergyError("This result has no group 'log_z': only SMC estimates it while it samples.")
    estimates = {str(name): np.asarray(value) for name, value in data["log_z"].data_vars.items()}
    draws = Draws(jnp.empty(0), {}, {str(name): value for name, value in data.attrs.items()}, log_z=estimates)
    return _summarise(draws, data.attrs.get("data_id"))


_DIAGNOSTICS = "num_evaluations", "num_nan_energy", "largest_drift"


def _summarise(draws: Draws, fingerprint: str | None) -> LogZ:
    """One `LogZ` from independent runs: values are averaged on the scale of Z."""
    runs = draws.log_z or {}
    phases = [phase for phase in ("prior", "data") if f"{phase}_value" in runs]
    parts = {phase: log_mean(runs[f"{phase}_value"]) for phase in phases}
    if not phases:
        return LogZ(0.0, 0.0, method="SMC", data_id=fingerprint)
    last = phases[-1]
    values, errors = runs[f"{last}_value"], runs[f"{last}_std_error"]
    diagnostics = {name: draws.attrs[name] for name in _DIAGNOSTICS if name in draws.attrs}
    return LogZ(
        value=parts[last],
        std_error=_std_error(values, errors),
        method="SMC",
        parts=parts,
        replicates=values,
        data_id=fingerprint,
        diagnostics=diagnostics | {"run_std_errors": errors.tolist()},
    )


def _std_error(values: np.ndarray, errors: np.ndarray) -> float:
    """Of the mean of independent runs: from their genealogies or from their spread, whichever is larger."""
    num = len(values)
    spread = float(np.std(values, ddof=1)) if num > 1 else 0.0
    return max(math.sqrt(float(np.mean(errors**2))), spread) / math.sqrt(num)


def _check_particles(draws: Draws) -> None:
    """Counts NaN energies aloud, and says where the particles lag behind or single precision is too coarse."""
    if draws.attrs.get("num_nan_energy"):
        warnings.warn(
            f"The energy was NaN {draws.attrs['num_nan_energy']} times; such points were given zero mass, and are "
            "counted in smc['num_nan'].",
            EnergyWarning,
            stacklevel=4,
        )
    drift = float(draws.attrs.get("largest_drift", 0.0))
    if drift > UNSETTLED:
        warnings.warn(
            f"The moves of SMC carried a coordinate's mean by {drift:.1f} standard errors along the path, where 0 is "
            "expected: the particles lag behind their targets, and log Z and the posterior may be off by far more than "
            "the stated error. More moves (num_moves), a larger target_ess or a reparametrised model help; more "
            "particles alone do not. smc['drift'] has the path.",
            EnergyWarning,
            stacklevel=4,
        )
    largest = float(draws.attrs.get("largest_mean_energy", 0.0))
    if largest > LARGE_ENERGY and draws.z.dtype == jnp.float32:
        warnings.warn(
            f"Energies reach {largest:.1e} nats in single precision, which resolves them to {largest * 6e-8:.1e} nats "
            "(this is part of the standard error): set jax.config.update('jax_enable_x64', True), or subtract a "
            "constant from the energy.",
            EnergyWarning,
            stacklevel=4,
        )


def _check_prior(draws: Draws, target: Target) -> None:
    """Where every prior energy came with its log partition function, log Z of the prior must be zero."""
    names = {name for name, role in target.spec.roles if role == "prior"}
    runs = draws.log_z or {}
    if not names or not names <= target.spec.normalized or "data_value" in runs:
        return
    value, error = log_mean(runs["prior_value"]), _std_error(runs["prior_value"], runs["prior_std_error"])
    if abs(value) > UNLIKELY * error:
        warnings.warn(
            f"log Z of the prior came out as {value:.2f} ± {error:.2f}, but it should be 0, since the log_partition of "
            f"{', '.join(map(repr, sorted(names)))} was given. Either that is wrong, or the particles did not mix: use "
            "more num_moves or num_particles, another parametrisation, or sampler=NUTS().",
            EnergyWarning,
            stacklevel=4,
        )


def prior_predictive(
    key: PRNGKey,
    target: Target,
    *,
    num_samples: int = 1000,
    sampler: mcmc.Sampler | SMC | None = None,
    coords: Coords | None = None,
    dims: Dims | None = None,
) -> xr.DataTree:
    """Draws of the prior, tilted by its energies, and of the data under it: groups `prior`, `prior_predictive`.

    Without prior energies the draws are exact; with them they come from a sampler on the prior alone.

    Args:
        num_samples: draws, or particles of the default SMC.
        sampler: what draws from a tilted prior: SMC by default, or a Markov chain.
    """
    key_draw, key_predict = jax.random.split(_as_key(key))
    prior = target.prior()
    prior.require_tractable()
    prior.require_reference()
    if prior.spec.roles:
        draws = _prior_draws(key_draw, prior, num_samples, sampler)
    else:
        z = _reference_draws(prior, jax.random.split(key_draw, num_samples))
        draws = Draws(z[None], {}, {"inference_library": "ebm_ppl", "sampler": "exact"})
    tree = to_datatree(prior, draws, group="prior", coords=coords, dims=dims)
    predicted = _predict(key_predict, target, tree["prior"], given=prior)
    tree.update(from_groups(target, {"prior_predictive": predicted}, coords=coords, dims=dims))
    return tree


def _prior_draws(key: PRNGKey, prior: Target, num_samples: int, sampler: mcmc.Sampler | SMC | None) -> Draws:
    if sampler is None or isinstance(sampler, SMC):
        sampler = SMC(num_particles=num_samples + num_samples % 2) if sampler is None else sampler
        return _weigh(key, prior, sampler, num_runs=1, progress_bar=False)
    draws, _ = mcmc.run(key, prior, sampler, num_chains=1, num_warmup=500, num_samples=num_samples, progress_bar=False)
    return draws


@eqx.filter_jit
def _reference_draws(target: Target, keys: Array) -> Array:
    return jax.vmap(target.sample_reference)(keys)


def posterior_predictive(
    key: PRNGKey,
    target: Target,
    data: xr.DataTree,
    *,
    coords: Coords | None = None,
    dims: Dims | None = None,
) -> xr.DataTree:
    """Draws of the data given each draw of the posterior: group `posterior_predictive`.

    Add it to a result by `data.update(posterior_predictive(key, target, data))`.
    """
    predicted = _predict(_as_key(key), target, data["posterior"], given=target)
    return from_groups(target, {"posterior_predictive": predicted}, coords=coords, dims=dims)


def _predict(key: PRNGKey, target: Target, draws: Any, *, given: Target) -> dict[str, np.ndarray]:
    """Data of `target` for each draw; discrete sites are drawn by their conditional distribution under `given`."""
    latents = {name: jnp.asarray(draws[name].values) for name in target.latent_names}
    sites = target.spec.observed
    if not sites:
        return {}
    key_discrete, key_observed = jax.random.split(key)
    if target.spec.discrete:
        known = Predictive(
            energies_model(given), latents, return_sites=target.spec.discrete, infer_discrete=True, batch_ndims=2
        )
        try:
            latents |= known(key_discrete, *target.args, **target.kwargs)
        except AssertionError as error:  # funsor's, without a word, for discrete sites inside `scan`
            raise EnergyError(
                f"The discrete sites {target.spec.discrete} cannot be drawn given the others: NumPyro's infer_discrete "
                "does not take this model (a scan over discrete sites, say). Posterior, log Z and energies do not need "
                "them."
            ) from error
    predictive = Predictive(predictive_model(target), latents, return_sites=sites, batch_ndims=2)
    try:
        return jax.device_get(predictive(key_observed, *target.args, **target.kwargs))
    except NotImplementedError as error:
        raise EnergyError(
            f"One of the observed sites {sites} cannot be sampled: an EnergyDistribution has no sampler of its own."
        ) from error


def _as_key(key: Any) -> PRNGKey:
    """A typed key; keys of the older kind (two integers) are taken too."""
    if jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        return key
    if jnp.shape(key) == (2,):
        return jax.random.wrap_key_data(jnp.asarray(key, jnp.uint32))
    raise EnergyError(f"The first argument is a key, jax.random.key(seed); got {key!r}.")
