"""Energies by adversarial diffusion: its bounds where all is normal and known, its gradients, and what is learned."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax.scipy.stats import norm
from limits import t_limit

import ebm_ppl as ebm
from ebm_ppl.train.objective import Density

LEVELS, SCALE, DIM = (0.3, 0.5, 1.0, 2.0), 1.5, 2
ADDED = np.array(LEVELS) ** 2 - LEVELS[0] ** 2
NUM_DRAWS = 10_000
GRID = jnp.linspace(-15.0, 15.0, 6001)[:, None]
TWO_MODES = dist.MixtureSameFamily(
    dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.array([-2.0, 1.5]), jnp.array([0.5, 0.7]))
)


def two_modes(num, seed=0):
    return np.asarray(TWO_MODES.sample(jax.random.key(seed), (num, 1)))


def divergence(energy):
    """KL of the two modes to the energy's density on the line, by quadrature."""
    log_p, log_q = TWO_MODES.log_prob(GRID[:, 0]), -jax.vmap(energy)(GRID)
    log_q = log_q - jax.nn.logsumexp(log_q) - jnp.log(GRID[1, 0] - GRID[0, 0])
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q)) * (GRID[1, 0] - GRID[0, 0])


class Bell(eqx.Module):
    """weight |x|^2 / 2v, where v is the variance of normal data at each level."""

    weight: jax.Array

    def at(self, sigma):
        return lambda x: self.weight * x @ x / (2 * (SCALE**2 + sigma**2 - LEVELS[0] ** 2))

    def __call__(self, x):
        return self.at(LEVELS[0])(x)


class Torn(Bell):
    """It is not a number where x[0] > 1."""

    def at(self, sigma):
        whole = super().at(sigma)
        return lambda x: jnp.where(x[0] > 1, jnp.nan, whole(x))


BELL = Bell(jnp.ones(()))


def normal_data(key, num):
    return SCALE * jax.random.normal(key, (num, DIM))


def normal_generator(latent=0.0, slope=1.0, wider=1.0):
    """Exact for normal data, with a share of the variance of the guess from z instead of from noise.

    The encoder is the posterior of z but for a factor of its slope and one of its width.
    """
    plain = ebm.DenoisingGenerator(jax.random.key(0), DIM, LEVELS, scale=SCALE, width=4, depth=0)
    (network,), (encoder,) = plain.network.layers, plain.encoder.layers
    of_z = jnp.zeros_like(network.weight).at[:, DIM + 1 :].set(jnp.sqrt(latent) * jnp.eye(DIM))
    # At the lowest level alone, where x is the guess: z and x are then normal with this correlation.
    of_x = jnp.zeros_like(encoder.weight).at[:DIM, :DIM].set(slope * jnp.sqrt(latent) * jnp.eye(DIM))
    bias = jnp.repeat(jnp.array([0.0, 0.5 * np.log1p(-latent) + np.log(wider)]), DIM)
    where = lambda g: (  # noqa: E731
        g.network.layers[0].weight,
        g.network.layers[0].bias,
        g.encoder.layers[0].weight,
        g.encoder.layers[0].bias,
        g.log_noise,
    )
    noise = jnp.full_like(plain.log_noise, 0.5 * np.log1p(-latent))
    return eqx.tree_at(where, plain, (of_z, jnp.zeros(DIM), of_x, bias, noise))


def posterior(y, level):
    """Mean and standard deviation of x_k given y, of normal data."""
    step, variance = ADDED[level + 1] - ADDED[level], SCALE**2 + ADDED[level]
    return variance / (variance + step) * y, np.sqrt(variance * step / (variance + step))


def score(values, exact):
    return (np.mean(values) - exact) / (np.std(values, ddof=1) / np.sqrt(len(values)))


@pytest.mark.parametrize("level", range(len(LEVELS) - 1))
def test_a_generator_without_networks_is_exact_for_normal_data(level):
    generator, y, x = normal_generator(), jnp.array([0.7, -2.0]), jnp.array([1.0, 0.3])
    mean, scale = posterior(y, level)
    for found, exact in zip(generator.given(jnp.ones(DIM), y, jnp.asarray(level)), (mean, scale), strict=True):
        np.testing.assert_allclose(found, exact * jnp.ones(DIM), rtol=1e-6)
    log_density = jnp.sum(norm.logpdf(x, mean, scale))
    found = generator.log_density_bound(jax.random.key(0), x, y, jnp.asarray(level))
    np.testing.assert_allclose(found, log_density, rtol=1e-6)
    drawn, h = generator.draw(jax.random.key(1), y, jnp.asarray(level))
    np.testing.assert_allclose(h, -jnp.sum(norm.logpdf(drawn, mean, scale)), rtol=1e-6)


