"""Diffusion recovery likelihood: a noisy point says where the one before it lies, up to a step of noise.

    x_k = x + sqrt(sigma_k^2 - sigma_0^2) e                    levels sigma_0 < ... < sigma_T, sigma_k^2 the variance
    y = x_k + d_k e'           d_k^2 = sigma_k+1^2 - sigma_k^2
    p(x_k | y) = exp(-V(x_k, sigma_k) - |y - x_k|^2 / 2 d_k^2) / Z(y)

    grad log p(x_k | y) = -grad V(x_k) + E_p(.|y)[grad V]      by a few moves that start at y

The forward process has exploding variance; Gao et al. write it with preserved variance, where y shrinks, which is the
same up to a scale of each level. Near y the conditional density is close to normal with standard deviation d_k, so that
a short run comes to it where the density itself has modes that no chain crosses between. The product over k is the
likelihood of the whole chain of noise given its end.

What is left open: data stand at the smallest level with no noise added, so that `energy(x)`, at sigma_0, is that of
the data themselves. It has no log Z here (`anneal`, or `ebm_ppl.log_z`), and is the density of the data only as far as
conditionals tell: where modes lie further apart than d_0 no y comes from both, and their weights are known by the wider
levels alone. Draws of the chain, `recover`, have them; the energy at the smallest level need not.

References:
    Gao, Song, Poole, Wu and Kingma (2021), Learning energy-based models by diffusion recovery likelihood; Bengio, Yao,
    Alain and Vincent (2013), Generalized denoising auto-encoders as generative models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from ebm_ppl.kernels import Langevin
from ebm_ppl.noise import check_chain, variance_between
from ebm_ppl.train.objective import Density, Metrics, Objective, density_from_start, require_levels
from ebm_ppl.train.walkers import Dynamics, next_step_size, walk
from ebm_ppl.typing import Array, PRNGKey, as_key

MOVES = Dynamics(Langevin(), 20, 0.1)
"""At each level."""


class Conditional(eqx.Module):
    """`p(x | y)` up to its Z(y), of one point y."""

    density: Density
    """Of x, at its level."""
    y: Array
    """(dim,)"""
    spread: Array
    """d, of y about x."""

    def log_density(self, x: Array) -> Array:
        return self.density.log_density(x) - jnp.sum((self.y - x) ** 2) / (2 * self.spread**2)


class RecoveryLikelihood(Objective):
    """Diffusion recovery likelihood, of a noise-conditional energy.

    Each point of a batch has a level of its own in each step.

    Args:
        levels: sigma_0, ..., sigma_T in units of the data, smallest first, as the energy has them; sigma_0 names the
            data as they are.
        dynamics: the moves from y, with a step size in units of d_k, and of d_k^2 for `Langevin()`. That of an
            adjusted kernel follows the acceptance of all levels: where an energy has grown so steep that walkers are
            rejected they stay at y, and it grows steeper; low rates of learning keep it from that.

    Reference: Gao, Song, Poole, Wu and Kingma (2021).
    """

    levels: tuple[float, ...]
    dynamics: Dynamics = MOVES
    name = "recovery likelihood"
    is_comparable = False
    is_continuous = True

    def __check_init__(self):
        check_chain(self.levels)

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        require_levels(density, self.levels, data)
        return (), jnp.asarray(self.dynamics.step_size, data.dtype)

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        key_level, key_here, key_there, key_walk = jax.random.split(key, 4)
        levels = jnp.asarray(self.levels, batch.dtype)
        level = jax.random.randint(key_level, (len(batch),), 0, len(levels) - 1)
        sigmas = levels[level]
        spreads = jnp.sqrt(variance_between(sigmas, levels[level + 1]))
        added = jnp.sqrt(variance_between(levels[0], sigmas))[:, None]
        x = batch + added * jax.random.normal(key_here, batch.shape, batch.dtype)
        y = x + spreads[:, None] * jax.random.normal(key_there, batch.shape, batch.dtype)
        keys = jax.random.split(key_walk, len(batch))
        negatives, accepted = jax.vmap(recovered, (0, None, 0, 0, 0, 0, None, None))(
            keys, density, sigmas, y, y, spreads, self.dynamics, state
        )
        negatives, accepted = jax.lax.stop_gradient(negatives), jnp.mean(accepted)
        gap = jnp.mean(jax.vmap(lambda sigma, x, other: _gap(density.at(sigma), x, other))(sigmas, x, negatives))
        metrics = {"energy_gap": -gap, "accept_rate": accepted, "step_size": state}
        return gap, (next_step_size(state, accepted, self.dynamics), metrics)


def recover(
    key: PRNGKey,
    energy: Callable[[Array], Array],
    levels: Sequence[float],
    start: dist.Distribution,
    *,
    num: int = 1024,
    base: dist.Distribution | None = None,
    dynamics: Dynamics = MOVES,
) -> Array:
    """Draws, shape (num, *event_shape), by walking the chain of noise down: x_k from p(x_k | x_k+1), for each k.

    Args:
        energy: noise-conditional, as `fit` returns it from `RecoveryLikelihood`.
        levels: those that it was trained at.
        start: a distribution of events at the widest level, about N(0, data variance + sigma_T^2):
            `energy.reference(levels[-1])`.
        num: of draws.
        base: as in `fit`.
        dynamics: the moves at each level, in the units of `RecoveryLikelihood`; their step size stays as it is.

    Raises:
        EnergyError: for levels that do not grow, fewer than two of them, or no draws.
        EnergyShapeError: where start and base are not of the same single events.

    Reference: Gao, Song, Poole, Wu and Kingma (2021).
    """
    check_chain(levels)
    density = density_from_start(energy, base, start, num)
    return _recover(as_key(key), density, jnp.asarray(levels), start, num, dynamics)


@eqx.filter_jit
def _recover(key: PRNGKey, density: Density, levels: Array, start: Any, num: int, dynamics: Dynamics) -> Array:
    key_start, key_levels = jax.random.split(key)
    points = start.sample(key_start, (num,)).reshape(num, -1)
    step_size = jnp.asarray(dynamics.step_size, points.dtype)

    def down(y: Array, given: Any) -> tuple[Array, None]:
        key, sigma, above = given
        spread = jnp.sqrt(variance_between(sigma, above))
        keys = jax.random.split(key, num)
        x, _ = jax.vmap(recovered, (0, None, None, 0, 0, None, None, None))(
            keys, density, sigma, y, y, spread, dynamics, step_size
        )
        return x, None

    given = jax.random.split(key_levels, len(levels) - 1), levels[:-1], levels[1:]
    points, _ = jax.lax.scan(down, points, given, reverse=True)
    return points.reshape(num, *density.event_shape)


def recovered(
    key: PRNGKey,
    density: Density,
    sigma: Array,
    start: Array,
    y: Array,
    spread: Array,
    dynamics: Dynamics,
    step_size: Array,
) -> tuple[Array, Array]:
    """A point of p(x | y) at a level, by a run from the start, and its acceptance rate."""
    points, accepted = walk(key, start[None], Conditional(density.at(sigma), y, spread), dynamics, step_size, spread)
    return points[0], accepted


def _gap(density: Density, x: Array, other: Array) -> Array:
    return density.tilt(x) - density.tilt(other)
