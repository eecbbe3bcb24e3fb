"""What chains are worth: how far apart their draws are as good as independent, and shares of modes with their errors.

    effective size      num / (1 + 2 sum_k rho_k)               ArviZ's, the least over all coordinates
    spacing             num / effective size                    `spacing`, where an AR(1) keeps a correlation of .13
    share of a mode     points nearest to its centre            `mode_weights`, or of those the ones within a radius
    its error           sqrt(p (1 - p) / (n + 2))               n effective points, p = (n share + 1/2) / (n + 1)

The error is the standard deviation of the posterior of a share under Jeffreys' prior: a mode without a point has one.

References:
    Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), Rank-normalization, folding, and localization: an improved
    R-hat for assessing convergence of MCMC; Brown, Cai and DasGupta (2001), Interval estimation for a binomial
    proportion.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ebm_ppl.logz.integral import effective_size
from ebm_ppl.train.objective import flat
from ebm_ppl.typing import ArrayLike, EnergyError, EnergyShapeError

SHORTEST = 4
"""Draws of a chain that say something of its effective size."""
INDEPENDENT = 2.0
"""Spacings apart at which a chain of order one keeps a correlation of .02."""


class ModeWeights(NamedTuple):
    """Shares of points nearest to each of several centres."""

    weight: np.ndarray
    """(num_centres,), adding up to one, or to the share of points within a radius of any."""
    std_error: np.ndarray
    """(num_centres,)"""


def spacing(values: np.ndarray) -> int:
    """Every how many draws of chains make as many as they are effectively worth: values of shape (chain, draw, num)."""
    return max(1, round(values.shape[0] * values.shape[1] / _least(values)))


def thinned(chains: ArrayLike) -> np.ndarray:
    """Draws of chains that are far enough apart to pass for independent, as `mmd_test` and `classifier_test` want them.

    Args:
        chains: shape (chain, draw, *event_shape).

    Returns:
        Shape (num, *event_shape), the chains one after another.

    Example:
        >>> ebm_ppl.mmd_test(key, data, ebm_ppl.thinned(tree["posterior"]["x"]))
    """
    draws = as_chains(chains)
    values = draws.reshape(*draws.shape[:2], -1)
    every = spacing(values)
    every = 1 if every == 1 else round(INDEPENDENT * every)
    return draws[:, ::every].reshape(-1, *draws.shape[2:])


def mode_weights(
    points: ArrayLike, centres: ArrayLike, *, within: float | None = None, chains: bool = False
) -> ModeWeights:
    """Shares of points that are nearest to each of several centres, with standard errors.

    Args:
        points: independent events, shape (num, *event_shape); with `chains`, (chain, draw, *event_shape).
        centres: of the modes, shape (num_centres, *event_shape).
        within: distance from its centre beyond which a point counts for no mode: of four standard deviations of a
            mode, say, whose weights then add up to the share of good samples, and are above zero for modes covered.
        chains: whether the points are those of Markov chains, whose errors are then those of their effective size.

    Raises:
        EnergyShapeError: where centres and points are of different shapes.
        EnergyError: for a number that is not finite, or a radius that is not positive.

    Example:
        >>> ebm_ppl.mode_weights(data, [[-2.0, 0.0], [2.0, 0.0]]).weight
    """
    draws = as_chains(points) if chains else np.asarray(points)[None]
    places, shape = flat(centres, "centres")
    rows, _ = flat(draws.reshape(-1, *draws.shape[2:]), "points")
    if draws.shape[2:] != shape:
        raise EnergyShapeError(f"A point has shape {draws.shape[2:]}, a centre {shape}.")
    rows, places = np.asarray(rows), np.asarray(places)
    if within is not None and not within > 0:
        raise EnergyError(f"within is a distance, positive; got {within}.")
    squares = np.stack([np.sum((rows - place) ** 2, axis=1) for place in places], axis=1)
    counts = np.argmin(squares, axis=1)[:, None] == np.arange(len(places))
    if within is not None:
        counts &= squares <= within**2
    inside = counts.reshape(*draws.shape[:2], -1).astype(float)
    weight, num = inside.mean(axis=(0, 1)), np.full(len(places), float(len(rows)))
    if chains:
        of_points = _least(rows.reshape(*draws.shape[:2], -1))
        # A mode that all draws are in, or none, does not say itself how often they could have left it.
        of_modes = [effective_size(each) if np.ptp(each) else of_points for each in np.moveaxis(inside, -1, 0)]
        num = np.minimum(of_modes, num)
    p = (num * weight + 0.5) / (num + 1)
    return ModeWeights(weight, np.sqrt(p * (1 - p) / (num + 2)))


def _least(values: np.ndarray) -> float:
    """The effective size of what mixes worst, of values of shape (chain, draw, num)."""
    return min(effective_size(values[..., i]) for i in range(values.shape[-1]))


def as_chains(points: ArrayLike) -> np.ndarray:
    """Draws of chains, (chain, draw, *event_shape), where there are enough of them."""
    draws = np.asarray(points)
    if draws.ndim < 2 or min(draws.shape[:2]) < 1 or draws.shape[1] < SHORTEST:
        raise EnergyError(f"Chains have shape (chain, draw, *event_shape), of four draws at least; got {draws.shape}.")
    return draws
