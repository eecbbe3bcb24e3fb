"""What a weighted cloud of points looks like as a density: a mixture of multivariate Student t distributions.

    q(z) = sum_k a_k t_nu(z; m_k, F_k F_k')              `StudentMixture.log_density`, `.sample`
    z = T(u) ~ q for u uniform on the cube               `StudentMixture.from_cube`

Expectation maximisation on two thirds of the points, in coordinates where the cloud has unit covariance; the number of
components doubles for as long as the other third becomes more likely, and all points have the last word. The components
of a fit share their degrees of freedom nu. The covariance of one that has n_k effective points leans on that of all,

    S_k = (n_k S_k' + dim S) / (n_k + dim)         S = sum_k a_k S_k'

and S leans on the unit matrix in the same way.

References:
    Peel and McLachlan (2000), Robust mixture modelling using the t distribution; Cappe, Douc, Guillin, Marin and Robert
    (2008), Adaptive importance sampling in general mixture classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, logsumexp
from scipy.special import chdtri, ndtri

from ebm_ppl import parallel
from ebm_ppl.scale import DenseScale, location_and_scale
from ebm_ppl.typing import Array, PRNGKey, generator

DEGREES = (3.0, 5.0, 8.0, 15.0, 40.0, 200.0, 2000.0)
"""Of freedom, to choose from: the first has heavy tails, the last is a normal distribution for every purpose."""
TAILS = 4.0
"""Degrees of freedom of what guards the tails."""
MOST_COMPONENTS = 64
FEWEST_PLACES = 4
"""For components in a program of a fit, of which there is one for each power of two from here on; where the points
bear no more than one component, a place is all that it gets."""
BLOCK = 512
"""Points of a fit that are taken at a time."""
NOTHING = -1e3
"""Log weight of a place without a component; a fit leaves it below `NEXT_TO_NOTHING`."""
NEXT_TO_NOTHING = -50.0
FAR = 10.0
"""From which on three terms of Stirling's series give the gamma function to 1e-10."""
POINTS_PER_COMPONENT = 2
"""Effective points for each dimension of a component, at least."""
RESTARTS = 2
MOST_ROUNDS = 50
SETTLED = 1e-4
"""Gain in the mean log density of a round, in nats, below which expectation maximisation stops."""
ALMOST_SETTLED = 1e-3
"""The same where fits are only compared."""
WORTHWHILE = 0.01
"""Gain in the mean log density of the points held out, in nats, for which the components are doubled."""


class StudentMixture(eqx.Module):
    """A mixture of K multivariate Student t distributions; methods take one point, those that make another mixture
    are of the host."""

    log_weight: Any
    """(K,)"""
    mean: Any
    """(K, dim)"""
    factor: Any
    """Lower triangular, (K, dim, dim)."""
    inverse: Any
    """Of each factor."""
    degrees: Any
    """Of freedom, (K,)."""

    @classmethod
    def normal(cls, mean: Array, scale: DenseScale) -> StudentMixture:
        """One component, which is a normal distribution for every purpose."""
        one = np.ones(1, mean.dtype)
        return cls(0 * one, mean[None], scale.factor[None], scale.inverse[None], DEGREES[-1] * one)

    def sample(self, key: PRNGKey) -> Array:
        """One draw, shape (dim,)."""
        key_component, key_normal, key_width = jax.random.split(key, 3)
        k = jax.random.categorical(key_component, self.log_weight)
        normal = jax.random.normal(key_normal, self.mean.shape[1:], self.mean.dtype)
        mean, factor, degrees = (jnp.asarray(x)[k] for x in (self.mean, self.factor, self.degrees))
        width = jnp.sqrt(degrees / (2 * jax.random.gamma(key_width, degrees / 2)))
        return mean + width * (factor @ normal)

    def from_cube(self, u: np.ndarray) -> np.ndarray:
        """Points of the unit cube, shape (num, dim + 2), as draws, shape (num, dim), on the host.

        The first coordinate chooses the component, the second its width, the others the place in it: where the points
        fill the cube evenly (`scipy.stats.qmc`), the draws fill q evenly.
        """
        log_weight, mean, factor = (np.asarray(x) for x in (self.log_weight, self.mean, self.factor))
        shares = np.cumsum(np.exp(log_weight.astype(float)))
        k = np.minimum(np.searchsorted(shares / shares[-1], u[:, 0], side="right"), len(mean) - 1)
        nu = np.asarray(self.degrees, float)[k]
        width = np.sqrt(nu / chdtri(nu, u[:, 1]))
        x = width[:, None] * ndtri(u[:, 2:])
        z = np.empty_like(x)
        for component in np.unique(k):
            here = k == component
            z[here] = mean[component] + x[here] @ factor[component].T
        return z.astype(mean.dtype)

    def log_density(self, z: Array) -> Array:
        """Log density at a point of shape (dim,), in nats."""
        return logsumexp(self._log_terms(self._distances(z)))

    def joined(self, others: StudentMixture, share: float) -> StudentMixture:
        """A mixture of two mixtures, `share` of it the others."""
        own = eqx.tree_at(lambda mixture: mixture.log_weight, self, self.log_weight + math.log1p(-share))
        others = eqx.tree_at(lambda mixture: mixture.log_weight, others, others.log_weight + math.log(share))
        return jax.tree.map(lambda x, y: np.concatenate([x, y]), own, others)

    def with_tails(self, share: float) -> StudentMixture:
        """With a share of each component given heavy tails, since a fit sees the bulk alone."""
        heavy = eqx.tree_at(lambda mixture: mixture.degrees, self, np.full_like(self.degrees, TAILS))
        return self.joined(heavy, share)

    def with_places(self, fewest: int = 1) -> StudentMixture:
        """With so many places for components, most of them empty, that few mixtures need a program of their own."""
        num = len(self.log_weight)
        wider = [(0, max(fewest, 2 ** math.ceil(math.log2(num))) - num)]
        filled = jax.tree.map(lambda x: np.pad(x, wider + [(0, 0)] * (x.ndim - 1), mode="edge"), self)
        log_weight = np.pad(self.log_weight, wider, constant_values=NOTHING)
        return eqx.tree_at(lambda mixture: mixture.log_weight, filled, log_weight)

    def _distances(self, z: Array) -> Array:
        """Squared distances from each mean in units of its component, (K,)."""
        return jnp.sum(jnp.einsum("kij,kj->ki", self.inverse, z - self.mean) ** 2, axis=-1)

    def _log_terms(self, distances: Array) -> Array:
        """`log a_k t(z)` of each component, (K,), from the squared distances."""
        dim, nu = self.mean.shape[1], self.degrees
        log_volume = -jnp.sum(jnp.log(jnp.diagonal(self.inverse, axis1=1, axis2=2)), axis=1)
        return self.log_weight + _log_peak(nu, dim) - log_volume - (nu + dim) / 2 * jnp.log1p(distances / nu)