def test_both_bounds_are_tight_where_the_encoder_is_the_posterior():
    """Not on average alone: each draw has its -log g. With another encoder they are off by its divergence."""
    y, level, keys = jnp.array([0.7, -2.0]), jnp.asarray(0), jax.random.split(jax.random.key(0), 20_000)
    x, (mean, scale) = jnp.array([1.0, 0.3]), posterior(y, 0)
    exact = jnp.sum(norm.logpdf(x, mean, scale))
    generator = normal_generator(latent=0.6)
    drawn, h = jax.vmap(generator.draw, (0, None, None))(keys, y, level)
    np.testing.assert_allclose(h, -jnp.sum(norm.logpdf(drawn, mean, scale), axis=1), rtol=1e-5)
    bounds = jax.vmap(generator.log_density_bound, (0, None, None, None))(keys, x, y, level)
    other = normal_generator(latent=0.6, slope=0.7, wider=1.3)
    looser = jax.vmap(other.log_density_bound, (0, None, None, None))(keys, x, y, level)
    _, h = jax.vmap(other.draw, (0, None, None))(keys, y, level)
    # KL of r to the posterior at x, and of the posterior to r on average over draws; both in closed form.
    standard = (x - mean) / scale
    to_posterior = DIM * (1.3**2 - 1 - 2 * np.log(1.3)) / 2 + 0.6 * 0.3**2 * jnp.sum(standard**2) / (2 * 0.4)
    to_encoder = DIM * (np.log(1.3) + (0.4 + 0.6 * 0.3**2) / (2 * 0.4 * 1.3**2) - 0.5)
    entropy = DIM * (0.5 * np.log(2 * np.pi * np.e) + np.log(scale))
    scores = [score(bounds, exact), score(looser, exact - to_posterior), score(h, entropy - to_encoder)]
    assert np.max(np.abs(scores)) < t_limit(len(scores), len(keys) - 1), scores
    assert to_posterior > 0.1 and to_encoder > 0.1


def loss(objective, key, energy, parameters, batch):
    return objective.loss(key, Density(energy, None, batch.shape[1:]), parameters, (), batch)


def test_at_rest_draws_weigh_the_same_and_the_divergence_is_nothing():
    """forward - H(q) + reverse + log Z(y) is zero where p = g = q, and more elsewhere, by closed forms."""
    num, objective = 32, ebm.AdversarialDiffusion(normal_generator(), num_draws=4)
    parameters, _ = objective.init(jax.random.key(0), Density(BELL, None, (DIM,)), normal_data(jax.random.key(0), 9))

    def one(key, energy):
        key_data, key_loss = jax.random.split(key)
        return loss(objective, key_loss, energy, parameters, normal_data(key_data, 512))[1][1]

    found = jax.jit(jax.vmap(one, (0, None)))(jax.random.split(jax.random.key(1), num), BELL)
    # log Z(y) of all levels, as a mean over y, and H(q) of x given y
    steps, variances = np.diff(ADDED), SCALE**2 + ADDED
    log_z = -DIM / 2 * np.mean(1 - np.log(2 * np.pi * variances[:-1] * steps / variances[1:]))
    entropy = DIM / 2 * np.mean(1 + np.log(2 * np.pi * variances[:-1] * steps / variances[1:]))
    scores = [score(found["forward"], entropy), score(found["reverse"], -log_z), score(found["energy_gap"], 0.0)]
    assert np.max(np.abs(scores)) < t_limit(len(scores), num - 1), scores
    np.testing.assert_allclose(found["ess"], 1.0, rtol=1e-5)
    with_wider = jax.jit(jax.vmap(one, (0, None)))(jax.random.split(jax.random.key(2), num), Bell(jnp.asarray(0.6)))
    assert np.mean(with_wider["ess"]) < 0.99


def test_draws_of_any_generator_weigh_the_conditional_without_bias():
    """E[exp(h - V - |y - x|^2 / 2 d^2)] = Z(y), with networks that are not trained."""
    generator, y = ebm.DenoisingGenerator(jax.random.key(3), DIM, LEVELS, scale=SCALE, width=16), jnp.array([0.7, -2.0])
    keys, scores = jax.random.split(jax.random.key(0), 50_000), []
    for level in range(len(LEVELS) - 1):
        drawn, h = jax.jit(jax.vmap(generator.draw, (0, None, None)))(keys, y, jnp.asarray(level))
        step, variance = ADDED[level + 1] - ADDED[level], SCALE**2 + ADDED[level]
        weights = np.exp(h - jax.vmap(BELL.at(LEVELS[level]))(drawn) - jnp.sum((y - drawn) ** 2, axis=1) / (2 * step))
        z = 2 * np.pi * variance * step / (variance + step) * np.exp(-np.sum(np.square(y)) / (2 * (variance + step)))
        scores.append(score(weights, z))
    assert np.max(np.abs(scores)) < t_limit(len(scores), len(keys) - 1), scores


