"""Layers of latents against quadrature, and a prior as a chain of energies against what it was trained on."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from limits import z_limit
from numpyro.infer import Predictive

import ebm_ppl as ebm
from ebm_ppl.models.hierarchical import LayeredGuess
from ebm_ppl.train.checks import warn_of_doubts
from ebm_ppl.train.objective import Density

MODEL = ebm.hierarchical_vae(jax.random.key(0), (1, 1), ebm.GaussianLikelihood((3,), 0.5), width=8)
X = jnp.array([0.4, -0.3, 0.8])
SIDE = jnp.linspace(-12.0, 12.0, 401)
GRID = jnp.stack(jnp.meshgrid(SIDE, SIDE, indexing="ij"), axis=-1).reshape(-1, 2)
CELL = (SIDE[1] - SIDE[0]) ** 2
LEVELS = (0.2, 0.6, 1.5, 3.0)
MOVES = {"dynamics": ebm.Dynamics(ebm.MALA(), 20, 0.5), "moves_from": "reference"}


def livelier(model, factor=1.7):
    """The same with larger weights, so that layers depend on each other as much as those of a trained model do."""
    return jax.tree.map(lambda x: factor * x if eqx.is_array(x) and x.ndim == 2 else x, model)


def test_latents_are_made_from_the_top_down():
    model = ebm.hierarchical_vae(jax.random.key(1), (2, 3, 1), ebm.BernoulliLikelihood((4,)), width=8)
    u = jnp.arange(6.0) / 3 - 1
    top, middle, bottom = model.decoder.latents(u)
    np.testing.assert_array_equal(top, u[:2])
    mean, raw = jnp.split(model.decoder.steps[0](top), 2)
    np.testing.assert_allclose(middle, mean + jnp.log1p((jnp.e - 1) * jnp.exp(raw)) * u[2:5])
    mean, raw = jnp.split(model.decoder.steps[1](jnp.concatenate([top, middle])), 2)
    np.testing.assert_allclose(bottom, mean + jnp.log1p((jnp.e - 1) * jnp.exp(raw)) * u[5:])
    outputs = model.decoder.network(jnp.concatenate([top, middle, bottom]))
    np.testing.assert_allclose(model.decoder(u), outputs)
    assert np.all(np.isfinite(model.decoder(1e4 * u)))  # where a walker may look


def test_a_guess_is_a_density_and_its_draws_have_it():
    guess = livelier(MODEL).posterior_guess(X)
    density = jnp.exp(guess.log_prob(GRID)) * CELL
    np.testing.assert_allclose(jnp.sum(density), 1.0, atol=1e-6)
    draws = guess.sample(jax.random.key(0), (20_000,))
    features = lambda u: jnp.stack([u[:, 0], u[:, 1], u[:, 0] ** 2, u[:, 1] ** 2, u[:, 0] * u[:, 1]])  # noqa: E731
    exact, found = features(GRID) @ density, features(draws)
    scores = (found.mean(axis=1) - exact) / (found.std(axis=1) / np.sqrt(len(draws)))
    assert np.max(np.abs(scores)) < z_limit(len(scores)), scores
    assert abs(exact[4] - exact[0] * exact[1]) > 0.01  # layers hang together
    np.testing.assert_allclose(guess.mean, exact[:2], atol=0.3)


def test_a_guess_has_the_batch_of_its_events():
    guess = MODEL.posterior_guess(jnp.stack([X, -X]))
    assert isinstance(guess, LayeredGuess) and guess.batch_shape == (2,) and guess.event_shape == (2,)
    u = guess.sample(jax.random.key(0), (5,))
    assert u.shape == (5, 2, 2)
    each = jnp.stack([MODEL.posterior_guess(x).log_prob(u[:, i]) for i, x in enumerate((X, -X))], axis=1)
    np.testing.assert_allclose(guess.log_prob(u), each)
    assert guess.variance.shape == (2, 2)
    np.testing.assert_allclose(jax.jit(lambda guess, u: guess.log_prob(u))(guess, u), each)


def test_weights_of_the_guess_have_the_likelihood_as_their_mean():
    model, keys = livelier(MODEL), jax.random.split(jax.random.key(0), 20_000)
    exact = jnp.sum(jnp.exp(jax.vmap(model.log_joint, (None, 0))(X, GRID))) * CELL
    weights = jnp.exp(jax.vmap(model.log_weight, (0, None))(keys, X))
    score = (jnp.mean(weights) - exact) / (jnp.std(weights) / np.sqrt(len(keys)))
    assert abs(score) < z_limit(1), score
    assert jnp.std(weights) < 10 * exact  # so that the score means something


def energy_at_rest(dim=2):
    """A noise-conditional energy that is its reference, N(0, 1 + sigma^2)."""
    energy = ebm.NoiseConditionalEnergy(jax.random.key(0), dim, LEVELS, width=4)
    return jax.tree.map(lambda x: 0 * x if eqx.is_array(x) else x, energy)


def test_the_prior_is_the_density_at_the_lowest_level():
    conditional = livelier(ebm.NoiseConditionalEnergy(jax.random.key(0), 2, LEVELS, width=8))
    prior = MODEL.with_prior(ebm.DiffusionPrior(conditional)).prior
    difference = prior.log_prob(GRID) + jax.vmap(conditional)(GRID)
    np.testing.assert_allclose(difference, -np.log(2 * np.pi), atol=1e-10)


def test_a_chain_of_what_is_its_reference_needs_no_moves():
    """Its draws are normal at once, and those of moves from the noisy point, which are far too few, are not."""
    few = ebm.Dynamics(ebm.Langevin(), 1, 1e-6)
    draws = ebm.DiffusionPrior(energy_at_rest(), few).draw_tilted(jax.random.key(0), 20_000)
    squares = np.asarray(draws).ravel() ** 2
    variance = 1 + LEVELS[0] ** 2
    score = (squares.mean() - variance) / (squares.std() / np.sqrt(squares.size))
    assert abs(score) < z_limit(1), score
    far = ebm.DiffusionPrior(energy_at_rest(), few, "noisy").draw_tilted(jax.random.key(0), 1000)
    assert np.var(far) > 5


def test_numpyro_draws_from_it_by_the_chain():
    model = MODEL.with_prior(ebm.DiffusionPrior(energy_at_rest()))
    drawn = Predictive(lambda: model.model(num=3), num_samples=4)(jax.random.key(0))
    assert drawn["z"].shape == (4, 3, 2) and drawn["x"].shape == (4, 3, 3)
    assert len(np.unique(drawn["z"])) == drawn["z"].size
    with pytest.raises(NotImplementedError):  # of another temperature it knows no draws
        ebm.EnergyDistribution(model.energy, model.base, beta=0.5).sample(jax.random.key(0))
    draws = ebm.EnergyDistribution(model.energy, model.base).expand([2]).sample(jax.random.key(0), (3,))
    assert draws.shape == (3, 2, 2)


def ring(key, num):
    """Latents on a ring, more of them on one side: nothing is where N(0, I) has most."""
    key_angle, key_radius = jax.random.split(key)
    angle = 1.5 * jax.random.normal(key_angle, (num,))
    radius = 1.4 + 0.2 * jax.random.normal(key_radius, (num,))
    return radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)


@pytest.fixture(scope="module")
def learned():
    energy = ebm.NoiseConditionalEnergy(jax.random.key(0), 2, LEVELS, width=32)
    walkers = ebm.PersistentContrastiveDivergence(256, dynamics=ebm.Dynamics(ebm.MALA(), 8))
    objective = ebm.RecoveryLikelihood(LEVELS, **MOVES, marginal=walkers)
    how = {"num_steps": 1500, "averaging": 0.99, "progress_bar": False}
    how["optimiser"] = optax.adam(optax.cosine_decay_schedule(2e-3, 1500))
    return ebm.fit(jax.random.key(1), energy, ring(jax.random.key(2), 10_000), objective, **how)


def test_a_hole_is_closed_by_the_chain_and_by_its_density(learned):
    """A classifier that tells N(0, I) from what was trained on does not tell draws of the chain, and the density at the
    lowest level, by quadrature, has the hole and the moments."""
    test, prior = ring(jax.random.key(3), 2000), ebm.DiffusionPrior(learned.energy, **MOVES)
    draws = prior.draw_tilted(jax.random.key(4), 2000)
    plain = jax.random.normal(jax.random.key(5), (2000, 2))
    holes = [ebm.classifier_auc(jax.random.key(6), np.asarray(each), np.asarray(test)).value for each in (plain, draws)]
    assert holes[0] > 0.75 and holes[1] < 0.56, holes
    density = jax.nn.softmax(-jax.vmap(learned.energy)(GRID))
    for of in (lambda u: u[:, 0], lambda u: u[:, 0] ** 2, lambda u: u[:, 1] ** 2, lambda u: jnp.hypot(*u.T) < 0.7):
        exact, found = jnp.mean(of(ring(jax.random.key(7), 100_000))), [jnp.mean(of(draws)), density @ of(GRID)]
        np.testing.assert_allclose(found, exact, atol=0.1)
    assert {"marginal_energy_gap", "marginal_accept_rate"} <= set(learned.record["training"])


def test_smc_takes_it_as_any_prior(learned):
    """Draws and log Z, by an energy that is not that of a chain of noise to it."""
    model = MODEL.with_prior(ebm.DiffusionPrior(learned.energy, **MOVES))
    log_density = model.prior.log_prob(GRID)
    exact = jax.nn.logsumexp(log_density) + jnp.log(CELL)
    target = ebm.target(ebm.LatentModel.generate, model)
    tree = ebm.sample(jax.random.key(0), target, ebm.SMC(num_particles=2000), num_chains=2, progress_bar=False)
    found = tree["log_z"]
    assert np.all(np.abs(found["prior_value"] - exact) < 4 * found["prior_std_error"]), (found, exact)
    of_draws = np.mean(tree["posterior"]["z"].values, axis=(0, 1))
    np.testing.assert_allclose(of_draws, jax.nn.softmax(log_density) @ GRID, atol=0.1)


def test_the_gradient_of_the_density_is_added_with_its_weight():
    energy, data = ebm.NoiseConditionalEnergy(jax.random.key(0), 2, LEVELS, width=4), ring(jax.random.key(1), 64)
    walkers, density = ebm.ContrastiveDivergence(), Density(energy, None, (2,))
    key, plain = jax.random.key(2), ebm.RecoveryLikelihood(LEVELS, **MOVES)
    both = ebm.RecoveryLikelihood(LEVELS, **MOVES, marginal=walkers, weight=0.7)
    parts = []
    for objective, key_used in ((both, key), (plain, key), (walkers, jax.random.split(key, 5)[4])):
        parameters, state = objective.init(jax.random.key(3), density, data)
        parts.append(objective.loss(key_used, density, parameters, state, data)[0])
    np.testing.assert_allclose(parts[0], parts[1] + 0.7 * parts[2], rtol=1e-12)
    assert abs(parts[2]) > 1e-3


def test_walkers_that_have_lost_the_density_are_told_of():
    """Those of the density beside the conditionals, as those of any objective."""
    objective = ebm.RecoveryLikelihood(LEVELS, **MOVES, marginal=ebm.ContrastiveDivergence())
    metrics = {"energy_gap": np.zeros(9), "marginal_energy_gap": np.full(9, 1000.0)}
    with pytest.warns(ebm.EnergyWarning, match="walkers lie 1000 nats above"):
        warn_of_doubts(metrics, 2, objective)


def test_single_precision_stays():
    with jax.enable_x64(False):
        draws = ebm.DiffusionPrior(ebm.NoiseConditionalEnergy(jax.random.key(0), 2, LEVELS)).draw_tilted(
            jax.random.key(0), 8
        )
        assert draws.dtype == jnp.float32 and np.all(np.isfinite(draws))


def test_draws_that_are_not_finite_are_counted():
    steep = ebm.DiffusionPrior(energy_at_rest(), ebm.Dynamics(ebm.Langevin(), 2000, 50.0))
    with pytest.warns(ebm.EnergyWarning, match=r"16 of 16 draws .* not finite"):
        steep.draw_tilted(jax.random.key(0), 16)


def test_what_cannot_be_is_refused():
    likelihood, key = ebm.BernoulliLikelihood((4,)), jax.random.key(0)
    for latent_dims in ((), (2, 0)):
        with pytest.raises(ebm.EnergyError, match="latent_dims"):
            ebm.hierarchical_vae(key, latent_dims, likelihood)
    wide = ebm.vae(key, 2, likelihood, width=8, base=dist.Normal(jnp.zeros(2), 2.0).to_event(1))
    with pytest.raises(ebm.EnergyError, match=r"relative to N\(0, I\)"):
        wide.with_prior(ebm.DiffusionPrior(energy_at_rest()))
    with pytest.raises(ebm.EnergyError, match=r"relative to N\(0, I\)"):
        ebm.EnergyDistribution(ebm.DiffusionPrior(energy_at_rest()), wide.base)
    with pytest.raises(ebm.EnergyError, match="moves_from"):
        ebm.RecoveryLikelihood(LEVELS, moves_from="data")
    with pytest.raises(ebm.EnergyError, match="weight"):
        ebm.RecoveryLikelihood(LEVELS, weight=0.0)

    class Levelled(ebm.Energy):
        def at(self, sigma):
            return lambda x: x @ x / (2 * (1 + sigma**2))

        def __call__(self, x):
            return self.at(LEVELS[0])(x)

    with pytest.raises(ebm.EnergyError, match=r"Levelled has no reference"):
        ebm.recover(key, Levelled(), LEVELS, dist.Normal().expand([2]).to_event(1), moves_from="reference")
    objective, density = ebm.RecoveryLikelihood(LEVELS, moves_from="reference"), Density(Levelled(), None, (2,))
    with pytest.raises(ebm.EnergyError, match=r"Levelled has no reference"):
        objective.init(key, density, jnp.ones((4, 2)))
