"""Energies as callables: values and gradients against closed forms, operators, and what is refused."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ebm_ppl
from ebm_ppl.energy import as_energy_values, quickened

PRECISION = jnp.array([[2.0, 0.5], [0.5, 1.0]])
MEAN = jnp.array([1.0, -1.0])
X = jnp.array([0.3, 0.7])


def quadratic(x):
    return 0.5 * (x - MEAN) @ PRECISION @ (x - MEAN)


def square(x):
    return jnp.sum(x**2)


QUADRATIC = ebm_ppl.QuadraticEnergy(PRECISION, MEAN)
SQUARE = ebm_ppl.FunctionEnergy(square)

CLOSED_FORMS = {
    "quadratic": (QUADRATIC, quadratic),
    "function": (SQUARE, square),
    "sum": (QUADRATIC + SQUARE, lambda x: quadratic(x) + square(x)),
    "sum with a plain callable": (SQUARE + quadratic, lambda x: quadratic(x) + square(x)),
    "a plain callable on the left": (quadratic + SQUARE, lambda x: quadratic(x) + square(x)),
    "scaled": (2.5 * QUADRATIC, lambda x: 2.5 * quadratic(x)),
    "scaled from the right": (QUADRATIC * 2.5, lambda x: 2.5 * quadratic(x)),
    "nested": (0.5 * (QUADRATIC + 3.0 * SQUARE), lambda x: 0.5 * quadratic(x) + 1.5 * square(x)),
    "sum of a list": (sum([QUADRATIC, 2.0 * QUADRATIC]), lambda x: 3 * quadratic(x)),
    "three terms": (ebm_ppl.SumEnergy((square, square, QUADRATIC)), lambda x: 2 * square(x) + quadratic(x)),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_value_and_gradient_equal_the_closed_form(name):
    energy, exact = CLOSED_FORMS[name]
    np.testing.assert_allclose(energy(X), exact(X), rtol=1e-14)
    np.testing.assert_allclose(jax.grad(energy)(X), jax.grad(exact)(X), rtol=1e-13)


def test_quadratic_in_one_dimension_with_a_scalar_mean():
    energy = ebm_ppl.QuadraticEnergy(jnp.array([[4.0]]), 1.0)
    np.testing.assert_allclose(energy(jnp.array([3.0])), 8.0)


def test_a_network_is_one_smooth_number():
    energy = ebm_ppl.MLPEnergy(jax.random.key(0), 3, width=8)
    x = jnp.array([0.1, -0.2, 0.3])
    assert energy(x).shape == ()
    other = ebm_ppl.MLPEnergy(jax.random.key(1), 3, width=8)
    assert energy(x) != other(x)
    direction, step = jnp.array([1.0, 2.0, -1.0]), 1e-6
    slope = (energy(x + step * direction) - energy(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, jax.grad(energy)(x) @ direction, rtol=1e-6)


def test_parameters_are_leaves_and_new_values_do_not_retrace():
    traces = []

    @eqx.filter_jit
    def evaluate(energy, x):
        traces.append(1)
        return energy(x)

    for scale in (1.0, 2.0, 3.0):
        energy = jnp.asarray(scale) * ebm_ppl.QuadraticEnergy(scale * PRECISION, MEAN)
        np.testing.assert_allclose(evaluate(energy, X), scale**2 * quadratic(X), rtol=1e-13)
    assert len(traces) == 1


def test_gradient_with_respect_to_the_parameters():
    gradient = eqx.filter_grad(lambda energy: energy(X))(QUADRATIC)
    np.testing.assert_allclose(gradient.precision, 0.5 * jnp.outer(X - MEAN, X - MEAN), rtol=1e-13)
    np.testing.assert_allclose(gradient.mean, -PRECISION @ (X - MEAN), rtol=1e-13)


def test_negative_factor_is_refused():
    with pytest.raises(ebm_ppl.EnergyError, match="non-negative"):
        -1.0 * SQUARE
    assert (0.0 * SQUARE)(X) == 0.0


def test_a_factor_may_be_traced():
    np.testing.assert_allclose(jax.jit(lambda factor: (factor * SQUARE)(X))(2.0), 2 * square(X))


def test_the_base_class_is_abstract():
    with pytest.raises(NotImplementedError):
        ebm_ppl.Energy()(X)


@pytest.mark.parametrize("values", [jnp.ones(3), jnp.ones((1,)), jnp.ones((2, 1))])
def test_wrong_shape_is_an_error_with_both_shapes(values):
    with pytest.raises(ebm_ppl.EnergyShapeError) as error:
        as_energy_values(values, (), "The energy 'f'")
    assert str(values.shape) in str(error.value) and "expected ()" in str(error.value)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float16, jnp.bfloat16])
def test_coarse_dtypes_are_cast_with_a_warning(dtype):
    with pytest.warns(ebm_ppl.EnergyWarning, match=jnp.dtype(dtype).name):
        values = as_energy_values(jnp.ones((), dtype), (), "The energy 'f'")
    assert values.dtype == jnp.float64


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_floats_pass_as_they_are(dtype):
    assert as_energy_values(jnp.ones((2,), dtype), (2,), "f").dtype == dtype


@pytest.mark.parametrize("dtype", [bool, complex])
def test_booleans_and_complex_numbers_are_refused(dtype):
    with pytest.raises(ebm_ppl.EnergyError, match="dtype"):
        as_energy_values(jnp.ones((), dtype), (), "The energy 'f'")


def test_a_constant_factor_is_checked_inside_jit_too():
    np.testing.assert_allclose(jax.jit(lambda x: (2.0 * SQUARE)(x))(X), 2 * square(X))
    with pytest.raises(ebm_ppl.EnergyError, match="non-negative"):
        jax.jit(lambda x: (np.float64(-2.0) * SQUARE)(x))(X)


def test_a_number_is_no_energy():
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + ebm_ppl.FunctionEnergy(jnp.square)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_quickened_network_is_the_same_function(use_bias):
    """Only layers of few inputs and more outputs are changed."""
    network = eqx.nn.MLP(2, 3, 8, 2, jnp.tanh, use_bias=use_bias, key=jax.random.key(0))

    def changed(network):
        return [type(layer) is not eqx.nn.Linear for layer in quickened(network).layers]

    assert changed(network) == [True, False, False]
    assert not any(changed(eqx.nn.MLP(65, 100, 65, 1, key=jax.random.key(0))))
    points = jax.random.normal(jax.random.key(1), (5, 2))

    @eqx.filter_jit
    @eqx.filter_grad
    def slopes(network, change):
        """In the weights, of slopes in the points."""
        slope = jax.vmap(jax.jacobian(change(network)))(points)
        return jnp.sum(slope**2)

    for ours, theirs in zip(*(jax.tree.leaves(slopes(network, x)) for x in (quickened, lambda x: x)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
