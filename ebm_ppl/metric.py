"""The metric of a kernel, learned from the draws of a window of the warm-up and the gradients at them.

    diag         M = diag(var z), Stan's
    dense        M for which  tr(M^-1 C) + tr(M G)  is least, with C = cov z and G = cov grad log p(z)
    low_rank     the same up to a diagonal and a few directions, by BlackJAX

The sum above is twice the dimension more than the Fisher divergence of a target from the normal of covariance M about
its mean, in the metric M. Its least value is where M G M = C: the geometric mean of C and of G^-1, which for a normal
target are one. Gradients tell as much as draws do, and where C is estimated too wide, G^-1 is too narrow, so that this
mean is near the truth with far fewer draws than C alone.

A dense metric is trusted only as far as two halves of the chains agree on it: the correlations of C and G are shrunk to
`k R + (1 - k) I`, with the k under which each half has the least divergence from the other. With the mean

    m = mean z + M mean grad log p(z)

the same divergence has its least value over all normal distributions, too (`closest_normal`).

References:
    Carpenter et al. (2017), Stan; Seyboldt et al. (2026), Preconditioning Hamiltonian Monte Carlo by minimizing Fisher
    divergence; Bhatia (2007), Positive definite matrices, chapter 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.mass_matrix import welford_algorithm
from blackjax.adaptation.metric_recipes import lookup_recipe
from jax.scipy.linalg import solve_triangular

from ebm_ppl.kernels import Metric
from ebm_ppl.scale import DenseScale, DiagonalScale, LowRankScale, Scale
from ebm_ppl.typing import Array

MOST_DENSE = 128
"""Dimensions from which the products with a dense metric cost more time than its last correlations save."""
MAX_RANK = 20
BUFFER = 512
"""Draws that the low-rank metric is learned from."""
KEEP = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Candidates for the share of the correlations that a dense metric keeps."""
UNMOVED = 1e-3
"""Variance of a coordinate that did not move, Stan's."""
STIFFEST = 1e4
"""Most that a coordinate's variance may exceed that of a normal with its gradients: a few of these may be huge."""


class Estimator(NamedTuple):
    """How a metric is learned: `init(dim) -> state, scale`, `add(state, positions, gradients)`, `close(state)`."""

    init: Callable[[int], tuple[Any, Scale]]
    add: Callable[[Any, Array, Array], Any]
    close: Callable[[Any], tuple[Any, Scale]]


def estimator(metric: Metric, dim: int) -> Estimator:
    """Of the metric that a sampler's settings ask for."""
    if metric == "diag":
        return _diagonal()
    if metric == "dense" or (metric == "auto" and dim <= MOST_DENSE):
        return _dense()
    return _low_rank()


def _diagonal() -> Estimator:
    core = lookup_recipe("welford_diag").build_core()

    def close(state: Any) -> tuple[Any, Scale]:
        state = core.final(state)
        return state, DiagonalScale(jnp.sqrt(state.inverse_mass_matrix))

    return Estimator(lambda dim: (core.init(dim), DiagonalScale(jnp.ones(dim))), _add_all(core.update), close)


def _low_rank() -> Estimator:
    """BlackJAX's Fisher-divergence metric, from the latest pooled draws of a window."""
    recipe = dataclasses.replace(lookup_recipe("fisher_low_rank"), max_rank=MAX_RANK)
    core = recipe.build_core(buffer_size=BUFFER)

    def scale(state: Any) -> Scale:
        sigma, directions, eigenvalues = state.inverse_mass_matrix
        return LowRankScale(sigma, directions, jnp.sqrt(eigenvalues))

    def init(dim: int) -> tuple[Any, Scale]:
        state = core.init(dim)
        return state, scale(state)

    def close(state: Any) -> tuple[Any, Scale]:
        state = core.final(state)
        return state, scale(state)

    return Estimator(init, _add_all(core.update), close)


def _add_all(update: Callable) -> Callable:
    def add(state: Any, positions: Array, gradients: Array) -> Any:
        learned, _ = jax.lax.scan(lambda state, draw: (update(state, *draw), None), state, (positions, gradients))
        return learned

    return add


class Halves(NamedTuple):
    """What is known of two halves of the chains (of the draws where there is one chain), and the number of updates."""

    first: tuple[Any, Any]
    """BlackJAX's sums for the covariances of draws and of gradients."""
    second: tuple[Any, Any]
    count: Array


class Moments(NamedTuple):
    """Covariances of draws and of gradients, each (dim, dim)."""

    draws: Array
    gradients: Array


def _dense() -> Estimator:
    empty, update, _ = welford_algorithm(is_diagonal_matrix=False)

    def nothing(dim: int) -> Halves:
        half = empty(dim), empty(dim)
        return Halves(half, half, jnp.zeros((), int))

    def init(dim: int) -> tuple[Any, Scale]:
        return nothing(dim), DenseScale(jnp.eye(dim), jnp.eye(dim))

    def add(state: Halves, positions: Array, gradients: Array) -> Halves:
        def add_one(halves: tuple[Any, Any], draw: tuple[Array, Array, Array]) -> tuple[tuple[Any, Any], None]:
            is_first, *values = draw
            first, second = halves
            half = jax.tree.map(lambda a, b: jnp.where(is_first, a, b), first, second)
            grown = tuple(update(sums, value) for sums, value in zip(half, values, strict=True))
            first = jax.tree.map(lambda new, old: jnp.where(is_first, new, old), grown, first)
            second = jax.tree.map(lambda new, old: jnp.where(is_first, old, new), grown, second)
            return (first, second), None

        chains = jnp.arange(len(positions)) + (state.count if len(positions) == 1 else 0)
        halves, _ = jax.lax.scan(add_one, (state.first, state.second), (chains % 2 == 0, positions, gradients))
        return Halves(*halves, state.count + 1)

    def close(state: Halves) -> tuple[Halves, Scale]:
        first, second = (Moments(*map(_covariance, half)) for half in (state.first, state.second))
        gap = Moments(*(a.mean - b.mean for a, b in zip(state.first, state.second, strict=True)))
        factor, widening = agreed(first, second, gap)
        scale = DenseScale.of_covariance(widening * factor @ factor.T)
        return nothing(len(gap.draws))._replace(count=state.count), scale

    return Estimator(init, add, close)


