"""Where the mass of a target may hide: its modes, each with the normal distribution that touches it (Laplace).

    m  = argmax log p(z)        by L-BFGS (optax) from many starts, in coordinates where a cloud has unit variances
    S  = (-Hessian log p(m))^-1
    log mass = log p(m) + 1/2 log det(2 pi S)

A tempered path meets a narrow mode only by luck; an ascent finds it from anywhere in its basin. What is found here is a
proposal and no estimate: the weights of its draws say what a mode is worth.

    unseen      about the share of ascents that would end at a mode not met yet: that of the modes met once (Good 1953)

References:
    Good (1953), The population frequencies of species and the estimation of population parameters; Liu and Nocedal
    (1989), On the limited memory BFGS method; Tierney and Kadane (1986), Accurate approximations for posterior moments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebm_ppl import parallel
from ebm_ppl.scale import DenseScale
from ebm_ppl.target import Tilted, log_joint
from ebm_ppl.typing import Array

MOST_STEPS = 200
FLAT = 1e-3
"""Norm of the gradient in whitened coordinates, in nats, at which an ascent has arrived."""
SAME = 0.3
"""Distance of two modes, for each dimension, in standard deviations of one of them, within which they are the same."""
FAR = 2.0
"""Such a distance of a mode from the nearest of many points, beyond which they have not been there; draws are at 1."""


class Modes(NamedTuple):
    """Distinct modes, the highest first."""

    z: np.ndarray
    """(mode, dim)"""
    log_density: np.ndarray
    scale: DenseScale
    """Of each, with leading axis (mode,)."""
    hits: np.ndarray
    """How many ascents ended there, (mode,)."""

    @property
    def num_once(self) -> int:
        """Modes that one ascent alone has met."""
        return int(np.sum(self.hits == 1))

    @property
    def unseen(self) -> float:
        """About the share of ascents that would end at another mode."""
        return self.num_once / max(int(np.sum(self.hits)), 1)

    @property
    def log_mass(self) -> np.ndarray:
        """Of the touching normal distributions, in nats."""
        log_volume = np.sum(np.log(np.diagonal(self.scale.factor, axis1=1, axis2=2)), axis=1)
        return self.log_density + log_volume + self.z.shape[1] / 2 * np.log(2 * np.pi)


def find_modes(
    target: Tilted, starts: np.ndarray, deviation: np.ndarray, known: Modes | None = None
) -> tuple[Modes, int]:
    """The modes that ascents from `starts`, shape (num, dim), arrive at, and the evaluations that it took.

    Args:
        deviation: standard deviations that the ascents take for units, shape (dim,).
        known: modes that were found before, to which the others are added.
    """
    # A batch of ascents would take both sides of every line search, each with a copy of all matrices of the model.
    parts = parallel.split(starts, most=len(starts))
    parts = parallel.over(_ascend, parts, target, deviation)
    found = jax.tree.map(lambda *xs: np.concatenate(xs), *jax.device_get(parts))
    z, log_density, arrived, evaluations = found
    arrived &= np.isfinite(log_density) & np.all(np.isfinite(z), axis=1)
    z, log_density = z[arrived], log_density[arrived]
    num_evaluations = int(np.sum(evaluations))
    kept = _listed(known) if known else []
    for i in np.argsort(-log_density):
        near = next((mode for mode in kept if _distance(z[i], mode.z, mode.scale) < SAME), None)
        if near is not None:
            near.hits[...] += 1
            continue
        scale, curved = jax.device_get(parallel.once(_touching, z[i], target))
        num_evaluations += 2 * target.dim
        if curved:
            kept.append(Modes(z[i], log_density[i], scale, np.array(1)))
    if not kept:
        dim = target.dim
        no_scale: Any = np.empty((0, dim, dim))
        nothing = Modes(np.empty((0, dim)), np.empty(0), DenseScale(no_scale, no_scale), np.empty(0, int))
        return nothing, num_evaluations
    kept.sort(key=lambda mode: -float(mode.log_density))
    modes: Any = jax.tree.map(lambda *xs: np.stack(xs), *kept)
    return modes, num_evaluations


def prepare_ascents(target: Tilted) -> None:
    """Starts to compile what `find_modes` needs."""
    point = jax.ShapeDtypeStruct((target.dim,), jnp.result_type(float))
    parallel.prepare_over(_ascend, jax.ShapeDtypeStruct((1, target.dim), point.dtype), target, point)
    parallel.prepare_once(_touching, point, target)


def unvisited(modes: Modes, z: np.ndarray) -> float:
    """log of the mass of the normal distributions at modes that none of the points, shape (num, dim), is near."""
    is_far = [np.min(_distance(z, mode.z, mode.scale)) > FAR for mode in _listed(modes)]
    return float(np.logaddexp.reduce(modes.log_mass[np.array(is_far, bool)], initial=-np.inf))


def spread_of(starts: np.ndarray) -> np.ndarray:
    """Standard deviations of points, shape (num, dim), without those that lie at infinity."""
    return np.std(starts[np.all(np.isfinite(starts), axis=1)], axis=0)


def _listed(modes: Modes) -> list[Modes]:
    """Each mode by itself."""
    return [jax.tree.map(lambda x, i=i: np.array(x[i]), modes) for i in range(len(modes.hits))]


def _distance(z: np.ndarray, mode: np.ndarray, scale: DenseScale) -> np.ndarray:
    """Of a point or of several, shape (..., dim), for each dimension, in standard deviations of the mode."""
    return np.linalg.norm((z - mode) @ np.asarray(scale.inverse).T, axis=-1) / np.sqrt(len(mode))


def _ascend(start: Array, target: Tilted, deviation: Array) -> tuple[Array, Array, Array, Array]:
    """Where one ascent ends, the log density there, whether it is flat, and the evaluations it took."""

    def height(x: Array) -> Array:
        return -log_joint(target, start + deviation * x)

    optimiser: Any = optax.lbfgs()
    value_and_grad: Callable = optax.value_and_grad_from_state(height)

    def again(carry: tuple[Array, Any, Array, Array, Array]) -> Array:
        _, _, slope, count, _ = carry
        return (slope > FLAT) & (count < MOST_STEPS)

    def step(carry: tuple[Array, Any, Array, Array, Array]) -> tuple[Array, Any, Array, Array, Array]:
        x, state, _, count, evaluations = carry
        value, gradient = value_and_grad(x, state=state)
        updates, state = optimiser.update(gradient, state, x, value=value, grad=gradient, value_fn=height)
        x = x + updates
        slope = jnp.linalg.norm(optax.tree.get(state, "grad"))
        searched = optax.tree.get(state, "num_linesearch_steps")
        return x, state, slope, count + 1, evaluations + 1 + searched

    x = jnp.zeros_like(start)
    zero = jnp.zeros((), int)
    x, _, slope, _, evaluations = jax.lax.while_loop(
        again, step, (x, optimiser.init(x), jnp.asarray(jnp.inf, x.dtype), zero, zero)
    )
    return start + deviation * x, -height(x), slope <= FLAT, evaluations


def _touching(mode: Array, target: Tilted) -> tuple[DenseScale, Array]:
    """The scale of the normal distribution that touches the density at a mode, and whether there is one."""
    precision = -jax.hessian(lambda z: log_joint(target, z))(mode)
    scale = DenseScale.of_covariance(jnp.linalg.inv((precision + precision.T) / 2))
    return scale, jnp.all(jnp.isfinite(scale.factor)) & jnp.all(jnp.isfinite(scale.inverse))
