"""Warm-up in windows, pooled over chains: one step size and one metric for all, from BlackJAX's own pieces.

    step size   dual averaging on each chain, averaged over the chains at the end of each stretch
    metric      inverse mass matrix `L L'` from all draws of a window; windows double in length, as Stan's do
    centring    where a sampler's metric is "auto", the coordinates that it is a metric of, from the same draws

With four chains a window carries four times the information, and trajectories of the chains agree better in length.
A dense metric is trusted only as far as two halves of the chains agree on it: its correlations R are shrunk to
`k R + (1 - k) I`, with the k under which each half best predicts the other, or to I, where they gain next to nothing.

References:
    Carpenter et al. (2017), Stan; Hoffman and Gelman (2014), The No-U-Turn Sampler; Seyboldt et al. (2026) for the
    low-rank metric.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.metric_recipes import lookup_recipe
from blackjax.adaptation.staged_adaptation import build_schedule
from blackjax.adaptation.step_size import dual_averaging_adaptation

from ebm_ppl.centring import Centring
from ebm_ppl.kernels import Metric, Tuning
from ebm_ppl.scale import DenseScale, DiagonalScale, LowRankScale, Scale
from ebm_ppl.typing import Array

FAST, SLOW, WINDOW_END, FROZEN = range(4)
STRETCHES = 30, 40, 20
"""Steps before the first window, after the last one, and of the first window."""
MOST_DENSE = 128
"""Dimensions from which the products with a dense metric cost more time than its last correlations save."""
MAX_RANK = 20
BUFFER = 512
"""Draws that the low-rank metric is learned from."""
DAMPING, DAMPING_DELAY = 0.2, 20
"""Four times and twice Stan's. The average of a step size that swings wide is too small: acceptance falls ever faster
as the step grows, so that swings about the step wanted accept too little, and a mean over chains keeps that bias."""
KEEP = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99)
"""Candidates for the share of the correlations that a dense metric keeps."""
WORTHWHILE = 0.025
"""Nats a draw and dimension by which correlations must predict the other half better than none: what they gain less,
the noise in them costs in step size."""


class Tuned(Protocol):
    """Settings of a sampler that has a warm-up."""

    @property
    def target_accept(self) -> float: ...

    @property
    def metric(self) -> Metric: ...


class Warmup(NamedTuple):
    """Pure functions for use in compiled code."""

    init: Callable[[int], Any]
    adapt: Callable[[Any, Array], Any]
    """`(step_size, acceptance) -> step_size`: dual averaging after each step of a chain."""
    add: Callable[[Any, Array, Array], Any]
    """`(metric, positions, gradients) -> metric`: one step of the chains, which lie along the first axis."""
    close: Callable[[Any], Any]
    """The state after the end of a window: its scale, a new metric, and dual averaging started again."""
    tuning: Callable[[Any], Tuning]
    """What to use once the warm-up is over: the average step size, and the scale."""


class WarmupState(NamedTuple):
    step_size: Any
    metric: Any
    scale: Scale


class Estimator(NamedTuple):
    """How a metric is learned: `init(dim) -> state, scale`, `add(state, positions, gradients)`, `close(state)`."""

    init: Callable[[int], tuple[Any, Scale]]
    add: Callable[[Any, Array, Array], Any]
    close: Callable[[Any], tuple[Any, Scale]]


def schedule(num_warmup: int) -> np.ndarray:
    """Phase code of each warm-up step, shape (num_warmup,).

    A warm-up too short for the stretches has them all in proportion: a last one of five steps would leave the step
    size far too large.
    """
    if num_warmup == 0:
        return np.zeros(0, int)
    share = min(1.0, num_warmup / sum(STRETCHES))
    with jax.ensure_compile_time_eval():  # it may be asked for inside a trace
        stages = np.asarray(build_schedule(num_warmup, *(int(share * length) for length in STRETCHES)), dtype=int)
    return stages[:, 0] + stages[:, 1]


def windows(num_warmup: int) -> list[tuple[int, bool]]:
    """Length of each stretch of the warm-up, and whether it is a window, at whose end a metric is learned."""
    phases = schedule(num_warmup)
    fast = phases == FAST
    cuts = np.flatnonzero((phases[:-1] == WINDOW_END) | (fast[:-1] != fast[1:])) + 1
    return [(len(stretch), bool(stretch[0] != FAST)) for stretch in np.split(phases, cuts) if len(stretch)]


def window_warmup(target_accept: float, metric: Metric, dim: int) -> Warmup:
    """Stan's warm-up in windows, pooled over chains; see the module docstring."""
    da_init, da_update, da_final = dual_averaging_adaptation(target_accept, t0=DAMPING_DELAY, gamma=DAMPING)
    estimator = _estimator(metric, dim)

    def init(dim: int) -> WarmupState:
        return WarmupState(jax.tree.map(jnp.asarray, da_init(1.0)), *estimator.init(dim))

    def close(state: WarmupState) -> WarmupState:
        restarted = jax.tree.map(jnp.asarray, da_init(da_final(state.step_size)))
        return WarmupState(restarted, *estimator.close(state.metric))

    def tuning(state: WarmupState) -> Tuning:
        return Tuning(da_final(state.step_size), state.scale)

    return Warmup(init, da_update, estimator.add, close, tuning)


