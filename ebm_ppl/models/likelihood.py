"""What a decoder's output says of an event: the distribution p(x | z), from `num_outputs` numbers.

    bits         x_i ~ Bernoulli(logistic(o_i))                  `BernoulliLikelihood`
    numbers      x_i ~ Normal(o_i, s)                            `GaussianLikelihood`, s learned or given
    categories   x_i ~ Categorical(softmax(o_i1 ... o_iC))       `CategoricalLikelihood`

Each is a function of outputs of shape (*batch, num_outputs), and gives a NumPyro distribution with that batch shape,
whose event is all of x: elements are independent given z.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from paramax import NonTrainable, unwrap

from ebm_ppl.typing import Array, ArrayLike, EnergyError, EnergyShapeError


class Likelihood(eqx.Module):
    """p(x | z) as a function of a decoder's outputs; see the module docstring."""

    event_shape: tuple[int, ...] = eqx.field(static=True)
    """Of x."""

    @property
    def num_outputs(self) -> int:
        """Numbers that it takes for an event."""
        return math.prod(self.event_shape)

    def __call__(self, outputs: Array) -> Any:
        raise NotImplementedError

    def _of_elements(self, outputs: Array, *trailing: int) -> Array:
        """Outputs in the shape of an event, behind their batch."""
        return outputs.reshape(*outputs.shape[:-1], *self.event_shape, *trailing)


class BernoulliLikelihood(Likelihood):
    """Bits, or shades of grey from 0 to 1 as probabilities of bits, which have no density: logits are the outputs.

    Args:
        event_shape: of x.
    """

    def __call__(self, outputs: Array) -> dist.Distribution:
        return dist.Bernoulli(logits=self._of_elements(outputs)).to_event(len(self.event_shape))


class GaussianLikelihood(Likelihood):
    """Numbers with normal noise around the outputs.

    Args:
        event_shape: of x.
        scale: standard deviation, in units of the data: one number for all elements, or one for each, of shape
            `event_shape`; where it is learned, what it starts from.
        is_learned: whether training moves it.

    Raises:
        EnergyError: for a scale that is not positive.
        EnergyShapeError: for scales of another shape.
    """

    log_scale: Any

    def __init__(self, event_shape: tuple[int, ...], scale: ArrayLike = 1.0, is_learned: bool = True):
        if np.shape(scale) not in ((), event_shape):
            raise EnergyShapeError(f"scale has shape {np.shape(scale)}; expected one number, or {event_shape}.")
        if not np.all(np.asarray(scale) > 0):
            raise EnergyError(f"scale is a positive standard deviation; got {scale}.")
        self.event_shape = event_shape
        log_scale = jnp.log(jnp.asarray(scale, jnp.result_type(float)))
        self.log_scale = log_scale if is_learned else NonTrainable(log_scale)

    @property
    def scale(self) -> Array:
        return jnp.exp(unwrap(self.log_scale))

    def __call__(self, outputs: Array) -> dist.Distribution:
        return dist.Normal(self._of_elements(outputs), self.scale).to_event(len(self.event_shape))


class CategoricalLikelihood(Likelihood):
    """Categories 0 .. num_classes - 1, whose logits are the outputs.

    Args:
        event_shape: of x.
        num_classes: C, of each element.

    Raises:
        EnergyError: for less than two classes.
    """

    num_classes: int = eqx.field(static=True)

    def __check_init__(self):
        if self.num_classes < 2:
            raise EnergyError(f"num_classes is 2 at least; got {self.num_classes}.")

    @property
    def num_outputs(self) -> int:
        return math.prod(self.event_shape) * self.num_classes

    def __call__(self, outputs: Array) -> dist.Distribution:
        elements: Any = dist.Categorical(logits=self._of_elements(outputs, self.num_classes))
        return elements.to_event(len(self.event_shape))
