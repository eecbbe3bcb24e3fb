"""The tilted distribution in NumPyro's algorithms: guides, SVI, scan; on flows, and with networks as energies."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.module import eqx_module, nnx_module, random_eqx_module
from numpyro.distributions.flows import InverseAutoregressiveTransform
from numpyro.handlers import seed, trace
from numpyro.infer import SVI, Trace_ELBO, autoguide
from numpyro.infer.util import log_density

import ebm_ppl


def quartic(x):
    return x**4


def vector_quartic(x):
    return jnp.sum(x**4)


def rough(x):
    return jnp.sum(jnp.diff(x) ** 2)


X = jnp.array([-0.4, 0.3, 1.2])


class Power(eqx.Module):
    coefficient: jax.Array
    power: int = eqx.field(static=True)

    def __call__(self, x):
        return self.coefficient * x**self.power


def double_well():
    numpyro.sample("x", ebm_ppl.EnergyDistribution(rough, dist.Normal(1.0, 1.0).expand([3]).to_event(1), beta=2.0))


@pytest.mark.parametrize(
    "guide", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal, autoguide.AutoLaplaceApproximation]
)
def test_autoguides_and_svi(guide):
    svi = SVI(double_well, guide(double_well), numpyro.optim.Adam(0.02), Trace_ELBO(num_particles=8))
    losses = svi.run(jax.random.key(0), 200, progress_bar=False).losses
    assert np.all(np.isfinite(losses))
    first, last = np.asarray(losses[:20]), np.asarray(losses[-50:])
    error = np.hypot(first.std() / np.sqrt(20), last.std() / np.sqrt(50))
    assert first.mean() - last.mean() > 5 * error


def test_svi_learns_the_parameter_of_a_base():
    """With its log partition the density of the data is normalised, so maximum likelihood has a closed form."""
    scale = 1.0
    x = jnp.array([0.4, 1.3, 0.8, 2.1, 0.9])

    def model(x):
        loc = numpyro.param("loc", 0.0)
        # N(loc, 1) exp(-x^2 / 2) = N(loc / 2, 1/2), and log Z = -loc^2 / 4 - log(2) / 2
        tilted = ebm_ppl.EnergyDistribution(
            lambda x: 0.5 * x**2, dist.Normal(loc, scale), log_partition=-(loc**2) / 4 - 0.5 * jnp.log(2.0)
        )
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", tilted, obs=x)

    svi = SVI(model, lambda x: None, numpyro.optim.Adam(0.1), Trace_ELBO())
    fit = svi.run(jax.random.key(0), 400, x, progress_bar=False).params
    np.testing.assert_allclose(fit["loc"], 2 * x.mean(), rtol=1e-3)


# Bases that are flows


def test_a_numpyro_flow_as_base():
    network = numpyro.nn.AutoregressiveNN(2, [4])
    _, params = network[0](jax.random.key(1), (2,))
    flow = dist.TransformedDistribution(
        dist.Normal(0.0, 1.0).expand([2]).to_event(1),
        InverseAutoregressiveTransform(lambda x, **kwargs: network[1](params, x, **kwargs)),
    )
    tilted = ebm_ppl.EnergyDistribution(vector_quartic, flow)
    x = flow.sample(jax.random.key(2), (5,))
    np.testing.assert_allclose(tilted.log_prob(x), flow.log_prob(x) - jnp.sum(x**4, -1), rtol=1e-12)
    target = ebm_ppl.target(lambda: numpyro.sample("x", tilted))
    z = target.sample_reference(jax.random.key(0))
    np.testing.assert_allclose(target.log_reference(z), flow.log_prob(z), rtol=1e-12)


def test_a_transformed_distribution_as_base():
    base = dist.LogNormal(0.3, 0.5)
    tilted = ebm_ppl.EnergyDistribution(quartic, base)
    x = jnp.array(1.7)
    np.testing.assert_allclose(tilted.log_prob(x), base.log_prob(x) - x**4, rtol=1e-13)
    target = ebm_ppl.target(lambda: numpyro.sample("x", tilted))
    z = jnp.log(x)[None]
    np.testing.assert_allclose(target.log_reference(z), base.log_prob(x) + jnp.log(x), rtol=1e-13)
    np.testing.assert_allclose(target.energies(z)["x"], x**4, rtol=1e-13)


def test_a_flowjax_flow_as_base():
    import flowjax.distributions
    import flowjax.flows
    from flowjax.experimental.numpyro import distribution_to_numpyro

    flow = flowjax.flows.coupling_flow(
        jax.random.key(0), base_dist=flowjax.distributions.Normal(jnp.zeros(2)), flow_layers=2, nn_width=4
    )
    tilted = ebm_ppl.EnergyDistribution(vector_quartic, distribution_to_numpyro(flow))
    assert (tilted.batch_shape, tilted.event_shape) == ((), (2,))
    x = jnp.array([0.3, -0.8])
    np.testing.assert_allclose(tilted.log_prob(x), flow.log_prob(x) - jnp.sum(x**4), rtol=1e-12)
    target = ebm_ppl.target(lambda: numpyro.sample("x", tilted))
    z = target.sample_reference(jax.random.key(0))
    total = target.log_reference(z) - target.energies(z)["x"]
    np.testing.assert_allclose(total, tilted.log_prob(target.constrain(z)["x"]), rtol=1e-9)


# Networks


def test_an_equinox_network_as_energy():
    energy = ebm_ppl.MLPEnergy(jax.random.key(0), 3, width=4)
    tilted = ebm_ppl.EnergyDistribution(energy, dist.Normal(jnp.zeros(3), 1.0).to_event(1))
    np.testing.assert_allclose(tilted.log_prob(X), dist.Normal(0.0, 1.0).log_prob(X).sum() - energy(X), rtol=1e-13)


def vector_base():
    return dist.Normal(jnp.zeros(3), 1.0).to_event(1)


def check_trainable(model, network):
    """The network is a parameter of the model, and its energy counts; returns the data and their log density."""
    x = jax.random.normal(jax.random.key(1), (4, 3))
    value, recorded = log_density(seed(model, 0), (x,), {}, {})
    assert recorded["energy$params"]["type"] == "param"
    exact = jnp.sum(dist.Normal(0.0, 1.0).log_prob(x)) - jnp.sum(jax.vmap(network)(x))
    np.testing.assert_allclose(value, exact, rtol=1e-12)
    return x, exact


def test_eqx_module_inside_a_model_can_be_trained():
    network = ebm_ppl.MLPEnergy(jax.random.key(0), 3, width=4)

    def model(x):
        energy = eqx_module("energy", network)
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", ebm_ppl.EnergyDistribution(energy, vector_base()), obs=x)

    x, _ = check_trainable(model, network)
    svi = SVI(model, lambda x: None, numpyro.optim.Adam(0.01), Trace_ELBO())
    losses = svi.run(jax.random.key(0), 20, x, progress_bar=False).losses
    assert losses[-1] < losses[0]  # without randomness, so no Monte Carlo error


def test_random_eqx_module_inside_a_model():
    network = eqx.nn.Linear(3, "scalar", key=jax.random.key(0))

    def model(x):
        energy = random_eqx_module("energy", network, prior=dist.Normal(0.0, 1.0))
        numpyro.sample("x", ebm_ppl.EnergyDistribution(energy, vector_base(), log_partition="ignore"), obs=x)

    recorded = trace(seed(model, 0)).get_trace(X)
    weight, bias = recorded["energy/weight"]["value"], recorded["energy/bias"]["value"]
    tilted = recorded["x"]["fn"]
    np.testing.assert_allclose(tilted.tilt(X), (weight @ X + bias).squeeze(), rtol=1e-12)


def test_nnx_module_inside_a_model():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(3, 4, rngs=rngs, param_dtype=jnp.float64)
            self.outer = nnx.Linear(4, 1, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, x):
            return self.outer(nnx.softplus(self.inner(x)))[0]

    network = Network(nnx.Rngs(0))

    def model(x):
        energy = nnx_module("energy", network)
        with numpyro.plate("n", len(x)):
            numpyro.sample("x", ebm_ppl.EnergyDistribution(energy, vector_base()), obs=x)

    x, exact = check_trainable(model, network)
    target = ebm_ppl.target(model, x)
    np.testing.assert_allclose(-target.energies(jnp.zeros(0))["x"], exact, rtol=1e-12)


def test_in_numpyro_scan():
    """A module passes through NumPyro's scan, where distributions are pytrees."""
    from numpyro.contrib.control_flow import scan

    energy = Power(jnp.array(0.5), 4)

    def model(xs):
        def step(carry, x):
            numpyro.sample("x", ebm_ppl.EnergyDistribution(energy, dist.Normal(carry, 1.0)), obs=x)
            return x, None

        scan(step, 0.0, xs)

    value, _ = log_density(seed(model, 0), (X,), {}, {})
    previous = jnp.concatenate([jnp.zeros(1), X[:-1]])
    np.testing.assert_allclose(value, jnp.sum(dist.Normal(previous, 1.0).log_prob(X) - 0.5 * X**4), rtol=1e-12)


def test_in_a_plate_inside_numpyro_scan():
    """Stacked parameters of energy, beta, base and log partition stay aligned with the plate."""
    from numpyro.contrib.control_flow import scan

    weights, scales = jnp.arange(1.0, 4.0), jnp.array([0.1, 0.2])
    log_partition = jnp.array([0.3, 0.4])

    def model(xs):
        def step(carry, inputs):
            weight, x = inputs
            with numpyro.plate("n", 2):
                tilted = ebm_ppl.EnergyDistribution(
                    Power(weight, 4), dist.Normal(carry, 1.0), beta=scales, log_partition=carry * log_partition
                )
                numpyro.sample("x", tilted, obs=x)
            return carry + 1.0, None

        scan(step, 0.0, (weights, xs))

    xs = jnp.linspace(-1, 1, 6).reshape(3, 2)
    value, _ = log_density(seed(model, 0), (xs,), {}, {})
    carry = jnp.arange(3.0)[:, None]
    tilt = scales * weights[:, None] * xs**4 + carry * log_partition
    np.testing.assert_allclose(value, jnp.sum(dist.Normal(carry, 1.0).log_prob(xs) - tilt), rtol=1e-12)
