"""Draws of a noise-conditional energy: weighted walkers go down the levels of noise, and carry log Z.

    X ~ start, A = -V_T(X) - log start(X)                        normalised, about as wide as the widest level
    at level k   resampled where weights have spread
                 a few moves that leave exp(-V_k) invariant
                 A <- A + V_k(X) - V_k-1(X)                    the next level, under the walkers
    E_p[f] = E[e^A f(X)] / E[e^A]      log Z = log E[e^A]      of p(x) = exp(-V_0(x)) / Z, the smallest level

This is annealed importance sampling whose path is the noise that the energy was trained with, where tempering would go
through densities that it never saw. The walkers themselves follow the scores of all levels: they have crossed between
modes where these were one. The weights follow the energies: where the smallest level has the modes' weights wrong, as
score matching does, the weights are right about the energy, and so wrong about the data (`resample=0` has the walkers
as they came). Z is unbiased but for the step size, which follows the walkers' own acceptance: of order 1/num.

References:
    Song and Ermon (2019), Generative modeling by estimating gradients of the data distribution; Neal (2001), Annealed
    importance sampling; Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo samplers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from blackjax.smc.ess import log_ess
from blackjax.smc.resampling import systematic
from jax.scipy.special import logsumexp

from ebm_ppl.kernels import MALA, Langevin
from ebm_ppl.noise import check_levels
from ebm_ppl.train.objective import Density, density_from_start
from ebm_ppl.train.walkers import Dynamics, next_step_size, walk
from ebm_ppl.typing import Array, EnergyError, PRNGKey, as_key

MOVES = Dynamics(MALA(), 10, 1.0)
"""At each level."""


class Annealed(NamedTuple):
    """Weighted draws of the smallest level."""

    points: Array
    """(num, *event_shape)"""
    log_weight: Array
    """A since they were last resampled, (num,)."""
    log_z: Array
    """Of `base(x) exp(-U(x))`, or of `exp(-U(x))` without a base."""
    accept_rate: Array
    """At each level, the widest first."""
    ess: Array
    """Effective share of the walkers on arrival at each level, the widest first."""


def anneal(
    key: PRNGKey,
    energy: Callable[[Array], Array],
    levels: Sequence[float],
    start: dist.Distribution,
    *,
    num: int = 1024,
    base: dist.Distribution | None = None,
    resample: float = 0.5,
    dynamics: Dynamics = MOVES,
) -> Annealed:
    """Draws of an energy that was trained at many levels of noise, from the widest down.

    Args:
        energy: noise-conditional, as `fit` returns it.
        levels: those that it was trained at, smallest first.
        start: a normalised distribution of events near the widest level: `energy.reference(levels[-1])`.
        num: of walkers.
        base: as in `fit`.
        resample: effective share of the walkers below which they are resampled; 0 never resamples, and leaves all
            modes that the walkers have come to.
        dynamics: the moves at each level, by an adjusted kernel. The step size is in units of sigma, and follows the
            acceptance of all walkers from move to move.

    Raises:
        EnergyError: for an unadjusted kernel, whose bias these weights do not know, levels that do not grow, or no
            walkers.
        EnergyShapeError: where start and base are not of the same single events.

    Example:
        >>> levels = ebm_ppl.noise_levels(0.05, 3.0, 16)
        >>> fitted = ebm_ppl.fit(key, energy, data, ebm_ppl.DenoisingScoreMatching(levels))
        >>> draws = ebm_ppl.anneal(key, fitted.energy, levels, energy.reference(levels[-1]))
    """
    check_levels(levels)
    if isinstance(dynamics.kernel, Langevin):
        raise EnergyError("The weights of annealing need moves that leave each level invariant: MALA() or HMC().")
    density = density_from_start(energy, base, start, num)
    return _anneal(as_key(key), density, jnp.asarray(levels)[::-1], start, num, resample, dynamics)


@eqx.filter_jit
def _anneal(
    key: PRNGKey,
    density: Density,
    levels: Array,
    start: Any,
    num: int,
    resample: float,
    dynamics: Dynamics,
) -> Annealed:
    key_start, key_levels = jax.random.split(key)
    events = start.sample(key_start, (num,))
    points = events.reshape(num, -1)
    log_weight = jax.vmap(density.at(levels[0]).log_density)(points) - start.log_prob(events)
    one_move = dataclasses.replace(dynamics, num_moves=1)

    def at_level(carry: Any, given: Any) -> tuple[Any, Any]:
        points, log_weight, log_z, step_size = carry
        key, sigma, following = given
        here = density.at(sigma)
        key_resample, key_moves = jax.random.split(key)
        share = jnp.exp(log_ess(log_weight)) / num
        ancestors = systematic(key_resample, jax.nn.softmax(log_weight), num)
        points = jnp.where(share < resample, points[ancestors], points)
        log_z = log_z + jnp.where(share < resample, logsumexp(log_weight) - jnp.log(num), 0.0)
        log_weight = jnp.where(share < resample, 0.0, log_weight)

        def move(carry: tuple[Array, Array], key: PRNGKey) -> tuple[tuple[Array, Array], Array]:
            points, step_size = carry
            points, accepted = walk(key, points, here, one_move, step_size, sigma)
            return (points, next_step_size(step_size, accepted, dynamics)), accepted

        keys = jax.random.split(key_moves, dynamics.num_moves)
        (points, step_size), accepted = jax.lax.scan(move, (points, step_size), keys)
        change = jax.vmap(lambda x: density.at(following).log_density(x) - here.log_density(x))(points)
        return (points, log_weight + change, log_z, step_size), (jnp.mean(accepted), share)

    zero, step_size = jnp.zeros((), points.dtype), jnp.asarray(dynamics.step_size, points.dtype)
    given = jax.random.split(key_levels, len(levels)), levels, jnp.append(levels[1:], levels[-1])
    (points, log_weight, log_z, _), (accepted, share) = jax.lax.scan(
        at_level, (points, log_weight, zero, step_size), given
    )
    log_z = log_z + logsumexp(log_weight) - jnp.log(num)
    return Annealed(points.reshape(num, *density.event_shape), log_weight, log_z, accepted, share)
