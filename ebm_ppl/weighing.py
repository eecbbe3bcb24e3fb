"""How far the next temperature of SMC is, what the particles weigh there, and what that says of log Z and its error.

    step              the largest that keeps a share `target_ess` of the effective particles
    weights           w_t^i = exp( -(beta_t - beta_{t-1}) U(z^i) )
    log Z increment   log (1/N) sum_i w_t^i

They are those of the newest particles (R = 1), or of all that the last R stages have left. These are draws of the
mixture of their temperatures, and weigh as such (persistent sampling; with R = 1 both lines say the same),

    weights           w_t^is = 1 / sum_s' exp( (beta_t - beta_s') U(z_s^i) ) Z_{t-1} / Z_s'
    log Z increment   log (1/N) sum_is w_t^is

The standard error comes from the genealogy, as Lee and Whiteley's (2018). What descends from the k-th initial particle
is a family. At each stage its weight differs from its number, and these differences add up to its influence on log Z,

    psi_k = sum_t sum_{i in family k} ( w_t^i / sum_j w_t^j - 1/N )
    variance of log Z = sum_k psi_k^2 / ( 1 - sum_k S_k^2 )                 S_k: weight of family k now

of which a chain of waste-free SMC is a part. With R > 1 the weights of each stage's particles are held against their
mean, and what log Z_t learns from the estimated Z_s counts as far as it does so,

    psi_tk = sum_{is in family k} ( W_t^is - mean_j W_t^js ) + sum_s psi_sk sum_is' W_t^is' r_s^is'

with W the normalised weights, r_s^is' the share of temperature s in the mixture at that particle.

Resampling changes the numbers and leaves psi as it is, so that its own noise counts only as far as the particles still
remember it when they are weighed the next time. The divisor makes up for deviations being from the mean of the same
families: with the last but one of them the error grows beyond all bounds, since nothing is known of it. A run that lost
most of a mode states a small error, too: see "Limits" in README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from blackjax.smc.ess import log_ess
from blackjax.smc.solver import dichotomy
from jax.scipy.special import logsumexp

from ebm_ppl.stages import SMALLEST_STEP
from ebm_ppl.typing import Array


class Ensemble(NamedTuple):
    """The particles of one run at its last R temperatures: a ring, where the newest replace the oldest."""

    z: Array
    """(N, R, dim)"""
    energy: Array
    """(N, R); +inf is zero mass, as have those of stages that have not been."""
    eve: Array
    """Index of the initial particle from which each descends, (N, R)."""
    beta: Array
    """(R,)"""
    log_z: Array
    """At these temperatures, less that at the newest, (R,); +inf at stages that have not been."""
    influence: Array
    """Of the family of each initial particle on log Z at these temperatures, (R, N)."""
    count: Array
    """Stages so far."""


class Weighed(NamedTuple):
    """An ensemble at the next temperature."""

    beta: Array
    step: Array
    """From the temperature before."""
    log_weight: Array
    """Normalised, (N, R)."""
    increment: Array
    """Of log Z."""
    influence: Array
    """Of the family of each initial particle on log Z, (N,)."""
    variance: Array
    """Relative variance of Z."""


def no_ensemble(z: Array, num_stages: int) -> Ensemble:
    """Room for the particles of so many stages; what stands there, a copy of these, has no mass."""
    num, _ = z.shape
    places, stages = jnp.zeros((num, num_stages), z.dtype), jnp.zeros(num_stages, z.dtype)
    return Ensemble(
        z=jnp.repeat(z[:, None], num_stages, axis=1),
        energy=places + jnp.inf,
        eve=places.astype(int),
        beta=stages,
        log_z=stages + jnp.inf,
        influence=places.T,
        count=jnp.zeros((), int),
    )


def join(ensemble: Ensemble, z: Array, energy: Array, eve: Array, beta: Array, influence: Array) -> Ensemble:
    """The ensemble with the particles of another stage."""
    at = ensemble.count % len(ensemble.beta)
    return Ensemble(
        z=ensemble.z.at[:, at].set(z),
        energy=ensemble.energy.at[:, at].set(energy),
        eve=ensemble.eve.at[:, at].set(eve),
        beta=ensemble.beta.at[at].set(beta),
        log_z=ensemble.log_z.at[at].set(0.0),
        influence=ensemble.influence.at[at].set(influence),
        count=ensemble.count + 1,
    )


def weigh(ensemble: Ensemble, beta: Array, target_ess: float) -> Weighed:
    """Weighs an ensemble for the temperature that comes after its newest, `beta`.

    Args:
        target_ess: share of effective particles that the step keeps.
    """
    num, _ = ensemble.energy.shape
    alive = jnp.isfinite(ensemble.energy)
    energy = jnp.where(alive, ensemble.energy, 0.0)
    log_parts = (beta - ensemble.beta) * energy[..., None] - ensemble.log_z
    log_mixture = logsumexp(log_parts, axis=-1)

    def log_weight(step: Array) -> Array:
        return jnp.where(alive, -step * energy - log_mixture, -jnp.inf)

    step = _largest_step(log_weight, 1.0 - beta, target_ess)
    after = jnp.where(beta + step >= 1.0 - SMALLEST_STEP, 1.0, beta + step)
    log_w = log_weight(after - beta)
    increment = logsumexp(log_w) - jnp.log(num)
    log_w = log_w - logsumexp(log_w)
    weights = jnp.exp(log_w)

    parts = jnp.exp(log_parts - log_mixture[..., None])
    learned = jnp.einsum("is,ist->t", weights, parts)
    influence = (learned @ ensemble.influence).at[ensemble.eve].add(weights - jnp.mean(weights, axis=0))
    share = jnp.zeros_like(influence).at[ensemble.eve].add(weights)
    variance = jnp.sum(influence**2) / jnp.maximum(1 - jnp.sum(share**2), jnp.finfo(weights.dtype).tiny)
    return Weighed(after, after - beta, log_w, increment, influence, variance)


def _largest_step(log_weight: Callable[[Array], Array], room: Array, target_ess: float) -> Array:
    """The largest step that keeps the wanted share of the particles that are effective without one."""

    def effective(step: Array) -> Array:
        return jnp.asarray(log_ess(jnp.ravel(log_weight(step))))

    wanted = jnp.log(target_ess) + effective(jnp.zeros_like(room))
    return dichotomy(lambda step: effective(step) - wanted, jnp.zeros_like(room), room, eps=1e-6)
