"""An unknown Z(theta) that depends on latent sites is refused before the first draw; nothing else is."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from limits import z_limit
from numpyro.contrib.module import eqx_module, random_eqx_module
from numpyro.infer import MCMC, NUTS
from scipy.special import gammaln

import ebm_ppl

Y = jnp.array([0.3, -0.5, 0.8])


def tilted(theta, base=None, **kwargs):
    return ebm_ppl.EnergyDistribution(
        lambda x: jnp.sum(theta * x**4), dist.Normal(0.0, 1.0) if base is None else base, **kwargs
    )


def prior():
    return numpyro.sample("theta", dist.Gamma(2.0, 1.0))


def observe(fn):
    with numpyro.plate("n", 3):
        numpyro.sample("y", fn, obs=Y)


def directly():
    observe(tilted(prior()))


def through_a_deterministic():
    observe(tilted(numpyro.deterministic("square", prior() ** 2)))


def through_a_scaled_energy():
    observe(ebm_ppl.EnergyDistribution(prior() * ebm_ppl.FunctionEnergy(jnp.square), dist.Normal(0.0, 1.0)))


def through_a_plate():
    with numpyro.plate("n", 3):
        theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
        tilted_each = ebm_ppl.EnergyDistribution(jnp.square, dist.Normal(0.0, 1.0), beta=theta)
        numpyro.sample("y", tilted_each, obs=Y)


LINEAR = eqx.nn.Linear(1, "scalar", key=jax.random.key(0))
VECTOR_BASE = dist.Normal(jnp.zeros(1), 1.0).to_event(1)


def through_a_random_network():
    network = random_eqx_module("network", LINEAR, prior=dist.Normal(0.0, 1.0))
    with numpyro.plate("n", 3):
        numpyro.sample(
            "y", ebm_ppl.EnergyDistribution(lambda x: network(x).squeeze() ** 2, VECTOR_BASE), obs=Y[:, None]
        )


def through_the_base():
    observe(tilted(1.0, dist.Normal(0.0, prior())))


def through_beta():
    observe(tilted(1.0, beta=prior()))


def through_an_enumerated_site():
    label = numpyro.sample("label", dist.Bernoulli(0.5))
    observe(tilted(1.0 + label))


def through_a_latent_tilted_site():
    theta = prior()
    x = numpyro.sample("x", tilted(theta))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=0.3)


def through_another_tilted_site():
    x = numpyro.sample("theta", tilted(1.0))
    observe(tilted(x**2))


def through_a_mask_and_event():
    theta = prior()
    numpyro.sample("y", tilted(theta).expand([3]).mask(jnp.array([True, True, False])).to_event(1), obs=Y)


def through_a_scan():
    from numpyro.contrib.control_flow import scan

    theta = prior()

    def step(carry, y):
        numpyro.sample("y", ebm_ppl.EnergyDistribution(Power(theta), dist.Normal(0.0, 1.0)), obs=y)
        return carry, None

    scan(step, 0.0, Y)


class Power(eqx.Module):
    theta: jax.Array

    def __call__(self, x):
        return self.theta * x**4


REFUSED = {
    directly: ("y", {"theta"}),
    through_a_deterministic: ("y", {"theta"}),
    through_a_scaled_energy: ("y", {"theta"}),
    through_a_plate: ("y", {"theta"}),
    through_a_random_network: ("y", {"network/weight", "network/bias"}),
    through_the_base: ("y", {"theta"}),
    through_beta: ("y", {"theta"}),
    through_an_enumerated_site: ("y", {"label"}),
    through_a_latent_tilted_site: ("x", {"theta"}),
    through_another_tilted_site: ("y", {"theta"}),
    through_a_mask_and_event: ("y", {"theta"}),
    through_a_scan: ("y", {"theta"}),
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_refused(model):
    site, latents = REFUSED[model]
    target = ebm_ppl.target(model)
    with pytest.raises(ebm_ppl.IntractablePartitionError) as error:
        target.require_tractable()
    message = str(error.value)
    assert f"'{site}' depends on " + ", ".join(map(repr, sorted(latents))) in message
    for remedy in ("log_partition=...", "fix the sites", "energy_factor", "log_partition='ignore'"):
        assert remedy in message
    assert target.spec.intractable == ((site, tuple(sorted(latents))),)


@pytest.mark.quick
@pytest.mark.parametrize(
    "sampler", [ebm_ppl.NUTS(), ebm_ppl.HMC(), ebm_ppl.MALA(), ebm_ppl.MCLMC(), ebm_ppl.SMC()], ids=lambda s: s.name
)
def test_every_sampler_refuses_before_the_first_draw(sampler):
    evaluations = []

    def model():
        theta = prior()

        def energy(x):
            jax.debug.callback(lambda: evaluations.append(1))
            return theta * x**4

        observe(ebm_ppl.EnergyDistribution(energy, dist.Normal(0.0, 1.0)))

    target = ebm_ppl.target(model)
    with pytest.raises(ebm_ppl.IntractablePartitionError):
        ebm_ppl.sample(jax.random.key(0), target, sampler, progress_bar=False)
    assert not evaluations


def test_log_z_and_predictions_refuse():
    for ask in (ebm_ppl.log_z, ebm_ppl.prior_predictive):
        with pytest.raises(ebm_ppl.IntractablePartitionError, match="'x' depends on 'theta'"):
            ask(jax.random.key(0), ebm_ppl.target(through_a_latent_tilted_site))


def constants():
    prior()
    observe(tilted(2.0, beta=0.5))


def data(strength):
    prior()
    observe(tilted(strength, dist.Normal(0.0, strength)))


def parameters():
    prior()
    strength = numpyro.param("strength", 1.0, constraint=dist.constraints.positive)
    observe(tilted(strength))


def trained_network():
    prior()
    network = eqx_module("network", LINEAR)
    with numpyro.plate("n", 3):
        numpyro.sample(
            "y", ebm_ppl.EnergyDistribution(lambda x: network(x).squeeze() ** 2, VECTOR_BASE), obs=Y[:, None]
        )


def with_log_partition():
    theta = prior()
    observe(
        ebm_ppl.EnergyDistribution(
            lambda x: 0.5 * theta * x**2, dist.Normal(0.0, 1.0), log_partition=-0.5 * jnp.log1p(theta)
        )
    )


def opted_out():
    observe(tilted(prior(), log_partition="ignore"))


def not_a_parameter():
    """Its value feeds other sites; its own density has constants only."""
    x = numpyro.sample("x", tilted(1.0))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=0.3)


def a_factor():
    x = prior()
    ebm_ppl.energy_factor("tilt", x**4)


TAKEN = {
    constants: (),
    data: (1.5,),
    parameters: (),
    trained_network: (),
    with_log_partition: (),
    opted_out: (),
    not_a_parameter: (),
    a_factor: (),
}


@pytest.mark.parametrize("model", TAKEN, ids=lambda model: model.__name__)
def test_taken(model):
    target = ebm_ppl.target(model, *TAKEN[model])
    assert target.spec.intractable == ()
    target.require_tractable()


def a_lookup():
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    numpyro.sample("y", ebm_ppl.EnergyDistribution(lambda k: theta[k], dist.Categorical(probs=jnp.ones(3) / 3)), obs=1)


def test_an_energy_that_looks_up_its_value_is_refused():
    assert ebm_ppl.target(a_lookup).spec.intractable == (("y", ("theta",)),)


@pytest.mark.parametrize("log_partition", [None, 0.0])
def test_part_of_an_observed_mixture_needs_its_log_partition(log_partition):
    """The weight of the other components against it depends on Z, though Z itself depends on no site."""

    def model():
        weight = numpyro.sample("weight", dist.Dirichlet(jnp.ones(2)))
        parts = [tilted(1.0, log_partition=log_partition), dist.Normal(0.0, 1.0)]
        observe(dist.MixtureGeneral(dist.Categorical(weight), parts))

    if log_partition is None:
        with pytest.raises(ebm_ppl.EnergyError, match=r"'y'.*MixtureGeneral.*log_partition"):
            ebm_ppl.target(model)
    else:
        ebm_ppl.target(model).require_tractable()


def test_a_transformed_observation_needs_none():
    def model():
        numpyro.sample("theta", dist.Normal(0.0, 1.0))
        scaled = dist.TransformedDistribution(tilted(1.0), dist.transforms.AffineTransform(0.0, 2.0))
        numpyro.sample("y", scaled, obs=0.3)

    assert ebm_ppl.target(model).spec.unknown_constant == ("y",)


def test_only_the_prior_need_be_tractable_for_prior_draws():
    prior_only = ebm_ppl.target(directly).prior()
    prior_only.require_tractable()


def test_evidence_of_the_opted_out_is_still_refused():
    with pytest.raises(ebm_ppl.IntractablePartitionError, match="'y'"):
        ebm_ppl.log_z(jax.random.key(0), ebm_ppl.target(opted_out))


# y_i ~ exp(-theta y^4) / Z(theta), the toy that goes wrong without a word


TRUE_THETA, NUM = 2.0, 200
LOG_NORMALISER = float(np.log(2) + gammaln(1.25))
"""log of the integral of exp(-y^4); that of exp(-theta y^4) is less by log(theta) / 4."""


def toy_data():
    rng = np.random.default_rng(0)
    return jnp.asarray((rng.gamma(0.25, 1 / TRUE_THETA, NUM)) ** 0.25 * rng.choice([-1.0, 1.0], NUM))


def forgotten(y):
    theta = numpyro.sample("theta", dist.HalfNormal(3.0))
    numpyro.factor("energy", -theta * jnp.sum(y**4))


def toy_distribution(y, known):
    theta = numpyro.sample("theta", dist.HalfNormal(3.0))
    wide = dist.Uniform(-4.0, 4.0)  # beyond +-4 the quartic leaves nothing
    log_partition = LOG_NORMALISER - jnp.log(theta) / 4 - jnp.log(8.0) if known else None
    quartic = ebm_ppl.EnergyDistribution(lambda x: theta * x**4, wide, log_partition=log_partition)
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", quartic, obs=y)


@pytest.fixture(scope="module")
def toy_moments():
    """Means and sds of the posterior with and without Z(theta), by quadrature on a fine grid."""
    y = np.asarray(toy_data())
    theta = np.linspace(1e-6, 12.0, 200_001)
    log_prior, total = -0.5 * (theta / 3.0) ** 2, np.sum(y**4)

    def moments(log_density):
        weight = np.exp(log_density - log_density.max())
        weight /= weight.sum()
        mean = weight @ theta
        return mean, np.sqrt(weight @ (theta - mean) ** 2)

    return {
        "right": moments(log_prior - theta * total + NUM * np.log(theta) / 4),
        "forgotten": moments(log_prior - theta * total),
    }


def z_score(draws, mean, sd):
    """Of a mean of draws of shape (chain, draw), by their effective number."""
    from arviz_stats import ess

    return (draws.mean() - mean) / (sd / np.sqrt(float(ess(np.asarray(draws)))))


def test_toy_is_wrong_when_the_partition_function_is_forgotten(toy_moments):
    """A hand-written factor runs without any warning, and its posterior is nowhere near the truth."""
    mcmc = MCMC(NUTS(forgotten), num_warmup=300, num_samples=500, num_chains=1, progress_bar=False)
    mcmc.run(jax.random.key(0), toy_data())
    draws = np.asarray(mcmc.get_samples()["theta"])[None]
    assert abs(z_score(draws, *toy_moments["forgotten"])) < z_limit(1)
    mean, sd = toy_moments["forgotten"]
    assert mean + 10 * sd < TRUE_THETA
    assert abs(toy_moments["right"][0] - TRUE_THETA) < 4 * toy_moments["right"][1]


def test_toy_is_refused(toy_moments):
    target = ebm_ppl.target(toy_distribution, toy_data(), known=False)
    with pytest.raises(ebm_ppl.IntractablePartitionError, match="'y' depends on 'theta'"):
        ebm_ppl.sample(jax.random.key(0), target, progress_bar=False)


def test_toy_is_right_with_log_partition(toy_moments):
    target = ebm_ppl.target(toy_distribution, toy_data(), known=True)
    data = ebm_ppl.sample(jax.random.key(0), target, num_chains=2, num_warmup=300, num_samples=500, progress_bar=False)
    assert abs(z_score(data["posterior"]["theta"].values, *toy_moments["right"])) < z_limit(1)
    mean, sd = toy_moments["right"]
    squares = (data["posterior"]["theta"].values - mean) ** 2
    assert abs(z_score(squares, sd**2, squares.std())) < z_limit(1)
