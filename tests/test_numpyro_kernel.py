"""Our samplers inside `numpyro.infer.MCMC`: chain methods, Gibbs, ArviZ, and the guard."""

import arviz_base
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz_stats import ess
from numpyro.infer import MCMC, DiscreteGibbs, Gibbs
from numpyro.infer.gibbs import discrete_latent_sites

import ebm_ppl as ebm

Y = np.array([1.2, 0.7, 2.1, 1.6])


def conjugate(y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    numpyro.deterministic("twice", 2 * mu)
    with numpyro.plate("data", 4):
        numpyro.sample("y", dist.Normal(mu, 1), obs=y)


PRECISION = 1 / 4 + 4
MEAN, SD = Y.sum() / PRECISION, PRECISION**-0.5


def z_scores(draws, mean, sd):
    """Of the mean and the variance, with the Monte Carlo error of the effective draws; shape (chain, draw)."""
    size = float(ess(draws))
    spread = float(ess((draws - mean) ** 2))
    return np.array([(draws.mean() - mean) / (sd / np.sqrt(size)), (draws.var() / sd**2 - 1) / np.sqrt(2 / spread)])


@pytest.mark.parametrize("chain_method", ["sequential", "vectorized"])
@pytest.mark.parametrize("sampler", [ebm.NUTS(), ebm.MALA(), ebm.HMC()], ids=lambda sampler: sampler.name)
def test_matches_the_exact_posterior(sampler, chain_method):
    kernel = ebm.as_numpyro_kernel(sampler, conjugate)
    mcmc = MCMC(kernel, num_warmup=300, num_samples=1500, num_chains=2, chain_method=chain_method, progress_bar=False)
    mcmc.run(jax.random.key(0), y=Y)
    draws = mcmc.get_samples(group_by_chain=True)
    assert np.all(np.abs(z_scores(np.asarray(draws["mu"]), MEAN, SD)) < 4.5)  # 12 scores, family-wise 1e-4
    np.testing.assert_allclose(draws["twice"], 2 * draws["mu"], rtol=1e-6)


@pytest.mark.parametrize("chain_method", ["sequential", "vectorized"])
def test_a_key_of_the_older_kind(chain_method):
    """Two integers, which are no chain axis."""
    shapes = []
    for num_chains in (1, 2):
        kernel = ebm.as_numpyro_kernel(ebm.NUTS(), conjugate)
        mcmc = MCMC(
            kernel,
            num_warmup=20,
            num_samples=10,
            num_chains=num_chains,
            chain_method=chain_method,
            thinning=2,
            progress_bar=False,
        )
        mcmc.run(jax.random.PRNGKey(0), y=Y)
        shapes.append(mcmc.get_samples(group_by_chain=True)["mu"].shape)
    assert shapes == [(1, 5), (2, 5)]


def test_parallel_chains(run_in_float32):
    """On two devices of one processor, with a progress bar for each."""
    printed = run_in_float32("""
        import numpyro
        numpyro.set_host_device_count(2)
        import jax, numpy as np, numpyro.distributions as dist, ebm_ppl
        from numpyro.infer import MCMC

        def model(y):
            mu = numpyro.sample("mu", dist.Normal(0, 2))
            numpyro.sample("y", dist.Normal(mu, 1).expand([4]).to_event(1), obs=y)

        mcmc = MCMC(ebm_ppl.as_numpyro_kernel(ebm_ppl.NUTS(), model), num_warmup=200, num_samples=200, num_chains=2,
                    chain_method="parallel")
        mcmc.run(jax.random.key(0), np.array([1.2, 0.7, 2.1, 1.6], np.float32))
        draws = np.asarray(mcmc.get_samples(group_by_chain=True)["mu"])
        print(draws.shape, np.array_equal(draws[0], draws[1]), draws.mean())
        """)
    *shape, equal, mean = printed.split()
    assert shape == ["(2,", "200)"] and equal == "False"
    assert abs(float(mean) - MEAN) < 5 * SD / np.sqrt(60)  # of 400 draws more than 60 are effective


def bounded_from_below_but_for(hole):
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("tilt", jnp.where((x > 0.5) & (x < 1.5), hole, 0.0))

    return model


@pytest.mark.parametrize(("hole", "name"), [(-jnp.inf, "infinite_density"), (jnp.nan, "nan_energy")])
def test_what_cannot_be_raised_is_rejected_and_told(hole, name):
    kernel = ebm.as_numpyro_kernel(ebm.HMC(), bounded_from_below_but_for(hole))
    mcmc = MCMC(kernel, num_warmup=100, num_samples=300, progress_bar=False)
    mcmc.run(jax.random.key(0), init_params={"x": jnp.zeros(())}, extra_fields=(name, "diverging"))
    x, fields = np.asarray(mcmc.get_samples()["x"]), mcmc.get_extra_fields()
    assert not np.any((x > 0.5) & (x < 1.5)) and np.std(x) > 0.1
    assert np.sum(fields[name]) > 0 and np.all(fields["diverging"] >= fields[name])


def test_tails_are_looked_at():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("tilt", -0.4 * x**2)

    mcmc = MCMC(ebm.as_numpyro_kernel(ebm.NUTS(), model), num_warmup=10, num_samples=10, progress_bar=False)
    with pytest.warns(ebm.EnergyWarning, match="'tilt' falls without bound"):
        mcmc.run(jax.random.key(0))


def test_arviz_reads_it():
    mcmc = MCMC(ebm.as_numpyro_kernel(ebm.HMC(), conjugate), num_warmup=100, num_samples=50, progress_bar=False)
    mcmc.run(jax.random.key(0), y=Y, extra_fields=("potential_energy", "num_steps", "adapt_state.step_size"))
    tree = arviz_base.from_numpyro(mcmc)
    assert {"mu", "twice"} <= set(tree["posterior"].data_vars)
    assert {"lp", "n_steps", "step_size", "diverging"} <= set(tree["sample_stats"].data_vars)


def mixture(probs, locs):
    c = numpyro.sample("c", dist.Categorical(probs))
    x = numpyro.sample("x", dist.Normal(locs[c], 0.5))
    numpyro.sample("obs", dist.Normal(x, 1.0), obs=jnp.array(0.4))


def test_block_of_a_gibbs_kernel():
    probs, locs = jnp.array([0.25, 0.75]), jnp.array([-1.0, 1.0])
    blocks = [(DiscreteGibbs(mixture), discrete_latent_sites), (ebm.as_numpyro_kernel(ebm.HMC(), mixture), None)]
    mcmc = MCMC(Gibbs(blocks), num_warmup=300, num_samples=4000, num_chains=1, progress_bar=False)
    mcmc.run(jax.random.key(1), probs, locs)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["c"], float)
    weight = probs * np.exp(-0.5 * (0.4 - locs) ** 2 / 1.25)
    truth = weight[1] / weight.sum()
    error = np.sqrt(truth * (1 - truth) / float(ess(draws)))
    assert abs(draws.mean() - truth) < 3.9 * error  # 1e-4


