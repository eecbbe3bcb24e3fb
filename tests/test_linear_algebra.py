"""Batches of matrices in turn: the same answers whatever holds them, and no program that waits for itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import solve_triangular

from ebm_ppl import parallel
from ebm_ppl.linear_algebra import matrix_by_matrix, may_wait_forever, num_batches

MATRICES = np.random.default_rng(0).normal(size=(5, 4, 4)) + 8 * np.eye(4)
COVARIANCES = MATRICES @ MATRICES.transpose(0, 2, 1)


@jax.custom_jvp
def _with_a_rule(x):
    return jnp.linalg.cholesky(x)


_with_a_rule.defjvp(lambda primals, tangents: (_with_a_rule(*primals), tangents[0]))


def _while_it_is_large(x):
    """In another number of rounds for each matrix."""
    smaller = lambda x: 0.9 * jnp.linalg.inv(jnp.linalg.inv(x))  # noqa: E731
    return jax.lax.while_loop(lambda x: jnp.linalg.cholesky(x)[0, 0] > 1, smaller, x)


def _while_not(x):
    return jax.lax.while_loop(lambda x: False, jnp.linalg.cholesky, x)


def _on_this_platform(x):
    return jax.lax.platform_dependent(x, tpu=lambda x: jnp.linalg.inv(x), default=jnp.linalg.cholesky)


def _scanned(x):
    def step(carry, shift):
        return carry + jnp.linalg.cholesky(x + shift * jnp.eye(4)), jnp.linalg.eigvalsh(carry + carry.T)

    return jax.lax.scan(step, jnp.zeros((4, 4)), jnp.arange(3.0), reverse=True)


def _either(x):
    return jax.lax.cond(jnp.sum(x) > 10, jnp.linalg.cholesky, lambda x: jnp.linalg.svd(x)[1] * x, x)


def _whole_batch_decides(x):
    """A condition that is no batch: a `cond` and not a `select` in the program."""
    return jax.lax.cond(jnp.sum(x) > 10, jnp.linalg.cholesky, lambda x: 2 * x, x)


def _tridiagonal(x):
    return jax.lax.linalg.tridiagonal_solve(0.1 * x[0], 8 + x[1], 0.1 * x[2], x)


CASES = {
    "cholesky": jnp.linalg.cholesky,
    "eigh": jnp.linalg.eigh,
    "eig": jnp.linalg.eigvals,
    "qr": jnp.linalg.qr,
    "slogdet": jnp.linalg.slogdet,
    "solve": lambda x: jnp.linalg.solve(x, jnp.arange(4.0)),
    "triangular solve": lambda x: solve_triangular(x, jnp.arange(4.0), lower=True),
    "gradient": jax.grad(lambda x: jnp.sum(jnp.linalg.inv(x)) + jnp.linalg.slogdet(x)[1]),
    "two batch axes": lambda x: jnp.linalg.cholesky(x + jnp.arange(3.0)[:, None, None] * jnp.eye(4)),
    "fft": lambda x: jnp.fft.fft(x).real,
    "tridiagonal": _tridiagonal,
    "call": jax.jit(jnp.linalg.cholesky),
    "checkpoint": jax.checkpoint(jnp.linalg.cholesky),
    "custom rule": _with_a_rule,
    "while": _while_it_is_large,
    "while, never": _while_not,
    "platform": _on_this_platform,
    "checkpoint, differentiated": jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.linalg.cholesky(x)))),
    "scan": _scanned,
    "cond, as a select": _either,
}


@pytest.mark.parametrize("name", CASES)
def test_the_answers_of_a_batch(name):
    batch = jax.vmap(CASES[name])
    assert num_batches(jax.make_jaxpr(batch)(COVARIANCES).jaxpr) > 0
    in_turn = jax.jit(matrix_by_matrix(batch))
    assert not may_wait_forever(in_turn.trace(COVARIANCES).jaxpr.jaxpr)
    for one, expected in zip(jax.tree.leaves(in_turn(COVARIANCES)), jax.tree.leaves(batch(COVARIANCES)), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-10, atol=1e-12)


def test_a_branch_with_a_batch():
    in_turn = jax.jit(matrix_by_matrix(_whole_batch_decides))
    for x in (COVARIANCES, -COVARIANCES):
        assert not may_wait_forever(in_turn.trace(x).jaxpr.jaxpr)
        np.testing.assert_allclose(in_turn(x), _whole_batch_decides(x), rtol=1e-12)


def test_trees_and_what_has_no_batches():
    def function(tree, scale):
        return {"inverse": jnp.linalg.inv(tree["x"]) * scale, "scale": scale}

    results = matrix_by_matrix(function)({"x": MATRICES[0]}, 2.0)
    np.testing.assert_allclose(results["inverse"], 2 * np.linalg.inv(MATRICES[0]))
    assert float(results["scale"]) == 2.0
    assert num_batches(jax.make_jaxpr(jnp.linalg.inv)(MATRICES[0]).jaxpr) == 0


def test_what_may_still_wait():
    """Transforms in two dimensions are in several threads by themselves."""
    transform = matrix_by_matrix(jax.vmap(jnp.fft.fft2))
    assert may_wait_forever(jax.make_jaxpr(transform)(MATRICES).jaxpr)


def _two_at_a_time(x, factors):
    """Two batches of triangular solves at a time, large enough for JAX to share each out among its threads."""

    def body(_, pair):
        first, second = (0.99 * solve_triangular(factors, x, lower=True) for x in pair)
        return first + 0 * jnp.sum(second), second + 0 * jnp.sum(first)

    return jax.lax.fori_loop(0, 300, body, (x, x + 1))


WOULD_HANG = """
import jax.numpy as jnp, numpy as np
from ebm_ppl import parallel
from test_linear_algebra import _two_at_a_time
factors, x = jnp.ones((4, 1, 1)) * jnp.eye(10), jnp.ones((4, {parts}, 10, 1000))
results = parallel.over(_two_at_a_time, [x] if {together} else parallel.split(x), factors)
np.testing.assert_allclose(results[-1][1], 2 * 0.99**300, rtol=1e-3)
"""


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="threads are for the CPU")
@pytest.mark.parametrize(("parts", "together"), [(4, False), (4, True)])
def test_no_program_waits_for_itself_or_for_another(parts, together):
    """As a batch, by one thread or by two at a time, this program never ends on two cores."""
    source = WOULD_HANG.format(parts=parts, together=together)
    subprocess.run([sys.executable, "-c", source], cwd=Path(__file__).parent, check=True, timeout=120)


def _one_batch(member):
    return jnp.linalg.cholesky(jnp.eye(3) + member)


def _many_batches(member):
    return [_one_batch(k * member) for k in range(os.cpu_count() or 1)]


@pytest.mark.parametrize(
    ("function", "num", "in_threads"), [(_one_batch, 4, True), (_one_batch, 40, False), (_many_batches, 40, True)]
)
def test_what_may_run_in_threads(function, num, in_threads, monkeypatch):
    """Parts of several members make a batch of the linear algebra of each, which alone may stay one."""
    monkeypatch.setattr(parallel, "_num_cores", lambda: max(2, os.cpu_count() or 1))
    part = parallel.split(np.zeros(num))[0]
    assert parallel.prepare_over(function, part).in_threads == in_threads
