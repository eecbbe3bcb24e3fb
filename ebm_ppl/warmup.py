"""Warm-up in windows, pooled over chains: one step size and one metric for all, from BlackJAX's own pieces.

    step size   dual averaging on each chain, averaged over the chains at the end of each stretch
    metric      inverse mass matrix `L L'` from the draws and gradients of a window (`metric.py`); windows double
    centring    where a sampler's metric is "auto", the coordinates that it is a metric of, from the same draws

With four chains a window carries four times the information, and trajectories of the chains agree better in length.

References:
    Carpenter et al. (2017), Stan; Hoffman and Gelman (2014), The No-U-Turn Sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.staged_adaptation import build_schedule
from blackjax.adaptation.step_size import dual_averaging_adaptation

from ebm_ppl.centring import Centring
from ebm_ppl.kernels import Metric, Tuning
from ebm_ppl.metric import estimator
from ebm_ppl.scale import Scale
from ebm_ppl.typing import Array

FAST, SLOW, WINDOW_END, FROZEN = range(4)
STRETCHES = 30, 40, 20
"""Steps before the first window, after the last one, and of the first window."""
DAMPING, DAMPING_DELAY = 0.2, 20
"""Four times and twice Stan's. The average of a step size that swings wide is too small: acceptance falls ever faster
as the step grows, so that swings about the step wanted accept too little, and a mean over chains keeps that bias."""


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
    metric_of = estimator(metric, dim)

    def init(dim: int) -> WarmupState:
        return WarmupState(jax.tree.map(jnp.asarray, da_init(1.0)), *metric_of.init(dim))

    def close(state: WarmupState) -> WarmupState:
        restarted = jax.tree.map(jnp.asarray, da_init(da_final(state.step_size)))
        return WarmupState(restarted, *metric_of.close(state.metric))

    def tuning(state: WarmupState) -> Tuning:
        return Tuning(da_final(state.step_size), state.scale)

    return Warmup(init, da_update, metric_of.add, close, tuning)


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


def halves(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The draws, (chain, draw, dim), of one half of the chains and of the other (of a single chain's halves)."""
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
