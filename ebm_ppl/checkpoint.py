"""State of a long run on disk: arrays as npz, with a description by which a file is known to be whole and one's own.

    save(path, tree, settings)      every array of a pytree, and what else must be the same where it is read
    load(path, like, settings)      the same pytree, its arrays from the file, which is read once

A file is written beside its place and then moved there, so that a process that dies leaves the file before. It holds
numbers and JSON, no pickle: nothing in it is ever executed. What is not an array (functions, settings) stays with the
program that reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ebm_ppl.typing import CheckpointError

FORMAT = 1
DESCRIPTION = "description"


def save(path: str | Path, tree: Any, settings: dict[str, Any]) -> None:
    """Writes all arrays of a pytree, typed keys included.

    Args:
        settings: JSON that `load` must be given, too: what the arrays mean something with.
    """
    path, arrays = Path(path), _arrays(tree)
    described = _described(tree, settings) | {"digest": _digest(arrays)}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            stored: Any = {DESCRIPTION: np.array(json.dumps(described))} | arrays
            np.savez(file, **stored)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | Path, like: Callable[[dict[str, Any]], Any], settings: dict[str, Any]) -> Any:
    """The pytree of a file that `save` wrote.

    Args:
        like: makes of the settings that the file was saved with a pytree of the same structure and shapes; what is no
            array in it is taken over.
        settings: those that must be the same; the file may have others beside them.

    Raises:
        CheckpointError: where the file is truncated, altered, of another version, holds anything but numbers, or
            belongs to another run; it says which.
    """
    described, arrays = _read(path)
    tree = like(described)
    expected = json.loads(json.dumps(_described(tree, settings)))
    differing = sorted(name for name in expected if described.get(name) != expected[name])
    if differing:
        told = "; ".join(f"{name} was {described.get(name)!r}, now {expected[name]!r}" for name in differing)
        raise CheckpointError(f"{path} belongs to another run: {told}. Give the same settings, or another path.")
    kept, rest = eqx.partition(tree, _is_array)
    leaves, structure = jax.tree.flatten(kept)
    read = [_as_leaf(arrays[_name(i)], leaf) for i, leaf in enumerate(leaves)]
    return eqx.combine(jax.tree.unflatten(structure, read), rest)


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Description and arrays of a file that is whole."""
    try:
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        described = json.loads(str(arrays.pop(DESCRIPTION)))
        digest, version = described.pop("digest"), described["format"]
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is no checkpoint, or a damaged one ({error}). Delete it to start anew."
        ) from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}; this version reads {FORMAT}. Delete it to start anew.")
    if digest != _digest(arrays):
        raise CheckpointError(f"{path} was altered since it was written. Delete it to start anew.")
    return described, arrays


def _described(tree: Any, settings: dict[str, Any]) -> dict[str, Any]:
    arrays = _arrays(tree)
    return {
        "format": FORMAT,
        "structure": hashlib.sha256(str(jax.tree.structure(eqx.filter(tree, _is_array))).encode()).hexdigest()[:16],
        "shapes": [f"{x.dtype}{list(x.shape)}" for x in arrays.values()],
        **settings,
    }


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves(eqx.filter(tree, _is_array))
    return {_name(i): np.asarray(jax.random.key_data(x) if _is_key(x) else x) for i, x in enumerate(leaves)}


def _as_leaf(array: np.ndarray, like: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(jax.numpy.asarray(array), impl=jax.random.key_impl(like))
    return array if isinstance(like, np.ndarray) else jax.numpy.asarray(array)


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _name(i: int) -> str:
    return f"array_{i}"


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
