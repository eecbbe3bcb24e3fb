"""Eight densities on the plane, and log Z of any energy there by quadrature.

    Density(sample, log_density)        log_density is exact: what a perfect fit would reach on points held out
    log_partition(energy) = log int exp(-U(x)) dx

All are about as wide as a standard normal distribution. Curves with noise (moons, swiss roll) are mixtures along their
parameter t, uniform on an interval; their density is the mean over a grid of t whose points lie half a standard
deviation of the noise apart at most, for which the midpoint rule is exact to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.special import i0e, logsumexp

Points = np.ndarray
"""(num, 2)"""
Values = np.ndarray
"""(num,)"""
HALF_WIDTH = 4.0
"""Of the innermost square of the quadrature; each further one is twice as wide."""
CELLS = 400
"""Along a side of each square: .02 wide in the innermost, a fifth of the narrowest standard deviation here."""
SQUARES = 5
"""The last has a half-width of 64."""
NEGLIGIBLE = 1e-4
"""Share of the mass that the band along the border of the last square may hold."""


@dataclasses.dataclass(frozen=True)
class Density:
    """Something to learn.

    Attributes:
        sample: draws of it, by a generator and their number.
        log_density: exact, at each of some points.
    """

    sample: Callable[[np.random.Generator, int], Points]
    log_density: Callable[[Points], Values]


def normal_mixture(centres: Points, scale: float, weights: Values) -> Density:
    """Of normal distributions with one standard deviation."""

    def sample(rng: np.random.Generator, num: int) -> Points:
        chosen = rng.choice(len(centres), size=num, p=weights)
        return centres[chosen] + scale * rng.normal(size=(num, 2))

    def log_density(x: Points) -> Values:
        squares = np.sum(x**2, axis=1)[:, None] - 2 * x @ centres.T + np.sum(centres**2, axis=1)
        return logsumexp(-squares / (2 * scale**2), axis=1, b=weights) - np.log(2 * np.pi * scale**2)

    return Density(sample, log_density)


def _log_normal(residual: np.ndarray, scale: float) -> np.ndarray:
    """Log density of a two-dimensional normal distribution around zero."""
    return -np.sum((residual / scale) ** 2, axis=-1) / 2 - np.log(2 * np.pi * scale**2)


def noisy_curve(curve: Callable[[Values], Points], length: float, scale: float, cells: int) -> Density:
    """`curve(t)` with t uniform from 0 to `length`, and normal noise."""

    def sample(rng: np.random.Generator, num: int) -> Points:
        return curve(rng.uniform(0, length, num)) + scale * rng.normal(size=(num, 2))

    midpoints = curve((np.arange(cells) + 0.5) * length / cells)
    return Density(sample, normal_mixture(midpoints, scale, np.full(cells, 1 / cells)).log_density)


def eight_gaussians() -> Density:
    """Eight modes on a circle, with weights in the ratio 1:2:...:8."""
    angles = np.arange(8) * np.pi / 4
    weights = np.arange(1.0, 9) / 36
    return normal_mixture(1.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1), 0.15, weights)


def two_moons() -> Density:
    """Two half circles that reach into each other; t runs over one, then the other."""

    def curve(t: Values) -> Points:
        upper = np.stack([np.cos(t) - 0.5, np.sin(t) - 0.25], axis=1)
        lower = np.stack([0.5 - np.cos(t - np.pi), 0.25 - np.sin(t - np.pi)], axis=1)
        return np.where((t < np.pi)[:, None], upper, lower) * 1.2

    return noisy_curve(curve, 2 * np.pi, 0.1, 200)


def swiss_roll() -> Density:
    """One and a half turns of a spiral, thinner where it is wider."""

    def curve(t: Values) -> Points:
        angle = 1.5 * np.pi + t
        return angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1) / 7

    return noisy_curve(curve, 3 * np.pi, 0.1, 400)


def pinwheel() -> Density:
    """Five arms, each a narrow normal distribution, twisted by an angle that grows with the radius.

    A rotation by an angle of the radius alone leaves areas as they are, so that its density needs no Jacobian.
    """
    mean, scale, twist = 1.3, np.array([0.4, 0.12]), 0.7
    turns = 2 * np.pi * np.arange(5) / 5

    def rotated(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
        cos, sin = np.cos(angle), np.sin(angle)
        return np.stack([cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]], axis=-1)

    def sample(rng: np.random.Generator, num: int) -> Points:
        arm = scale * rng.normal(size=(num, 2)) + [mean, 0]
        return rotated(arm, rng.choice(turns, num) + twist * np.linalg.norm(arm, axis=1))

    def log_density(x: Points) -> Values:
        angle = turns + twist * np.linalg.norm(x, axis=1)[:, None]
        arm = (rotated(x[:, None], -angle) - [mean, 0]) / scale
        return logsumexp(_log_normal(arm, 1.0), axis=1) - np.log(5 * np.prod(scale))

    return Density(sample, log_density)


def checkerboard() -> Density:
    """Uniform on every other unit square of a board of four by four."""

    def sample(rng: np.random.Generator, num: int) -> Points:
        column, half = rng.integers(4, size=num), rng.integers(2, size=num)
        corner = np.stack([column, 2 * half + column % 2], axis=1) - 2
        return corner + rng.uniform(size=(num, 2))

    def log_density(x: Points) -> Values:
        cell = np.floor(x).astype(int)
        inside = (np.abs(x + 1e-12) < 2).all(axis=1) & (cell.sum(axis=1) % 2 == 0)
        return np.where(inside, -np.log(8), -np.inf)

    return Density(sample, log_density)


def rings() -> Density:
    """Three circles with normal noise, of weights as their radii: a Bessel function of the radius."""
    radii, scale = np.array([0.6, 1.2, 1.8]), 0.1
    weights = radii / radii.sum()

    def sample(rng: np.random.Generator, num: int) -> Points:
        angle, radius = rng.uniform(0, 2 * np.pi, num), rng.choice(radii, num, p=weights)
        centres = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return centres + scale * rng.normal(size=(num, 2))

    def log_density(x: Points) -> Values:
        radius = np.linalg.norm(x, axis=1)[:, None]
        on_axis = -((radius - radii) ** 2) / (2 * scale**2) - np.log(2 * np.pi * scale**2)
        return logsumexp(on_axis + np.log(i0e(radius * radii / scale**2)), axis=1, b=weights)

    return Density(sample, log_density)


def gaussians_25() -> Density:
    """Five by five modes of equal weight."""
    side = 0.7 * np.arange(-2, 3)
    centres = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    return normal_mixture(centres, 0.1, np.full(25, 1 / 25))


def funnel() -> Density:
    """Neal's: v ~ N(0, 1), x | v ~ N(0, e^v / 4)."""

    def sample(rng: np.random.Generator, num: int) -> Points:
        v, noise = rng.normal(size=(2, num))
        return np.stack([v, 0.5 * np.exp(v / 2) * noise], axis=1)

    def log_density(x: Points) -> Values:
        scale = 0.5 * np.exp(x[:, 0] / 2)
        return _log_normal(np.stack([x[:, 0], x[:, 1] / scale], axis=1), 1.0) - np.log(scale)

    return Density(sample, log_density)


