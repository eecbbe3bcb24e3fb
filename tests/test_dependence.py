"""Which inputs an output depends on, read off the jaxpr."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebm_ppl.dependence import dependencies

A, B, C = jnp.array(1.0), jnp.arange(3.0), jnp.array(2.0)


def found(function, *args, **inputs):
    return {name: set(names) for name, names in dependencies(function, inputs, *args).items()}


@pytest.mark.quick
def test_paths_of_operations():
    def function(inputs):
        doubled = 2.0 * inputs["b"]
        return {
            "direct": inputs["a"],
            "through another": jnp.sin(doubled).sum() + inputs["a"],
            "constant": jnp.ones(3),
            "unused": jnp.zeros_like(inputs["b"]),
        }

    assert found(function, a=A, b=B, c=C) == {
        "direct": {"a"},
        "through another": {"a", "b"},
        "constant": set(),
        "unused": set(),
    }


def test_names_are_matched_whatever_their_order():
    assert found(lambda inputs: {"y": inputs["z"] + inputs["b"]}, z=A, b=C, a=B) == {"y": {"z", "b"}}


def test_pytrees_of_inputs_and_outputs():
    def function(inputs):
        return {"y": [inputs["net"]["weight"], (1.0, inputs["a"])], "other": {"deep": inputs["net"]["bias"]}}

    inputs = {"net": {"weight": B, "bias": A}, "a": C}
    assert {name: set(names) for name, names in dependencies(function, inputs).items()} == {
        "y": {"net", "a"},
        "other": {"net"},
    }


def test_further_arguments_are_of_no_interest():
    assert found(lambda inputs, x: {"y": inputs["a"] * x, "x": x}, B, a=A) == {"y": {"a"}, "x": set()}


@jax.jit
def inner(a, b):
    return 2 * a, b + 1


@jax.custom_jvp
def custom(a, b):
    return a * 2


@custom.defjvp
def custom_jvp(primals, tangents):
    return custom(*primals), 2 * tangents[0]


@jax.custom_vjp
def custom_reverse(a, b):
    return a * 3


custom_reverse.defvjp(lambda a, b: (a * 3, None), lambda _, g: (3 * g, None))


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda a, b: inner(a, b)[0], id="jit"),
        pytest.param(lambda a, b: jax.jit(inner)(a, b)[0], id="jit in jit"),
        pytest.param(custom, id="custom_jvp"),
        pytest.param(custom_reverse, id="custom_vjp"),
        pytest.param(lambda a, b: jax.checkpoint(inner)(a, b)[0], id="checkpoint"),
        pytest.param(lambda a, b: jax.vmap(inner, (None, 0))(a, b)[0], id="vmap"),
    ],
)
def test_calls_are_followed_inside(call):
    def function(inputs):
        return {"y": call(inputs["a"], inputs["b"])}

    assert found(function, a=A, b=B) == {"y": {"a"}}


@pytest.mark.parametrize(
    "loop",
    [
        pytest.param(lambda a, b: jax.lax.scan(lambda c, x: (c + x, c * a), 0.0, b)[1], id="scan"),
        pytest.param(lambda a, b: jax.lax.fori_loop(0, 3, lambda i, c: c + b[i] * a, 0.0), id="fori_loop"),
        pytest.param(lambda a, b: jax.lax.while_loop(lambda c: c < a, lambda c: c + 1 + b[0], 0.0), id="while"),
        pytest.param(lambda a, b: jax.lax.cond(a > 0, lambda: b, lambda: -b), id="cond"),
        pytest.param(lambda a, b: jnp.where(b > a, 1.0, 2.0), id="select"),
        pytest.param(lambda a, b: b[jnp.asarray(a, int)], id="index"),
    ],
)
def test_loops_branches_and_indices_depend_on_all_of_their_operands(loop):
    def function(inputs):
        return {"y": loop(inputs["a"], inputs["b"]), "other": inputs["c"]}

    assert found(function, a=A, b=B, c=C) == {"y": {"a", "b"}, "other": {"c"}}


def test_gradients_are_followed():
    def function(inputs):
        return {"y": jax.grad(lambda x: jnp.sum(x**2 * inputs["a"]))(inputs["b"])}

    assert found(function, a=A, b=B, c=C) == {"y": {"a", "b"}}


def test_abstract_inputs_are_enough():
    shape = jax.ShapeDtypeStruct((), np.float64)
    assert found(lambda inputs: {"y": inputs["a"] + 1}, a=shape) == {"y": {"a"}}
