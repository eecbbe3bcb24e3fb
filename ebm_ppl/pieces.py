"""A long run of several parts, made in short calls of one compiled program, where no part waits for another.

    f(member, *shared, (number, count)) -> member, record       `count` steps, the first of which has that number
    return loop(step, member, limits, capacity)                 how f ends, whose record has room for a capacity
    for piece in in_pieces(f, parts, number, length, capacity, *shared):
        whole = written(whole, piece, len(parts), length)       one record of all members and steps

Calls take a short time, so that the host can show how the run goes and stop it, and ever less towards the end, so that
no core is idle for long: cores differ in speed, and parts in the time that they take.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl import parallel
from ebm_ppl.sharding import Mesh
from ebm_ppl.typing import Array

FIRST = 100
"""Most steps of the first call, when nothing is known of the time that they take."""
SHORTEST, LONGEST = 0.01, 0.1
"""Seconds of a call, which costs about half a millisecond beside its steps."""


class Piece(NamedTuple):
    """What one call has made."""

    index: int
    """Of the part."""
    part: Any
    """As it is now."""
    start: int
    """How many steps it had made before."""
    record: Any
    """Of the steps, a pytree of arrays (member, step, ...)."""
    seconds: float
    """For each step."""

    @property
    def end(self) -> int:
        return self.start + jax.tree.leaves(self.record)[0].shape[1]


def in_pieces(
    function: Callable, parts: list[Any], number: int, length: int, capacity: int, *shared: Any, mesh: Mesh | None
) -> Iterator[Piece]:
    """Takes each part through `length` steps, and gives what each call has made as soon as it is there.

    Args:
        function, shared, mesh: as for `parallel.over`; see the module docstring.
        number: of the first step.
        capacity: most steps that a record has room for.
    """
    program = parallel.prepare_over(function, parts[0], *shared, np.array([number, 0]), mesh=mesh)
    call, submit = parallel.caller(program, len(parts), mesh), parallel.submitter(program, len(parts))

    def make(index: int, part: Any, start: int, count: int) -> Piece:
        begun = time.perf_counter()
        part, record = jax.block_until_ready(call(part, *shared, np.array([number + start, count])))
        record = jax.tree.map(lambda x: x[:, :count], jax.device_get(record))
        return Piece(index, part, start, record, (time.perf_counter() - begun) / count)

    first = min(FIRST, length, capacity)
    pending: set[Future] = {submit(make, index, part, 0, first) for index, part in enumerate(parts) if first}
    try:
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            pieces = [future.result() for future in done]
            for piece in pieces:
                if piece.end < length:
                    count = min(_count(length - piece.end, piece.seconds), capacity)
                    pending.add(submit(make, piece.index, piece.part, piece.end, count))
            yield from pieces
    finally:
        for future in pending:
            future.cancel()


def _count(left: int, seconds: float) -> int:
    """Steps of the next call: half of those that are left, as far as they take neither too short nor too long."""
    shortest, longest = (math.ceil(limit / seconds) for limit in (SHORTEST, LONGEST))
    return min(max(shortest, min(math.ceil(left / 2), longest)), left)


def loop(step: Callable, member: Any, limits: Array, capacity: int) -> tuple[Any, Any]:
    """A member after `count` steps from number `first` on, and their record with room for more; inside a function of
    `in_pieces`.

    Args:
        step: `(member, number) -> (member, record of the step)`.
        limits: `first` and `count`.
        capacity: most steps that the record has room for.
    """
    first, count = limits
    step = jax.jit(step)  # so that it is traced once, for its shapes and for the loop

    def body(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        member, records = carry
        member, record = step(member, first + i)
        return member, jax.tree.map(lambda whole, x: whole.at[i].set(x), records, record)

    _, shapes = jax.eval_shape(step, member, first)
    empty = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)
    return jax.lax.fori_loop(0, count, body, (member, empty))


def written(whole: Any, piece: Piece, num_parts: int, length: int) -> Any:
    """The record of a run, (member, step, ...), after that of a piece is written into it; `whole` is None at first."""
    if whole is None:
        whole = jax.tree.map(lambda x: np.empty((num_parts * len(x), length, *x.shape[2:]), x.dtype), piece.record)

    def write(room: np.ndarray, x: np.ndarray) -> None:
        room[piece.index * len(x) :][: len(x), piece.start : piece.end] = x

    jax.tree.map(write, whole, piece.record)
    return whole
