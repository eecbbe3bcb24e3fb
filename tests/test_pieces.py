"""A run in pieces: every part makes every step once, in order, whatever the size of a call; calls shrink to the end."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebm_ppl import parallel, pieces

LENGTH, CAPACITY = 500, 64


def _count_up(member, scale, limits):
    """A member that adds the numbers of its steps, and a record of them."""
    number, count = limits

    def body(i, carry):
        total, record = carry
        total = total + scale * (number + i)
        return total, record.at[i].set(total)

    total, record = jax.lax.fori_loop(0, count, body, (member, jnp.zeros(CAPACITY)))
    return total, {"total": record}


def _run(parts, length=LENGTH):
    return list(pieces.in_pieces(_count_up, parts, 10, length, CAPACITY, np.float64(0.5), mesh=None))


@pytest.mark.parametrize("num", [1, 4, 34])
def test_each_part_makes_each_step_once_and_in_order(num):
    starts = np.arange(num, dtype=float)
    parts = parallel.split(starts)
    made = _run(parts)
    for index, part in enumerate(parts):
        mine = [piece for piece in made if piece.index == index]
        assert [piece.start for piece in mine[1:]] == [piece.end for piece in mine[:-1]]
        assert (mine[0].start, mine[-1].end) == (0, LENGTH)
        total = np.concatenate([piece.record["total"] for piece in mine], axis=1)
        np.testing.assert_array_equal(total, part[:, None] + 0.5 * np.cumsum(10 + np.arange(LENGTH)))
        np.testing.assert_array_equal(mine[-1].part, total[:, -1])


def test_nothing_to_do():
    assert _run(parallel.split(np.zeros(2)), 0) == []


@pytest.mark.parametrize(("left", "seconds", "count"), [(1000, 1e-6, 1000), (1000, 1e-4, 500), (10**6, 1e-4, 1000)])
def test_a_call_makes_half_of_what_is_left_and_takes_neither_long_nor_short(left, seconds, count):
    assert pieces._count(left, seconds) == count


def test_steps_slower_than_the_longest_call_are_made_one_by_one():
    assert pieces._count(30, 5.0) == 1


def test_no_part_waits_for_another(monkeypatch):
    """A slow part is still at its first call when the others have made all of theirs."""
    two = parallel.split(np.zeros(2))
    real = parallel.caller

    def caller(program, num_parts, mesh):
        call = real(program, num_parts, mesh)

        def delayed(part, *shared):
            if float(part[0]) == 0 and next(first):
                time.sleep(1.0)
            return call(part, *shared)

        return delayed

    first = iter([True] + [False] * 100)
    monkeypatch.setattr(parallel, "caller", caller)
    monkeypatch.setattr(parallel, "_num_cores", lambda: 2)
    parallel._runners.cache_clear()
    order = [piece.index for piece in _run(two)]
    parallel._runners.cache_clear()
    slow = order[-1]
    assert order.index(slow) == order.count(1 - slow)


def test_an_error_of_a_call_is_raised_and_ends_the_run():
    real = pieces.in_pieces(_count_up, parallel.split(np.zeros(3)), 0, LENGTH, CAPACITY, np.float64(1), mesh=None)
    next(real)
    with pytest.raises(ZeroDivisionError):
        real.throw(ZeroDivisionError())
    assert list(real) == []
