"""The compiler's settings: made in time, made once, and chosen by what a program holds."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebm_ppl import xla

OLDER = {"xla_cpu_use_fusion_emitters": False}
LOOP = """
    {before}
    import ebm_ppl
    import jax
    import jax.numpy as jnp

    loop = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: 0.5 * jnp.sin(x[::-1] * i), x))
    print("xla_cpu_small_call" in loop.lower(jnp.ones(1000), 5).compile().as_text())
"""


def test_a_small_loop_is_compiled_as_one_call(run_in_float32):
    assert run_in_float32(LOOP.format(before="")).strip() == "True"


def test_options_of_the_user_are_left_alone(run_in_float32):
    own = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1024"
    before = f"import os; os.environ['XLA_FLAGS'] = '{own}'"
    assert run_in_float32(LOOP.format(before=before)).strip() == "False"


def test_the_setting_is_made_once():
    before = os.environ["XLA_FLAGS"]
    xla.compile_small_loops()
    assert os.environ["XLA_FLAGS"] == before and before.count("xla_backend_extra_options") == 1


LEVEL = "xla_backend_optimization_level"
FEW, MANY = np.arange(50) % 10, np.arange(xla.SMALL_SCATTER + 1) % 10


@pytest.mark.parametrize(
    ("log_density", "expected"),
    [
        (lambda z: jnp.sum(z[FEW] ** 2), OLDER),
        (lambda z: jnp.sum(z[MANY] ** 2), {}),
        (lambda z: jnp.sum(z**2), {}),
        (lambda z: jnp.sum(z[FEW] ** 2) + jnp.sum(jnp.outer(z, z) @ jnp.outer(z, z)), {}),
        (lambda z: jnp.sum(z[FEW] ** 2) + jnp.sort(z)[0], {}),
    ],
    ids=["gather", "large gather", "no gather", "gather and product", "gather and sort"],
)
def test_options_follow_what_a_program_holds(log_density, expected):
    program = jax.jit(lambda z: jax.lax.fori_loop(0, 3, lambda i, z: z - 0.1 * jax.grad(log_density)(z), z))
    jaxpr = program.trace(jnp.ones(10)).jaxpr.jaxpr
    assert xla.compiler_options(jaxpr, hurry=False) == expected | {LEVEL: xla.EFFORT}
    assert xla.compiler_options(jaxpr, hurry=True) == expected | {LEVEL: xla.LEAST_EFFORT}


def test_both_emitters_compute_the_same_gradient():
    group = np.arange(60) % 10
    program = jax.jit(jax.grad(lambda z: jnp.sum(jnp.sin(z[group]) * jnp.arange(60.0)))).lower(jnp.ones(10))
    one, other = (program.compile(options)(jnp.linspace(0, 1, 10)) for options in ({}, OLDER))
    np.testing.assert_allclose(one, other, rtol=1e-12)
