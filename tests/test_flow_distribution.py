"""Flows of flowjax as distributions of NumPyro: in models, as bases of energies, and as arguments of programs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flowjax.distributions import Normal, Transformed
from flowjax.flows import coupling_flow, masked_autoregressive_flow
from limits import z_limit

import ebm_ppl as ebm


@pytest.fixture(scope="module")
def flow():
    return coupling_flow(jax.random.key(0), base_dist=Normal(jnp.ones(2)), flow_layers=2, nn_width=4)


def test_it_is_the_flow_in_any_batch(flow):
    wrapped, x = ebm.FlowDistribution(flow), jax.random.normal(jax.random.key(1), (4, 3, 2))
    np.testing.assert_allclose(wrapped.log_prob(x), flow.log_prob(x), rtol=1e-12)
    assert wrapped.sample(jax.random.key(2), (4, 3)).shape == (4, 3, 2)
    assert (wrapped.batch_shape, wrapped.event_shape, wrapped.event_dim) == ((), (2,), 1)
    np.testing.assert_allclose(wrapped.expand([3]).log_prob(x), flow.log_prob(x), rtol=1e-12)
    scalar = ebm.FlowDistribution(Normal(0.5, 2.0))
    np.testing.assert_allclose(scalar.log_prob(x), dist.Normal(0.5, 2.0).log_prob(x), rtol=1e-12)


def test_it_goes_through_compiled_programs_as_an_argument(flow):
    """Its parameters are arrays of the program: another flow of the shape is no other program."""
    compiled = []

    @jax.jit
    def log_prob(wrapped, x):
        compiled.append(1)
        return wrapped.log_prob(x)

    other = jax.tree.map(lambda leaf: leaf + 0.1 if eqx.is_inexact_array(leaf) else leaf, flow)
    for each in (flow, other):
        np.testing.assert_allclose(log_prob(ebm.FlowDistribution(each), jnp.zeros(2)), each.log_prob(jnp.zeros(2)))
    assert len(compiled) == 1


def test_draws_have_its_density(flow):
    """E[q / p] = 1 over draws of p, for a normal distribution q that lies within."""
    wrapped, q = ebm.FlowDistribution(flow), dist.Normal(jnp.ones(2), 0.5).to_event(1)
    x = wrapped.sample(jax.random.key(3), (20_000,))
    ratios = np.exp(q.log_prob(x) - wrapped.log_prob(x))
    assert abs(ratios.mean() - 1) < z_limit(1) * ratios.std() / np.sqrt(len(ratios))


def test_it_is_a_prior_and_the_base_of_an_energy(flow):
    wrapped = ebm.FlowDistribution(flow)

    def model():
        x = numpyro.sample("x", ebm.EnergyDistribution(ebm.QuadraticEnergy(jnp.eye(2)), wrapped))
        numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=0.5)

    target = ebm.target(model)
    z = target.sample_reference(jax.random.key(4))
    np.testing.assert_allclose(target.log_reference(z), flow.log_prob(z), rtol=1e-12)
    np.testing.assert_allclose(target.energies(z)["x"], z @ z / 2, rtol=1e-12)


def test_what_is_no_flow_or_depends_on_conditions_is_refused():
    conditional = masked_autoregressive_flow(
        jax.random.key(0), base_dist=Normal(jnp.zeros(2)), cond_dim=1, flow_layers=1, nn_width=4
    )
    assert isinstance(conditional, Transformed)
    for wrong in (conditional, dist.Normal()):
        with pytest.raises(ebm.EnergyError, match="distribution of flowjax without conditions"):
            ebm.FlowDistribution(wrong)
