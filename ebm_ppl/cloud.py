"""The particles of one run of SMC, from draws of the reference on, and what a phase tempers.

    phase     stays in the density                    is tempered
    prior     log pi_0                                U_prior
    data      log pi_0 - U_prior                      U_data
    joint     log pi_0                                U_prior + U_data

A cloud goes through the stages of `smc.py`; all here is of one run but what moves the particles of several in turn.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl import sharding
from ebm_ppl.centring import Centring
from ebm_ppl.crosswise import MOST_LEARNED, learn_crosswise
from ebm_ppl.sharding import Layout
from ebm_ppl.target import Phase, Tilted
from ebm_ppl.typing import Array, PRNGKey
from ebm_ppl.weighing import Ensemble, no_ensemble


class Cloud(NamedTuple):
    """The particles of one run, equally weighted, and what has been learned so far."""

    z: Array
    """(N, dim)"""
    base: Array
    """Log density that is not tempered in this phase, (N,)."""
    energy: Array
    """Energy that is tempered in this phase, (N,)."""
    eve: Array
    """Index of the initial particle from which each descends, (N,)."""
    beta: Array
    step_size: Array
    log_z: Array
    influence: Array
    """Of the family of each initial particle on log Z of this phase, (N,)."""
    ensemble: Ensemble
    """Particles of this and the last stages before resampling, and their normalised log weights, (N, R)."""
    log_weight: Array
    variance: Array
    """Relative variance of this phase's part of Z, once it is done."""
    drift: Array
    """How far the moves of all stages have carried each coordinate's mean, in standard deviations, (dim,)."""
    drift_noise: Array
    """Variance of it for particles that follow their targets."""
    centring: Centring | None = None
    """Coordinates in which each half moves, with leading axis (2,)."""


def initial(key: PRNGKey, target: Tilted, num: int, persistence: int, layout: Layout) -> Cloud:
    """Draws of the reference."""
    z = layout.over(target.sample_reference)(jax.random.split(jax.random.fold_in(key, 0), num))
    zero, zeros = jnp.zeros((), z.dtype), jnp.zeros(num, z.dtype)
    step_size, drift = zero + target.dim**-0.25, jnp.zeros(target.dim, z.dtype)
    ensemble = no_ensemble(z, persistence)
    log_weight = jnp.full_like(ensemble.energy, -jnp.inf).at[:, 0].set(-jnp.log(num))
    eve = jnp.arange(num)
    cloud = Cloud(z, zeros, zeros, eve, zero, step_size, zero, zeros, ensemble, log_weight, zero, drift, zero)
    return lying(cloud, layout)


def lying(cloud: Cloud, layout: Layout) -> Cloud:
    """Vectors for each particle over the devices, and whatever is a number everywhere."""
    z, before = layout.spread((cloud.z, cloud.ensemble.z))
    numbers = layout.everywhere(cloud._replace(z=None, ensemble=cloud.ensemble._replace(z=None)))
    return numbers._replace(z=z, ensemble=numbers.ensemble._replace(z=before))


def enter(cloud: Cloud, target: Tilted, phase: Phase, layout: Layout) -> Cloud:
    """The same particles at the start of another phase."""
    base, energy = layout.over(lambda z: terms_of(target, phase, z))(cloud.z)
    zero, zeros = jnp.zeros_like(cloud.log_z), jnp.zeros_like(cloud.influence)
    ensemble = no_ensemble(cloud.z, len(cloud.ensemble.beta))
    start = {"beta": zero, "log_z": zero, "influence": zeros, "ensemble": ensemble, "variance": zero}
    return lying(cloud._replace(base=base, energy=energy, **start), layout)


def terms_of(target: Tilted, phase: Phase, z: Array) -> tuple[Array, Array]:
    """Log density that stays, and energy that is tempered."""
    log_reference, (prior, data) = target.staged_terms(z)
    if phase == "joint":
        return log_reference, prior + data
    return (log_reference, prior) if phase == "prior" else (log_reference - prior, data)


def in_new_coordinates(clouds: list[Cloud], target: Tilted, layout: Layout) -> list[Cloud]:
    """The clouds of several runs, in parts, which know coordinates for their next moves."""
    num = clouds[0].z.shape[1] // 2
    few = min(num, MOST_LEARNED)
    both = [np.asarray(sharding.gathered([cloud.z[:, start : start + few] for start in (0, num)])) for cloud in clouds]
    found = learn_crosswise([np.swapaxes(halves, 0, 1) for halves in both], target)
    return [
        cloud._replace(centring=sharding.everywhere(centring, layout.mesh))
        for cloud, centring in zip(clouds, found, strict=True)
    ]
