"""Coordinates in which the scale of one coordinate no longer depends on another: partial non-centring, learned.

    z_i = m_i + c_i w + exp(a_i s) u_i      s = u_j, the driver of i: a log standard deviation or precision, say
                                            w = u_k, its leader: a population mean, say
    z_j = m_j + u_j                         drivers, leaders, and what nothing drives
    log |dz/du| = sum_i a_i s

A driver with two bounds, a log scale that is uniform between them, say, has a logistic coordinate: there scales may
follow its value instead, s = logistic(z_j) - logistic(m_j), which ends where its coordinate goes on.

A random effect whose scale is a parameter has a posterior like a funnel: no one step size and no metric suits its neck
and its mouth, and a chain crosses it slowly. Non-centring by hand moves that dependence out of the prior and, where the
data are strong, into the likelihood; here location and scale of each coordinate given its driver are read off draws of
the posterior itself, so that a_i lies wherever between centred and non-centred the data put it. The map is a bijection
whatever its numbers are: a poor fit costs speed, never correctness.

    a_ji        slope of log |z_i - mean| over z_j, by least squares, from each of two halves of the draws
    v_j         variance of those slopes: from how far the two halves disagree, over all i, and no less than that of
                independent normal draws, (pi^2 / 8) / n
    gain        nats a draw by which u is nearer to independence: a_ji^2, as far as it is significant

Drivers are chosen one by one, for as long as one gains enough. Coordinates of a site that are not significant by
themselves join a driver where they are together, and the slopes of those that share site and driver are shrunk towards
their mean, as far as they differ by no more than their noise.

References:
    Papaspiliopoulos, Roberts and Skold (2007), A general framework for the parametrization of hierarchical models;
    Gorinova, Moore and Hoffman (2020), Automatic reparameterisation of probabilistic programs; Efron and Morris (1973),
    Stein's estimation rule and its competitors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import expit
from scipy.special import expit as expit_on_host

from ebm_ppl.target import Tilted
from ebm_ppl.typing import Array

FEWEST = 200
"""Draws from which anything is learned."""
MOST_COORDINATES = 2000
"""Beyond them the table of all pairs costs more than it tells."""
WORTHWHILE = 0.2
"""Nats a draw that a driver must gain."""
SIGNIFICANT = 9.0
"""Squared standard errors of a slope that count as noise."""
TOGETHER = 4.0
"""Standard errors of the gain of all coordinates of a site that count as noise."""
NOISE = 0.5
"""Nats for each coordinate and unit of variance of its slope that a driver must gain: what chance alone may."""
LED = 0.1
"""Share of a coordinate's variance that a leader must explain."""
LOG_NORMAL_VARIANCE = math.pi**2 / 8
"""Variance of log |x| for a standard normal x."""
LARGEST = 40.0
"""Nats of log scale, far beyond what any posterior holds."""
ROUNDS = 3
"""Of location given scale, and scale given location."""
RIDGE = 1e-6
SMALLEST = 1e-3
"""Standard deviations from the mean at which log |x| is cut off."""


class Centring(eqx.Module):
    """The map from non-centred coordinates u to z; methods take one point of shape (dim,)."""

    driver: Array
    """Index of the coordinate that drives each, its own where none does, (dim,)."""
    leader: Array
    """Index of the coordinate that each follows, (dim,)."""
    mean: Array
    follow: Array
    """c; like the next zero where nothing drives."""
    slope: Array
    """a"""
    is_bent: Array | None = None
    """Whether what each coordinate drives follows its logistic function; None where none does, (dim,)."""

    @classmethod
    def identity(cls, dim: int, *batch: int) -> Centring:
        """Where nothing drives anything, as many of it as a batch has; on the host."""
        own: Any = np.broadcast_to(np.arange(dim, dtype=jnp.result_type(int)), (*batch, dim))
        zeros: Any = np.zeros((*batch, dim), jnp.result_type(float))
        return cls(own, own, zeros, zeros, zeros)

    def place(self, u: Array) -> tuple[Array, Array]:
        """`(z, log |dz/du|)`."""
        location, log_scale = self._given(u)
        return self.mean + location + jnp.exp(log_scale) * u, jnp.sum(log_scale)

    def coordinates(self, z: Array) -> tuple[Array, Array]:
        """`(u, log |du/dz|)`: the inverse of `place`."""
        centred = z - self.mean
        location, log_scale = self._given(centred)
        return (centred - location) * jnp.exp(-log_scale), -jnp.sum(log_scale)

    def _given(self, u: Array) -> tuple[Array, Array]:
        """Location and log scale of each coordinate given its driver and leader, which are the same in u and z - m.

        The scale is bounded, so that nothing overflows where a trajectory diverges; it is a bijection all the same.
        """
        s = u[self.driver]
        if self.is_bent is not None:
            m = self.mean[self.driver]
            s = jnp.where(self.is_bent[self.driver], expit(m + s) - expit(m), s)
        return self.follow * u[self.leader], jnp.clip(self.slope * s, -LARGEST, LARGEST)

    def pull(self, u: Array, gradient: Array) -> Array:
        """The gradient in u of a density of u, from that in z of the same as a density of z."""
        return _through(self.place, u, gradient)

    def push(self, z: Array, gradient: Array) -> Array:
        """The inverse of `pull`, at the same point."""
        return _through(self.coordinates, z, gradient)


