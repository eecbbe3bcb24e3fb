"""What tests of fit have in common: sums over all pairs of points, a p-value by simulation, and Holm's correction.

    sums over pairs     sum_{j != i} k(x_i, x_j) w_j            `over_pairs`: in blocks of rows, for many w at once
    scale of a kernel   median |x_i - x_j|                      `median_distance`
    p-value             (1 + #{b: T_b >= T}) / (1 + B)          `simulated_p_value`: T_b as T is under the hypothesis
    many tests          max_{j <= i} min(1, (m - j + 1) p_(j))  `holm`: the probability of any false alarm stays below p

Nothing of the size of all pairs is ever held: memory goes as the number of points times that of weights.

References:
    Phipson and Smyth (2010), Permutation p-values should never be zero; Holm (1979), A simple sequentially rejective
    multiple test procedure; Garreau, Jitkrittum and Kanagawa (2017), Large sample analysis of the median heuristic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.typing import Array, ArrayLike, EnergyError, PRNGKey

BLOCK = 128
"""Rows of a matrix of pairs that are held at once."""
FOR_MEDIAN = 1000
"""Points whose distances give the scale of a kernel."""


class Significance(NamedTuple):
    """What a test says; under its hypothesis a p-value of at most p has a probability of at most about p."""

    statistic: float
    p_value: float
    num_points: int
    """That were tested: of chains, those left after thinning."""
    scale: float = float("nan")
    """Of the kernel, where the test has one."""


def over_pairs(kernel: Callable[[Any, Any], Array], points: Any, weights: Array) -> Array:
    """`sum_{j != i} kernel(x_i, x_j) w_j` for each i and each column of weights, shape (num, num_weights).

    Args:
        kernel: of one pair.
        points: a pytree of arrays whose first axis is that of the points.
        weights: shape (num, num_weights).
    """

    def of_point(i: Array) -> Array:
        own = jax.tree.map(lambda x: x[i], points)
        row = jax.vmap(lambda other: kernel(own, other))(points)
        return row.at[i].set(0.0) @ weights

    return jax.lax.map(of_point, jnp.arange(len(weights)), batch_size=BLOCK)


def squared_distance(x: Array, y: Array) -> Array:
    """Of two points; written by products, so that of many pairs it is one product of matrices."""
    return jnp.maximum(x @ x + y @ y - 2 * (x @ y), 0.0)


def median_distance(key: PRNGKey, points: Array) -> Array:
    """The median distance of some of the points, which does not depend on their order: shape (num, dim)."""
    chosen = jax.random.permutation(key, points - jnp.mean(points, axis=0))[:FOR_MEDIAN]
    squares = jax.vmap(lambda x: jax.vmap(lambda y: squared_distance(x, y))(chosen))(chosen)
    return jnp.sqrt(jnp.median(squares[jnp.triu_indices(len(chosen), 1)]))


def simulated_p_value(statistic: Array, simulated: Array) -> Array:
    """Share of the simulated statistics, and the one observed, that are as large: never zero, and NaN where one is."""
    # Equal but for rounding is as large: on a handful of points many simulated ones are the observed one.
    slack = 1e3 * jnp.finfo(simulated.dtype).eps * jnp.max(jnp.abs(simulated), initial=0.0)
    limit = statistic - slack
    return jnp.where(jnp.isnan(limit), jnp.nan, (1 + jnp.sum(simulated >= limit)) / (1 + len(simulated)))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values of several tests, corrected for their number by Holm's step-down procedure.

    Rejecting what is below .05 then rejects any true hypothesis with a probability of .05 at most, whatever the tests
    have in common. A NaN, of a test that could not be made, stays one, and counts as no test.

    Args:
        p_values: of each test, shape (num,).

    Raises:
        EnergyError: for numbers that are no probabilities.

    Reference: Holm (1979).

    Example:
        >>> ebm_ppl.holm([0.01, 0.04, 0.03])  # .03, .06, .06
    """
    p = np.asarray(p_values, float)
    if p.ndim != 1 or np.any((p < 0) | (p > 1)):
        raise EnergyError(f"p-values are probabilities, one for each test; got {p_values}.")
    made = np.flatnonzero(~np.isnan(p))
    order = made[np.argsort(p[made], kind="stable")]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return corrected


def check_simulations(num: int, name: str) -> None:
    if num < 19:
        raise EnergyError(f"{name} is 19 at least, for a p-value of .05 to be possible; got {num}.")


def check_scale(scale: ArrayLike) -> float:
    found = float(scale)  # pyright: ignore
    if not (math.isfinite(found) and found > 0):
        raise EnergyError(f"The scale of a kernel is a positive length, and the points must not coincide; got {found}.")
    return found
