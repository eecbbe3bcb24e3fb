"""The suite runs in double precision and without a display; `run_in_float32` starts a fresh process in single.

Most of its time is compilation. So compiled programs are kept on disk (`.jax_cache`, which may be deleted at any time),
for the other workers, for processes that tests start, and for the next time. And what runs by a plain `jax.jit` is
compiled without the optimisation of LLVM, which takes longer than what it saves; what `ebm_ppl.parallel` compiles has
levels of its own (`ebm_ppl/xla.py`).
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Of two that are at odds the last one counts, and so one that is there already.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # One core for each worker: the thread pools of several XLAs on the same cores wait for one another.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"][2:]) % len(cores)]})

import jax
import pytest

from ebm_ppl import parallel

jax.config.update("jax_enable_x64", True)

MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Drops compiled programs after a file of tests where the process comes near the number of maps it may have.

    A program takes three maps of memory for each of its parts, and Linux gives a process 65530: thousands of programs
    later, XLA ends the process in the middle of a test that has nothing to do with it.
    """
    yield
    if all(path.exists() for path in MAPS) and 3 * MAPS[0].read_bytes().count(b"\n") > int(MAPS[1].read_text()):
        jax.clear_caches()
        parallel.forget()
        gc.collect()


@pytest.fixture(scope="session")
def run_in_float32():
    """Runs Python source in a process with JAX's default precision, and returns what it prints."""

    def run(source: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "JAX_ENABLE_X64"}
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(source)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="session")
def in_both_precisions(run_in_float32):
    """Runs a function that stands by itself in single precision and here; what it returns goes through JSON."""

    def run(function, *args):
        source = f"import json\n{inspect.getsource(function)}\nprint(json.dumps({function.__name__}(*{args!r})))"
        return json.loads(run_in_float32(source).strip().splitlines()[-1]), function(*args)

    return run
