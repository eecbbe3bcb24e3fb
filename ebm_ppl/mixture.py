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
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, logsumexp
from scipy.special import chdtri, ndtri

from ebm_ppl import parallel
from ebm_ppl.scale import DenseScale, location_and_scale
from ebm_ppl.typing import Array, PRNGKey

DEGREES = (3.0, 5.0, 8.0, 15.0, 40.0, 200.0, 2000.0)
"""Of freedom, to choose from: the first has heavy tails, the last is a normal distribution for every purpose."""
TAILS = 4.0
"""Degrees of freedom of what guards the tails."""
MOST_COMPONENTS = 64
FEWEST_PLACES = 4
"""For components in a program of a fit, of which there is one for each power of two from here on; where the points
bear no more than one component, a place is all that it gets."""
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
"""Gain in the mean log density of the points held out, in nats, for which the components are doubled again."""


class StudentMixture(eqx.Module):
    """A mixture of K multivariate Student t distributions; methods take one point."""

    log_weight: Array
    """(K,)"""
    mean: Array
    """(K, dim)"""
    factor: Array
    """Lower triangular, (K, dim, dim)."""
    inverse: Array
    """Of each factor."""
    degrees: Array
    """Of freedom, (K,)."""

    @classmethod
    def normal(cls, mean: Array, scale: DenseScale) -> StudentMixture:
        """One component, which is a normal distribution for every purpose."""
        one = jnp.ones(1, mean.dtype)
        return cls(0 * one, mean[None], scale.factor[None], scale.inverse[None], DEGREES[-1] * one)

    def sample(self, key: PRNGKey) -> Array:
        """One draw, shape (dim,)."""
        key_component, key_normal, key_width = jax.random.split(key, 3)
        k = jax.random.categorical(key_component, self.log_weight)
        normal = jax.random.normal(key_normal, self.mean.shape[1:], self.mean.dtype)
        width = jnp.sqrt(self.degrees[k] / (2 * jax.random.gamma(key_width, self.degrees[k] / 2)))
        return self.mean[k] + width * (self.factor[k] @ normal)

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

    def joined(self, others: StudentMixture, share: Array) -> StudentMixture:
        """A mixture of two mixtures, `share` of it the others."""

        def both(x: Array, y: Array) -> Array:
            return jnp.concatenate([x, y])

        own = eqx.tree_at(lambda mixture: mixture.log_weight, self, self.log_weight + jnp.log1p(-share))
        others = eqx.tree_at(lambda mixture: mixture.log_weight, others, others.log_weight + jnp.log(share))
        return jax.tree.map(both, own, others)

    def with_tails(self, share: float) -> StudentMixture:
        """With a share of each component given heavy tails, since a fit sees the bulk alone."""
        heavy = eqx.tree_at(lambda mixture: mixture.degrees, self, jnp.full_like(self.degrees, TAILS))
        return self.joined(heavy, jnp.asarray(share, self.mean.dtype))

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


