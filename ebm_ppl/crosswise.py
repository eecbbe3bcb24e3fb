"""What particles move by, learned **crosswise**: each half of a cloud from the other half.

    scale       metric of a half: the covariance of the other half's particles (`scale.py`)
    centring    coordinates that it is a metric of (`centring.py`), from the other half, too, where the kernel's metric
                is "auto"
    centre      mean of the other half in these coordinates, for proposals around it

A metric of the very particles that it moves would favour the directions in which they happen to spread, and biases
log Z (by -.012 a stage for 1000 particles of a Gaussian in 32 dimensions).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.centring import Centring, alike, before_learning, coordinates_of, learn_centring
from ebm_ppl.kernels import Tuning
from ebm_ppl.scale import DenseScale
from ebm_ppl.target import Tilted
from ebm_ppl.typing import Array

MOST_LEARNED = 1000
"""Particles of a half that the coordinates of the other are learned from."""


def learn_crosswise(parts: list[np.ndarray], target: Tilted) -> list[Centring | None]:
    """Coordinates for both halves of the clouds of several runs, with leading axes (run, 2) in each part; on the host.

    All parts have some, or none where no run of any has found any.

    Args:
        parts: particles of both halves, each (run, 2, num, dim), with as many runs.
    """

    def learned(z: np.ndarray) -> Centring | None:
        middle = len(z) // 2
        found = learn_centring(z[:middle], z[middle:], target.site_numbers)
        return before_learning(target) if found is None else found

    found = alike([learned(half) for part in parts for run in part for half in run[::-1]])
    if found[0] is None:
        return [None] * len(parts)
    in_parts = jax.tree.map(lambda *each: np.stack(each).reshape(len(parts), -1, 2, target.dim), *found)
    return [jax.tree.map(lambda x, i=i: x[i], in_parts) for i in range(len(parts))]


def crosswise(halves: Array, centring: Centring | None, points: Array) -> tuple[DenseScale, Centring | None, Array]:
    """What both halves of a run move by, with leading axis (2,).

    Args:
        halves: the particles, (2, num, dim).
        points: how many independent ones a half is worth.
    """
    others = list(halves[::-1] if centring is None else jax.vmap(coordinates_of)(halves[::-1], centring))
    # Not by vmap: with a batch of matrices the runs would have to go one at a time (`linear_algebra.py`).
    scales = [DenseScale.of_cloud(other, points) for other in others]
    centres = jnp.stack([jnp.mean(other, axis=0) for other in others])
    return jax.tree.map(lambda *of_halves: jnp.stack(of_halves), *scales), centring, centres


def tuning_of(z: Array, step_size: Array, centring: Centring | None, points: Array | int) -> Tuning:
    """What a cloud says about moves at its temperature, in the coordinates of its first half.

    Args:
        z: the particles of a run, (num, dim).
        centring: of a `Cloud`, with leading axis (2,).
        points: how many independent ones the particles are worth.
    """
    own = jax.tree.map(lambda x: x[0], centring)
    u = z if own is None else coordinates_of(z, own)
    return Tuning(step_size, DenseScale.of_cloud(u, points), own, jnp.mean(u, axis=0))