def pooled(step_sizes: list[Any]) -> Any:
    """The mean of the dual averaging of several chains, which lie along the leading axis of each part."""

    def mean(*parts: Array) -> Array:
        return jnp.mean(jnp.concatenate(parts), axis=0).astype(parts[0].dtype)

    return jax.tree.map(mean, *step_sizes)


def unlearned(sampler: Tuned, dim: int) -> tuple[WarmupState, Tuning]:
    """What is known before the warm-up."""
    warmup = warmup_of(sampler, dim)
    learned = warmup.init(dim)
    return learned, warmup.tuning(learned)


def halves(pieces: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The draws of one half of the chains and of the other (of a single chain's halves), each (num, dim)."""
    z = np.concatenate(pieces, axis=1)
    first, second = np.array_split(z, 2, axis=0 if len(z) > 1 else 1)
    return first.reshape(-1, z.shape[-1]), second.reshape(-1, z.shape[-1])


def learn(
    sampler: Tuned,
    learned: WarmupState,
    centring: Centring | None,
    positions: Array,
    gradients: Array,
    count: Array,
) -> WarmupState:
    """The metric, as it learns from `count` steps of all chains, in the coordinates of a centring."""
    add = warmup_of(sampler, positions.shape[-1]).add

    def coordinates(z: Array, gradient: Array) -> tuple[Array, Array]:
        if centring is None:
            return z, gradient
        u, _ = centring.coordinates(z)
        return u, centring.pull(u, gradient)

    def add_one(i: Array, metric: Any) -> Any:
        return add(metric, *jax.vmap(coordinates)(positions[:, i], gradients[:, i]))

    return learned._replace(metric=jax.lax.fori_loop(0, count, add_one, learned.metric))


def end_stretch(
    sampler: Tuned, learned: WarmupState, adaptations: list[Any], dim: int, is_window: bool
) -> tuple[WarmupState, Tuning, list[Any]]:
    """What the chains know together, and their step size adaptation for the next stretch."""
    warmup = warmup_of(sampler, dim)
    learned = learned._replace(step_size=pooled(adaptations))
    if is_window:
        learned = warmup.close(learned)
        adaptations = [jax.tree.map(lambda new, old: new + 0 * old, learned.step_size, old) for old in adaptations]
    return learned, warmup.tuning(learned), adaptations


def warmup_of(sampler: Tuned, dim: int) -> Warmup:
    """The warm-up that a sampler's settings ask for."""
    return window_warmup(sampler.target_accept, sampler.metric, dim)


def _estimator(metric: Metric, dim: int) -> Estimator:
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
    """Moments of the two halves of the chains (of the draws where there is one chain), and the number of updates."""

    first: Any
    second: Any
    count: Array


def _dense() -> Estimator:
    core = lookup_recipe("welford_dense").build_core()

    def init(dim: int) -> tuple[Any, Scale]:
        half = core.init(dim)
        return Halves(half, half, jnp.zeros((), int)), DenseScale(jnp.eye(dim), jnp.eye(dim))

    def add(state: Halves, positions: Array, gradients: Array) -> Halves:
        def add_one(halves: tuple[Any, Any], draw: tuple[Array, Array, Array]) -> tuple[tuple[Any, Any], None]:
            is_first, position, gradient = draw
            first, second = halves
            grown = core.update(jax.tree.map(lambda a, b: jnp.where(is_first, a, b), first, second), position, gradient)
            first = jax.tree.map(lambda new, old: jnp.where(is_first, new, old), grown, first)
            second = jax.tree.map(lambda new, old: jnp.where(is_first, old, new), grown, second)
            return (first, second), None

        chains = jnp.arange(len(positions)) + (state.count if len(positions) == 1 else 0)
        halves, _ = jax.lax.scan(add_one, (state.first, state.second), (chains % 2 == 0, positions, gradients))
        return Halves(*halves, state.count + 1)

    def close(state: Halves) -> tuple[Halves, Scale]:
        gap = state.first.wc_state.mean - state.second.wc_state.mean
        first, second = core.final(state.first), core.final(state.second)
        covariance = _agreed_covariance(first.inverse_mass_matrix, second.inverse_mass_matrix, gap)
        return Halves(first, second, state.count), DenseScale.of_covariance(covariance)

    return Estimator(init, add, close)


def _agreed_covariance(first: Array, second: Array, gap: Array) -> Array:
    """The covariance of two halves together, its correlations shrunk as far as the halves disagree on them."""
    between = jnp.outer(gap, gap)
    keep = jnp.asarray(KEEP, first.dtype)
    loss = _held_out(first, second + between, keep) + _held_out(second, first + between, keep)
    loss = jnp.where(jnp.isfinite(loss), loss, jnp.inf).at[0].add(-4 * WORTHWHILE * len(first))
    best = keep[jnp.argmin(loss)]
    covariance = (first + second) / 2 + between / 4
    return best * covariance + (1 - best) * jnp.diag(jnp.diag(covariance))


def _held_out(fit: Array, test: Array, keep: Array) -> Array:
    """Minus twice the Gaussian log likelihood of second moments `test` under `fit`, for each share kept."""
    deviation = jnp.sqrt(jnp.diag(fit))
    spread = jnp.outer(deviation, deviation)
    values, vectors = jnp.linalg.eigh(fit / spread)
    moment = jnp.sum(vectors * ((test / spread) @ vectors), axis=0)
    spectrum = keep[:, None] * jnp.maximum(values, 0.0) + (1 - keep[:, None])
    return jnp.sum(jnp.log(spectrum) + moment / spectrum, axis=1)