def test_gradients_are_zero_at_rest_and_that_of_the_likelihood_elsewhere():
    """Of the energy's weight by closed form; of the generator at rest, along random directions."""
    num, penalty = 32, 0.3
    objective = ebm.AdversarialDiffusion(normal_generator(), penalty=penalty, num_draws=64)
    parameters, _ = objective.init(jax.random.key(0), Density(BELL, None, (DIM,)), normal_data(jax.random.key(0), 9))
    leaves, structure = jax.tree.flatten(parameters)
    directions = jax.tree.unflatten(
        structure, [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    )

    def one(key, weight):
        key_data, key_loss = jax.random.split(key)

        def of(trained):
            return loss(objective, key_loss, Bell(trained[0]), trained[1], normal_data(key_data, 256))[0]

        of_weight, of_generator = jax.grad(of)((weight, parameters))
        along = sum(map(jnp.vdot, jax.tree.leaves(of_generator), jax.tree.leaves(directions)))
        return of_weight, along

    steps, variance = np.diff(ADDED), (SCALE**2 + ADDED)[:-1]

    def exact(weight):
        precision = weight / variance + 1 / steps
        of_model = DIM * (1 / precision + (variance + steps) / (steps * precision) ** 2)
        slope = weight * np.square(LEVELS[:-1]) * DIM / variance
        return np.mean(DIM / 2 - of_model / (2 * variance) + penalty * slope)

    run = jax.jit(jax.vmap(one, (0, None)))
    at_rest, below = (run(jax.random.split(jax.random.key(1), num), jnp.asarray(weight)) for weight in (1.0, 0.5))
    scores = [score(at_rest[0], exact(1.0)), score(at_rest[1], 0.0), score(below[0], exact(0.5))]
    assert np.max(np.abs(scores)) < t_limit(len(scores), num - 1), scores
    assert np.std(below[0]) / np.sqrt(num) < 0.1 * np.abs(exact(0.5) - exact(1.0))  # so that the scores mean something


def test_the_chain_walked_down_has_the_density_of_the_data():
    """Variance of draws at the smallest level, of the generator alone and with moves by the energy."""
    scores = []
    for energy in (None, BELL):
        tree = ebm.denoise(jax.random.key(0), normal_generator(), energy, num=NUM_DRAWS)
        scores += [score(np.ravel(tree["posterior"]["x"].values ** 2), SCALE**2)]
    assert np.max(np.abs(scores)) < t_limit(len(scores), NUM_DRAWS - 1), scores
    x = tree["posterior"]["x"].values
    assert x.shape == (1, NUM_DRAWS, DIM)
    np.testing.assert_allclose(tree["sample_stats"]["energy"][0], jax.vmap(BELL)(x[0]), rtol=1e-5)


def test_moves_mend_a_generator_that_is_wrong():
    wrong = eqx.tree_at(lambda g: g.log_noise, normal_generator(), replace_fn=lambda x: x + 0.5)
    far, near = (
        float(np.mean(ebm.denoise(jax.random.key(0), wrong, energy, num=NUM_DRAWS)["posterior"]["x"].values ** 2))
        for energy in (None, BELL)
    )
    assert abs(near - SCALE**2) < 0.5 * abs(far - SCALE**2)


def test_draws_that_are_not_finite_are_counted():
    torn = eqx.tree_at(lambda g: g.log_noise, normal_generator(), replace_fn=lambda x: x * jnp.nan)
    with pytest.warns(ebm.EnergyWarning, match="20 of 20 draws of the chain are not finite"):
        tree = ebm.denoise(jax.random.key(0), torn, num=20)
    assert not np.any(np.isfinite(tree["posterior"]["x"].values))
    with pytest.warns(ebm.EnergyWarning, match="draws of the chain are not finite") as caught:
        tree = ebm.denoise(jax.random.key(0), normal_generator(), Torn(jnp.ones(())), num=20)
    num_bad = np.sum(np.isnan(tree["sample_stats"]["energy"].values))
    assert 0 < num_bad < 20
    assert str(caught[0].message).startswith(f"{num_bad} of 20 ")


def adam(of_energy, of_generator, num_steps):
    rates = {"energy": of_energy, "generator": of_generator}
    each = {name: optax.adam(optax.cosine_decay_schedule(rate, num_steps), b1=0.0) for name, rate in rates.items()}
    return optax.multi_transform(each, ("energy", "generator"))


def test_two_modes_are_learned():
    """By both: the energy as a density, and the generator by its draws, whose first mode has the weight .3."""
    levels = (0.3, 0.8, 2.0, 4.0)
    energy = ebm.NoiseConditionalEnergy(jax.random.key(0), 1, levels, scale=1.8, width=32)
    generator = ebm.DenoisingGenerator(jax.random.key(1), 1, levels, scale=1.8, width=32)
    objective = ebm.AdversarialDiffusion(generator, penalty=0.02, num_draws=4)
    settings = {"num_steps": 1000, "batch_size": 64, "averaging": 0.99, "progress_bar": False}
    settings["optimiser"] = adam(2e-3, 3e-3, 1000)
    fitted = ebm.fit(jax.random.key(2), energy, two_modes(10_000), objective, **settings)
    test, trained = two_modes(10_000, seed=1), objective.trained(fitted.parameters)
    assert divergence(fitted.energy) < 0.1
    draws = ebm.denoise(jax.random.key(3), trained, num=4000)["posterior"]["x"].values
    assert abs(np.mean(draws < -0.3) - np.mean(test < -0.3)) < 0.05
    assert {"forward", "reverse", "energy_gap", "ess"} <= set(fitted.record["training"].data_vars)


def test_what_is_refused():
    energy = ebm.NoiseConditionalEnergy(jax.random.key(0), 1, LEVELS, width=4, depth=1)
    generator = ebm.DenoisingGenerator(jax.random.key(1), 1, LEVELS, width=4, depth=1)

    def fit(data, energy=energy, generator=generator):
        ebm.fit(jax.random.key(2), energy, data, ebm.AdversarialDiffusion(generator), num_steps=2, progress_bar=False)

    # The noise of the authors' public code for the plane, for data of variance one: a twentieth of it at the end.
    short = (0.03, 0.12, 0.18, 0.23)
    with pytest.raises(ebm.EnergyError, match="last level as wide as the data"):
        makers = ebm.NoiseConditionalEnergy, ebm.DenoisingGenerator
        fit(two_modes(100), *(make(jax.random.key(0), 1, short) for make in makers))
    with pytest.raises(ebm.EnergyError, match="not finite"):
        fit(np.where(np.arange(100)[:, None] == 7, np.nan, two_modes(100)))
    broken = eqx.tree_at(lambda e: e.network.layers[0].bias, energy, replace_fn=lambda x: x * jnp.nan)
    with pytest.raises(ebm.NonFiniteEnergyError, match="not finite"):
        fit(two_modes(100), broken)
    broken = eqx.tree_at(lambda g: g.log_noise, generator, replace_fn=lambda x: x * jnp.nan)
    with pytest.raises(ebm.NonFiniteEnergyError, match="adversarial diffusion"):
        fit(two_modes(100), generator=broken)
    with pytest.raises(ebm.EnergyError, match="same levels"):
        fit(two_modes(100), ebm.NoiseConditionalEnergy(jax.random.key(0), 1, (0.2, 2.0)))
    with pytest.raises(ebm.EnergyError, match="no levels of noise"):
        fit(two_modes(100), ebm.MLPEnergy(jax.random.key(0), 1))
    with pytest.raises(ebm.EnergyShapeError, match=r"draws points of shape \(2,\)"):
        fit(two_modes(100), generator=ebm.DenoisingGenerator(jax.random.key(1), 2, LEVELS))
    with pytest.raises(ebm.EnergyError, match="not negative"):
        ebm.AdversarialDiffusion(generator, penalty=-1.0)
    with pytest.raises(ebm.EnergyError, match="num_draws"):
        ebm.AdversarialDiffusion(generator, num_draws=0)
    with pytest.raises(ebm.EnergyError, match="two levels"):
        ebm.DenoisingGenerator(jax.random.key(1), 1, (0.2,))
    with pytest.raises(ebm.EnergyError, match="num is 1"):
        ebm.denoise(jax.random.key(1), generator, num=0)
    with pytest.raises(ebm.EnergyShapeError, match="start"):
        ebm.denoise(jax.random.key(1), generator, start=dist.Normal(0.0, 1.0).expand([2]))