DENSITIES = {
    "8 Gaussians": eight_gaussians,
    "two moons": two_moons,
    "swiss roll": swiss_roll,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
    "rings": rings,
    "25 Gaussians": gaussians_25,
    "funnel": funnel,
}


class UnboundedError(Exception):
    """Too much of the mass of an energy lies where the quadrature ends: it may have no log Z."""


def log_partition(energy: Callable[[Points], Values]) -> float:
    """`log int exp(-U(x)) dx` by the midpoint rule in nested squares, each twice as wide and as coarse as the last.

    Args:
        energy: U, of points of shape (num, 2) in single precision.

    Raises:
        UnboundedError: where the band along the border of the last square, a twentieth of its width, has more than a
            negligible share of the mass, or an energy is not a number.
    """
    log_masses, border = [], -np.inf
    for square in range(SQUARES):
        half = HALF_WIDTH * 2**square
        side = ((np.arange(CELLS) + 0.5) / CELLS * 2 - 1) * half
        points = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
        distance = np.abs(points).max(axis=1)
        points, distance = (x[distance > (half / 2 if square else 0)] for x in (points, distance))
        log_values = -np.asarray(energy(points.astype(np.float32)), float) + 2 * np.log(2 * half / CELLS)
        log_masses.append(logsumexp(log_values))
        border = logsumexp(log_values[distance > 0.95 * half])
    log_z = float(logsumexp(log_masses))
    if not border - log_z < np.log(NEGLIGIBLE):
        raise UnboundedError(f"a share of {np.exp(border - log_z):.1g} of the mass lies along |x| = {half:.0f}")
    return log_z
