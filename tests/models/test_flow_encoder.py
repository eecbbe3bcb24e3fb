"""Flows inside a `LatentModel`: as its prior, trained with the rest, and as its guide."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow
from limits import z_limit
from numpyro.handlers import seed, trace

import ebm_ppl as ebm

SMALL = {"base_dist": Normal(jnp.zeros(2)), "flow_layers": 2, "nn_width": 8, "invert": False}
CONDITIONAL = coupling_flow(jax.random.key(0), cond_dim=3, **SMALL)


def latent_model(encoder, **settings):
    """x ~ N(W z, s^2 I), of four numbers."""
    decoder = eqx.nn.Linear(2, 4, key=jax.random.key(1))
    return ebm.LatentModel(2, decoder, ebm.GaussianLikelihood((4,)), encoder=encoder, **settings)


def with_flow_guide(**settings):
    network = eqx.nn.Linear(4, 3, key=jax.random.key(2))
    return latent_model(ebm.FlowEncoder(network, CONDITIONAL), **settings)


DATA = np.random.default_rng(0).normal(size=(256, 4)) @ np.diag([2.0, 1.0, 0.5, 0.2])


def fit(model, num_steps=100):
    how = {"num_steps": num_steps, "batch_size": 64, "progress_bar": False}
    return ebm.fit(jax.random.key(3), model, DATA, ebm.EvidenceBound(), **how)


def moved(before, after):
    """Which arrays of one are other numbers in the other."""
    pairs = zip(*(jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)) for tree in (before, after)), strict=True)
    return [not np.array_equal(a, b) for a, b in pairs]


def test_guide_is_the_flow_under_the_conditions_of_each_event():
    model, x = with_flow_guide(), jnp.asarray(DATA[:3])
    guess = model.posterior_guess(x)
    assert (guess.batch_shape, guess.event_shape) == ((3,), (2,))
    z = guess.sample(jax.random.key(4), (5,))
    assert z.shape == (5, 3, 2)
    conditions = jnp.stack([model.encoder.network(each) for each in x])
    np.testing.assert_allclose(guess.log_prob(z), CONDITIONAL.log_prob(z, conditions), rtol=1e-9)
    traced = trace(seed(model.guide, jax.random.key(5))).get_trace(x)
    assert traced["z"]["value"].shape == (3, 2)
    draws = guess.sample(jax.random.key(6), (2000,))
    scores = (draws.mean(axis=0) - guess.mean) / np.sqrt(guess.variance * (1 / 256 + 1 / 2000))
    assert np.max(np.abs(scores)) < z_limit(6)


@pytest.mark.slow
def test_evidence_bound_trains_the_guide_and_stays_below_the_likelihood():
    """log p(x) = log N(b, W W' + s^2) in closed form: a bound that is not below it is none."""
    model = with_flow_guide()
    fitted = fit(model, 300)
    bound = fitted.record["training"]["bound"].values
    assert np.mean(bound[-50:]) > np.mean(bound[:50])
    assert all(moved(model.encoder.flow.bijection, fitted.energy.encoder.flow.bijection))
    known, x = fitted.energy, jnp.asarray(DATA)
    weight, scale = known.decoder.weight, known.likelihood.scale
    of_x = dist.MultivariateNormal(known.decoder.bias, weight @ weight.T + scale**2 * jnp.eye(4))
    keys = jax.random.split(jax.random.key(7), len(x))
    weights = jax.jit(jax.vmap(jax.vmap(known.log_weight, (0, None)), (0, 0)))
    log_weights = weights(jax.vmap(lambda key: jax.random.split(key, 64))(keys), x)
    exact = np.asarray(of_x.log_prob(x))
    assert np.all(log_weights.mean(axis=1) < exact + z_limit(len(x)) * log_weights.std(axis=1) / 8)
    ratio = np.exp(log_weights - exact[:, None]).mean(axis=1)
    assert abs(ratio.mean() - 1) < z_limit(1) * ratio.std() / np.sqrt(len(x))


def test_a_flow_as_prior_is_trained_with_the_rest():
    prior = ebm.FlowDistribution(coupling_flow(jax.random.key(8), **SMALL))
    model = latent_model(eqx.nn.Linear(4, 4, key=jax.random.key(9)), base=prior)
    fitted = fit(model)
    assert any(moved(model.base, fitted.energy.base))
    z = fitted.energy.sample_latents(jax.random.key(10), 7)
    np.testing.assert_allclose(fitted.energy.prior.log_prob(z), fitted.energy.base.flow.log_prob(z), rtol=1e-9)
    x = jnp.asarray(DATA[0])
    expected = -fitted.energy.given(z[0]).log_prob(x) - fitted.energy.base.flow.log_prob(z[0])
    np.testing.assert_allclose(fitted.energy.joint_energy(x, z[0]), expected, rtol=1e-9)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ebm.EnergyError, match="a flow with conditions"):
        ebm.FlowEncoder(eqx.nn.Linear(4, 3, key=jax.random.key(0)), coupling_flow(jax.random.key(0), **SMALL))
    with pytest.raises(ebm.EnergyShapeError, match="condition has shape \\(2,\\)"):
        latent_model(ebm.FlowEncoder(eqx.nn.Linear(4, 2, key=jax.random.key(0)), CONDITIONAL))
    three = coupling_flow(jax.random.key(0), cond_dim=3, base_dist=Normal(jnp.zeros(3)), flow_layers=1, nn_width=4)
    with pytest.raises(ebm.EnergyShapeError, match="A draw of the encoder"):
        latent_model(ebm.FlowEncoder(eqx.nn.Linear(4, 3, key=jax.random.key(0)), three))