def _log_peak(nu: Array, dim: int) -> Array:
    """Log density of a standard Student t at its mode, `log( Gamma((nu + dim)/2) / Gamma(nu/2) / (nu pi)^(dim/2) )`.

    The two gamma functions of a thousand degrees of freedom differ by less than single precision resolves them to. So
    their large parts, Stirling's, are subtracted first, with x = nu/2 and h = dim/2.
    """
    x, h = nu / 2, dim / 2
    large = (x + h - 0.5) * jnp.log1p(h / x) - h - h * math.log(2 * math.pi)
    return large + _beyond_stirling(x + h) - _beyond_stirling(x)


def _beyond_stirling(x: Array) -> Array:
    """`log Gamma(x) - ( (x - 1/2) log x - x + log(2 pi)/2 )`, to 1e-10 from x = 1 on."""
    small, big = jnp.minimum(x, FAR), jnp.maximum(x, FAR)
    stirling = (small - 0.5) * jnp.log(small) - small + 0.5 * math.log(2 * math.pi)
    return jnp.where(x < FAR, gammaln(small) - stirling, 1 / (12 * big) - 1 / (360 * big**3) + 1 / (1260 * big**5))


def fit_mixture(key: PRNGKey, z: Any, weights: Any, start: StudentMixture | None = None) -> StudentMixture:
    """The mixture of Student t distributions that best describes weighted points; on the host.

    Args:
        z: points, shape (num, dim); those of zero weight count for nothing, and may pad the array.
        weights: not negative, shape (num,).
        start: a mixture near the points; without one, the search begins with one component.
    """
    dim = z.shape[1]
    rng = generator(key)
    x, mean, scale = jax.device_get(parallel.once(_whitened, z, weights))
    weights = np.asarray(weights) / np.sum(weights)
    kept = np.where(rng.uniform(size=len(x)) < 2 / 3, weights, np.zeros_like(weights))
    held_out, most = weights - kept, np.sum(kept) ** 2 / np.sum(kept**2) / (POINTS_PER_COMPONENT * dim)

    def improved(
        starts: list[StudentMixture], weights: Any, settled: float
    ) -> tuple[list[StudentMixture], list[float]]:
        """Fits of several mixtures, and how likely each makes the points held out."""
        points, limit = _in_blocks(x, weights / np.sum(weights), held_out), np.asarray(settled, x.dtype)
        parts = parallel.over(_fit, [jax.tree.map(lambda leaf: leaf[None], each) for each in starts], points, limit)
        found = [jax.tree.map(lambda leaf: leaf[0], part) for part in jax.device_get(parts)]
        return [mixture for mixture, _ in found], [float(score) for _, score in found]

    fewest = FEWEST_PLACES if most >= 2 else 1
    best, best_score, num_components = None, -np.inf, 1
    if start is not None:
        begun = _image(start, -scale.inverse @ mean, scale.inverse, scale.factor)
        (best,), (best_score,) = improved([begun.with_places(fewest)], kept, ALMOST_SETTLED)
        num_components = 2 * len(begun.log_weight)
    while best is None or num_components <= min(MOST_COMPONENTS, most):
        restarts = RESTARTS if num_components > 1 else 1  # there is one place to start from
        starts = [_start(rng, x, kept, num_components).with_places(fewest) for _ in range(restarts)]
        found, scores = improved(starts, kept, ALMOST_SETTLED)
        chosen = int(np.argmax(scores))
        if best is not None and not scores[chosen] - best_score > WORTHWHILE:
            break
        best, best_score, num_components = found[chosen], scores[chosen], 2 * num_components
    assert best is not None
    (whole,), _ = improved([best], weights, SETTLED)
    return _image(_pruned(whole), mean, scale.factor, scale.inverse)