def test_the_guard_holds_before_the_first_draw():
    def model(y):
        theta = numpyro.sample("theta", dist.HalfNormal(1))
        with numpyro.plate("n", 4):
            numpyro.sample("y", ebm.EnergyDistribution(lambda x: theta * x**4, dist.Normal(0, 5)), obs=y)

    mcmc = MCMC(ebm.as_numpyro_kernel(ebm.NUTS(), model), num_warmup=10, num_samples=10, progress_bar=False)
    with pytest.raises(ebm.IntractablePartitionError, match="theta"):
        mcmc.run(jax.random.key(0), Y)


def test_unadjusted_is_refused():
    with pytest.raises(ebm.EnergyError, match="adjusted=True"):
        ebm.as_numpyro_kernel(ebm.MCLMC(adjusted=False), conjugate)


@pytest.mark.parametrize("adjusted", [True, False])
def test_mclmc_needs_two_dimensions(adjusted):
    with pytest.raises(ebm.EnergyError, match="two dimensions"):
        ebm.sample(jax.random.key(0), ebm.target(conjugate, y=Y), ebm.MCLMC(adjusted=adjusted), progress_bar=False)


def test_mclmc_needs_two_dimensions_inside_numpyro_and_smc():
    mcmc = MCMC(ebm.as_numpyro_kernel(ebm.MCLMC(), conjugate), num_warmup=10, num_samples=10, progress_bar=False)
    with pytest.raises(ebm.EnergyError, match="two dimensions"):
        mcmc.run(jax.random.key(0), y=Y)
    with pytest.raises(ebm.EnergyError, match="two dimensions"):
        ebm.log_z(jax.random.key(0), ebm.target(conjugate, y=Y), ebm.SMC(kernel=ebm.MCLMC()))