def _covariance(sums: Any) -> Array:
    """Zero, where there is but one draw."""
    return sums.m2 / jnp.maximum(sums.sample_size - 1, 1)


def agreed(first: Moments, second: Moments, gap: Moments) -> tuple[Array, Array]:
    """A factor of the metric of two halves of the draws together, as far as they agree, and a number.

    Times that number its widest direction is as wide as the draws are: trajectories whose length is a multiple of the
    metric's unit then reach across the target, which has more than one mode, say, where draws and gradients differ.

    Args:
        first, second: of the halves.
        gap: differences of their means, each (dim,).
    """
    between = jax.tree.map(lambda mean: jnp.outer(mean, mean), gap)
    keep = jnp.asarray(KEEP, first.draws.dtype)
    about_first, about_second = (jax.tree.map(jnp.add, half, between) for half in (second, first))
    divergence = _held_out(first, about_first, keep) + _held_out(second, about_second, keep)
    divergence = jnp.where(jnp.isfinite(divergence), divergence, jnp.inf)
    both = jax.tree.map(lambda a, b, c: (a + b) / 2 + c / 4, first, second, between)
    units, moments = _standardised(both)
    eigenvalues, vectors, _ = _mean_of(_shrunk(moments, keep[jnp.argmin(divergence)]))
    factor = units[:, None] * vectors * eigenvalues**-0.25
    return factor, jnp.sqrt(jnp.max(eigenvalues))


def closest_normal(z: Array, gradients: Array) -> tuple[Array, DenseScale]:
    """Mean and scale of the normal distribution of least Fisher divergence, by draws of a target and its gradients.

    Of a normal target it is that target, up to what the halves of the draws do not agree on.

    Args:
        z, gradients: each of shape (num, dim).
    """
    half, square = len(z) // 2, 2 * z.shape[1:]
    first, second = (
        Moments(*(jnp.cov(x[part], rowvar=False).reshape(square) for x in (z, gradients)))
        for part in (slice(half), slice(half, None))
    )
    gap = Moments(*(jnp.mean(x[:half], axis=0) - jnp.mean(x[half:], axis=0) for x in (z, gradients)))
    factor, _ = agreed(first, second, gap)
    covariance = factor @ factor.T
    return jnp.mean(z, axis=0) + covariance @ jnp.mean(gradients, axis=0), DenseScale.of_covariance(covariance)


def _held_out(fit: Moments, test: Moments, keep: Array) -> Array:
    """`tr(M^-1 C) + tr(M G)` of other moments, for the metric of `fit` with each share of its correlations."""
    units, fit = _standardised(fit)
    spread = jnp.outer(units, units)

    def one(k: Array) -> Array:
        eigenvalues, vectors, inverse = _mean_of(_shrunk(fit, k))
        draws = jnp.sum(inverse * (inverse @ (test.draws / spread)), axis=1)
        gradients = jnp.sum(vectors * ((test.gradients * spread) @ vectors), axis=0)
        return jnp.sum(jnp.sqrt(eigenvalues) * draws + gradients / jnp.sqrt(eigenvalues))

    return jax.lax.map(one, keep)


def _standardised(moments: Moments) -> tuple[Array, Moments]:
    """Units in which each coordinate has the same variance as its gradient, and the moments in them.

    What is zero or not finite tells nothing: a coordinate that did not move, or its gradients.
    """
    variance, roughness = jnp.diag(moments.draws), jnp.diag(moments.gradients)
    variance = jnp.where(_tells(variance), variance, UNMOVED)
    roughness = jnp.where(_tells(roughness), roughness, 1 / variance)
    ratio = jnp.minimum(jnp.sqrt(variance) * jnp.sqrt(roughness), STIFFEST)

    def scaled(matrix: Array, deviation: Array) -> Array:
        correlation = matrix / deviation / deviation[:, None]
        correlation = jnp.nan_to_num(correlation, posinf=0, neginf=0)
        size = jnp.sqrt(ratio)
        return jnp.fill_diagonal(correlation, 1.0, inplace=False) * size * size[:, None]

    units = jnp.sqrt(variance / ratio)
    return units, Moments(scaled(moments.draws, jnp.sqrt(variance)), scaled(moments.gradients, jnp.sqrt(roughness)))


def _tells(x: Array) -> Array:
    return jnp.isfinite(x) & (x > 0)


def _shrunk(moments: Moments, keep: Array) -> Moments:
    return jax.tree.map(lambda matrix: keep * matrix + (1 - keep) * jnp.diag(jnp.diag(matrix)), moments)


def _mean_of(moments: Moments) -> tuple[Array, Array, Array]:
    """The geometric mean of C and G^-1 as `B W^-1/2 B'` with `C = B B'` and `W = B' G B` diagonal: W, B and B^-1."""
    factor = jnp.linalg.cholesky(moments.draws)
    eigenvalues, rotation = jnp.linalg.eigh(factor.T @ moments.gradients @ factor)
    floor = jnp.finfo(eigenvalues.dtype).eps * jnp.max(eigenvalues)
    return jnp.maximum(eigenvalues, floor), factor @ rotation, solve_triangular(factor.T, rotation, lower=False).T
