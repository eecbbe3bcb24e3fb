"""Diffusion recovery likelihood: a noisy point says where the one before it lies, up to a step of noise.

    x_k = x + sqrt(sigma_k^2 - sigma_0^2) e                    levels sigma_0 < ... < sigma_T, sigma_k^2 the variance
    y = x_k + d_k e'           d_k^2 = sigma_k+1^2 - sigma_k^2
    p(x_k | y) = exp(-V(x_k, sigma_k) - |y - x_k|^2 / 2 d_k^2) / Z(y)

    grad log p(x_k | y) = -grad V(x_k) + E_p(.|y)[grad V]      by a few moves, which start at y, or where p(x_k | y)
                                                               would be if p(x_k) were normal

The forward process has exploding variance; Gao et al. write it with preserved variance, where y shrinks, which is the
same up to a scale of each level. Near y the conditional density is close to normal with standard deviation d_k, so that
a short run comes to it where the density itself has modes that no chain crosses between. The product over k is the
likelihood of the whole chain of noise given its end.

What is left open: data stand at the smallest level with no noise added, so that `energy(x)`, at sigma_0, is that of
the data themselves. It has no log Z here (`anneal`, or `ebm_ppl.log_z`), and is the density of the data only as far as
conditionals tell: where modes lie further apart than d_0 no y comes from both, and their weights are known by the wider
levels alone; and of what lies further than d_0 from all data nothing is said at all. Draws of the chain, `recover`,
have the weights and stay near; the energy at the smallest level need not. An objective of the density itself,
`marginal`, tells it: persistent walkers, say, whose points are at that level and go wherever it is low. Adjusted moves
go with it: unadjusted ones have the conditionals learn what makes up for their bias, which the density has not. Of the
weights of modes that no walker crosses between, it tells no more than the wider levels do.

References:
    Gao, Song, Poole, Wu and Kingma (2021), Learning energy-based models by diffusion recovery likelihood; Bengio, Yao,
    Alain and Vincent (2013), Generalized denoising auto-encoders as generative models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ebm_ppl.kernels import Langevin
from ebm_ppl.noise import check_chain, variance_between
from ebm_ppl.train.checks import OF_MARGINAL
from ebm_ppl.train.objective import Density, Metrics, Objective, density_from_start, require_levels
from ebm_ppl.train.walkers import Dynamics, next_step_size, walk
from ebm_ppl.typing import Array, EnergyError, EnergyWarning, PRNGKey, as_key

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


class State(NamedTuple):
    """Of recovery likelihood."""

    step_size: Array
    marginal: Any
    """Of the objective of the smallest level."""


class RecoveryLikelihood(Objective):
    """Diffusion recovery likelihood, of a noise-conditional energy.

    Each point of a batch has a level of its own in each step.

    Args:
        levels: sigma_0, ..., sigma_T in units of the data, smallest first, as the energy has them; sigma_0 names the
            data as they are.
        dynamics: the moves, with a step size in units of d_k, and of d_k^2 for `Langevin()`. That of an adjusted kernel
            follows the acceptance of all levels: where an energy has grown so steep that walkers are rejected they
            stay where they start, at y say, and it grows steeper; low rates of learning keep it from that.
        moves_from: `"noisy"`, from y, or `"reference"`, from a draw of what y would say of x_k if the energy's own
            `reference(sigma)`, a normal distribution, were all there is. Where it nearly is, d_k may be as wide as the
            data, and a few levels do.
        marginal: an objective by which the energy at the smallest level is trained, too, as the density that it is by
            itself: `PersistentContrastiveDivergence()`, say. What it tells is in the record as `marginal_...`.
        weight: of that.

    Raises:
        EnergyError: for levels that do not grow, or an energy that lacks what these need.

    Reference: Gao, Song, Poole, Wu and Kingma (2021).
    """

    levels: tuple[float, ...]
    dynamics: Dynamics = MOVES
    moves_from: Literal["noisy", "reference"] = "noisy"
    marginal: Objective | None = None
    weight: float = 0.1
    name = "recovery likelihood"
    is_comparable = False
    is_continuous = True

    def __check_init__(self):
        check_chain(self.levels)
        _check_moves(self.moves_from)
        if not self.weight > 0:
            raise EnergyError(f"weight is positive; got {self.weight}.")

    def check(self, data: Array) -> None:
        if self.marginal is not None:
            self.marginal.check(data)

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        require_levels(density, self.levels, data)
        _require_reference(density.energy, self.moves_from)
        parameters, state = ((), ()) if self.marginal is None else self.marginal.init(key, density, data)
        return parameters, State(jnp.asarray(self.dynamics.step_size, data.dtype), state)

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        key_level, key_here, key_there, key_walk, key_marginal = jax.random.split(key, 5)
        levels = jnp.asarray(self.levels, batch.dtype)
        level = jax.random.randint(key_level, (len(batch),), 0, len(levels) - 1)
        sigmas = levels[level]
        spreads = jnp.sqrt(variance_between(sigmas, levels[level + 1]))
        added = jnp.sqrt(variance_between(levels[0], sigmas))[:, None]
        x = batch + added * jax.random.normal(key_here, batch.shape, batch.dtype)
        y = x + spreads[:, None] * jax.random.normal(key_there, batch.shape, batch.dtype)
        step = _Step(density, self.dynamics, self.moves_from)
        keys = jax.random.split(key_walk, len(batch))
        negatives, accepted = jax.vmap(step, (0, 0, 0, 0, None))(keys, sigmas, y, spreads, state.step_size)
        negatives, accepted = jax.lax.stop_gradient(negatives), jnp.mean(accepted)
        loss = jnp.mean(jax.vmap(lambda sigma, x, other: _gap(density.at(sigma), x, other))(sigmas, x, negatives))
        metrics = {"energy_gap": -loss, "accept_rate": accepted, "step_size": state.step_size}
        of_marginal = state.marginal
        if self.marginal is not None:
            value, (of_marginal, told) = self.marginal.loss(key_marginal, density, parameters, of_marginal, batch)
            loss = loss + self.weight * value
            metrics |= {f"{OF_MARGINAL}{name}": each for name, each in told.items()}
        return loss, (State(next_step_size(state.step_size, accepted, self.dynamics), of_marginal), metrics)


def recover(
    key: PRNGKey,
    energy: Callable[[Array], Array],
    levels: Sequence[float],
    start: dist.Distribution,
    *,
    num: int = 1024,
    base: dist.Distribution | None = None,
    dynamics: Dynamics = MOVES,
    moves_from: Literal["noisy", "reference"] = "noisy",
) -> Array:
    """Draws, shape (num, *event_shape), by walking the chain of noise down: x_k from p(x_k | x_k+1), for each k.

    Args:
        energy: noise-conditional, as `fit` returns it from `RecoveryLikelihood`.
        levels: those that it was trained at.
        start: a distribution of events at the widest level, about N(0, data variance + sigma_T^2):
            `energy.reference(levels[-1])`.
        num: of draws.
        base: as in `fit`.
        dynamics, moves_from: the moves at each level, as in `RecoveryLikelihood`; the step size stays as it is.

    Draws that are not finite are warned of.

    Raises:
        EnergyError: for levels that do not grow, fewer than two of them, no draws, or an energy without a reference
            where the moves start from it.
        EnergyShapeError: where start and base are not of the same single events.

    Reference: Gao, Song, Poole, Wu and Kingma (2021).
    """
    check_chain(levels)
    _check_moves(moves_from)
    _require_reference(energy, moves_from)
    density = density_from_start(energy, base, start, num)
    draws = _recover(as_key(key), _Step(density, dynamics, moves_from), jnp.asarray(levels), start, num)
    if not isinstance(draws, jax.core.Tracer):
        warn_of_bad(np.asarray(draws), "the energy is not, or its slopes are too steep for the moves")
    return draws


@eqx.filter_jit
def _recover(key: PRNGKey, step: _Step, levels: Array, start: Any, num: int) -> Array:
    key_start, key_levels = jax.random.split(key)
    points = start.sample(key_start, (num,)).reshape(num, -1)
    step_size = jnp.asarray(step.dynamics.step_size, points.dtype)

    def down(y: Array, given: Any) -> tuple[Array, None]:
        key, sigma, above = given
        spread = jnp.sqrt(variance_between(sigma, above))
        x, _ = jax.vmap(step, (0, None, 0, None, None))(jax.random.split(key, num), sigma, y, spread, step_size)
        return x, None

    given = jax.random.split(key_levels, len(levels) - 1), levels[:-1], levels[1:]
    points, _ = jax.lax.scan(down, points, given, reverse=True)
    return points.reshape(num, *step.density.event_shape)


class _Step(eqx.Module):
    """A step down the chain of noise, of one point."""

    density: Density
    dynamics: Dynamics
    moves_from: str = eqx.field(static=True)

    def __call__(self, key: PRNGKey, sigma: Array, y: Array, spread: Array, step_size: Array) -> tuple[Array, Array]:
        key_start, key_walk = jax.random.split(key)
        start = y
        if self.moves_from == "reference":
            start = _by_reference(key_start, self.density.energy, sigma, y, spread)
        return recovered(key_walk, self.density, sigma, start, y, spread, self.dynamics, step_size)


def _by_reference(key: PRNGKey, energy: Any, sigma: Array, y: Array, spread: Array) -> Array:
    """A draw of x given y, if x were a draw of the energy's reference."""
    reference = energy.reference(sigma)
    mean, variance = (jnp.ravel(each).astype(y.dtype) for each in (reference.mean, reference.variance))
    share = variance / (variance + spread**2)
    return mean + share * (y - mean) + jnp.sqrt(share) * spread * jax.random.normal(key, y.shape, y.dtype)


def _check_moves(moves_from: str) -> None:
    if moves_from not in ("noisy", "reference"):
        raise EnergyError(f"moves_from is 'noisy' or 'reference'; got {moves_from!r}.")


def _require_reference(energy: Any, moves_from: str) -> None:
    if moves_from == "reference" and not hasattr(energy, "reference"):
        raise EnergyError(
            f"{type(energy).__name__} has no reference(sigma) to move from, as NoiseConditionalEnergy has: "
            "moves_from='noisy' needs none."
        )


def warn_of_bad(draws: np.ndarray, why: str) -> None:
    """Of those of a chain of noise that are not finite."""
    num_bad = np.sum(~np.isfinite(draws).reshape(len(draws), -1).all(axis=1))
    if num_bad:
        warnings.warn(
            f"{num_bad} of {len(draws)} draws of the chain are not finite: {why}. Smaller steps help, or more levels.",
            EnergyWarning,
            stacklevel=3,
        )


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
