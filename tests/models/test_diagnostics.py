"""What latents are worth: closed forms of a linear model, a dead latent, and a prior with a hole."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from limits import z_limit
from model_problems import draws, linear_gaussian, posterior_variances

import ebm_ppl as ebm

_, X = draws(0, 2000)


def test_information_and_rate_of_a_linear_model():
    """The aggregate posterior of the exact encoder is the prior, so I_i = -log(v_i) / 2 and the rate is their sum."""
    tree = ebm.latent_diagnostics(jax.random.key(0), linear_gaussian("exact"), X)
    expected = -np.log(posterior_variances()) / 2
    np.testing.assert_allclose(tree["latents"]["information"], expected, atol=0.05)
    np.testing.assert_allclose(tree["latents"]["rate"], np.sum(expected), atol=0.1)
    assert tree["latents"]["active"].all()
    hole = tree["prior_hole"]
    assert np.abs(hole["auc"].item() - 0.5) < z_limit(1) * hole["std_error"].item()


def test_a_dead_latent_is_told():
    model = linear_gaussian("exact")
    dead = eqx.tree_at(lambda m: m.encoder.weight, model, model.encoder.weight.at[1].set(0.0))
    dead = eqx.tree_at(lambda m: m.encoder.bias, dead, dead.encoder.bias.at[1].set(0.0).at[3].set(0.0))
    with pytest.warns(ebm.EnergyWarning, match=r"1 of 2 latents say nothing .* \[1\]"):
        tree = ebm.latent_diagnostics(jax.random.key(0), dead, X)
    assert tree["latents"]["active"].values.tolist() == [True, False]
    np.testing.assert_allclose(tree["latents"]["information"][1], 0.0, atol=1e-12)


def _half(seed):
    """Data of one half of the latents: the prior has the other half too much."""
    z = jax.random.normal(jax.random.key(seed), (2000, 2))
    z = z.at[:, 0].set(jnp.abs(z[:, 0]) + 1.0)
    return linear_gaussian("exact").given(z).sample(jax.random.key(seed + 1))


@pytest.mark.parametrize("kind", ["known", pytest.param("learned", marks=pytest.mark.slow)])
def test_a_hole_in_the_prior_is_found_and_mended_by_a_tilt(kind):
    model, data = linear_gaussian("exact"), _half(1)
    plain = ebm.latent_diagnostics(jax.random.key(0), model, data)["prior_hole"]
    energy = ebm.FunctionEnergy(lambda z: jax.nn.softplus(100 * (1.0 - z[0])) - z[0])
    if kind == "learned":
        z, network = model.posterior_guess(_half(3)).sample(jax.random.key(5)), ebm.MLPEnergy(jax.random.key(6), 2, 32)
        how = {"base": model.base, "num_steps": 400, "optimiser": optax.adam(1e-2), "progress_bar": False}
        energy = ebm.fit(jax.random.key(7), network, z, ebm.MonteCarloLikelihood(), **how).energy
    tilted = ebm.latent_diagnostics(jax.random.key(0), model.with_prior(energy), data)["prior_hole"]
    assert plain["auc"].item() > 0.9
    assert tilted["auc"].item() < 0.6


def test_what_it_refuses():
    with pytest.raises(ebm.EnergyShapeError, match="an event of the model"):
        ebm.latent_diagnostics(jax.random.key(0), linear_gaussian("exact"), X[:, :2])
    with pytest.raises(ebm.EnergyError, match="no encoder"):
        ebm.latent_diagnostics(jax.random.key(0), linear_gaussian(None), X)