def _through(change: object, point: Array, gradient: Array) -> Array:
    """`d/dpoint ( log p(change(point)) + log |d change / d point| )`, where `gradient` is that of log p."""
    _, pulled_back = jax.vjp(change, point)  # pyright: ignore
    return pulled_back((gradient, jnp.ones((), gradient.dtype)))[0]


def coordinates_of(z: Array, centring: Centring) -> Array:
    """Of many points, (num, dim)."""
    return jax.vmap(centring.coordinates)(z)[0]


def before_learning(target: Tilted, *batch: int) -> Centring | None:
    """A place for a map in the first program of a sampler, where the model is such that one is likely to be found.

    Without it a program is smaller, compiles sooner and runs faster; a map that is found all the same takes another.
    """
    return Centring.identity(target.dim, *batch) if target.is_hierarchical else None


def alike(centrings: list[Centring | None]) -> list[Centring | None]:
    """The same maps, so that they can be stacked: the identity where there is none, if there is one anywhere."""
    known = next((centring for centring in centrings if centring is not None), None)
    if known is None:
        return centrings
    *batch, dim = known.driver.shape
    identity = Centring.identity(dim, *batch)
    return [identity if centring is None else centring for centring in centrings]


def learn_centring(
    first: np.ndarray, second: np.ndarray, sites: np.ndarray, is_logistic: np.ndarray | None = None
) -> Centring | None:
    """The map that two halves of the draws agree upon, or None where there is none; on the host.

    Args:
        first, second: draws, each of shape (num, dim).
        sites: number of the site that each coordinate belongs to, (dim,).
        is_logistic: of which coordinates the logistic function, too, is to be tried as what scales follow, (dim,).
    """
    first, second = (half[np.all(np.isfinite(half), axis=1)] for half in (first, second))
    pooled = np.concatenate([first, second]).astype(float)
    num, dim = pooled.shape
    if 2 * min(len(first), len(second)) < FEWEST or not 1 < dim <= MOST_COORDINATES:
        return None
    mean, deviation = np.mean(pooled, axis=0), np.std(pooled, axis=0)
    if not np.all(np.isfinite(deviation) & (deviation > 0)):
        return None
    x = (pooled - mean) / deviation
    halves = slice(len(first)), slice(len(first), None)
    driver = _drivers(_slopes(x[halves[0]]), _slopes(x[halves[1]]), num, sites)
    driven = driver != np.arange(dim)
    if not np.any(driven):
        return None
    leader, follow, slope, is_bent = np.arange(dim), np.zeros(dim), np.zeros(dim), np.zeros(dim, bool)
    for j in np.unique(driver[driven]):
        here = driven & (driver == j)
        free = np.flatnonzero(~driven)
        given, width = _conditional(x, halves, j, here, free, sites[here]), deviation[j]
        if is_logistic is not None and is_logistic[j]:
            value, bent = expit_on_host(pooled[:, j]), x.copy()
            bent[:, j] = (value - np.mean(value)) / np.std(value)
            by_value = _conditional(bent, halves, j, here, free, sites[here])
            if by_value.unexplained < given.unexplained:
                given, width, is_bent[j] = by_value, np.std(value), True
        leader[here], slope[here] = given.leader, given.slope / width
        constant, follow[here] = given.location.T
        mean[here] += constant * deviation[here]
    numbers = mean, follow * deviation / deviation[leader], slope
    indices: Any = (x.astype(jnp.result_type(int)) for x in (driver, leader))
    bends: Any = is_bent if np.any(is_bent) else None
    return Centring(*indices, *(x.astype(first.dtype) for x in numbers), is_bent=bends)


def _slopes(x: np.ndarray) -> np.ndarray:
    """Least-squares slopes of log |x_i| over x_j for each pair, shape (j, i)."""
    centred, log_size = x - np.mean(x, axis=0), _log_size(x)
    return centred.T @ (log_size - np.mean(log_size, axis=0)) / np.sum(centred**2, axis=0)[:, None]


def _log_size(x: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.abs(x), SMALLEST))


