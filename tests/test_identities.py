"""Identities between log Z and moments of the energy, by draws on one side and quadrature on the other.

F(beta) = -log Z(beta) / beta:   d(beta F)/d beta = <U>       Var U = -d<U>/d beta       grad log Z = -<grad U>
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz_stats.base import array_stats
from jax.scipy.special import logsumexp
from limits import z_limit

import ebm_ppl as ebm

BETAS = 0.3, 1.0, 2.0
THETA = jnp.array([1.0, 1.5])
GRID = jnp.linspace(-8.0, 8.0, 8001)


def well(x, theta):
    """A double well: a (x^2 - b)^2."""
    return theta[0] * (x**2 - theta[1]) ** 2


def log_z(beta, theta):
    """Of N(0, 1) exp(-beta U)."""
    return logsumexp(dist.Normal().log_prob(GRID) - beta * well(GRID, theta)) + jnp.log(GRID[1] - GRID[0])


def model(beta):
    x = numpyro.sample("x", dist.Normal())
    ebm.energy_factor("well", well(x, THETA), role="prior", beta=beta)


@pytest.fixture(scope="module")
def draws():
    """By inverse temperature, (chain, draw)."""
    settings = {"num_chains": 4, "num_samples": 4000, "progress_bar": False}
    sampled = {
        beta: ebm.sample(jax.random.key(0), ebm.target(model, jnp.asarray(beta)), ebm.NUTS(), **settings)
        for beta in BETAS
    }
    return {beta: each["posterior"]["x"].values for beta, each in sampled.items()}


def score(values, mean):
    """How far the mean of draws is off, in Monte Carlo standard errors."""
    ess = float(array_stats.ess(values, chain_axis=0, draw_axis=1, method="mean"))
    return float((values.mean() - mean) / (values.std() / np.sqrt(ess)))


@pytest.mark.parametrize("beta", BETAS)
def test_slopes_of_log_z_are_moments_of_the_energy(draws, beta):
    x = draws[beta]
    mean = -jax.grad(log_z)(beta, THETA)
    variance = jax.grad(jax.grad(log_z))(beta, THETA)
    slopes = -jax.grad(log_z, argnums=1)(beta, THETA) / beta
    by_theta = jax.vmap(jax.grad(well, argnums=1), (0, None))(jnp.ravel(x), THETA)
    energies = np.asarray(well(x, THETA))
    scores = [
        score(energies, float(mean)),
        score((energies - float(mean)) ** 2, float(variance)),
        *(score(np.asarray(by_theta[:, i]).reshape(x.shape), float(slopes[i])) for i in range(2)),
    ]
    assert np.max(np.abs(scores)) < z_limit(4 * len(BETAS)), scores
