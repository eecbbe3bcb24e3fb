"""What an objective of training is, and the density whose energy it trains.

    p(x) = base(x) exp(-U(x)) / Z        U the energy with trained parameters; base flat where none is given
    V(x) = U(x) - log base(x)            `Density.total`: the energy of all there is, relative to Lebesgue measure

    parameters, state = objective.init(key, density, data)
    loss, (state, metrics) = objective.loss(key, density, parameters, state, batch)

`fit` lowers `loss` in the parameters of U and in the objective's own (a learned log Z, a generator). `state` is what
goes on from step to step without a gradient: walkers, weights, a replay buffer. Both are pytrees, so that a checkpoint
carries them. Objectives are small frozen settings objects; they see a batch of flat points, shape (batch, dim), and
draw whatever they need by the key of their step.

Where the gradient of log-likelihood is wanted,

    grad log p(data) = - E_data[grad U] + E_p[grad U]            loss = mean U(data) - mean U(negatives)

whose value is no measure of progress: `is_comparable` says whether a loss of one step may be compared with another's.

Of an energy that is conditional on a level of noise (`noise.py`), `density.at(sigma)` is that of noisy data; the base,
where there is one, is tilted at every level: p(x, sigma) = base(x) exp(-U(x, sigma)) / Z(sigma).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

from ebm_ppl.energy import as_energy_values
from ebm_ppl.typing import Array, ArrayLike, EnergyError, EnergyShapeError, PRNGKey

Metrics = dict[str, Array]
"""Scalars of a step, by the name that they have in the record."""


class Density(eqx.Module):
    """`base(x) exp(-U(x))`, of flat points; methods take one, shape (dim,)."""

    energy: Callable[[Array], Array]
    """U, of one event."""
    base: dist.Distribution | None
    event_shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def is_discrete(self) -> bool:
        return self.base is not None and self.base.is_discrete

    def tilt(self, x: Array) -> Array:
        """U(x)"""
        name = f"The energy {getattr(self.energy, '__name__', type(self.energy).__name__)!r}"
        return as_energy_values(self.energy(x.reshape(self.event_shape)), (), name)

    def total(self, x: Array) -> Array:
        """V(x)"""
        if self.base is None:
            return self.tilt(x)
        return self.tilt(x) - log_prob(self.base, x.reshape(self.event_shape))

    def log_density(self, x: Array) -> Array:
        return -self.total(x)

    def at(self, sigma: Array) -> Density:
        """That of data with noise of standard deviation sigma."""
        at: Any = getattr(self.energy, "at", None)
        if at is None:
            raise EnergyError(
                f"{type(self.energy).__name__} has no levels of noise: many of them need an energy with a method "
                "at(sigma) -> energy of one event, such as NoiseConditionalEnergy."
            )
        return Density(at(sigma), self.base, self.event_shape)

    def draw_base(self, key: PRNGKey, num: int) -> Array:
        """Draws of the base, shape (num, dim)."""
        if self.base is None:
            raise EnergyError("There is no base to draw from: pass base=... to fit, a NumPyro distribution of events.")
        return self.base.sample(key, (num,)).reshape(num, -1)  # pyright: ignore


class Objective(eqx.Module):
    """How an energy is trained; see the module docstring."""

    name: ClassVar[str]
    is_comparable: ClassVar[bool]
    is_continuous: ClassVar[bool] = False
    """Whether it takes slopes at points, or looks beside them, so that no base of discrete events will do."""

    def check(self, data: Array) -> None:
        """Refuses data, shape (num, dim), that it cannot be trained on or judged at."""

    def preview(self, density: Density, x: Array) -> Array:
        """A number that must be finite at each event of the data before the first step: its energy."""
        return density.total(x)

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        """`(parameters, state)` before the first step: none, but where an objective has some."""
        return (), ()

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        """Loss of a batch, and the state and metrics after it."""
        raise NotImplementedError


def log_prob(base: Any, x: Array) -> Array:
    """Of a NumPyro distribution at one event of floating-point numbers, also where it is discrete.

    Categories are looked up by whole numbers. Bits are left as they are, since their log density has a slope. Outside
    of the support it is -inf, where NumPyro's formulas go on.
    """
    integers = base.is_discrete and _kind(base) is not constraints.boolean
    value = jnp.asarray(base.log_prob(x.astype(int) if integers else x))
    return jnp.where(base.support(x), value, -jnp.inf) if has_borders(base) else value


def has_borders(base: dist.Distribution) -> bool:
    """Whether there are points of floating-point numbers outside of the support."""
    return _kind(base) not in (constraints.real, constraints.real_vector, constraints.real_matrix)


def _kind(base: dist.Distribution) -> Any:
    """Of the numbers in an event."""
    support: Any = base.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def parameters_of(module: Any) -> Any:
    """What an objective trains of a module of its own: its floating-point arrays."""
    return eqx.filter(module, eqx.is_inexact_array)


def with_parameters(module: Any, parameters: Any) -> Any:
    """The module with these in place of its own."""
    return eqx.combine(parameters, eqx.filter(module, eqx.is_inexact_array, inverse=True))


def without_gradient(tree: Any) -> Any:
    """The same, as something that no gradient goes through."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, tree)


