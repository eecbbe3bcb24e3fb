"""Targets in the space of a flow: the density by its Jacobian, the model's own sites, and a log Z that stays."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flowjax.bijections import LeakyTanh
from flowjax.distributions import Normal, Transformed
from flowjax.flows import coupling_flow
from limits import z_limit

import ebm_ppl as ebm

LEFT = jnp.array([1.0, -0.5])


def made(dim=2, size=0.3, base=Normal):
    flow = coupling_flow(
        jax.random.key(0),
        base_dist=base(jnp.ones(dim)),
        flow_layers=2,
        nn_width=4,
        nn_activation=jnp.tanh,
        invert=False,
    )
    arrays, others = eqx.partition(flow, eqx.is_inexact_array)
    rng = np.random.default_rng(0)
    return eqx.combine(jax.tree.map(lambda x: x + size * rng.normal(size=x.shape), arrays), others)


def model(y):
    sd = numpyro.sample("sd", dist.HalfNormal(2.0))
    mean = numpyro.sample("mean", ebm.EnergyDistribution(lambda x: 0.1 * x**4, dist.Normal(0.0, 1.0)))
    numpyro.deterministic("ratio", mean / sd)
    with numpyro.plate("observation", len(y)):
        numpyro.sample("y", dist.Normal(mean, sd), obs=y)


def enumerated(y):
    share = numpyro.sample("share", dist.Beta(2.0, 2.0))
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("observation", len(y)):
        group = numpyro.sample("group", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(jnp.where(group == 1, mean, -mean), 1.0), obs=y)


def conjugate(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("program", [model, enumerated])
def test_terms_are_those_of_the_target_with_the_jacobian_of_the_flow(program):
    target, flow = ebm.target(program, LEFT), made()
    moved = ebm.transported(target, flow)
    place = flow.merge_transforms().bijection.transform
    for u in np.random.default_rng(1).normal(size=(3, 2)):
        z = place(jnp.asarray(u))
        log_det = np.linalg.slogdet(jax.jacfwd(place)(jnp.asarray(u)))[1]
        assert abs(log_det) > 0.01
        log_reference, energies = moved.terms(u)
        expected, of_target = target.terms(z)
        np.testing.assert_allclose(log_reference, expected + log_det, rtol=1e-8)
        for name, energy in of_target.items():
            np.testing.assert_allclose(energies[name], energy, rtol=1e-8)
        np.testing.assert_allclose(moved.staged_terms(u)[1], target.staged_terms(z)[1], rtol=1e-8)
        for name, value in target.constrain(z).items():
            np.testing.assert_allclose(moved.constrain(u)[name], value, rtol=1e-8)


def test_points_go_to_and_fro():
    target, flow = ebm.target(model, LEFT), made()
    moved = ebm.transported(target, flow)
    key, place = jax.random.key(2), flow.merge_transforms().bijection.transform
    np.testing.assert_allclose(place(moved.sample_reference(key)), target.sample_reference(key), rtol=1e-6)
    values = {"sd": jnp.asarray(0.7), "mean": jnp.asarray(-0.4)}
    u = moved.unconstrain(values)
    for name, value in values.items():
        np.testing.assert_allclose(moved.constrain(u)[name], value, rtol=1e-6)
    np.testing.assert_allclose(moved.log_likelihood(u)["y"], target.log_likelihood(place(u))["y"], rtol=1e-8)
    prior = moved.prior()
    assert isinstance(prior, ebm.Transported) and prior.energy_names == ("mean",)
    np.testing.assert_allclose(prior.log_reference(u), moved.log_reference(u), rtol=1e-12)


def test_draws_and_log_z_are_those_of_the_model():
    """A conjugate posterior N(y / 2, 1 / 2), with log Z in closed form.

    The slope of the bijection falls from 1 to .4 within a standard deviation: means without its Jacobian are far off.
    """
    flow = Transformed(Normal(jnp.zeros(2)), LeakyTanh(1.0, (2,)))
    moved = ebm.transported(ebm.target(conjugate, LEFT), flow)
    data = ebm.sample(jax.random.key(3), moved, num_chains=4, num_samples=500, num_warmup=300, progress_bar=False)
    from arviz_stats import ess

    x = np.asarray(data["posterior"]["x"])
    num = np.asarray(ess(data["posterior"].to_dataset(), method="mean")["x"])
    scores = (x.mean(axis=(0, 1)) - LEFT / 2) / np.sqrt(0.5 / num)
    assert np.max(np.abs(scores)) < z_limit(3) and {"log_likelihood", "observed_data"} <= set(data.children)
    found = ebm.log_z(jax.random.key(4), moved, ebm.SMC(num_particles=1000, num_moves=2))
    expected = float(dist.Normal(0.0, np.sqrt(2.0)).log_prob(LEFT).sum())
    assert abs(found.value - expected) < z_limit(3) * found.std_error


def test_what_is_no_flow_of_these_points_is_refused():
    target = ebm.target(conjugate, LEFT)
    with pytest.raises(ebm.EnergyShapeError, match="those of the target have \\(2,\\)"):
        ebm.transported(target, made(3))
    with pytest.raises(ebm.EnergyError, match="a flow of flowjax"):
        ebm.transported(target, dist.Normal())
    with pytest.raises(ebm.EnergyError, match="in the space of a flow already"):
        ebm.transported(ebm.transported(target, made()), made())
