"""Energies as callables: `U(x)` takes **one** event and returns one number, in nats; low where probability is high.

Any callable on one event is an energy: a function, a lambda, an `equinox.Module`. The classes here are for what a
plain lambda cannot do: to be a pytree whose parameters are leaves (so that they can be trained, batched and changed
without a new trace), and to be added and scaled.

    sum_k U_k           U_1 + U_2                 -> `SumEnergy`
    beta U              beta * U                  -> `ScaledEnergy`
    1/2 (x-m)' P (x-m)                            -> `QuadraticEnergy`
    a small network                               -> `MLPEnergy`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ebm_ppl.typing import Array, ArrayLike, EnergyError, EnergyShapeError, EnergyWarning, PRNGKey


class Energy(eqx.Module):
    """An energy that can be added to another and scaled; subclasses define `__call__(x) -> scalar`."""

    def __call__(self, x: Array) -> Array:
        raise NotImplementedError

    def __add__(self, other: Callable[[Array], Array]) -> SumEnergy:
        return SumEnergy((self, other))

    def __mul__(self, factor: ArrayLike) -> ScaledEnergy:
        return ScaledEnergy(self, factor)

    def __radd__(self, other: Callable[[Array], Array] | int) -> Energy:
        """From the right; `sum` starts from the number zero."""
        if callable(other):
            return SumEnergy((other, self))
        return self if other == 0 else NotImplemented

    __rmul__ = __mul__


class FunctionEnergy(Energy):
    """A plain callable with the operators of `Energy`: `FunctionEnergy(f) + 2.0 * other`."""

    function: Callable[[Array], Array]

    def __call__(self, x: Array) -> Array:
        return self.function(x)


class SumEnergy(Energy):
    """`U(x) = sum_k U_k(x)`: the product of the densities."""

    terms: tuple[Callable[[Array], Array], ...]

    def __call__(self, x: Array) -> Array:
        total = self.terms[0](x)
        for term in self.terms[1:]:
            total = total + term(x)
        return total


class ScaledEnergy(Energy):
    """`U(x) = factor * U_1(x)`; a factor is an inverse temperature, so negative ones are refused.

    Raises:
        EnergyError: where the factor is a concrete negative number.
    """

    term: Callable[[Array], Array]
    factor: ArrayLike

    def __check_init__(self):
        check_inverse_temperature(self.factor, "ScaledEnergy")

    def __call__(self, x: Array) -> Array:
        return jnp.asarray(self.factor) * self.term(x)


class QuadraticEnergy(Energy):
    """`U(x) = 1/2 (x - mean)' precision (x - mean)`.

    Args:
        precision: shape (d, d), symmetric and positive semi-definite.
        mean: shape (d,) or scalar.
    """

    precision: Array
    mean: ArrayLike = 0.0

    def __call__(self, x: Array) -> Array:
        residual = x - self.mean
        return 0.5 * residual @ self.precision @ residual


class MLPEnergy(Energy):
    """A multilayer perceptron with one output; smooth activations keep its gradient continuous.

    Args:
        key: draws the weights.
        dim: length of the event vector.
        width: units in each hidden layer.
        depth: number of hidden layers.
        activation: smooth function, softplus by default.
    """

    network: eqx.nn.MLP

    def __init__(
        self,
        key: PRNGKey,
        dim: int,
        width: int = 32,
        depth: int = 2,
        activation: Callable[[Array], Array] = jax.nn.softplus,
    ):
        self.network = quickened(eqx.nn.MLP(dim, "scalar", width, depth, activation, key=key))

    def __call__(self, x: Array) -> Array:
        return self.network(x)


FEW = 64
"""Inputs of a linear layer, as measured with batches of 128 and of 1280 points."""


class _Widening(eqx.nn.Linear):
    """A linear layer of few inputs and more outputs.

    The gradient of its weights is `slopes' points` of slopes[batch, outputs] and points[batch, inputs]. XLA multiplies
    those on the CPU by way of a transpose of the larger one, which takes five to twelve times as long as `points'
    slopes` where two inputs have 128 outputs, four times where 16 have 256, and would make the former of the latter,
    but for the barrier. Where inputs are many the products are the longer part, and suffer from the barrier.
    """

    def __init__(self, layer: eqx.nn.Linear):
        for name, value in vars(layer).items():
            setattr(self, name, value)

    def __call__(self, x: Array, *, key: PRNGKey | None = None) -> Array:
        y = x @ jax.lax.optimization_barrier(self.weight.T)
        return y if self.bias is None else y + self.bias


def quickened(network: Any) -> Any:
    """The same function, with linear layers whose gradient in the weights takes less time for a batch of points."""

    def quicker(layer: Any) -> Any:
        if type(layer) is not eqx.nn.Linear:
            return layer
        inputs, outputs = layer.in_features, layer.out_features
        if not (isinstance(inputs, int) and isinstance(outputs, int)):
            return layer
        return _Widening(layer) if inputs < outputs and inputs <= FEW else layer

    return jax.tree.map(quicker, network, is_leaf=lambda node: isinstance(node, eqx.nn.Linear))


def check_inverse_temperature(beta: Any, source: str) -> None:
    """Refuses a concrete negative factor of an energy: the density would be tilted the other way."""
    known = isinstance(beta, (int, float, np.ndarray, np.generic, jax.Array)) and not isinstance(beta, jax.core.Tracer)
    if known and np.any(np.asarray(beta) < 0):
        raise EnergyError(f"{source} is scaled by a negative number, {beta}; give a non-negative factor.")


def as_energy_values(values: Any, expected_shape: tuple[int, ...], source: str) -> Array:
    """Checks what an energy returned: a floating-point array of `expected_shape`.

    Args:
        values: what the user's energy gave.
        expected_shape: one number for each event, so `()` for a single one.
        source: how to name the energy in a message, for example `"energy_factor 'smooth'"`.

    Raises:
        EnergyShapeError: with both shapes.
        EnergyError: for booleans and complex numbers, which are no energies.
    """
    values = jnp.asarray(values)
    if values.shape != expected_shape:
        raise EnergyShapeError(
            f"{source} has shape {values.shape}; expected {expected_shape}. An energy is one number for each event: "
            "sum over the dimensions of an event, and let `numpyro.plate` or the base distribution's batch shape "
            "declare independent ones."
        )
    if jnp.issubdtype(values.dtype, jnp.complexfloating) or values.dtype == jnp.bool_:
        raise EnergyError(f"{source} has dtype {values.dtype}; an energy is a real number in nats.")
    if not jnp.issubdtype(values.dtype, jnp.floating) or jnp.finfo(values.dtype).bits < 32:
        wanted = jnp.result_type(float)
        warnings.warn(
            f"{source} has dtype {values.dtype}, cast to {wanted}; half precision and integers lose gradients.",
            EnergyWarning,
            stacklevel=3,
        )
        values = values.astype(wanted)
    return values
