"""Linear algebra on batches of matrices, which on the CPU may wait for itself forever, and the same in turn.

JAX shares a batch of matrices out among the threads of XLA, and waits for them in one of these same threads. Where each
of them is in such a call, none is left to do the work: on two cores, two independent batches of Cholesky factors in one
program never end. A loop over the matrices waits for nobody. It has no second core, and on one core takes up to six
times as long for matrices of two rows, next to no longer for those of twenty.

    matrix_by_matrix(f)(*args) = f(*args)           f with its batches as loops
    num_batches(jaxpr)                              fewer of them than there are threads cannot block all
    may_wait_forever(jaxpr)                         whether any is left, or a transform in several dimensions, or a
                                                    call of foreign code

A batch is made by `jax.vmap` of what a model does for one point, so it is the traced program that is changed:

    jaxpr       equations that bind primitives to values
    batch       a primitive of LAPACK with operands of more dimensions than it has by itself (`_CORE`)
    structure   while, scan, cond and calls, whose own jaxprs are changed in the same way
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_CORE = {"tridiagonal_solve": 1, "fft": 1} | dict.fromkeys(
    (
        "cholesky",
        "eig",
        "eigh",
        "geqp3",
        "geqrf",
        "hessenberg",
        "householder_product",
        "lu",
        "ormqr",
        "qr",
        "schur",
        "svd",
        "symmetric_product",
        "triangular_solve",
        "tridiagonal",
    ),
    2,
)
"""Dimensions of the first operand for one matrix, or one row of a transform."""
NAMES = _CORE.keys() - {"fft"} | {"cholesky_update"}
"""Primitives that call a library of linear algebra."""


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of loops and calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        yield from _within(eqn)


def num_batches(jaxpr: Any) -> int:
    """In how many places a program has linear algebra on a batch; fewer than there are threads never block them all."""
    return sum(map(_is_batch, equations(jaxpr)))


def may_wait_forever(jaxpr: Any) -> bool:
    """Whether a program must not run beside another, or beside itself, on the threads of one process on the CPU."""
    return any(_is_batch(eqn) or eqn.primitive.name == "ffi_call" or _is_large_fft(eqn) for eqn in equations(jaxpr))


def matrix_by_matrix(function: Callable) -> Callable:
    """The same function of arrays, whose linear algebra takes the matrices of a batch in turn; for the CPU."""

    @functools.wraps(function)
    def in_turn(*args: Any) -> Any:
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _evaluate(traced, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return in_turn


def _is_large_fft(eqn: Any) -> bool:
    return eqn.primitive.name == "fft" and len(eqn.params["fft_lengths"]) > 1


def _is_batch(eqn: Any) -> bool:
    core = _CORE.get(eqn.primitive.name)
    return core is not None and not _is_large_fft(eqn) and eqn.invars[0].aval.ndim > core


def _evaluate(closed: ClosedJaxpr, *args: Any) -> list[Any]:
    """What the program makes of its arguments, equation by equation."""
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    read = lambda x: x.val if isinstance(x, Literal) else values[x]  # noqa: E731
    for eqn in jaxpr.eqns:
        operands = [read(x) for x in eqn.invars]
        values.update(zip(eqn.outvars, _results(jaxpr, eqn, operands), strict=True))
    return [read(x) for x in jaxpr.outvars]


def _results(jaxpr: Jaxpr, eqn: Any, operands: list[Any]) -> list[Any]:
    """Of an equation, with the batches that are in it in turn."""
    if _is_batch(eqn):
        return _one_by_one(jaxpr, eqn, operands)
    structure = _STRUCTURES.get(eqn.primitive.name)
    if structure is not None and any(map(_is_batch, _within(eqn))):
        return structure(eqn.params, operands)
    return _as_it_is(jaxpr, eqn, operands)


def _as_it_is(jaxpr: Jaxpr, eqn: Any, operands: list[Any]) -> list[Any]:
    """The results of one equation of a program, left to JAX."""
    known = {x: operand for x, operand in zip(eqn.invars, operands, strict=True) if not isinstance(x, Literal)}
    alone = jaxpr.replace(constvars=[], invars=[*known], outvars=eqn.outvars, eqns=[eqn])
    return eval_jaxpr(alone, (), *known.values())


def _one_by_one(jaxpr: Jaxpr, eqn: Any, operands: list[Any]) -> list[Any]:
    batch = operands[0].shape[: operands[0].ndim - _CORE[eqn.primitive.name]]
    rows = [x.reshape(math.prod(batch), *x.shape[len(batch) :]) for x in operands]
    results = jax.lax.map(lambda one: _as_it_is(jaxpr, eqn, one), rows)
    return [x.reshape(*batch, *x.shape[1:]) for x in results]


def _within(eqn: Any) -> Iterator[Any]:
    """The equations of the loop or call that an equation is."""
    is_solve = eqn.primitive.name == "custom_linear_solve"  # of whose programs one alone is run
    for value in [eqn.params["jaxprs"].solve] if is_solve else eqn.params.values():
        for body in value if isinstance(value, tuple | list) else [value]:
            body = getattr(body, "jaxpr", body)
            if hasattr(body, "eqns"):
                yield from equations(body)


def _while(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    of_condition, of_body, start = _split(operands, params["cond_nconsts"], params["body_nconsts"])

    def goes_on(carry: list[Any]) -> jax.Array:
        return jnp.asarray(_evaluate(params["cond_jaxpr"], *of_condition, *carry)[0])

    def step(carry: list[Any]) -> list[Any]:
        after, still = _evaluate(params["body_jaxpr"], *of_body, *carry), goes_on(carry)
        if still.ndim == 0:
            return after
        mask = lambda x: still.reshape(*still.shape, *[1] * (x.ndim - still.ndim))  # noqa: E731
        return [jnp.where(mask(old), new, old) for new, old in zip(after, carry, strict=True)]

    # Of a batch of loops those that are done wait for the others, as in JAX's own `while` with a batch of conditions.
    return jax.lax.while_loop(lambda carry: jnp.any(goes_on(carry)), step, start)


def _scan(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    consts, start, rows = _split(operands, params["num_consts"], params["num_carry"])

    def step(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        results = _evaluate(params["jaxpr"], *consts, *carry, *row)
        return results[: len(carry)], results[len(carry) :]

    settings = {name: params[name] for name in ("length", "reverse", "unroll")}
    end, record = jax.lax.scan(step, start, rows, **settings)
    return [*end, *record]


def _cond(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    branches = [functools.partial(_evaluate, branch) for branch in params["branches"]]
    platforms = params.get("branches_platforms")
    if platforms is not None:  # one for each, and those of others need not compile here
        here = next(i for i, names in enumerate(platforms) if names is None or "cpu" in names)
        return branches[here](*operands[1:])
    return jax.lax.switch(operands[0], branches, *operands[1:])


def _linear_solve(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    lengths = params["const_lengths"]
    _, consts, _, right = _split(operands, lengths.matvec + lengths.vecmat, lengths.solve, lengths.transpose_solve)
    return _evaluate(params["jaxprs"].solve, *consts, *right)


def _shard_map(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    body = ClosedJaxpr(params["jaxpr"], ())
    settings = {name: params[name] for name in ("mesh", "in_specs", "out_specs", "check_vma")}
    axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]  # in JAX 0.8
    return list(jax.shard_map(lambda *own: tuple(_evaluate(body, *own)), axis_names=axes, **settings)(*operands))


def _checkpoint(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    if params["prevent_cse"] and params["differentiated"]:  # or what is made anew would be kept after all
        operands = list(jax.lax.optimization_barrier(operands))
    return _evaluate(ClosedJaxpr(params["jaxpr"], ()), *operands)


def _call(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    return _evaluate(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], *operands)


_STRUCTURES = {
    "while": _while,
    "scan": _scan,
    "cond": _cond,
    "custom_linear_solve": _linear_solve,
    "shard_map": _shard_map,
    "remat2": _checkpoint,
} | dict.fromkeys(("jit", "closed_call", "custom_jvp_call", "custom_vjp_call"), _call)
"""What is looked into; any other is left as it is, and what it holds may wait."""


def _split(operands: list[Any], *lengths: int) -> list[list[Any]]:
    """Runs of operands of these lengths, and what is left."""
    runs = []
    for length in lengths:
        runs.append(operands[:length])
        operands = operands[length:]
    return [*runs, operands]
