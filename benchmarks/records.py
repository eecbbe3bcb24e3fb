"""What the benchmarks share: runs in files of JSON lines, and tables in Markdown."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The records of a file; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(record: Record, path: Path | None) -> None:
    """Adds a record to a file, where one is wanted."""
    if path is not None:
        with path.open("a") as file:
            print(json.dumps(record), file=file)


def versions(packages: tuple[str, ...]) -> str:
    """Of those that are installed, and of Python."""
    found = [f"{name} {number}" for name in packages if (number := _version(name))]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def as_header(*columns: str) -> str:
    return f"{as_row(*columns)}\n|{' --- |' * len(columns)}"
