"""Energies of data with noise on them, at every level of noise: `energy.at(sigma)` is the energy of one event.

    x + sigma e ~ exp(-U(., sigma)) / Z(sigma)         e ~ N(0, I)
    U(x, sigma)                                        `energy.at(sigma)(x)`
    U(x, sigma_0)                                      `energy(x)`: of the data, at the smallest level

Whatever is an energy by itself and has such a method is noise-conditional. What it returns is a pytree with sigma among
its leaves, so that each point of a batch can have a level of its own.

References:
    Song and Ermon (2019), Generative modeling by estimating gradients of the data distribution; Salimans and Ho (2021),
    Should EBMs model the energy or the score?; Karras, Aittala, Aila and Laine (2022), Elucidating the design space of
    diffusion-based generative models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ebm_ppl.energy import Energy
from ebm_ppl.typing import Array, ArrayLike, EnergyError, PRNGKey


def noise_levels(smallest: float, largest: float, num: int) -> tuple[float, ...]:
    """Standard deviations in geometric progression, smallest first.

    The largest is to be as wide as the data are, so that all modes are one there; in `dim` dimensions a ratio of about
    `1 + 2 / sqrt(dim)` between neighbours lets their densities overlap.

    Raises:
        EnergyError: for levels that are not positive and growing, or fewer than two of them.

    Reference: Song and Ermon (2020), Improved techniques for training score-based generative models.
    """
    if not 0 < smallest < largest or num < 2:
        raise EnergyError(f"Levels go from a positive one to a larger, two at least; got {smallest}, {largest}, {num}.")
    return tuple(map(float, np.geomspace(smallest, largest, num)))


def check_levels(levels: Sequence[float]) -> None:
    """Refuses levels of noise that are not positive and growing."""
    if not levels or not levels[0] > 0 or not np.all(np.diff(levels) > 0):
        raise EnergyError(f"Levels of noise are positive standard deviations, smallest first; got {levels}.")


def check_chain(levels: Sequence[float]) -> None:
    """Refuses levels between which there is no step."""
    check_levels(levels)
    if len(levels) < 2:
        raise EnergyError(f"A chain of noise has two levels at least; got {levels}.")


def variance_between(sigma: Array, above: Array) -> Array:
    """Of the noise from one level to a higher one; as a difference of squares rounding could make it negative."""
    return (above - sigma) * (above + sigma)


class NoiseConditionalEnergy(Energy):
    """A network of a point and its level of noise, about the energy of a normal distribution.

        U(x, sigma) = |x|^2 / 2 (s^2 + sigma^2)  +  sqrt(s/sigma) N(x / sqrt(s^2 + sigma^2), log sigma)

    With s the standard deviation of the data, the first term is exact for normal ones, and all that is left at levels
    much wider than s; without N energies are those of `reference(sigma)`, normalised, and no other base is needed. N
    sees points of unit variance. Scores of single points grow with s/sigma, which preconditions a network of the score
    (Karras et al.); those of a smooth density stay as they are. The root is between the two: with s/sigma itself,
    small errors of N make large ones of the weights of modes at small levels.

    Args:
        key: draws the weights.
        dim: length of the event vector; other events are read flat.
        levels: standard deviations sigma of the noise, smallest first, in units of the data: `noise_levels(...)`.
        scale: s; the data should have mean zero, up to a fraction of it.
        width: units in each hidden layer.
        depth: number of hidden layers.
        activation: smooth function.

    References: Karras, Aittala, Aila and Laine (2022); Salimans and Ho (2021).
    """

    network: eqx.nn.MLP
    levels: tuple[float, ...] = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKey,
        dim: int,
        levels: Sequence[float],
        scale: float = 1.0,
        width: int = 64,
        depth: int = 2,
        activation: Callable[[Array], Array] = jax.nn.silu,
    ):
        check_levels(levels)
        if not scale > 0:
            raise EnergyError(f"scale is the data's standard deviation, positive; got {scale}.")
        self.network = eqx.nn.MLP(dim + 1, "scalar", width, depth, activation, key=key)
        self.levels, self.scale = tuple(map(float, levels)), float(scale)

    def at(self, sigma: ArrayLike) -> EnergyAtNoise:
        """The energy of data with noise of standard deviation sigma."""
        return EnergyAtNoise(self, jnp.asarray(sigma))

    def reference(self, sigma: ArrayLike) -> dist.Distribution:
        """N(0, s^2 + sigma^2): about what data are at the widest level, where annealing starts."""
        dim = self.network.layers[0].weight.shape[1] - 1
        return dist.Normal(0.0, jnp.hypot(self.scale, sigma)).expand([dim]).to_event(1)

    def __call__(self, x: Array) -> Array:
        return self.at(self.levels[0])(x)


class EnergyAtNoise(Energy):
    """`U(., sigma)` of a `NoiseConditionalEnergy`."""

    conditional: NoiseConditionalEnergy
    sigma: Array

    def __call__(self, x: Array) -> Array:
        network, scale, levels = self.conditional.network, self.conditional.scale, np.log(self.conditional.levels)
        x = jnp.ravel(x)
        sigma = self.sigma.astype(x.dtype)
        variance = scale**2 + sigma**2
        level = 2 * (jnp.log(sigma) - np.mean(levels[[0, -1]])) / max(levels[-1] - levels[0], 1.0)  # -1 to 1
        correction = network(jnp.append(x / jnp.sqrt(variance), level))
        return x @ x / (2 * variance) + jnp.sqrt(scale / sigma) * correction
