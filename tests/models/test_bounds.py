"""Bounds of the log likelihood of each event against closed forms, for every kind of model."""

import arviz_stats
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from limits import z_limit
from model_problems import draws, linear_gaussian, marginal

import ebm_ppl as ebm
from ebm_ppl.models.annealed import Annealed, bracket, find_path

SETTINGS = Annealed(num_chains=4, num_stages=30)
Z, X = draws(0, 256)
EXACT = marginal().logpdf(X)


def _bounds(model, num_simulated=0, **settings):
    """Of as many events in each call, for which everything is compiled once."""
    return ebm.log_likelihood_bounds(
        jax.random.key(0), model, X, annealed=SETTINGS, num_simulated=num_simulated, **settings
    )


@pytest.mark.parametrize("encoder", ["wrong", None])
def test_weights_of_both_directions_are_unbiased(encoder):
    """E exp(A) = p(x) forward, E exp(-A) = 1 / p(x) back from latents that were drawn with the events."""
    model = linear_gaussian(encoder)
    path = find_path(jax.random.key(1), model, jnp.asarray(X), SETTINGS)
    found = bracket(jax.random.key(2), model, jnp.asarray(X), path, SETTINGS, jnp.asarray(Z))
    for ratio in (np.exp(found.lower - EXACT), np.exp(EXACT - found.upper)):
        assert np.abs(np.mean(ratio) - 1) < z_limit(4) * np.std(ratio) / np.sqrt(len(X))
    # Few chains of few stages: neither bound is tight, so that the above could have failed.
    assert np.mean(found.lower - EXACT) < -0.003 and np.mean(found.upper - EXACT) > 0.003
    assert np.abs(np.mean(found.rank) - 0.5) < z_limit(2) * np.std(found.rank) / np.sqrt(len(X))


def test_the_gap_between_true_bounds_is_small():
    model = linear_gaussian("wrong")
    tree = ebm.log_likelihood_bounds(jax.random.key(0), model, X, annealed=Annealed(8, 200), latents=Z, num_simulated=0)
    bounds = tree["bounds"]
    gap = bounds["mean_upper"].item() - bounds["mean_lower"].item()
    assert tree.attrs["bounds"] == "true" and tree.attrs["doubts"] == ""
    spread = np.std(bounds["upper"].values - bounds["lower"].values) / np.sqrt(len(X))
    assert -z_limit(1) * spread < gap < 0.05
    assert np.abs(np.mean(bounds["lower"].values - EXACT)) < 0.05


def test_events_of_the_world_get_a_gap_from_simulated_ones():
    tree = _bounds(linear_gaussian("wrong"), num_simulated=len(X))
    assert tree.attrs["bounds"] == "heuristic"
    assert tree["simulated"]["gap"].shape == (len(X),)
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "event")


def test_latents_that_are_no_draws_are_found_out():
    with pytest.warns(ebm.EnergyWarning, match="are no draws of the posterior"):
        tree = _bounds(linear_gaussian("wrong"), latents=np.zeros_like(Z))
    assert "no draws of the posterior" in tree.attrs["doubts"]


def test_a_flow_or_another_distribution_is_exact():
    normal = dist.MultivariateNormal(marginal().mean, marginal().cov)
    tree = ebm.log_likelihood_bounds(jax.random.key(0), normal, X)
    assert tree.attrs["bounds"] == "exact"
    for name in ("lower", "upper"):
        np.testing.assert_allclose(tree["bounds"][name], EXACT, rtol=1e-10)


def test_a_tilt_has_one_constant():
    """exp(-x^2 / 2) on N(0, 1) is N(0, 1/2), whose log Z is -log(2) / 2."""
    x = np.linspace(-1, 1, 5)[:, None]
    base = dist.Normal(0.0, 1.0).expand([1]).to_event(1)
    tilted = ebm.EnergyDistribution(ebm.FunctionEnergy(lambda x: 0.5 * x @ x), base)
    exact = st.norm.logpdf(x[:, 0], 0, np.sqrt(0.5))
    tree = ebm.log_likelihood_bounds(jax.random.key(0), tilted, x)
    assert np.all(tree["bounds"]["lower"] <= exact + 1e-12) and np.all(tree["bounds"]["upper"] >= exact - 1e-12)
    assert np.all(tree["bounds"]["upper"] - tree["bounds"]["lower"] < 0.1)
    given = ebm.log_likelihood_bounds(jax.random.key(0), tilted, x, log_z=ebm.LogZ(-np.log(2) / 2, 0.0, "known"))
    np.testing.assert_allclose(given["log_likelihood"]["x"][0, 0], exact, rtol=1e-10)
    known = ebm.EnergyDistribution(tilted.energy, base, log_partition=-np.log(2) / 2)
    assert ebm.log_likelihood_bounds(jax.random.key(0), known, x).attrs["bounds"] == "exact"


def test_log_z_of_a_tilted_prior_is_taken_off():
    shift = ebm.FunctionEnergy(lambda z: jnp.asarray(3.0, z.dtype))
    plain = _bounds(linear_gaussian("wrong"))
    tilted = _bounds(linear_gaussian("wrong", energy=shift), log_z=ebm.LogZ(-3.0, 0.0, "known"))
    np.testing.assert_allclose(tilted["bounds"]["lower"], plain["bounds"]["lower"], atol=1e-8)


# Of pandas 3.1, about what ArviZ calls: its own.
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values is deprecated:DeprecationWarning")
def test_arviz_ranks_models_of_the_same_events():
    near, far = dist.Normal(jnp.zeros(4), 1.5).to_event(1), dist.Normal(jnp.zeros(4), 5.0).to_event(1)
    trees = {
        name: ebm.log_likelihood_bounds(jax.random.key(0), model, X)
        for name, model in {"near": near, "far": far}.items()
    }
    trees["latent"] = _bounds(linear_gaussian("exact"))
    table = arviz_stats.compare({name: ebm.held_out_elpd(tree) for name, tree in trees.items()})
    assert list(table.index) == ["latent", "near", "far"]
    np.testing.assert_allclose(table.loc["latent", "elpd"], np.sum(EXACT), rtol=1e-6)  # the exact encoder has no error


def test_what_it_refuses():
    model = linear_gaussian("exact")
    with pytest.raises(ebm.EnergyShapeError, match=r"data has shape \(256, 3\); expected \(num, 4\)"):
        ebm.log_likelihood_bounds(jax.random.key(0), model, X[:, :3])
    with pytest.raises(ebm.EnergyShapeError, match="5 latents for 256 events"):
        ebm.log_likelihood_bounds(jax.random.key(0), model, X, latents=Z[:5], annealed=SETTINGS)
    with pytest.raises(ebm.EnergyError, match="has no likelihood"):
        ebm.log_likelihood_bounds(jax.random.key(0), ebm.MLPEnergy(jax.random.key(0), 4), X)
    with pytest.raises(ebm.EnergyError, match="latents are those of a LatentModel"):
        ebm.log_likelihood_bounds(jax.random.key(0), dist.Normal(jnp.zeros(4)).to_event(1), X, latents=Z)
    with pytest.raises(ebm.EnergyError, match="num_chains is 2 at least"):
        Annealed(num_chains=1)
