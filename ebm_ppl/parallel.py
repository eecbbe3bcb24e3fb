"""A function of one chain (or of one run) over all of them: by a thread for each core on the CPU, elsewhere vectorised.

    parts = split(batch)                            each part keeps its leading axis
    results = over(f, parts, *shared)               f(member, *shared) on every member of every part
    result = once(f, *args)                         f(*args), of what comes between
    program = prepare_over(...), prepare_once(...)  the same, compiled in the background until it is called

On a mesh of devices (`sharding.py`) each runs its share of the members as a batch.

An accelerator wants one large batch. A processor does not: a batch makes each step together, so it waits for its
longest trajectory, and small operations leave all cores but one idle.

Programs with batches of linear algebra run one at a time on the CPU, and take the matrices in turn where there are many
such batches: `linear_algebra.py` says why.

Threads only ever run compiled programs. The handlers of NumPyro are one stack for the whole process, so that models
must be traced in one thread, which `jax.jit` does not promise; hence the cache of compiled programs here.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from ebm_ppl import linear_algebra, sharding
from ebm_ppl.sharding import Mesh
from ebm_ppl.typing import OutOfMemoryError
from ebm_ppl.xla import compiler_options

MOST_CALLS = 16
"""Parts on the CPU; a larger batch has several members in each. No matter on which machine, so that draws agree."""
_COMPILER = ThreadPoolExecutor(2)


def split(batch: Any, most: int = MOST_CALLS) -> list[Any]:
    """Equal parts of a batch along the leading axis: its members, or several members each where these are many."""
    num = len(jax.tree.leaves(batch)[0])
    parts = max(d for d in range(1, most + 1) if num % d == 0) if jax.default_backend() == "cpu" else 1
    size = num // parts
    return [jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], batch) for i in range(parts)]


class Program(NamedTuple):
    """What `prepare` returns: a program on its way."""

    shapes: Any
    """Of its results."""
    compiled: Future
    in_threads: bool
    """Whether several threads may run it at the same time."""
    shared: int
    """Bytes of arguments after the first, which all parts share."""
    held: Callable[[], Any]
    """The compiler's account of its memory, which is made once, at the first call."""


def over(
    function: Callable,
    parts: list[Any],
    *shared: Any,
    hurry: bool = False,
    mesh: Mesh | None = None,
    in_place: bool = False,
) -> list[Any]:
    """`function(member, *shared)` for each member of each part, with the leading axis of its part.

    Args:
        function: pure, defined at the top of a module, from arrays to arrays.
        shared: arrays and hashable settings, the same for all.
        hurry: whether to compile fast rather than well, for what each member runs but once.
        mesh: devices that share the members of each part; the results are gathered.
        in_place: whether results take the memory of the parts, of whose every array there must be a successor among
            them; the parts are then gone.
    """
    program = prepare_over(function, parts[0], *shared, hurry=hurry, mesh=mesh, in_place=in_place)
    call = caller(program, len(parts), mesh)
    if len(parts) == 1:
        return [call(parts[0], *shared)]
    submit = submitter(program, len(parts))
    futures = [submit(lambda part: jax.block_until_ready(call(part, *shared)), part) for part in parts]
    return [future.result() for future in futures]


def prepare_over(
    function: Callable,
    part: Any,
    *shared: Any,
    hurry: bool = False,
    mesh: Mesh | None = None,
    in_place: bool = False,
) -> Program:
    """Prepares what `over` will run."""
    if mesh is None:
        return prepare(_of_part(function), part, *shared, hurry=hurry, in_place=in_place)
    part, shared = sharding.shapes((part, shared))
    part, shared = sharding.spread(part, mesh), sharding.everywhere(shared, mesh)
    return prepare(_of_shares(function, mesh), part, *shared, hurry=hurry, in_place=in_place)


def once(function: Callable, *args: Any) -> Any:
    """`function(*args)`, compiled in a hurry: where it runs once, compiling fast matters more than running fast."""
    program = prepare_once(function, *args)
    _require_room(num_bytes(program, 1))
    return program.compiled.result()(*eqx.filter(args, _is_array))


def prepare_once(function: Callable, *args: Any) -> Program:
    """Prepares what `once` will run."""
    return prepare(function, *args, hurry=True)


def at_once(program: Program, num_parts: int) -> int:
    """How many parts `over` runs at the same time."""
    return min(num_parts, _num_cores()) if program.in_threads else 1


def caller(program: Program, num_parts: int, mesh: Mesh | None) -> Callable:
    """`(part, *shared) -> result`, by a program of `prepare_over`.

    Raises:
        OutOfMemoryError: where the parts cannot fit, before any of them runs.
    """
    compiled = program.compiled.result()
    _require_room(num_bytes(program, num_parts))

    def call(part: Any, *shared: Any) -> Any:
        shared = eqx.filter(shared, _is_array)
        if mesh is None:
            return compiled(part, *shared)
        part, shared = sharding.spread(part, mesh), sharding.everywhere(shared, mesh)
        return sharding.gathered(compiled(part, *shared))

    return call


