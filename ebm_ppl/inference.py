"""The questions that are asked of a target beside its log evidence: draws and predictions.

data  = sample(key, target, NUTS())          draws of p(z), as a DataTree
prior_predictive, posterior_predictive       draws of the data, from the tilted prior or the posterior
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import Predictive

from ebm_ppl import mcmc
from ebm_ppl.arviz import Coords, Dims, from_groups, prepare, to_datatree
from ebm_ppl.evidence import weigh
from ebm_ppl.kernels import NUTS
from ebm_ppl.logz import tempering
from ebm_ppl.logz.tempering import ParallelTempering
from ebm_ppl.mcmc import ChainState
from ebm_ppl.probe import check_tails
from ebm_ppl.sharding import Mesh
from ebm_ppl.smc import SMC
from ebm_ppl.spec import variable
from ebm_ppl.target import Target, energies_model, predictive_model
from ebm_ppl.typing import Array, Draws, EnergyError, PRNGKey, as_key

if TYPE_CHECKING:
    import xarray as xr


def sample(
    key: PRNGKey,
    target: Target,
    sampler: mcmc.Sampler | SMC | ParallelTempering | None = None,
    *,
    num_chains: int | None = None,
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
    mesh: Mesh | None = None,
) -> Any:
    """Draws from a target, as an ArviZ-schema DataTree.

    Args:
        key: from `jax.random.key`.
        target: from `ebm_ppl.target`.
        sampler: `NUTS()` (default), `HMC()`, `MALA()`, `MCLMC()`, `SMC()` or `ParallelTempering()`.
        num_chains: chains (default 4), on the CPU each in a thread, elsewhere batched; independent runs for `SMC`,
            the sampler's `num_replicas` for `ParallelTempering`.
        num_warmup: warm-up steps of each chain (default 500), which learn step size and metric from all chains.
        num_samples: draws of each chain (default 1000); for `SMC` they are the sampler's `num_particles`, for
            `ParallelTempering` its `num_draws`.
        thin: keep every `thin`-th draw.
        init: `"uniform"` on (-2, 2) in unconstrained space, `"reference"` for draws of the reference, or a
            dictionary of values of the latent sites.
        state: continue a run from its returned state, without a warm-up, of the same target by the same sampler.
        return_state: return `(data, state)`.
        progress_bar: show progress, in a terminal or a notebook.
        coords, dims: as in ArviZ; the names of plates are used where they are silent.
        log_likelihood: whether to keep the pointwise log likelihood, which `arviz.loo` needs. That of an
            `EnergyDistribution` without its `log_partition` is not one, and never kept.
        mesh: of `jax.make_mesh`: its devices share the chains, or the particles of `SMC`; see `sharding.py`.

    Returns:
        A DataTree with groups `posterior`, `sample_stats`, `log_likelihood`, `observed_data`, for `SMC` also
        `particles`, `smc` and `log_z`, and for `ParallelTempering` also `tempering` and `log_z`.

    Raises:
        IntractablePartitionError: where a partition function depends on latent sites and is not known.
        NonFiniteEnergyError: where no finite starting point is found, or an energy is -inf.
        EnergyError: where a state is of another target, sampler or number of chains, and where the model has no
            continuous latent site.

    Example:
        >>> data = ebm_ppl.sample(jax.random.key(0), ebm_ppl.target(model, y=y))
    """
    key = as_key(key)
    sampler = NUTS() if sampler is None else sampler
    _require_coordinates(target)
    target.require_tractable()
    if isinstance(sampler, SMC):
        if num_samples is not None or num_warmup is not None or state is not None or thin != 1:
            raise EnergyError(
                "SMC has particles instead of draws and no warm-up: set SMC(num_particles=...), and leave "
                "num_samples, num_warmup, thin and state alone."
            )
        check_tails(target, needs_normalisation=True)
        num_runs = mcmc.NUM_CHAINS if num_chains is None else num_chains
        draws = weigh(key, target, sampler, num_runs, progress_bar, mesh=mesh)
        return to_datatree(target, draws, coords=coords, dims=dims, log_likelihood=log_likelihood)
    if isinstance(sampler, ParallelTempering):
        if mesh is not None:
            raise EnergyError("ParallelTempering does not share its replicas among the devices of a mesh.")
        if num_warmup is not None or state is not None or thin != 1:
            raise EnergyError(
                "ParallelTempering tunes itself in rounds that double up to num_samples, and starts from the "
                "reference: set ParallelTempering(num_rounds=...), and leave num_warmup, thin and state alone."
            )
        check_tails(target, needs_normalisation=True)
        given = {"num_replicas": num_chains, "num_draws": num_samples}
        sampler = dataclasses.replace(sampler, **{name: num for name, num in given.items() if num is not None})
        draws = tempering.draw(key, target, sampler, progress_bar=progress_bar)
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
        mesh=mesh,
        meanwhile=lambda z: prepare(target, z, log_likelihood),
    )
    data = to_datatree(target, draws, coords=coords, dims=dims, log_likelihood=log_likelihood)
    return (data, state) if return_state else data


def _require_coordinates(target: Target) -> None:
    if not target.dim:
        raise EnergyError(
            "The model has no continuous latent site to sample. Its evidence is known (`log_z`), and "
            "numpyro.infer.Predictive(model, num_samples=...) draws its data."
        )


def prior_predictive(
    key: PRNGKey,
    target: Target,
    *,
    num_samples: int = 1000,
    sampler: mcmc.Sampler | SMC | ParallelTempering | None = None,
    coords: Coords | None = None,
    dims: Dims | None = None,
) -> xr.DataTree:
    """Draws of the prior, tilted by its energies, and of the data under it: groups `prior`, `prior_predictive`.

    Without prior energies the draws are exact; with them they come from a sampler on the prior alone, whose statistics
    are in `sample_stats_prior`. Add all to a result by `data.update(prior_predictive(key, target))`.

    Args:
        num_samples: draws, or particles of the default SMC.
        sampler: what draws from a tilted prior: SMC by default, or a Markov chain, or `ParallelTempering`, whose own
            `num_draws` hold.
    """
    key_draw, key_predict = jax.random.split(as_key(key))
    _require_coordinates(target)
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


def _prior_draws(
    key: PRNGKey, prior: Target, num_samples: int, sampler: mcmc.Sampler | SMC | ParallelTempering | None
) -> Draws:
    if isinstance(sampler, ParallelTempering):
        return tempering.draw(key, prior, sampler)
    if sampler is None or isinstance(sampler, SMC):
        sampler = SMC(num_particles=num_samples + num_samples % 2) if sampler is None else sampler
        return weigh(key, prior, sampler, num_runs=1, progress_bar=False)
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
    predicted = _predict(as_key(key), target, data["posterior"], given=target)
    return from_groups(target, {"posterior_predictive": predicted}, coords=coords, dims=dims)


def _predict(key: PRNGKey, target: Target, draws: Any, *, given: Target) -> dict[str, np.ndarray]:
    """Data of `target` for each draw; discrete sites are drawn by their conditional distribution under `given`."""
    latents = {name: jnp.asarray(draws[variable(name)].values) for name in target.latent_names}
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
