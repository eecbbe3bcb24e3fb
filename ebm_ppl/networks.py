"""Networks for images and classifiers as energies.

    U(x) = f(x)                          `ConvEnergy`: f a convolutional network with one output
    U(x) = -log sum_y exp f(x)[y]        `JointEnergy`: a classifier, p(y | x) proportional to exp f(x)[y], read as the
                                         energy of what it classifies: p(x, y) is proportional to exp f(x)[y]
    W / max(1, |W| / bound)              `SpectralNorm`: |W| the largest singular value of each layer, so that a network
                                         of L layers has a slope of bound^L at most

References:
    Grathwohl, Wang, Jacobsen, Duvenaud, Norouzi and Swersky (2020), Your classifier is secretly an energy based model
    and you should treat it like one; Miyato, Kataoka, Koyama and Yoshida (2018), Spectral normalization for generative
    adversarial networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.energy import Energy
from ebm_ppl.typing import Array, EnergyError, EnergyShapeError, PRNGKey


class ConvNetwork(eqx.Module):
    """Convolutions of 3 x 3 pixels, each of which halves both sides of an image, and a linear map of what is left.

    It has the signature of Equinox's layers, and may stand in a `Sequential`; its key is not used.

    Args:
        key: draws the weights.
        shape: of an image: (height, width), or (channels, height, width).
        channels: of each convolution.
        num_outputs: of the linear map: a scalar, or so many.
        activation: smooth function; softplus by default.
    """

    convolutions: tuple[eqx.nn.Conv2d, ...]
    head: eqx.nn.Linear
    activation: Callable[[Array], Array]
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKey,
        shape: tuple[int, ...],
        channels: tuple[int, ...] = (16, 32),
        num_outputs: int | Literal["scalar"] = "scalar",
        activation: Callable[[Array], Array] = jax.nn.softplus,
    ):
        if len(shape) not in (2, 3) or not channels:
            raise EnergyError(
                f"An image has shape (height, width) or (channels, height, width), and a network one convolution at "
                f"least; got {shape} and channels {channels}."
            )
        *keys, key_head = jax.random.split(key, len(channels) + 1)
        depths = (shape[0] if len(shape) == 3 else 1, *channels)
        self.convolutions = tuple(
            eqx.nn.Conv2d(into, out, kernel_size=3, stride=2, padding=1, key=key)
            for into, out, key in zip(depths[:-1], depths[1:], keys, strict=True)
        )
        sides = [math.ceil(side / 2 ** len(channels)) for side in shape[-2:]]
        self.head = eqx.nn.Linear(channels[-1] * math.prod(sides), num_outputs, key=key_head)
        self.activation = activation
        self.shape = tuple(shape)

    def __call__(self, x: Array, *, key: PRNGKey | None = None) -> Array:
        if x.shape != self.shape:
            raise EnergyShapeError(f"The image has shape {x.shape}; the network takes {self.shape}.")
        x = x.reshape(-1, *self.shape[-2:])
        for convolution in self.convolutions:
            x = self.activation(convolution(x))
        return self.head(x.ravel())


class DeconvNetwork(eqx.Module):
    """An image from a vector: a linear map, and transposed convolutions, each of which doubles both sides.

    Args:
        key: draws the weights.
        num_inputs: length of the vector.
        shape: of the image: (height, width), or (channels, height, width), whose sides are multiples of 2 to the power
            of the number of convolutions.
        channels: of what goes into each convolution: (32, 16) undoes a `ConvNetwork` of channels (16, 32).
        num_outputs: numbers for each element of the image.
        activation: smooth function; softplus by default.

    Returns:
        When called, a flat array with the elements of the image, and the numbers of each together.
    """

    head: eqx.nn.Linear
    convolutions: tuple[eqx.nn.ConvTranspose2d, ...]
    activation: Callable[[Array], Array]
    start: tuple[int, ...] = eqx.field(static=True)
    num_outputs: int = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKey,
        num_inputs: int,
        shape: tuple[int, ...],
        channels: tuple[int, ...] = (32, 16),
        num_outputs: int = 1,
        activation: Callable[[Array], Array] = jax.nn.softplus,
    ):
        scale = 2 ** len(channels)
        if len(shape) not in (2, 3) or not channels or shape[-1] % scale or shape[-2] % scale:
            raise EnergyError(
                f"An image has shape (height, width) or (channels, height, width), with sides that are multiples of "
                f"{scale} where there are {len(channels)} convolutions; got {shape}."
            )
        *keys, key_head = jax.random.split(key, len(channels) + 1)
        depths = (*channels, (shape[0] if len(shape) == 3 else 1) * num_outputs)
        self.convolutions = tuple(
            eqx.nn.ConvTranspose2d(into, out, kernel_size=4, stride=2, padding=1, key=key)
            for into, out, key in zip(depths[:-1], depths[1:], keys, strict=True)
        )
        self.start = (channels[0], shape[-2] // scale, shape[-1] // scale)
        self.head = eqx.nn.Linear(num_inputs, math.prod(self.start), key=key_head)
        self.activation, self.num_outputs = activation, num_outputs

    def __call__(self, z: Array, *, key: PRNGKey | None = None) -> Array:
        x = self.head(z).reshape(self.start)
        for convolution in self.convolutions:
            x = convolution(self.activation(x))
        # What belongs to one element of the image comes last.
        return jnp.moveaxis(x.reshape(-1, self.num_outputs, *x.shape[1:]), 1, -1).ravel()


class ConvEnergy(Energy):
    """A convolutional network with one output, for images of 8 x 8 or 28 x 28 pixels, say.

    Args:
        key: draws the weights.
        shape: of an image: (height, width), or (channels, height, width).
        channels: of each convolution, which halves both sides of the image.
        activation: smooth function, softplus by default.

    Example:
        >>> energy = ebm_ppl.ConvEnergy(jax.random.key(0), (28, 28), channels=(16, 32, 64))
        >>> energy(jnp.zeros((28, 28))).shape
        ()
    """

    network: ConvNetwork

    def __init__(
        self,
        key: PRNGKey,
        shape: tuple[int, ...],
        channels: tuple[int, ...] = (16, 32),
        activation: Callable[[Array], Array] = jax.nn.softplus,
    ):
        self.network = ConvNetwork(key, shape, channels, "scalar", activation)

    def __call__(self, x: Array) -> Array:
        return self.network(x)


class JointEnergy(Energy):
    """A classifier read as an energy: `U(x) = -log sum_y exp f(x)[y]`, with `p(y | x) = softmax f(x)`.

    `fit(..., labels=...)` trains both: `log p(x, y) = log p(x) + log p(y | x)`. The energy itself is the score by which
    inputs from elsewhere are told, higher the stranger (`auroc`); `calibration` tells whether the probabilities hold.

    Args:
        classifier: f, a callable that gives the logits of one event, shape (num_classes,): an `equinox.nn.MLP` or a
            `ConvNetwork`, say.

    Reference: Grathwohl et al. (2020).
    """

    classifier: Callable[[Array], Array]

    def logits(self, x: Array) -> Array:
        """f(x), shape (num_classes,)."""
        return self.classifier(x)

    def __call__(self, x: Array) -> Array:
        return -jax.nn.logsumexp(self.classifier(x))


class SpectralNorm(eqx.Module):
    """A network with the linear and convolutional layers scaled down until no singular value is above a bound.

    With activations whose slope is one at most (softplus, relu, tanh) the network's own is at most `bound` to the power
    of its layers: nothing that walks on it is thrown far. Layers that are within the bound stay as they are. The
    largest singular value is by power iteration from a fixed start, without a gradient through it; of a convolution
    it is that of its patches, times what patches overlap.

    Args:
        network: any callable pytree with `equinox.nn.Linear` and `equinox.nn.Conv` inside: an energy, a classifier.
        bound: of the singular values of each layer.
        num_iterations: of the power iteration.

    Reference: Miyato et al. (2018).

    Example:
        >>> energy = ebm_ppl.SpectralNorm(ebm_ppl.ConvEnergy(jax.random.key(0), (8, 8)))
    """

    network: Any
    bound: float = eqx.field(static=True, default=1.0)
    num_iterations: int = eqx.field(static=True, default=16)

    def __check_init__(self):
        if not self.bound > 0 or self.num_iterations < 1:
            raise EnergyError(
                f"bound is positive and num_iterations 1 at least; got {self.bound, self.num_iterations}."
            )

    def normalised(self) -> Any:
        """The network with its layers scaled."""

        def scaled(layer: Any) -> Any:
            if not _is_layer(layer):
                return layer
            norm = _norm(layer, self.num_iterations)
            return eqx.tree_at(lambda x: x.weight, layer, layer.weight / jnp.maximum(1.0, norm / self.bound))

        return jax.tree.map(scaled, self.network, is_leaf=_is_layer)

    def __call__(self, x: Array) -> Array:
        return self.normalised()(x)


def _is_layer(node: Any) -> bool:
    return isinstance(node, (eqx.nn.Linear, eqx.nn.Conv))


def _norm(layer: Any, num_iterations: int) -> Array:
    """Upper bound of the largest singular value of a layer, up to what the power iteration leaves."""
    matrix = layer.weight.reshape(len(layer.weight), -1)
    fixed = jax.lax.stop_gradient(matrix)

    def iterate(_: int, right: Array) -> Array:
        right = fixed.T @ (fixed @ right)
        return right / jnp.maximum(jnp.linalg.norm(right), jnp.finfo(right.dtype).tiny)

    # From the largest row: it is not orthogonal to the first singular vector but by accident.
    start = fixed[jnp.argmax(jnp.sum(fixed**2, axis=1))]
    right = jax.lax.fori_loop(0, num_iterations, iterate, start)
    left = fixed @ right
    left = left / jnp.maximum(jnp.linalg.norm(left), jnp.finfo(left.dtype).tiny)
    norm = left @ matrix @ right
    if isinstance(layer, eqx.nn.Conv):
        # A pixel is in so many patches, so that the map to patches has this norm at most.
        overlap = math.prod(
            math.ceil(size / stride) for size, stride in zip(layer.kernel_size, layer.stride, strict=True)
        )
        norm = norm * math.sqrt(overlap)
    return norm
