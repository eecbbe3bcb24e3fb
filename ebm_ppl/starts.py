"""Where chains start: at points of finite density and gradient, after a bounded number of tries.

finite_chains     all chains of a run, each by its own key
given_point       the point of values that the user gives
explain           which site is not finite at a point, and where that is
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from ebm_ppl import parallel
from ebm_ppl.kernels import hmc_state
from ebm_ppl.sharding import Mesh
from ebm_ppl.target import Target
from ebm_ppl.typing import Array, EnergyError, NonFiniteEnergyError, PRNGKey

START_TRIES = 100
START_RADIUS = 2.0
OF_CHAINS, SHARED = 0, 1
"""What is folded into a run's key for the keys of its chains, and for what they share."""


class Chain(NamedTuple):
    """One chain on its way; several along a leading axis."""

    kernel: Any
    """State of the kernel: position, log density and gradient."""
    key: Array
    """Step number i uses `fold_in(key, i)`."""
    adaptation: Any
    """Its dual averaging; the whole tuning for the unadjusted kernel, whose chains share nothing."""


def finite_chains(
    members: list[Any], mesh: Mesh | None, key: PRNGKey, target: Target, start: Any, adaptation: Any
) -> list[Chain]:
    """All chains in parts, where log density and gradient are finite, after a bounded number of tries."""
    for _ in range(START_TRIES):
        results = parallel.over(chain_at, members, key, target, start, adaptation, hurry=True, mesh=mesh)
        finite = [np.asarray(ok) for _, ok in results]
        if all(map(np.all, finite)):
            return [chains for chains, _ in results]
        members = [(index, tries + ~ok) for (index, tries), ok in zip(members, finite, strict=True)]
    positions = np.concatenate([chains.kernel.position for chains, _ in results])
    raise NonFiniteEnergyError(
        f"No starting point with finite log density and gradient in {START_TRIES} tries. "
        + explain(target, jnp.asarray(positions[int(np.argmin(np.concatenate(finite)))]))
        + " Check these sites there, or pass init= with values at which they are finite."
    )


def chain_at(
    member: tuple[Array, Array], key: PRNGKey, target: Target, start: Any, adaptation: Any
) -> tuple[Chain, Array]:
    """A chain at a starting point, another for each try, and whether log density and gradient are finite there.

    The points are uniform on (-2, 2) in unconstrained space, draws of the reference, or the one given.
    """
    index, tries = member
    key_start, key_chain = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, OF_CHAINS), index))
    key_start = jax.random.fold_in(key_start, tries)
    if isinstance(start, str) and start == "uniform":
        z = jax.random.uniform(key_start, (target.dim,), minval=-START_RADIUS, maxval=START_RADIUS)
    else:
        z = target.sample_reference(key_start) if isinstance(start, str) else start
    state = hmc_state(z, target.log_density)
    finite = jnp.isfinite(state.logdensity) & jnp.all(jnp.isfinite(state.logdensity_grad))
    return Chain(state, key_chain, adaptation), finite


def given_point(target: Target, values: dict[str, Any]) -> Array:
    missing = [name for name in target.latent_names if name not in values]
    if missing:
        raise EnergyError(f"init gives no value for the latent sites {', '.join(map(repr, missing))}.")
    return target.unconstrain(values)


@numpyro.validation_enabled(False)
def explain(target: Target, z: Array) -> str:
    """Which site is not finite at a point, as a sentence.

    Without NumPyro's validation, which would raise an error of its own where a point is out of bounds.
    """
    constrained = {name: np.asarray(value).tolist() for name, value in target.constrain(z).items()}
    if target.spec.discrete:
        log_reference, energies = target.terms(z)
        references = {"the reference": log_reference}
    else:
        references, energies = target.site_terms(z)
    bad = [f"'{name}' (log density {value})" for name, value in references.items() if not jnp.isfinite(value)]
    bad += [f"'{name}' (energy {value})" for name, value in energies.items() if not jnp.isfinite(value)]
    what = ", ".join(bad) if bad else "the gradient of the log density (all values are finite)"
    return f"Not finite: {what}. Example point: {constrained}."
