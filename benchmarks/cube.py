"""The reference of a model as an image of the unit cube, for peers that know priors by their quantiles.

    u in (0, 1)^n                       uniform
    x = Q_site(u) for each site         distributed as the reference
    z                                   the same point in unconstrained space, where a `Target` lives

A product of distributions on a line is mapped by their quantile functions, which NumPyro has. Two others of the
benchmark's priors have a quantile function coordinate by coordinate, given those before:

    Dirichlet(a)            shares of what is left of a stick: Beta(a_i, sum_{j > i} a_j)
    multivariate t_nu       a t of nu + i degrees of freedom, its scale sqrt((nu + sum_{j < i} y_j^2) / (nu + i))
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.handlers import seed, trace

import ebm_ppl as ebm


class OutOfReachError(Exception):
    """Says in a sentence why a tool cannot be asked a problem."""


def from_cube(target: ebm.Target) -> tuple[int, Callable[[jax.Array], jax.Array]]:
    """The cube's number of dimensions, and the map of one of its points to unconstrained space."""
    sites = independent_sites(target)
    dims = {name: _cube_dim(fn, shape) for name, (fn, shape) in sites.items()}

    def to_target(u: jax.Array) -> jax.Array:
        values, offset = {}, 0
        for name, (fn, shape) in sites.items():
            values[name] = _quantile(fn, shape, u[offset : offset + dims[name]])
            offset += dims[name]
        return target.unconstrain(values)

    return sum(dims.values()), to_target


def independent_sites(target: ebm.Target) -> dict[str, tuple[dist.Distribution, tuple[int, ...]]]:
    """The distribution of each latent site, without its plates, and the shape of its value.

    Raises:
        OutOfReachError: where the distribution of one site depends on the value of another.
    """
    first, second = (
        trace(seed(target.model, key)).get_trace(*target.args, **target.kwargs)
        for key in jax.random.split(jax.random.key(0))
    )
    sites = {}
    for name in target.latent_names:
        fn, again = first[name]["fn"], second[name]["fn"]
        if not all(map(np.array_equal, jax.tree.leaves(fn), jax.tree.leaves(again))):
            raise OutOfReachError(f"The prior of '{name}' depends on other sites.")
        sites[name] = _plain(fn), jnp.shape(first[name]["value"])
    return sites


def _plain(fn: dist.Distribution) -> dist.Distribution:
    while isinstance(fn, (dist.Independent, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def _cube_dim(fn: dist.Distribution, shape: tuple[int, ...]) -> int:
    if fn.event_dim and not isinstance(fn, (dist.Dirichlet, dist.MultivariateStudentT)):
        raise OutOfReachError(f"{type(fn).__name__} is no product of distributions on a line.")
    return math.prod(shape) - isinstance(fn, dist.Dirichlet)


def _quantile(fn: dist.Distribution, shape: tuple[int, ...], u: jax.Array) -> jax.Array:
    if isinstance(fn, dist.Dirichlet):
        return _dirichlet(fn.concentration, u)
    if isinstance(fn, dist.MultivariateStudentT):
        return fn.loc + fn.scale_tril @ _student(fn.df, u)
    return fn.icdf(u.reshape(shape))


def _dirichlet(concentration: jax.Array, u: jax.Array) -> jax.Array:
    left = jnp.cumsum(concentration[::-1])[::-1][1:]
    logit = _solve(lambda s: jax.scipy.special.betainc(concentration[:-1], left, jax.nn.sigmoid(s)), u)
    log_rest = jnp.append(0.0, jnp.cumsum(jax.nn.log_sigmoid(-logit)))
    return jnp.exp(log_rest + jnp.append(jax.nn.log_sigmoid(logit), 0.0))


def _student(df: jax.Array, u: jax.Array) -> jax.Array:
    degrees = df + jnp.arange(len(u))
    standard = jnp.sinh(_solve(lambda s: dist.StudentT(degrees).cdf(jnp.sinh(s)), u))
    values, squares = [], 0.0
    for value, degree in zip(standard, degrees, strict=True):
        values.append(value * jnp.sqrt((df + squares) / degree))
        squares += values[-1] ** 2
    return jnp.stack(values)


def _solve(cdf: Callable[[jax.Array], jax.Array], u: jax.Array) -> jax.Array:
    """`s` with `cdf(s) = u`, to double precision, by bisection."""

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        return jnp.where(cdf(middle) < u, middle, low), jnp.where(cdf(middle) < u, high, middle)

    return jax.lax.fori_loop(0, 64, halve, (jnp.full_like(u, -100.0), jnp.full_like(u, 100.0)))[0]