def _drivers(first: np.ndarray, second: np.ndarray, num: int, sites: np.ndarray) -> np.ndarray:
    """Which coordinate drives each, its own where none does, from two tables of slopes."""
    dim = len(first)
    slope = (first + second) / 2
    others = ~np.eye(dim, dtype=bool)
    disagreement = np.sum((first - second) ** 2, axis=1, where=others) / (4 * (dim - 1))
    variance = np.maximum(disagreement, LOG_NORMAL_VARIANCE / num)
    gain = np.maximum(slope**2 - SIGNIFICANT * variance[:, None], 0.0) * others
    enough = np.maximum(WORTHWHILE, NOISE * dim * variance)

    driver, best, chosen = np.arange(dim), np.zeros(dim), []
    while len(chosen) < dim:
        more = np.maximum(gain - best, 0.0)
        more[chosen], more[:, chosen], more[best > 0] = 0.0, 0.0, 0.0
        j = int(np.argmax(np.sum(more, axis=1) - enough))
        if np.sum(more[j]) <= enough[j]:
            break
        better = more[j] > 0
        driver[better], best[better] = j, gain[j][better]
        chosen.append(j)
    undecided = best == 0
    undecided[chosen] = False
    for site in np.unique(sites[undecided]) if chosen else ():
        members = (sites == site) & ~np.isin(np.arange(dim), chosen)
        together = np.sum((first * second)[np.ix_(chosen, members)], axis=1)
        beyond_noise = together - TOGETHER * 2 * variance[chosen] * math.sqrt(np.sum(members))
        if np.max(beyond_noise) > 0:
            driver[undecided & members] = chosen[int(np.argmax(beyond_noise))]
    return driver


class Conditional(NamedTuple):
    """What the driven coordinates of one driver are given it, in standard deviations."""

    leader: np.ndarray
    location: np.ndarray
    """Constant, and coefficient of the leader, (driven, 2)."""
    slope: np.ndarray
    """Of log size over the driver, (driven,)."""
    unexplained: float
    """Variance of log size that the slopes leave, added up over the driven coordinates."""


def _conditional(
    x: np.ndarray, halves: tuple[slice, slice], j: int, driven: np.ndarray, free: np.ndarray, sites: np.ndarray
) -> Conditional:
    """Location of the driven coordinates given a leader, and slopes of their log size over x_j.

    A mean that moves with the driver is taken out where sizes are measured, and left out of the map: along its line the
    neck of a funnel, far from most of the draws, would be bent away from where it is. For the same reason the location
    is found where the scale is small, by weights exp(-2 a s).
    """
    s, y = x[:, j], x[:, driven]
    which, led = _leaders(s, y, x[:, free])
    leader = np.where(led, free[which], j)
    design = np.stack([np.ones_like(y), x[:, leader] * led, np.broadcast_to(s[:, None], y.shape)], axis=-1)
    groups = np.unique(np.stack([sites, leader]), axis=1, return_inverse=True)[1].ravel()
    slope = np.zeros(y.shape[1])

    def location(columns: int) -> np.ndarray:
        weights = np.exp(-2 * slope * s[:, None])
        return _agreed([_regressed(design[half, :, :columns], y[half], weights[half]) for half in halves], groups, 0.0)

    for _ in range(ROUNDS):
        log_size = _log_size(y - np.einsum("nij,ij->ni", design, location(3)))
        slopes = [_slope(s[half], log_size[half])[:, None] for half in halves]
        slope = _agreed(slopes, groups, LOG_NORMAL_VARIANCE / len(x))[:, 0]
    unexplained = float(np.sum(np.var(log_size - s[:, None] * slope, axis=0)))
    return Conditional(leader, location(2), slope, unexplained)


def _regressed(design: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares of each y, (num, k), on columns of its own, (num, k, m): coefficients (k, m)."""
    weighted = design * (weights / np.sum(weights, axis=0))[..., None]
    normal = np.einsum("nij,nik->ijk", weighted, design) + RIDGE * np.eye(design.shape[-1])
    return np.linalg.solve(normal, np.einsum("nij,ni->ij", weighted, y)[..., None])[..., 0]


def _agreed(halves: list[np.ndarray], groups: np.ndarray, least: float) -> np.ndarray:
    """Means of two estimates, (k, m), shrunk towards those of their group as far as the halves explain the spread."""
    first, second = halves
    mean = (first + second) / 2
    noise = np.maximum(np.mean((first - second) ** 2, axis=0) / 4, least)
    for group in np.unique(groups):
        here = groups == group
        centre = np.mean(mean[here], axis=0)
        spread = np.maximum(np.mean((mean[here] - centre) ** 2, axis=0) - noise, 0.0)
        mean[here] = centre + spread / np.maximum(spread + noise, RIDGE**2) * (mean[here] - centre)
    return mean


def _leaders(s: np.ndarray, y: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the free coordinates explains most of each y beside s, and whether that is enough."""
    rest, rest_of_free = (x - np.outer(s, s @ x / (s @ s)) for x in (y, free))
    size = np.sqrt(np.outer(np.sum(rest_of_free**2, axis=0), np.sum(rest**2, axis=0)))
    explained = (rest_of_free.T @ rest / np.maximum(size, RIDGE * len(s))) ** 2  # the driver itself explains nothing
    return np.argmax(explained, axis=0), np.max(explained, axis=0) > LED


def _slope(s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slopes of y, (num, k), over s, (num,)."""
    s = s - np.mean(s)
    return s @ y / (s @ s)