def fit_mixture(key: PRNGKey, z: Array, weights: Array, start: StudentMixture | None = None) -> StudentMixture:
    """The mixture of Student t distributions that best describes weighted points.

    Args:
        z: points, shape (num, dim); those of zero weight count for nothing, and may pad the array.
        weights: not negative, shape (num,).
        start: a mixture near the points; without one, the search begins with one component.
    """
    num, dim = z.shape
    key_split, key_fit = jax.random.split(key)
    x, mean, scale = parallel.once(_whitened, z, weights)
    weights = np.asarray(weights) / np.sum(weights)
    kept = np.where(np.asarray(jax.random.uniform(key_split, (num,))) < 2 / 3, weights, np.zeros_like(weights))
    held_out, most = weights - kept, np.sum(kept) ** 2 / np.sum(kept**2) / (POINTS_PER_COMPONENT * dim)

    def improved(starts: StudentMixture, weights: Any, settled: float) -> tuple[StudentMixture, np.ndarray]:
        """Fits of several mixtures, and how likely each makes the points held out."""
        limit = np.asarray(settled, weights.dtype)
        found = parallel.over(_fit, parallel.split(starts), x, weights / np.sum(weights), held_out, limit)
        return jax.tree.map(lambda *parts: np.concatenate(parts), *jax.device_get(found))

    fewest = FEWEST_PLACES if most >= 2 else 1
    best, best_score, num_components = None, -np.inf, 1
    if start is not None:
        begun = _image(start, -np.asarray(scale.inverse) @ np.asarray(mean), scale.inverse, scale.factor)
        found, scores = improved(_alone(_padded(begun, fewest)), kept, ALMOST_SETTLED)
        best, best_score, num_components = _first(found), scores[0], 2 * len(begun.log_weight)
    while best is None or num_components <= min(MOST_COMPONENTS, most):
        keys = jax.random.split(jax.random.fold_in(key_fit, num_components), RESTARTS)
        starts = parallel.once(_starts, keys, x, kept, np.asarray(num_components), _places(num_components, fewest))
        starts = _alone(_first(starts)) if num_components == 1 else starts  # there is one place to start from
        found, scores = improved(starts, kept, ALMOST_SETTLED)
        chosen = int(np.argmax(scores))
        gain = scores[chosen] - best_score
        if gain > 0:
            best, best_score = jax.tree.map(lambda x, i=chosen: x[i], found), scores[chosen]
        if not gain > WORTHWHILE:
            break
        num_components *= 2
    whole, _ = improved(_alone(best), weights, SETTLED)
    return jax.tree.map(jnp.asarray, _image(_pruned(_first(whole)), mean, scale.factor, scale.inverse))


def _places(num_components: int, fewest: int) -> int:
    """For so many components."""
    return max(fewest, 2 ** math.ceil(math.log2(num_components)))


def _padded(mixture: StudentMixture, fewest: int) -> StudentMixture:
    """With a place for each component that the program of its fit has room for, on the host."""
    num = len(mixture.log_weight)
    wider = [(0, _places(num, fewest) - num)]
    filled = jax.tree.map(lambda x: np.pad(x, wider + [(0, 0)] * (x.ndim - 1), mode="edge"), mixture)
    log_weight = np.pad(mixture.log_weight, wider, constant_values=NOTHING)
    return eqx.tree_at(lambda mixture: mixture.log_weight, filled, log_weight)


def _pruned(mixture: StudentMixture) -> StudentMixture:
    """Without places that no component has filled, on the host."""
    return jax.tree.map(lambda x: x[mixture.log_weight > NEXT_TO_NOTHING], mixture)


def _whitened(z: Array, weights: Array) -> tuple[Array, Array, DenseScale]:
    """The points in coordinates where they have zero mean and unit covariance, and the mean and scale that they had."""
    mean, scale = location_and_scale(z, weights)
    return (z - mean) @ scale.inverse.T, mean, scale


def _image(mixture: StudentMixture, shift: Any, factor: Any, inverse: Any) -> StudentMixture:
    """The mixture of `shift + factor x`, on the host; `inverse` is that of the factor."""
    mixture, shift, factor, inverse = jax.device_get((mixture, shift, factor, inverse))
    means, factors = shift + mixture.mean @ factor.T, factor @ mixture.factor
    return StudentMixture(mixture.log_weight, means, factors, mixture.inverse @ inverse, mixture.degrees)


def _alone(mixture: Any) -> Any:
    return jax.tree.map(lambda x: x[None], mixture)


def _first(mixtures: Any) -> Any:
    return jax.tree.map(lambda x: x[0], mixtures)


def _fit(
    start: StudentMixture, x: Array, weights: Array, held_out: Array, settled: Array
) -> tuple[StudentMixture, Array]:
    """Expectation maximisation until the mean log density settles, and that of the points held out."""

    def again(carry: tuple[StudentMixture, Array, Array, Array]) -> Array:
        _, score, previous, count = carry
        return (score - previous > settled) & (count < MOST_ROUNDS)

    def one_round(carry: tuple[StudentMixture, Array, Array, Array]) -> tuple[StudentMixture, Array, Array, Array]:
        mixture, score, _, count = carry
        mixture, new_score = _improve(mixture, x, weights)
        return mixture, new_score, score, count + 1

    low = jnp.asarray(-1e30, x.dtype)
    mixture = jax.lax.while_loop(again, one_round, (start, low, 2 * low, jnp.zeros((), int)))[0]
    return mixture, held_out @ jax.vmap(mixture.log_density)(x) / jnp.sum(held_out)


