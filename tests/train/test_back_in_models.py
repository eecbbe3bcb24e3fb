"""A trained energy in a NumPyro model: as a factor, as a prior, and with priors on its own weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from arviz_stats import mcse
from jax.scipy.special import logsumexp
from numpyro.contrib.module import random_eqx_module
from train_problems import BASE, GRID, two_modes

import ebm_ppl as ebm

NOISE = 1.5
SEEN = -0.5


@pytest.fixture(scope="module")
def energy():
    """Of the two modes, by score matching."""
    start = ebm.MLPEnergy(jax.random.key(0), 1, width=16)
    settings = {"optimiser": optax.adam(1e-2), "num_steps": 500, "averaging": 0.99, "progress_bar": False}
    return ebm.fit(jax.random.key(1), start, two_modes(5000), ebm.ScoreMatching(), base=BASE, **settings).energy


def as_factor(energy, seen):
    x = numpyro.sample("x", BASE)
    ebm.energy_factor("learned", energy(x))
    numpyro.sample("seen", dist.Normal(x[0], NOISE), obs=seen)


def as_prior(energy, seen):
    x = numpyro.sample("x", ebm.EnergyDistribution(energy, BASE))
    numpyro.sample("seen", dist.Normal(x[0], NOISE), obs=seen)


@pytest.mark.parametrize("model", [pytest.param(as_factor, marks=pytest.mark.slow), as_prior])
def test_a_trained_energy_is_a_prior(model, energy):
    """Posterior mean and evidence by quadrature; the energy's own log Z is taken off."""
    log_prior = BASE.log_prob(GRID) - jax.vmap(energy)(GRID)
    log_joint = log_prior + dist.Normal(GRID[:, 0], NOISE).log_prob(SEEN)
    weights = np.exp(log_joint - logsumexp(log_joint))
    target = ebm.target(model, energy, SEEN)
    draws = ebm.sample(jax.random.key(2), target, num_samples=2000, progress_bar=False)
    error = float(draws["posterior"]["x"].mean()) - float(weights @ GRID[:, 0])
    assert abs(error) < 4 * float(mcse(draws["posterior"])["x"].values[0])
    evidence = ebm.log_z(jax.random.key(3), target, ebm.SMC(num_particles=1000))
    exact = logsumexp(log_joint) - logsumexp(log_prior)
    assert abs(evidence.value - float(exact)) < 4 * evidence.std_error
    assert evidence.std_error < 0.2


def bayesian(start, x, grid=None):
    """A prior on the weights of a small energy, of which x are draws."""
    energy = random_eqx_module("energy", start, prior=dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, BASE, log_partition=partition(energy, grid)), obs=x)


def partition(energy, grid):
    if grid is None:
        return None
    return logsumexp(BASE.log_prob(grid) - jax.vmap(energy)(grid)) + jnp.log(grid[1, 0] - grid[0, 0])


START = ebm.MLPEnergy(jax.random.key(0), 1, width=3, depth=1)


def test_weights_with_a_prior_need_their_partition_function():
    with pytest.raises(ebm.IntractablePartitionError, match="'x'"):
        ebm.sample(jax.random.key(1), ebm.target(bayesian, START, two_modes(20)), progress_bar=False)


def test_weights_have_a_posterior_where_the_partition_function_is_known():
    """Whose predictive density is nearer to the truth than the prior's, at data that were not seen."""
    grid = GRID[::20]
    target = ebm.target(bayesian, START, two_modes(100), grid)
    draws = ebm.sample(jax.random.key(1), target, num_chains=2, num_warmup=300, num_samples=200, progress_bar=False)
    weights = draws["posterior"].to_dataset()
    names = [name for name, _ in jax.tree_util.tree_leaves_with_path(START) if eqx.is_inexact_array(_)]
    found = [weights["energy." + jax.tree_util.keystr(path)[1:]].values[:, ::10] for path in names]
    leaves = [each.reshape(-1, *each.shape[2:]) for each in found]
    params, static = eqx.partition(START, eqx.is_inexact_array)
    posterior = jax.tree.unflatten(jax.tree.structure(params), leaves)
    prior = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), posterior)
    test = two_modes(2000, seed=1)

    def predictive(params):
        """log density of each event of the test, averaged over draws of the weights."""

        def one(params):
            energy = eqx.combine(params, static)
            return BASE.log_prob(test) - jax.vmap(energy)(test) - partition(energy, grid)

        return float(jnp.mean(logsumexp(jax.vmap(one)(params), axis=0) - jnp.log(len(leaves[0]))))

    assert predictive(posterior) > predictive(prior) + 0.2
