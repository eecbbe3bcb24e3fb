"""The metric of a kernel as a scale `L`: the inverse mass matrix is `L L'`, near the covariance of the target.

Kernels move in whitened coordinates `x`, with `z = origin + L x` and an identity metric, so that the kinetic energy
is a sum of squares. (In single precision a dense quadratic form can overflow to minus infinity, and a Metropolis
step then accepts whatever it is given.)

    L x         `times`     from whitened coordinates to z
    L^-1 z      `whitened`  and back
    L' g        `pull`      a gradient in z as one in x
    L'^-1 g     `push`      a gradient in x as one in z
"""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from ebm_ppl.typing import Array


class DiagonalScale(eqx.Module):
    """`L = diag(deviation)`, with deviation of shape (dim,)."""

    deviation: Array

    def times(self, x: Array) -> Array:
        return self.deviation * x

    def whitened(self, z: Array) -> Array:
        return z / self.deviation

    def pull(self, gradient: Array) -> Array:
        return self.deviation * gradient

    def push(self, gradient: Array) -> Array:
        return gradient / self.deviation


class DenseScale(eqx.Module):
    """`L` lower triangular, with its inverse, each of shape (dim, dim)."""

    factor: Array
    inverse: Array

    @classmethod
    def of_covariance(cls, covariance: Array) -> DenseScale:
        """The Cholesky factor of a covariance, scaled to a correlation first, which single precision needs."""
        deviation = jnp.sqrt(jnp.diag(covariance))
        factor = jnp.linalg.cholesky(covariance / jnp.outer(deviation, deviation)) * deviation[:, None]
        return cls(factor, solve_triangular(factor, jnp.eye(len(factor), dtype=factor.dtype), lower=True))

    @classmethod
    def of_cloud(cls, z: Array, points: Array | int, weights: Array | None = None) -> DenseScale:
        """The scale of a cloud's covariance, shrunk towards its diagonal by the noise of the estimate.

        Args:
            z: points, shape (num, dim).
            points: how many independent ones they are worth.
            weights: that add up to one, shape (num,); equal ones where None.
        """
        num, dim = z.shape
        weights = jnp.full(num, 1 / num, z.dtype) if weights is None else weights
        centred = z - weights @ z
        covariance = (weights[:, None] * centred).T @ centred
        shrinkage = dim / (dim + points)
        variances = jnp.maximum(jnp.diag(covariance), jnp.finfo(z.dtype).tiny * 1e3)
        return cls.of_covariance((1 - shrinkage) * covariance + shrinkage * jnp.diag(variances))

    def times(self, x: Array) -> Array:
        return self.factor @ x

    def whitened(self, z: Array) -> Array:
        return self.inverse @ z

    def pull(self, gradient: Array) -> Array:
        return gradient @ self.factor

    def push(self, gradient: Array) -> Array:
        return gradient @ self.inverse


class LowRankScale(eqx.Module):
    """`L = diag(deviation) (I + V (diag(stretch) - I) V')`, with V of shape (dim, rank); costs O(dim * rank)."""

    deviation: Array
    directions: Array
    stretch: Array

    def _stretched(self, x: Array, stretch: Array) -> Array:
        return x + self.directions @ ((stretch - 1.0) * (x @ self.directions))

    def times(self, x: Array) -> Array:
        return self.deviation * self._stretched(x, self.stretch)

    def whitened(self, z: Array) -> Array:
        return self._stretched(z / self.deviation, 1.0 / self.stretch)

    def pull(self, gradient: Array) -> Array:
        return self._stretched(self.deviation * gradient, self.stretch)

    def push(self, gradient: Array) -> Array:
        return self._stretched(gradient, 1.0 / self.stretch) / self.deviation


def location_and_scale(z: Array, weights: Array) -> tuple[Array, DenseScale]:
    """Mean of points, (num, dim), of weights that are not negative, (num,), and the scale of their covariance."""
    weights = weights / jnp.sum(weights)
    return weights @ z, DenseScale.of_cloud(z, 1 / jnp.sum(weights**2), weights)


Scale = DiagonalScale | DenseScale | LowRankScale