def _starts(keys: Array, x: Array, weights: Array, num_components: Array, places: int) -> StudentMixture:
    return jax.vmap(lambda key: _start(key, x, weights, num_components, places))(keys)


def _start(key: PRNGKey, x: Array, weights: Array, num_components: Array, places: int) -> StudentMixture:
    """Components at points far from one another, all as wide as points lie apart from the nearest (k-means++)."""
    num, dim = x.shape
    is_filled = jnp.arange(places) < num_components

    def add(nearest: Array, k: Array) -> tuple[Array, Array]:
        centre = x[jax.random.categorical(jax.random.fold_in(key, k), jnp.log(weights * nearest))]
        closer = jnp.minimum(nearest, jnp.sum((x - centre) ** 2, axis=1))
        return jnp.where(is_filled[k], closer, nearest), centre

    far = jnp.full(num, 1e6 * dim, x.dtype)
    nearest, centres = jax.lax.scan(add, far, jnp.arange(places))
    width = jnp.where(num_components > 1, jnp.sqrt(weights @ nearest / dim), 1.0)
    eye = jnp.broadcast_to(jnp.eye(dim, dtype=x.dtype), (places, dim, dim))
    log_weight = jnp.where(is_filled, -jnp.log(num_components.astype(x.dtype)), NOTHING)
    return StudentMixture(log_weight, centres, eye * width, eye / width, jnp.full(places, DEGREES[2], x.dtype))


def _improve(mixture: StudentMixture, x: Array, weights: Array) -> tuple[StudentMixture, Array]:
    """One round of expectation maximisation, and the mean log density that it started from."""
    dim, least = x.shape[1], jnp.finfo(x.dtype).tiny * 1e3
    distances = jax.vmap(mixture._distances)(x)
    mixture = _with_best_degrees(mixture, distances, weights)
    log_terms = jax.vmap(mixture._log_terms)(distances)
    log_density = logsumexp(log_terms, axis=1)
    share = jnp.exp(log_terms - log_density[:, None]) * weights[:, None]
    mass = jnp.maximum(jnp.sum(share, axis=0), least)
    pull = share * (mixture.degrees + dim) / (mixture.degrees + distances)
    mean = pull.T @ x / jnp.maximum(jnp.sum(pull, axis=0), least)[:, None]

    def scatter(of_component: tuple[Array, Array]) -> Array:
        mean, pull = of_component
        centred = x - mean
        return (pull[:, None] * centred).T @ centred

    scatters = jax.lax.map(scatter, (mean, pull.T))
    points = mass / jnp.sum(weights**2)
    pooled = (jnp.sum(scatters, axis=0) * jnp.sum(points) + dim * jnp.eye(dim)) / (jnp.sum(points) + dim)

    def scale(of_component: tuple[Array, Array, Array]) -> DenseScale:
        scatter, mass, points = of_component
        return DenseScale.of_covariance((points * scatter / mass + dim * pooled) / (points + dim))

    # Component by component: a batch of matrices would not run in threads (`linear_algebra.py`).
    scales = jax.lax.map(scale, (scatters, mass, points))
    return StudentMixture(jnp.log(mass), mean, scales.factor, scales.inverse, mixture.degrees), weights @ log_density


def _with_best_degrees(mixture: StudentMixture, distances: Array, weights: Array) -> StudentMixture:
    """With the degrees of freedom that make points at these distances, (point, K), most likely."""

    def with_degrees(degrees: Array) -> StudentMixture:
        return eqx.tree_at(lambda mixture: mixture.degrees, mixture, jnp.full_like(mixture.degrees, degrees))

    def score(degrees: Array) -> Array:
        return weights @ logsumexp(jax.vmap(with_degrees(degrees)._log_terms)(distances), axis=1)

    degrees = jnp.asarray(DEGREES, distances.dtype)
    return with_degrees(degrees[jnp.argmax(jax.lax.map(score, degrees))])
