"""What a tool for log Z is asked, and what it answers.

    TOOL(target)                set up once for a target
    run(seed) -> Estimate       one run: log E_{pi_0}[exp(-U)] of all energies of the target
    evidence(tool, target)      the same less log Z of the prior, where prior energies have one of their own

A target is seen as log pi_0(z) and -U(z) in unconstrained space. A likelihood that is called from outside of JAX is
`Counted`: compiled, batched where the tool batches, and counting its points.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import ebm_ppl as ebm


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One estimate of log Z, in nats.

    Attributes:
        std_error: what the run says of itself; None where a tool says nothing.
        evaluations: of the log likelihood, with or without its gradient.
        doubts: what the tool itself says against it, its warnings apart.
    """

    value: float
    std_error: float | None
    evaluations: float
    doubts: tuple[str, ...] = ()


Run = Callable[[int], Estimate]


def evidence(tool: Callable[[ebm.Target], Run], target: ebm.Target) -> Run:
    """The log evidence by a tool that integrates all energies: that of the whole less that of the prior's own."""
    phases = dict(target.phases())
    whole = tool(target)
    if "prior" not in phases:
        return whole
    prior = tool(phases["prior"])

    def run(seed: int) -> Estimate:
        both, before = whole(seed), prior(seed + 1_000_000)
        errors = [each.std_error for each in (both, before)]
        return Estimate(
            both.value - before.value,
            None if None in errors else math.hypot(*errors),
            both.evaluations + before.evaluations,
            both.doubts + before.doubts,
        )

    return run


def log_likelihood(target: ebm.Target) -> Callable[[jax.Array], jax.Array]:
    """-U, all energies added up."""
    return lambda z: -sum(target.energies(z).values())


def draws(key: jax.Array, target: ebm.Target, num: int) -> jax.Array:
    """Independent draws of the reference, (num, dim)."""
    return jax.vmap(target.sample_reference)(jax.random.split(key, num))


class Counted:
    """A function of one point for callers outside of JAX: compiled, batched, counting its points; NaN has no mass."""

    def __init__(self, function: Callable[[Any], jax.Array]):
        self.batch = jax.jit(jax.vmap(function))
        self.count = 0

    def __call__(self, points: Any) -> np.ndarray:
        """Of points along the leading axis, whose number is padded to a power of two, for fewer compilations."""
        num = len(jax.tree.leaves(points)[0])
        self.count += num
        size = 1 << (num - 1).bit_length()
        if size > num:
            points = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], size - num, axis=0)]), points)
        values = np.asarray(self.batch(points))[:num]
        return np.where(np.isnan(values), -np.inf, values)

    def counted(self) -> int:
        """The points since the last time that this was asked."""
        count, self.count = self.count, 0
        return count
