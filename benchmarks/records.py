"""What benchmarks share: runs in files of JSON lines, a command that makes or reads them, and tables in Markdown."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The records of a file; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(record: Record, path: Path | None) -> None:
    """Adds a record to a file, where one is wanted."""
    if path is not None:
        with path.open("a") as file:
            print(json.dumps(record), file=file)


def run_or_read(
    parser: argparse.ArgumentParser,
    serve: Callable[[Record], None],
    run_all: Callable[[argparse.Namespace, list[Record]], None],
    print_tables: Callable[[list[Record]], None],
) -> None:
    """The command of a benchmark whose tools have processes of their own.

    Args:
        parser: with the arguments that this benchmark alone has.
        serve: of the process of one tool, by what it was asked for with.
        run_all: adds to the records what is asked for and not there yet.
    """
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for a run, after which it is killed")
    parser.add_argument("--out", type=Path, help="a file of JSON lines that runs are appended to")
    parser.add_argument("--read", type=Path, nargs="+", help="only print the tables of the runs in these files")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(json.loads(options.serve))
        return
    records = [record for path in options.read or filter(None, [options.out]) for record in read(path)]
    if not options.read:
        run_all(options, records)
    print_tables(records)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor, and what the work returned."""
    import jax  # here, since tools without JAX read this file, too

    start = time.process_time()
    found = jax.block_until_ready(work())
    return time.process_time() - start, found


def versions(packages: tuple[str, ...]) -> str:
    """Of those that are installed, and of Python."""
    found = [f"{name} {number}" for name in packages if (number := _version(name))]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def with_error(values: ArrayLike, form: str = ".3f") -> str:
    """Mean of independent values, and where there is more than one its standard error."""
    values = np.asarray(values)
    error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{error}"


def as_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def as_header(*columns: str) -> str:
    return f"{as_row(*columns)}\n|{' --- |' * len(columns)}"
