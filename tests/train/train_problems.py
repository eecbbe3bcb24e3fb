"""Densities on a line, whose likelihood, its gradient and log Z come from quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp

BASE = dist.Normal(0.0, 3.0).expand([1]).to_event(1)
GRID = np.linspace(-15, 15, 6001)[:, None]


def two_modes(num, seed=0):
    """.3 N(-2, .5^2) + .7 N(1.5, .7^2), shape (num, 1)."""
    rng = np.random.default_rng(seed)
    first = rng.random((num, 1)) < 0.3
    return np.where(first, rng.normal(-2, 0.5, (num, 1)), rng.normal(1.5, 0.7, (num, 1)))


def log_z(energy, base=BASE):
    """log of the integral of base exp(-U)."""
    return logsumexp(base.log_prob(GRID) - jax.vmap(energy)(GRID)) + np.log(GRID[1, 0] - GRID[0, 0])


def log_likelihood(energy, data, base=BASE):
    """Mean over the data."""
    return jnp.mean(base.log_prob(data) - jax.vmap(energy)(data)) - log_z(energy, base)


def best_log_likelihood(data):
    """Of the density that they come from."""
    first, second = (dist.Normal(m, s).log_prob(data) + np.log(w) for m, s, w in ((-2, 0.5, 0.3), (1.5, 0.7, 0.7)))
    return float(np.mean(np.logaddexp(first, second)))
