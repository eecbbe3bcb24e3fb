"""A long run of several parts, made in short calls of one compiled program, where no part waits for another.

    f(member, *shared, (number, count)) -> member, record       `count` steps, the first of which has that number
    for piece in in_pieces(f, parts, number, length, capacity, *shared): ...

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
import numpy as np

from ebm_ppl import parallel
from ebm_ppl.sharding import Mesh

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
    record: dict[str, np.ndarray]
    """Of the steps, each (member, step, ...)."""
    seconds: float
    """For each step."""

    @property
    def end(self) -> int:
        return self.start + next(iter(self.record.values())).shape[1]


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
    call, submit = parallel.caller(program, mesh), parallel.submitter(program, len(parts))

    def make(index: int, part: Any, start: int, count: int) -> Piece:
        begun = time.perf_counter()
        part, record = jax.block_until_ready(call(part, *shared, np.array([number + start, count])))
        record = {name: x[:, :count] for name, x in jax.device_get(record).items()}
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
