"""Settings of JAX's compiler on the CPU, where a small model spends its time on calls and not on arithmetic.

XLA runs a program on the CPU as a list of calls of about 50 ns each. It compiles a loop as one call where the loop is
small, and by its own measure almost none is; with a larger measure NUTS on eight schools is five times as fast. Loops
with a scatter, a sort, a product of matrices or a call of a linear algebra library stay as they are. XLA's older
emitters write a scatter as a loop, and the gradient of `effect[group]` is a scatter: so they are chosen for a program
whose scatters are small, and that has nothing else to keep its loops apart.

The measure is a setting of the whole process and is read when JAX starts. So the package makes it before it imports
BlackJAX, whose import starts JAX; where something else has started JAX before, all runs as ever, but slower. Options of
this kind that `XLA_FLAGS` holds already are left alone; XLA's own measure is 1024 in place of the number below.
"""

from __future__ import annotations

import os
from typing import Any

from ebm_ppl import linear_algebra

EFFORT, LEAST_EFFORT = 2, 0
"""Levels of optimisation. The third, XLA's own choice, takes ten times as long over a batch of random numbers, a third
longer over a program, and none that was measured ran faster for it."""
SMALL_LOOP = 10**6
"""Most bytes that a round of a loop may touch to be compiled as one call; more take far longer than the calls."""
SMALL_SCATTER = 2000
"""Most numbers that a scatter may move for the older emitters, which take twice as long for each."""
_SCATTERS = {"scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max"}
_NEVER_ONE_CALL = linear_algebra.NAMES | {"conv_general_dilated", "ffi_call", "fft", "pure_callback", "sort"}


def compile_small_loops() -> None:
    """Has XLA compile a small loop as one call."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in flags:
        option = f"--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold={SMALL_LOOP}"
        os.environ["XLA_FLAGS"] = f"{flags} {option}".strip()


def compiler_options(jaxpr: Any, hurry: bool) -> dict[str, Any]:
    """Options for a program on the CPU; a wrong guess costs time, never a wrong number.

    Args:
        hurry: whether to compile fast rather than well.
    """
    effort = {"xla_backend_optimization_level": LEAST_EFFORT if hurry else EFFORT}
    return effort | ({"xla_cpu_use_fusion_emitters": False} if _has_small_scatters_only(jaxpr) else {})


def _has_small_scatters_only(jaxpr: Any) -> bool:
    """Whether a program has scatters, all of them small, and nothing else that keeps its loops apart."""
    scatters = False
    for eqn in linear_algebra.equations(jaxpr):
        name = eqn.primitive.name
        if name in _NEVER_ONE_CALL or (name == "dot_general" and min(x.aval.ndim for x in eqn.invars) > 1):
            return False
        if name in _SCATTERS:
            scatters = True
            if eqn.invars[2].aval.size > SMALL_SCATTER:
                return False
    return scatters


compile_small_loops()
