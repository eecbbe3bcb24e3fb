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
from ebm_ppl.train.objective import Density, Metrics, Objective, require_levels
from ebm_ppl.typing import Array, EnergyError, PRNGKey


class ScoreMatching(Objective):
    """Exact score matching, whose cost is that of `dim` gradients; sliced is as dear as one.

    Args:
        num_slices: random directions of second derivatives for each point; all coordinates, exactly, where None.

    Reference: Hyvarinen (2005); Song, Garg, Shi and Ermon (2019).
    """

    num_slices: int | None = None
    name = "score matching"
    is_comparable = True

    def __check_init__(self):
        if self.num_slices is not None and self.num_slices < 1:
            raise EnergyError(f"num_slices is 1 at least, or None; got {self.num_slices}.")

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        num, dim = batch.shape
        num_directions = dim if self.num_slices is None else self.num_slices
        directions = jnp.tile(jnp.eye(dim, dtype=batch.dtype), (num, 1))
        if self.num_slices is not None:
            directions = jax.random.rademacher(key, (num * num_directions, dim), batch.dtype)

        def of_pair(x: Array, direction: Array) -> tuple[Array, Array]:
            slope, bent = jax.jvp(jax.grad(density.total), (x,), (direction,))
            return slope @ slope / 2, direction @ bent

        # Pairs of a point and a direction as one batch: of a batch of batches XLA makes slower products of matrices.
        energies, curvatures = jax.vmap(of_pair)(jnp.repeat(batch, num_directions, axis=0), directions)
        trace = jnp.mean(curvatures) * (dim if self.num_slices is None else 1)
        loss = jnp.mean(energies) - trace
        return loss, (state, {})


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

    def __check_init__(self):
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
        levels = jnp.asarray(self.noise, batch.dtype)
        sigmas = jax.random.choice(key_level, jnp.atleast_1d(levels), (len(batch),))

        def of_point(x: Array, e: Array, sigma: Array) -> Array:
            noisy = density.at(sigma) if levels.ndim else density
            slope = jax.grad(noisy.total)(x + sigma * e)
            return jnp.sum((e - sigma * slope) ** 2) / 2

        return jnp.mean(jax.vmap(of_point)(batch, noise, sigmas)), (state, {})
