"""The data of a model in blocks, and the target that has some of them: what a walk along the data is made of.

U(z)  =  sum_t U_t(z)              the energies of the data by block: `Arriving.terms`, and `blocks` of observations
at a position (t, a)               exp( -sum_{s<t} U_s(z) - a U_t(z) )         `Position`
from one position to another       `Arriving`, a reference tilted by energies, as `Tilted` asks for
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.sharding import Layout
from ebm_ppl.target import Target
from ebm_ppl.typing import Array, ArrayLike, EnergyError

Axes = tuple[tuple[str, int | None], ...]
"""Of each site that counts as data: the axis of its elements along which the observations lie, None for outside."""


def axes_of(target: Target, plate: str | None) -> tuple[Axes, int]:
    """Where the observations lie, and their number."""
    if target.spec.discrete:
        raise EnergyError(
            f"The discrete sites {target.spec.discrete} are summed out for all data at once, so that single "
            "observations have no terms of their own: sum them out inside the model (numpyro.distributions."
            "MixtureSameFamily, say)."
        )
    names = [name for name, role in target.spec.roles if role != "prior"]
    if not names:
        raise EnergyError("This model has no data: neither observed sites nor losses.")
    z = jax.ShapeDtypeStruct((target.dim,), jnp.result_type(float))
    shapes = {name: x.shape for name, x in jax.eval_shape(lambda z: target.element_terms(z)[1], z).items()}
    plates = dict(target.spec.dims)
    known = {name: plates[name][: len(shapes[name])] for name in names}
    found = sorted({p for named in known.values() for p in named if p is not None})
    if plate is None and len(found) > 1:
        raise EnergyError(f"The data lie in the plates {found}: say which one has the observations by plate=...")
    if plate is not None and plate not in found:
        raise EnergyError(f"No data in a plate '{plate}'; there are {found}.")
    wanted = plate if plate is not None else (found[0] if found else None)

    def axis_of(name: str) -> int | None:
        if wanted is not None:
            return known[name].index(wanted) if wanted in known[name] else None
        return 0 if len(shapes[name]) == 1 else None

    axes = tuple((name, axis_of(name)) for name in names)
    sizes = {shapes[name][axis] for name, axis in axes if axis is not None}
    if len(sizes) != 1:
        raise EnergyError(
            "The observations cannot be told apart: put them in a numpyro.plate. Shapes of the log likelihoods: "
            f"{ {name: shapes[name] for name in names} }."
        )
    return axes, sizes.pop()


def blocks(times: ArrayLike | None, num: int, has_outside: bool) -> tuple[np.ndarray, np.ndarray]:
    """The times of the blocks in their order, and the block of each observation, what lies outside being the last."""
    each = np.arange(num) if times is None else np.asarray(times)
    if each.shape != (num,):
        raise EnergyError(f"times has shape {each.shape}, but there are {num} observations.")
    if np.any(each != each):  # NaN, or no time at all
        raise EnergyError("times has NaN: each observation needs one.")
    order, block = np.unique(each, return_inverse=True)
    return order, np.append(block + 1, 0) if has_outside else block


class Position(NamedTuple):
    """How far the data are in: all blocks before `block`, and the likelihood of that to the power `part`."""

    block: Any
    part: Any

    def power(self, block: np.ndarray | Array) -> Array:
        """To which each block is in."""
        return jnp.where(block < self.block, 1.0, jnp.where(block == self.block, self.part, 0.0))


def at(block: int, part: float) -> Position:
    """As arrays, so that no position is compiled into a program."""
    return Position(np.array(block), np.array(part))


class Arriving(eqx.Module):
    """A target that has the data up to `start`, and takes in those up to `stop`; as `Tilted`."""

    target: Target
    block: np.ndarray | Array
    """Of each observation, and of what lies outside of the plate, shape (n,) or (n + 1,)."""
    start: Position
    stop: Position
    axes: Axes = eqx.field(static=True)

    @property
    def dim(self) -> int:
        return self.target.dim

    @property
    def site_numbers(self) -> np.ndarray:
        return self.target.site_numbers

    @property
    def is_logistic(self) -> np.ndarray:
        return self.target.is_logistic

    @property
    def is_hierarchical(self) -> bool:
        return self.target.is_hierarchical

    def staged_terms(self, z: Array) -> tuple[Array, Array]:
        """`(log pi_0(z), (U_prior(z) and what is in, what comes in))`."""
        log_reference, prior, each = self.terms(z)
        is_in = self.start.power(self.block).astype(z.dtype)
        comes_in = self.stop.power(self.block).astype(z.dtype) - is_in
        # An energy that is not in may be infinite, or NaN.
        energies = [jnp.sum(jnp.where(power > 0, power * each, 0.0)) for power in (is_in, comes_in)]
        return log_reference, jnp.stack([prior + energies[0], energies[1]])

    def terms(self, z: Array) -> tuple[Array, Array, Array]:
        """`(log pi_0(z), U_prior(z), U(z) of each observation)`; what lies outside of the plate comes last."""
        references, energies = self.target.element_terms(z)
        zero, axes = jnp.zeros((), z.dtype), dict(self.axes)
        inside = [_along(energies[name], axis) for name, axis in self.axes if axis is not None]
        outside = [jnp.sum(energies[name]) for name, axis in self.axes if axis is None]
        each = sum(inside[1:], inside[0])
        return (
            sum(map(jnp.sum, references.values()), zero),
            sum((jnp.sum(x) for name, x in energies.items() if name not in axes), zero),
            jnp.append(each, sum(outside, zero)) if outside else each,
        )


def _along(x: Array, axis: int) -> Array:
    """Sums over all other axes."""
    return jnp.sum(x, axis=tuple(other for other in range(x.ndim) if other != axis))


def energies_of_observations(z: Array, target: Arriving, layout: Layout) -> Array:
    """Energies of the observations for all particles of a run, (N, n)."""
    return layout.over(lambda z: target.terms(z)[2])(z)
