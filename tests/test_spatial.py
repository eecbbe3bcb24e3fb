"""The main job: county effects whose smoothness energy has a Z(tau), by chains and by particles, beside NumPyro's.

`REFERENCES` holds means and standard deviations by NumPyro's NUTS, 2 chains of 1000 draws, with the energy as a factor:
with Z(tau), and with it forgotten. Its draws count for about a hundred.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz_stats.base import array_stats
from limits import t_limit, z_limit

import ebm_ppl as ebm

DATA = Path(__file__).parent.parent / "notebooks" / "data"
REFERENCES = {True: {"tau": (4.6, 2.6), "b": (0.425, 0.085)}, False: {"tau": (0.025, 0.015), "b": (0.459, 0.127)}}
REFERENCE_DRAWS = 100
LIMIT = z_limit(2 * 2)
NUM_RUNS = 8


@pytest.fixture(scope="module")
def counties():
    return np.genfromtxt(DATA / "sids_counties.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")


@pytest.fixture(scope="module")
def laplacian():
    pairs = np.loadtxt(DATA / "sids_neighbours.csv", delimiter=",", skiprows=1, dtype=int)
    assert len(pairs) == 231 == len(np.unique(np.sort(pairs), axis=0))
    adjacency = np.zeros((100, 100))
    adjacency[pairs[:, 0], pairs[:, 1]] = adjacency[pairs[:, 1], pairs[:, 0]] = 1
    return np.diag(adjacency.sum(0)) - adjacency


def test_totals_of_the_data(counties):
    assert len(counties) == 100 and counties["sids_deaths"].sum() == 667 and counties["births"].sum() == 329_962


@pytest.fixture(scope="module")
def target(counties, laplacian):
    births, deaths = counties["births"], counties["sids_deaths"].astype(float)
    expected = births * deaths.sum() / births.sum()
    share = np.sqrt(counties["nonwhite_births"] / births)
    nonwhite = (share - share.mean()) / share.std()
    eigenvalues = np.linalg.eigvalsh(laplacian)
    energy, base = ebm.QuadraticEnergy(jnp.asarray(laplacian)), dist.Normal(0, 1).expand([100]).to_event(1)

    def model(known):
        tau = numpyro.sample("tau", dist.LogNormal(1, 1.5))
        log_z = -0.5 * jnp.sum(jnp.log1p(tau * eigenvalues)) if known else "ignore"
        phi = numpyro.sample("phi", ebm.EnergyDistribution(energy, base, beta=tau, log_partition=log_z))
        a, b = (numpyro.sample(name, dist.Normal(0, 1)) for name in "ab")
        numpyro.sample("deaths", dist.Poisson(expected * jnp.exp(a + b * nonwhite + phi)).to_event(1), obs=deaths)

    return lambda known: ebm.target(model, known)


def moments(values):
    """Mean of draws of shape (chain, draw), and its squared Monte Carlo error."""
    ess = float(array_stats.ess(values, chain_axis=0, draw_axis=1, method="mean"))
    return values.mean(), values.var() / ess


@pytest.fixture(scope="module")
def chains(target):
    return ebm.sample(jax.random.key(0), target(True), progress_bar=False, log_likelihood=False)["posterior"]


@pytest.fixture(scope="module")
def forgetful(target):
    return ebm.sample(jax.random.key(0), target(False), progress_bar=False, log_likelihood=False)["posterior"]


@pytest.mark.parametrize(("draws", "known"), [("chains", True), ("forgetful", False)])
def test_chains_agree_with_numpyro(request, draws, known):
    draws = request.getfixturevalue(draws)
    for name, (mean, deviation) in REFERENCES[known].items():
        found, variance = moments(draws[name].values)
        assert abs(found - mean) < LIMIT * np.sqrt(variance + deviation**2 / REFERENCE_DRAWS), name


@pytest.mark.slow
def test_particles_agree_with_chains(target, chains):
    sampler = ebm.SMC(num_particles=200)
    particles = ebm.sample(
        jax.random.key(2), target(True), sampler, num_chains=NUM_RUNS, progress_bar=False, log_likelihood=False
    )["posterior"]
    for name, scale in (("tau", np.log), ("a", np.asarray), ("b", np.asarray)):
        mean, variance = moments(scale(chains[name].values))
        means = scale(particles[name].values).mean(1)  # of independent runs
        gap = means.mean() - mean
        assert abs(gap) < t_limit(3, NUM_RUNS - 1) * np.sqrt(variance + means.var(ddof=1) / NUM_RUNS), name