def prepare_fit(num: int, dim: int) -> None:
    """Starts to compile what the first fits to so many points need."""
    x, ones, eye = np.zeros((num, dim)), np.ones(num), np.eye(dim)
    x, ones, eye = (values.astype(jnp.result_type(float)) for values in (x, ones, eye))
    start = StudentMixture.normal(x[0], DenseScale(eye, eye)).with_places(FEWEST_PLACES)  # pyright: ignore
    parallel.prepare_once(_whitened, x, ones)
    parallel.prepare_over(_fit, jax.tree.map(lambda leaf: leaf[None], start), _in_blocks(x, ones, ones), ones[0])


def _pruned(mixture: StudentMixture) -> StudentMixture:
    """Without places that no component has filled, on the host."""
    return jax.tree.map(lambda x: x[mixture.log_weight > NEXT_TO_NOTHING], mixture)


def _whitened(z: Array, weights: Array) -> tuple[Array, Array, DenseScale]:
    """The points in coordinates where they have zero mean and unit covariance, and the mean and scale that they had."""
    mean, scale = location_and_scale(z, weights)
    return (z - mean) @ scale.inverse.T, mean, scale


def _image(mixture: StudentMixture, shift: Any, factor: Any, inverse: Any) -> StudentMixture:
    """The mixture of `shift + factor x`, on the host; `inverse` is that of the factor."""
    means, factors = shift + mixture.mean @ factor.T, factor @ mixture.factor
    return StudentMixture(mixture.log_weight, means, factors, mixture.inverse @ inverse, mixture.degrees)


def _start(rng: np.random.Generator, x: np.ndarray, weights: np.ndarray, num_components: int) -> StudentMixture:
    """Components at points far from one another, all as wide as points lie apart from the nearest (k-means++)."""
    dim, dtype = x.shape[1], x.dtype
    x, weights = x[weights > 0], weights[weights > 0].astype(float)
    centres, nearest = [], np.full(len(x), 1e6 * dim)
    for _ in range(num_components):
        odds = np.cumsum(weights * nearest)
        centres.append(x[min(np.searchsorted(odds, rng.uniform() * odds[-1], side="right"), len(x) - 1)])
        nearest = np.minimum(nearest, np.sum((x - centres[-1]) ** 2, axis=1))
    width = math.sqrt(weights @ nearest / np.sum(weights) / dim) if num_components > 1 else 1.0
    eyes = np.tile(np.eye(dim, dtype=dtype), (num_components, 1, 1))
    ones = np.ones(num_components, dtype)
    return StudentMixture(
        -math.log(num_components) * ones, np.stack(centres), width * eyes, eyes / width, DEGREES[2] * ones
    )


class Points(NamedTuple):
    """Weighted points in blocks, of which only those count that hold any: a fit to few takes the program of many."""

    x: Any
    """(block, BLOCK, dim)"""
    weights: Any
    """That add up to one, (block, BLOCK)."""
    held_out: Any
    """Weights of others, by which a fit is judged, (block, BLOCK)."""
    num: Any
    """Blocks that count: an array, so that it is no part of the program."""


def _in_blocks(x: np.ndarray, weights: np.ndarray, held_out: np.ndarray) -> Points:
    count = np.max(np.flatnonzero(weights + held_out), initial=0) + 1
    room = -len(x) % BLOCK

    def blocks(values: np.ndarray) -> np.ndarray:
        wider = np.pad(values, [(0, room)] + [(0, 0)] * (values.ndim - 1))
        return wider.reshape(-1, BLOCK, *values.shape[1:]).astype(x.dtype)

    return Points(blocks(x), blocks(weights), blocks(held_out), np.asarray(math.ceil(count / BLOCK)))