def submitter(program: Program, num_parts: int) -> Callable[..., Future]:
    """`(function, *args) -> future`: in a thread for each core, or here and now where parts must run in turn."""
    return _runners().submit if at_once(program, num_parts) > 1 else _here_and_now


def _here_and_now(function: Callable, *args: Any) -> Future:
    future = Future()
    future.set_result(function(*args))
    return future


def prepare(function: Callable, *args: Any, hurry: bool = False, in_place: bool = False) -> Program:
    """Traces a function, and compiles it in the background; shapes may stand for arrays."""
    arrays, settings = eqx.partition(args, _is_array)
    leaves, structure = jax.tree.flatten(settings)
    avals, aval_structure = jax.tree.flatten(sharding.shapes(arrays))
    return _program(function, hurry, in_place, tuple(leaves), structure, tuple(avals), aval_structure, *_context())


@functools.cache
def _of_part(function: Callable) -> Callable:
    """The function over the members of a part; a part of one is no batch."""

    @functools.wraps(function)
    def of_part(part: Any, *shared: Any) -> Any:
        if len(jax.tree.leaves(part)[0]) > 1:
            return jax.vmap(lambda member: function(member, *shared))(part)
        result = function(jax.tree.map(lambda x: x[0], part), *shared)
        return jax.tree.map(lambda x: x[None], result)

    return of_part


@functools.cache
def _of_shares(function: Callable, mesh: Mesh) -> Callable:
    """The function over the members of a part, each device with its share of them."""
    return sharding.over_shares(_of_part(function), mesh)


@functools.cache
def _runners() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_num_cores())


def _num_cores() -> int:
    """Those that this process may use, which a container or a batch system may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _context() -> tuple:
    """What else a compiled program depends on."""
    return jax.config.jax_enable_x64, jax.config.jax_default_device, jax.config.jax_default_matmul_precision  # pyright: ignore


@functools.lru_cache(maxsize=64)
def _program(
    function: Callable,
    hurry: bool,
    in_place: bool,
    settings: tuple,
    structure: Any,
    avals: tuple,
    aval_structure: Any,
    *context: Any,
) -> Program:
    settings = jax.tree.unflatten(structure, settings)
    arrays = jax.tree.unflatten(aval_structure, avals)
    donated = (0,) * in_place

    def named(*arrays: Any) -> Any:
        return function(*eqx.combine(arrays, settings))

    named.__name__ = function.__name__  # as profiles and logs have it
    program = jax.jit(named, donate_argnums=donated)
    traced, on_mesh = program.trace(*arrays), sharding.is_on_mesh(avals)
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and linear_algebra.num_batches(traced.jaxpr.jaxpr) >= (1 if on_mesh else _num_cores()):
        traced = jax.jit(linear_algebra.matrix_by_matrix(program), donate_argnums=donated).trace(*arrays)
    jaxpr = traced.jaxpr.jaxpr
    options = compiler_options(jaxpr, hurry) if on_cpu else {}
    beside_itself = not linear_algebra.may_wait_forever(jaxpr)
    if on_mesh and not beside_itself:
        sharding.require_devices_that_do_not_wait(avals)
    compiled = _COMPILER.submit(traced.lower().compile, options)
    shared = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays[1:]))
    held = functools.cache(lambda: compiled.result().memory_analysis())
    return Program(traced.out_info, compiled, beside_itself and not on_mesh, shared, held)


def forget() -> None:
    """Drops the compiled programs that are kept for later calls, as `jax.clear_caches` drops JAX's own."""
    _program.cache_clear()


def num_bytes(program: Program, num_parts: int) -> int:
    """What all parts hold, and those that run at the same time beside it; 0 where the compiler does not tell."""
    held = program.held()
    if held is None:
        return 0
    shared = min(program.shared, held.argument_size_in_bytes)
    # Some of the results may take the memory of arguments.
    own = held.argument_size_in_bytes - shared + held.output_size_in_bytes - held.alias_size_in_bytes
    return shared + num_parts * own + at_once(program, num_parts) * held.temp_size_in_bytes


def _require_room(num_bytes: int) -> None:
    room = _room()
    if room is not None and num_bytes > room:
        raise OutOfMemoryError(
            f"This takes {num_bytes / 1e9:.1f} GB on a device that has {room / 1e9:.1f} GB. Evaluate fewer particles "
            "at a time (SMC(chunk_size=...)), share them or the chains among more devices (mesh=...), or use fewer."
        )


def _room() -> int | None:
    """Bytes of memory of a device, by its own account or, on the CPU, the machine's."""
    known = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in known or jax.default_backend() != "cpu":
        return known.get("bytes_limit")
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # an operating system that does not tell
        return None