def require_levels(density: Density, levels: Sequence[float], data: Array) -> None:
    """Refuses an energy that, by itself, is not that of the smallest level: training would pass it by."""
    by_itself, at_smallest = density.tilt(data[0]), density.at(jnp.asarray(levels[0], data.dtype)).tilt(data[0])
    if not np.allclose(by_itself, at_smallest, rtol=1e-4):
        raise EnergyError(
            f"By itself the energy is {float(by_itself)} at the first event, and {float(at_smallest)} at the smallest "
            f"level of noise of the objective, {levels[0]}: give both the same levels."
        )


def energy_gap(density: Density, data: Array, negatives: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """`(loss, gap)`: the loss whose gradient is that of minus the log-likelihood, and how much lower data lie.

    Args:
        data: shape (batch, dim).
        negatives: draws of the model, shape (num, dim).
        weights: of the negatives, adding up to one, shape (num,); equal where None.
    """
    of_data = jnp.mean(jax.vmap(density.tilt)(data))
    energies = jax.vmap(density.tilt)(jax.lax.stop_gradient(negatives))
    of_negatives = jnp.mean(energies) if weights is None else jax.lax.stop_gradient(weights) @ energies
    return of_data - of_negatives, of_negatives - of_data


def flat(data: ArrayLike, name: str) -> tuple[Array, tuple[int, ...]]:
    """Events as rows, and their shape."""
    data = jnp.asarray(data, jnp.result_type(float))
    if data.ndim < 1 or not len(data):
        raise EnergyError(f"{name} has shape {data.shape}: it is an array of events along the first axis.")
    bad = ~np.isfinite(np.asarray(data)).reshape(len(data), -1).all(axis=1)
    if np.any(bad):
        raise EnergyError(
            f"{name} has {np.sum(bad)} of {len(data)} events that are not finite, the first at {np.argmax(bad)}."
        )
    return data.reshape(len(data), -1), data.shape[1:]


def flat_pair(x: ArrayLike, y: ArrayLike, names: tuple[str, str] = ("x", "y")) -> tuple[Array, Array, tuple[int, ...]]:
    """Two samples of the same kind of events, each as rows, and the shape of an event.

    Raises:
        EnergyShapeError: for events of different shapes.
    """
    (x, shape), (y, other) = (flat(each, name) for each, name in zip((x, y), names, strict=True))
    if shape != other:
        raise EnergyShapeError(f"An event of {names[0]} has shape {shape}, one of {names[1]} {other}.")
    return x, y, shape


def check_base(base: dist.Distribution | None, event_shape: tuple[int, ...], name: str, role: str = "base") -> None:
    """The base, or another distribution, where there is one, is of single events, and of their shape.

    Raises:
        EnergyShapeError: where it is not, with both shapes.
    """
    if base is not None and (base.event_shape != event_shape or base.batch_shape):
        raise EnergyShapeError(
            f"The {role} has event shape {base.event_shape} and batch shape {base.batch_shape}; an event of {name} "
            f"has shape {event_shape}. `.expand(...)` and `.to_event(...)` make one event of it."
        )


def density_from_start(
    energy: Callable[[Array], Array], base: dist.Distribution | None, start: dist.Distribution, num: int
) -> Density:
    """The density that so many walkers are moved to, of such events as the distribution that they start from has.

    Raises:
        EnergyError: for no walkers.
        EnergyShapeError: where start or base is not one of single events, or they have different ones.
    """
    if num < 1:
        raise EnergyError(f"num is 1 at least; got {num}.")
    check_base(start, start.event_shape, "draws", "start")
    check_base(base, start.event_shape, "draws")
    return Density(energy, base, start.event_shape)
