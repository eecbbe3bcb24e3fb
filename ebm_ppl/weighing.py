"""How far the next temperature of SMC is, what the particles weigh there, and what that says of log Z and its error.

    step              the largest that keeps a share `target_ess` of the effective particles
    weights           w_t^i = exp( -(beta_t - beta_{t-1}) U(z^i) )
    log Z increment   log (1/N) sum_i w_t^i

The standard error comes from the genealogy, as Lee and Whiteley's (2018). What descends from the k-th initial particle
is a family. At each stage its weight differs from its number, and these differences add up to its influence on log Z,

    psi_k = sum_t sum_{i in family k} ( w_t^i / sum_j w_t^j - 1/N )
    variance of log Z = sum_k psi_k^2 / ( 1 - sum_k S_k^2 )                 S_k: weight of family k now

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


class Weighed(NamedTuple):
    """The particles of one run at the next temperature."""

    beta: Array
    step: Array
    """From the temperature before."""
    log_weight: Array
    """Normalised, (N,)."""
    increment: Array
    """Of log Z."""
    influence: Array
    """Of the family of each initial particle on log Z, (N,)."""
    variance: Array
    """Relative variance of Z."""


def weigh(energy: Array, eve: Array, beta: Array, influence: Array, target_ess: float) -> Weighed:
    """Weighs particles for the next temperature.

    Args:
        energy: of each particle, (N,); +inf is zero mass.
        eve: initial particle from which each descends, (N,).
        beta: inverse temperature of the particles.
        influence: of each family so far, (N,).
        target_ess: share of effective particles that the step keeps.
    """
    num = len(energy)
    alive = jnp.isfinite(energy)
    safe = jnp.where(alive, energy, 0.0)

    def log_weight(step: Array) -> Array:
        return jnp.where(alive, -step * safe, -jnp.inf)

    step = _largest_step(log_weight, 1.0 - beta, target_ess)
    after = jnp.where(beta + step >= 1.0 - SMALLEST_STEP, 1.0, beta + step)
    log_w = log_weight(after - beta)
    increment = logsumexp(log_w) - jnp.log(num)
    log_w = log_w - logsumexp(log_w)
    weights = jnp.exp(log_w)

    influence = influence.at[eve].add(weights - 1 / num)
    share = jnp.zeros_like(influence).at[eve].add(weights)
    variance = jnp.sum(influence**2) / jnp.maximum(1 - jnp.sum(share**2), jnp.finfo(weights.dtype).tiny)
    return Weighed(after, after - beta, log_w, increment, influence, variance)


def _largest_step(log_weight: Callable[[Array], Array], room: Array, target_ess: float) -> Array:
    """The largest step that keeps the wanted share of the particles that are effective without one."""
    wanted = jnp.log(target_ess) + log_ess(log_weight(jnp.zeros_like(room)))
    return dichotomy(lambda step: log_ess(log_weight(step)) - wanted, jnp.zeros_like(room), room, eps=1e-6)
