"""One function over many members: the parts, the same answers as one by one, and one trace whatever the data."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebm_ppl import parallel
from ebm_ppl.typing import OutOfMemoryError

TRACED_IN = []


def _walk(member, scale, name):
    """A few steps of a random walk, with a number of steps that depends on the member."""
    TRACED_IN.append((name, threading.current_thread()))
    key, steps = member
    start = jnp.zeros(2)
    end = jax.lax.fori_loop(
        0, steps, lambda i, x: x + scale * jax.random.normal(jax.random.fold_in(key, i), (2,)), start
    )
    return end, {"steps": steps}


def _members(num):
    return jax.random.split(jax.random.key(0), num), jnp.arange(num)


@pytest.mark.parametrize(("num", "parts"), [(1, 1), (4, 4), (16, 16), (17, 1), (40, 10)])
def test_parts_are_equal_and_whole(num, parts):
    split = parallel.split(_members(num))
    assert len(split) == parts
    assert {len(steps) for _, steps in split} == {num // parts}
    np.testing.assert_array_equal(np.concatenate([steps for _, steps in split]), np.arange(num))
    assert len(parallel.split(_members(num), most=num)) == num


@pytest.mark.parametrize("num", [1, 4, 17, 40])
def test_answers_are_those_of_each_member(num):
    keys, steps = _members(num)
    results = parallel.over(_walk, parallel.split((keys, steps)), np.float64(0.5), "answers")
    ends = np.concatenate([end for end, _ in results])
    one_by_one = [_walk((key, step), 0.5, "by hand")[0] for key, step in zip(keys, steps, strict=True)]
    np.testing.assert_allclose(ends, one_by_one, rtol=1e-12)
    np.testing.assert_array_equal(np.concatenate([record["steps"] for _, record in results]), steps)


def test_traced_once_and_never_in_a_thread():
    """NumPyro's handlers are one stack for the process: two threads that trace would mix up their models."""
    parts = parallel.split(_members(8))
    for scale in (0.5, 0.7, 0.9):
        parallel.over(_walk, parts, jnp.asarray(scale), "once")
    traces = [thread for name, thread in TRACED_IN if name == "once"]
    assert traces == [threading.main_thread()]


def test_shapes_are_enough_to_prepare():
    keys, steps = parallel.split(_members(2))[0]
    shapes = jax.ShapeDtypeStruct(keys.shape, keys.dtype), jax.ShapeDtypeStruct(steps.shape, steps.dtype)
    prepared = parallel.prepare_over(_walk, shapes, jax.ShapeDtypeStruct((), np.float64), "prepared")
    assert prepared is parallel.prepare_over(_walk, (keys, steps), np.float64(0.5), "prepared")


def _power(scale, exponent, name):
    TRACED_IN.append((name, threading.current_thread()))
    return jnp.arange(3) * scale**exponent


def test_a_program_that_runs_once():
    shapes = parallel.prepare_once(_power, jax.ShapeDtypeStruct((), np.float64), 2, "power").shapes
    assert (shapes.shape, shapes.dtype) == ((3,), np.float64)
    for scale in (2.0, 3.0):
        np.testing.assert_array_equal(parallel.once(_power, np.float64(scale), 2, "power"), np.arange(3) * scale**2)
    assert [thread for name, thread in TRACED_IN if name == "power"] == [threading.main_thread()]


def test_errors_of_a_trace_are_raised():
    with pytest.raises(TypeError, match="unhashable"):
        parallel.over(_walk, parallel.split(_members(2)), 0.5, ["a list is no setting", object(), {1}])


def _shifted(member, data):
    return member + jnp.sum(data)


def test_memory_that_parts_share_counts_once():
    parts, data = parallel.split(np.zeros(16)), np.ones(10_000)
    program = parallel.prepare_over(_shifted, parts[0], data)
    assert data.nbytes < parallel.num_bytes(program, 16) < 1.5 * data.nbytes


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "_room", lambda: 1000)
    with pytest.raises(OutOfMemoryError):
        parallel.once(_shifted, np.zeros(1), np.ones(10_000))
    with pytest.raises(OutOfMemoryError):
        parallel.over(_shifted, [np.zeros(1)], np.ones(10_000))
