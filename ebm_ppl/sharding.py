"""Chains and particles over the devices of a mesh, on one host or on several: all that knows `jax.sharding`.

    mesh = jax.make_mesh((8,), ("devices",))       any mesh; only its devices count, not the shape that it gives them
    sample(key, target, NUTS(), num_chains=8, mesh=mesh)
    log_z(key, target, SMC(num_particles=80_000), mesh=mesh)

Chains: each device runs its share of them as one batch (`shard_map`); nothing passes between the devices. The results
are gathered on every host, where the warm-up learns from all chains.

Particles: a run of SMC is one program, which XLA divides among the devices by what is said of its arrays.

    (N, dim)    a vector for each particle      spread: a device has the rows of its own particles
    (N,)        a number for each particle      everywhere: all compute the same weights, temperatures and ancestors
    z[a]        resampling                      a device gets all particles, and keeps those that it will move
    moves       `Layout.over`                   a device moves its own (`shard_map`), whatever loops are in the model

Random numbers belong to particles and chains, by keys, and not to devices, so that a mesh changes results by rounding
only. Several hosts each run the same Python, `jax.distributed.initialize()` before the import of this package, with a
mesh of the devices of all, and each has the whole result.

Each device holds its share of the vectors, but of a stage's ancestors all: memory per device does not fall below
one (N, dim). The devices into which `--xla_force_host_platform_device_count` divides one CPU are for trying things out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ebm_ppl.typing import EnergyError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the particles of a run lie, and how many of them are evaluated at a time: here, and all, if not said.

    Attributes:
        mesh: whose devices share the particles.
        chunk_size: particles that a device evaluates at a time, one chunk after the other.
    """

    mesh: Mesh | None = None
    chunk_size: int | None = None

    def over(self, function: Callable) -> Callable:
        """A function of one particle over all of them, along the leading axis of each of its arguments."""

        def over_particles(*particles: Any) -> Any:
            if self._chunk(particles) is None:
                return jax.vmap(function)(*particles)
            return jax.lax.map(lambda one: function(*one), particles, batch_size=self.chunk_size)

        return over_particles if self.mesh is None else _share(over_particles, self.mesh)

    def renewing(self, function: Callable) -> Callable:
        """The same, of a function whose first result takes the place of its first argument."""

        def over_particles(states: Any, *others: Any) -> Any:
            size = self._chunk(states)
            if size is None:
                return jax.vmap(function)(states, *others)
            return _renewed(jax.vmap(function), size, states, *others)

        return over_particles if self.mesh is None else _share(over_particles, self.mesh)

    def _chunk(self, particles: Any) -> int | None:
        """Size of a chunk of the particles of a device; None where one would hold them all."""
        num = len(jax.tree.leaves(particles)[0])
        return None if self.chunk_size is None or self.chunk_size >= num else self.chunk_size

    def halved(self) -> Layout:
        """For a function that is over two halves of the particles at the same time."""
        return self if self.chunk_size is None else dataclasses.replace(self, chunk_size=max(1, self.chunk_size // 2))

    def spread(self, particles: Any, axis: int = 0) -> Any:
        """Has the compiler divide arrays among the devices along an axis."""
        if self.mesh is None:
            return particles
        return jax.lax.with_sharding_constraint(particles, _spread(self.mesh, axis))

    def everywhere(self, tree: Any) -> Any:
        """Has the compiler keep arrays whole on every device."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, _everywhere(self.mesh))


def _renewed(function: Callable, size: int, states: Any, *others: Any) -> Any:
    """In place, as `lax.map` is not: it would hold every state twice."""
    num = len(jax.tree.leaves(states)[0])

    def chunk(tree: Any, start: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tree)

    def one_chunk(i: jax.Array, all_of_them: Any) -> Any:
        start = jnp.minimum(i * size, num - size)
        done = start + jnp.arange(size) < i * size  # the last chunk may begin in the one before
        before = chunk(all_of_them, start)
        after = function(before[0], *chunk(others, start))
        after = jax.vmap(lambda done, old, new: jax.tree.map(lambda a, b: jnp.where(done, a, b), old, new))(
            done, before, after
        )
        return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 0), all_of_them, after)

    _, shapes = jax.eval_shape(function, states, *others)
    results = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, -(-num // size), one_chunk, (states, results))


def flat(mesh: Mesh | None) -> Mesh | None:
    """The devices of a mesh in a row; axes of any type are taken.

    Raises:
        EnergyError: for what is no mesh.
    """
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh):
        raise EnergyError(f"mesh is a jax.sharding.Mesh, as of jax.make_mesh((4,), ('devices',)); got {mesh!r}.")
    return Mesh(mesh.devices.ravel(), ("devices",))


def require_equal_shares(num: int, mesh: Mesh | None, what: str) -> None:
    """Raises where a number of chains or particles is no multiple of the number of devices."""
    if mesh is not None and num % mesh.size:
        raise EnergyError(
            f"{num} {what} cannot be shared out equally among the {mesh.size} devices of the mesh: take a multiple of "
            f"{mesh.size}, or a mesh of fewer devices."
        )


def over_shares(function: Callable, mesh: Mesh) -> Callable:
    """`function(batch, *shared)`, each device with its share of the batch and all of what is shared."""
    return lambda batch, *shared: _share(lambda own: function(own, *shared), mesh)(batch)


def shapes(tree: Any) -> Any:
    """Shapes for arrays, which keep where the arrays lie if that is on a mesh; what is no array is left alone."""
    return jax.tree.map(lambda x: _shape(x, _lies(x)) if _is_array(x) else x, tree)


def spread(tree: Any, mesh: Mesh) -> Any:
    """Arrays, or shapes for them, divided among the devices along their leading axis; on all hosts the same."""
    return jax.tree.map(lambda x: _put(x, _spread(mesh)) if _is_array(x) else x, tree)


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays, or shapes for them, whole on every device; on all hosts the same."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: _put(x, _everywhere(mesh)) if _is_array(x) else x, tree)


def is_on_mesh(tree: Any) -> bool:
    """Whether any array, or any that a shape stands for, lies on a mesh."""
    return any(_lies(x) is not None for x in jax.tree.leaves(tree))


def require_devices_that_do_not_wait(tree: Any) -> None:
    """Raises where a mesh has several devices of one CPU process, for a program that would wait for itself; see
    `linear_algebra.py`, which leaves none but what the message names.
    """
    devices = {device for x in jax.tree.leaves(tree) if (lies := _lies(x)) for device in lies.device_set}
    if sum(d.platform == "cpu" and d.process_index == jax.process_index() for d in devices) > 1:
        raise EnergyError(
            "The model makes Fourier transforms in several dimensions or calls foreign code, in which several CPU "
            "devices of one process wait for one another forever. Give each device a process of its own "
            "(jax.distributed.initialize), or leave mesh out: the CPU's cores are used without it."
        )


def gathered(tree: Any) -> Any:
    """Arrays of a mesh whole on this host; keys stay keys."""
    return jax.tree.map(_gathered, tree)


def _share(function: Callable, mesh: Mesh) -> Callable:
    # Unchecked: loops of the model, which knows of no mesh, would have to say which of their values differ by device.
    spec = PartitionSpec(mesh.axis_names)
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def _spread(mesh: Mesh, axis: int = 0) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _lies(x: Any) -> NamedSharding | None:
    lies = getattr(x, "sharding", None)
    if not isinstance(lies, NamedSharding):
        return None
    axes = list(lies.spec)
    while axes and axes[-1] is None:  # the same with and without, but another key to the cache of programs
        axes.pop()
    return NamedSharding(lies.mesh, PartitionSpec(*axes))


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _shape(x: Any, lies: NamedSharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)


def _put(x: Any, lies: NamedSharding) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return _shape(x, lies)
    if _lies(x) == lies:
        return x
    if _is_key(x):  # which JAX does not put where other hosts have devices
        data = jax.device_put(np.asarray(jax.random.key_data(x)), lies)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.device_put(np.asarray(x), lies)


def _gathered(x: Any) -> Any:
    if isinstance(x, jax.Array) and _is_key(x):
        return jax.random.wrap_key_data(_gathered(jax.random.key_data(x)), impl=jax.random.key_impl(x))
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return process_allgather(x, tiled=True)
    return np.asarray(x)
