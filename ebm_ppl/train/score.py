"""Score matching: the gradient of the energy is that of the data's, and Z plays no part.

    score          s(x) = -grad V(x)
    exact          E[ tr grad s + |s|^2 / 2 ]                                        Hyvarinen 2005
    sliced         E[ v' (grad s) v + |s|^2 / 2 ]         v of independent signs     Song et al. 2019, with |s|^2 itself
    denoising      E[ |sigma s(x + sigma e) + e|^2 / 2 ]                             Vincent 2011
    at many levels E[ |sigma s(x + sigma e, sigma) + e|^2 / 2 ]   sigma of many      Song and Ermon 2019

Blind to the weights of modes that lie apart: between them there are no data to say how the score goes on.

References:
    Hyvarinen (2005), Estimation of non-normalized statistical models by score matching; Vincent (2011), A connection
    between score matching and denoising autoencoders; Song, Garg, Shi and Ermon (2019), Sliced score matching; Song and
    Ermon (2019), Generative modeling by estimating gradients of the data distribution.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ebm_ppl.noise import check_levels
from ebm_ppl.train.objective import Density, Metrics, Objective, has_borders, require_levels
from ebm_ppl.typing import Array, ArrayLike, EnergyError, PRNGKey

UNROLLED = 4
"""Coordinates that exact score matching takes in one piece."""


class ScoreMatching(Objective):
    """Exact score matching, whose cost is that of `dim` gradients; sliced is as dear as one.

    It takes for granted that the density vanishes at the borders of its support, as one of all real numbers does: a
    base with borders is refused.

    Args:
        num_slices: random directions of second derivatives for each point; all coordinates, exactly, where None.

    Raises:
        EnergyError: for a base with borders.

    Reference: Hyvarinen (2005); Song, Garg, Shi and Ermon (2019).
    """

    num_slices: int | None = None
    name = "score matching"
    is_comparable = True
    is_continuous = True

    def __check_init__(self):
        if self.num_slices is not None and self.num_slices < 1:
            raise EnergyError(f"num_slices is 1 at least, or None; got {self.num_slices}.")

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        if density.base is not None and has_borders(density.base):
            raise EnergyError(
                "Score matching is wrong where the density does not vanish at the borders of the base's support: train "
                "on `biject_to(base.support).inv(data)`, all real numbers, or without a base of constant density."
            )
        return (), ()

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        if self.num_slices is None:
            return _exact(density, batch), (state, {})
        directions = jax.random.rademacher(key, (len(batch) * self.num_slices, batch.shape[1]), batch.dtype)
        return _sliced(density, batch, directions), (state, {})


def _exact(density: Density, batch: Array) -> Array:
    """The loss by second derivatives along each coordinate, which bring the first ones with them."""
    total = jax.vmap(density.total)

    def along(loss: Array, coordinate: Array) -> tuple[Array, None]:
        directions = jnp.broadcast_to(coordinate, batch.shape)

        def slopes(points: Array) -> Array:
            return jax.jvp(total, (points,), (directions,))[1]

        slope, curvature = jax.jvp(slopes, (batch,), (directions,))
        return loss + jnp.mean(slope**2 / 2 - curvature), None

    # What does not depend on the coordinate is computed once for those that are unrolled. All of them as one batch, of
    # batches, would have XLA make far slower products of matrices.
    coordinates = jnp.eye(batch.shape[1], dtype=batch.dtype)
    return jax.lax.scan(along, jnp.zeros((), batch.dtype), coordinates, unroll=UNROLLED)[0]


def _sliced(density: Density, batch: Array, directions: Array) -> Array:
    """The loss with second derivatives along some directions of each point, shape (batch * num_slices, dim)."""

    def of_pair(x: Array, direction: Array) -> Array:
        slope, bent = jax.jvp(jax.grad(density.total), (x,), (direction,))
        return slope @ slope / 2 - direction @ bent

    # Pairs of a point and a direction as one batch, for the same reason.
    return jnp.mean(jax.vmap(of_pair)(jnp.repeat(batch, len(directions) // len(batch), axis=0), directions))


class DenoisingScoreMatching(Objective):
    """Score matching of the data with noise on them: it learns the density of noisy data, at one level or at many.

    With many levels the energy is noise-conditional (`NoiseConditionalEnergy`), each point has a level of its own in
    each step, and the loss is weighted by sigma^2, so that all levels count alike. Wide levels join modes that lie
    apart and so tell the sampler of their weights (`anneal`); the energy at the smallest level does not learn them.

    Args:
        noise: standard deviation sigma of what is added, in units of the data; or many of them, smallest first.

    References: Vincent (2011); Song and Ermon (2019).
    """

    noise: float | tuple[float, ...] = 0.1
    name = "denoising score matching"
    is_comparable = True
    is_continuous = True

    def __check_init__(self):
        if not isinstance(self.noise, float | int | tuple):
            raise EnergyError(f"noise is one standard deviation, or a tuple of them; got {self.noise!r}.")
        check_levels(self.noise if isinstance(self.noise, tuple) else (self.noise,))

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        if isinstance(self.noise, tuple):
            require_levels(density, self.noise, data)
        return (), ()

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        key_noise, key_level = jax.random.split(key)
        noise = jax.random.normal(key_noise, batch.shape, batch.dtype)

        def of_point(x: Array, e: Array, sigma: ArrayLike, density: Density) -> Array:
            slope = jax.grad(density.total)(x + sigma * e)
            return jnp.sum((e - sigma * slope) ** 2) / 2

        def of_level(x: Array, e: Array, sigma: Array) -> Array:
            return of_point(x, e, sigma, density.at(sigma))

        level = self.noise
        if isinstance(level, tuple):
            sigmas = jax.random.choice(key_level, jnp.asarray(level, batch.dtype), (len(batch),))
            losses = jax.vmap(of_level)(batch, noise, sigmas)
        else:
            losses = jax.vmap(lambda x, e: of_point(x, e, level, density))(batch, noise)
        return jnp.mean(losses), (state, {})
