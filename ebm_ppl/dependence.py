"""Which inputs does each output of a function depend on? Found by analysis of its jaxpr, never by name.

An output depends on an input where a path of operations joins them. Calls are followed inside (`jit`, custom
derivatives, checkpointing); loops and branches count as one operation, all of whose outputs depend on all of its
inputs, which errs on the side of dependence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend import core

Names = frozenset[str]
_LOOPS = {"scan", "while", "cond"}


def dependencies(function: Callable[..., Mapping[str, Any]], inputs: Mapping[str, Any], *args: Any) -> dict[str, Names]:
    """For each output of `function(inputs, *args)`, the names of the inputs that it depends on.

    Args:
        function: takes the mapping of named inputs, and returns a mapping from names to pytrees of arrays.
        inputs: arrays or shape structs by name.
        args: further inputs whose influence is of no interest.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(inputs, *args)
    names = [name for name, leaf in inputs.items() for _ in jax.tree.leaves(leaf)]
    names = [frozenset([name]) for name in sorted(names)]
    rest = [frozenset()] * (len(closed.jaxpr.invars) - len(names))
    outputs = _propagate(closed.jaxpr, names + rest)
    structure = jax.tree.structure(shapes)
    by_name = jax.tree.unflatten(structure, outputs)
    return {name: frozenset().union(*jax.tree.leaves(tree)) for name, tree in by_name.items()}


def _propagate(jaxpr: core.Jaxpr, inputs: list[Names]) -> list[Names]:
    known: dict[core.Var, Names] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Names:
        return frozenset() if isinstance(atom, core.Literal) else known.get(atom, frozenset())

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        body = _called(eqn)
        if body is None:
            results = [frozenset().union(*operands)] * len(eqn.outvars)
        else:
            results = _propagate(body, operands)
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _called(eqn: Any) -> core.Jaxpr | None:
    """The jaxpr that an equation calls with exactly its own operands and results, if it is such a call."""
    if eqn.primitive.name in _LOOPS:
        return None
    for value in eqn.params.values():
        body = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
        if (
            isinstance(body, core.Jaxpr)
            and len(body.invars) == len(eqn.invars)
            and len(body.outvars) == len(eqn.outvars)
        ):
            return body
    return None