def _total(of_block: Callable, points: Points, *others: Array) -> Any:
    """The sum over blocks of `of_block(x, weights, held_out, *others)`, where others have a leading axis (block,)."""

    def block(i: Array) -> Any:
        return of_block(*(leaf[i] for leaf in (points.x, points.weights, points.held_out, *others)))

    nothing = jax.tree.map(lambda sum: jnp.zeros(sum.shape, sum.dtype), jax.eval_shape(block, 0))
    return jax.lax.fori_loop(0, points.num, lambda i, total: jax.tree.map(jnp.add, total, block(i)), nothing)


def _fit(start: StudentMixture, points: Points, settled: Array) -> tuple[StudentMixture, Array]:
    """Expectation maximisation until the mean log density settles, and that of the points held out."""

    def again(carry: tuple[StudentMixture, Array, Array, Array]) -> Array:
        _, score, previous, count = carry
        return (score - previous > settled) & (count < MOST_ROUNDS)

    def one_round(carry: tuple[StudentMixture, Array, Array, Array]) -> tuple[StudentMixture, Array, Array, Array]:
        mixture, score, _, count = carry
        mixture, new_score = _improve(mixture, points)
        return mixture, new_score, score, count + 1

    def judged(x: Array, _: Array, held_out: Array) -> tuple[Array, Array]:
        return held_out @ jax.vmap(mixture.log_density)(x), jnp.sum(held_out)

    low = jnp.asarray(-1e30, points.x.dtype)
    mixture = jax.lax.while_loop(again, one_round, (start, low, 2 * low, jnp.zeros((), int)))[0]
    score, mass = _total(judged, points)
    return mixture, score / mass


def _improve(mixture: StudentMixture, points: Points) -> tuple[StudentMixture, Array]:
    """One round of expectation maximisation, and the mean log density that it started from."""
    dim, dtype = points.x.shape[-1], points.x.dtype
    least = jnp.finfo(dtype).tiny * 1e3
    mixture = _with_better_degrees(mixture, points)

    def moments(x: Array, weights: Array, _: Array) -> tuple[Array, ...]:
        distances = jax.vmap(mixture._distances)(x)
        log_terms = jax.vmap(mixture._log_terms)(distances)
        log_density = logsumexp(log_terms, axis=1)
        share = jnp.exp(log_terms - log_density[:, None]) * weights[:, None]
        pull = (share * (mixture.degrees + dim) / (mixture.degrees + distances)).T
        # About the means so far: about zero, little would be left of a narrow component in single precision.
        centred = x - mixture.mean[:, None]
        scatters = (pull[..., None] * centred).swapaxes(1, 2) @ centred
        return (
            jnp.sum(share, axis=0),
            jnp.sum(pull, axis=1),
            jnp.einsum("kn,kni->ki", pull, centred),
            scatters,
            weights @ log_density,
            jnp.sum(weights**2),
        )

    mass, pull, shift, scatters, log_density, squares = _total(moments, points)
    mass, pull = jnp.maximum(mass, least), jnp.maximum(pull, least)
    shift = shift / pull[:, None]
    scatters = scatters - pull[:, None, None] * shift[:, :, None] * shift[:, None, :]
    num = mass / squares
    pooled = (jnp.sum(scatters, axis=0) * jnp.sum(num) + dim * jnp.eye(dim, dtype=dtype)) / (jnp.sum(num) + dim)

    def scale(of_component: tuple[Array, Array, Array]) -> DenseScale:
        scatter, mass, num = of_component
        return DenseScale.of_covariance((num * scatter / mass + dim * pooled) / (num + dim))

    # Component by component: a batch of matrices would not run in threads (`linear_algebra.py`).
    scales = jax.lax.map(scale, (scatters, mass, num))
    mean = mixture.mean + shift
    return StudentMixture(jnp.log(mass), mean, scales.factor, scales.inverse, mixture.degrees), log_density


def _with_better_degrees(mixture: StudentMixture, points: Points) -> StudentMixture:
    """With the degrees of freedom, of those so far and their neighbours, that make the points most likely."""
    all_degrees = jnp.asarray(DEGREES, points.x.dtype)
    now = jnp.argmin(jnp.abs(all_degrees - mixture.degrees[0]))
    near = all_degrees[jnp.clip(now + jnp.arange(-1, 2), 0, len(DEGREES) - 1)]

    def with_degrees(degrees: Array) -> StudentMixture:
        return eqx.tree_at(lambda mixture: mixture.degrees, mixture, jnp.full_like(mixture.degrees, degrees))

    def scores(x: Array, weights: Array, _: Array) -> Array:
        distances = jax.vmap(mixture._distances)(x)

        def score(degrees: Array) -> Array:
            return weights @ logsumexp(jax.vmap(with_degrees(degrees)._log_terms)(distances), axis=1)

        return jax.lax.map(score, near)

    return with_degrees(near[jnp.argmax(_total(scores, points))])
