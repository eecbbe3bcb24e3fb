"""Training a generator against a critic: losses and penalties in closed form, who learns from what, what is learned."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from limits import t_limit

import ebm_ppl as ebm
from ebm_ppl.train.objective import Density

NUM = 64
KEY = jax.random.key(0)


class Affine(eqx.Module):
    """G(z) = scale z + shift, of one number."""

    scale: jax.Array
    shift: jax.Array

    def __call__(self, z):
        return self.scale * z + self.shift


class Quadratic(eqx.Module):
    """d(x) = a + b x + c x^2, of one number."""

    weights: jax.Array

    def __call__(self, x):
        return self.weights @ x[0] ** jnp.arange(3)


class Linear(eqx.Module):
    """d(x) = slope x, of an event of any shape."""

    slope: jax.Array

    def __call__(self, x):
        return jnp.sum(self.slope * x)


def generator(scale=1.0, shift=0.0):
    noise = ebm.GaussianLikelihood((1,), 0.01, is_learned=False)
    return ebm.LatentModel(1, Affine(jnp.array(scale), jnp.array(shift)), noise)


def log_ratio(mean, scale):
    """Of N(mean, scale^2) to N(0, 1)."""
    weights = [-np.log(scale) - mean**2 / (2 * scale**2), mean / scale**2, 0.5 - 0.5 / scale**2]
    return Quadratic(jnp.array(weights))


def data(num, mean=0.5, scale=0.8, seed=0):
    return np.random.default_rng(seed).normal(mean, scale, (num, 1))


@eqx.filter_jit
def game(objective, model, batch, key=KEY):
    """Loss and metrics, and the gradient in the parameters of both players."""
    parameters = eqx.filter(objective.critic, eqx.is_inexact_array)

    def loss(players):
        density = Density(players[0], None, model.event_shape)
        return objective.loss(key, density, players[1], (), batch)

    (value, (_, metrics)), gradient = eqx.filter_value_and_grad(loss, has_aux=True)((model, parameters))
    return value, metrics, *gradient


def drawn(model, num, key=KEY):
    """What a step draws."""
    return model.given(model.base.sample(jax.random.split(key)[0], (num,))).mean


def test_losses_are_those_of_the_field():
    critic, model, batch = log_ratio(0.5, 0.8), generator(0.9, 0.2), jnp.asarray(data(50))
    of_data, of_drawn = jax.vmap(critic)(batch), jax.vmap(critic)(drawn(model, 50))
    value, metrics, *_ = game(ebm.LogisticGAN(critic), model, batch)
    of_critic = -jnp.mean(jnp.log(jax.nn.sigmoid(of_data))) - jnp.mean(jnp.log(1 - jax.nn.sigmoid(of_drawn)))
    np.testing.assert_allclose(value, of_critic - jnp.mean(jnp.log(jax.nn.sigmoid(of_drawn))))
    np.testing.assert_allclose(metrics["divergence"], np.log(2) - of_critic / 2)
    value, metrics, *_ = game(ebm.WassersteinGAN(critic, penalty=0.0), model, batch)
    np.testing.assert_allclose(value, -jnp.mean(of_data))
    np.testing.assert_allclose(metrics["distance"], jnp.mean(of_data) - jnp.mean(of_drawn))


@pytest.mark.parametrize("slope", [0.0, 0.3, 2.0])
def test_penalties_of_a_linear_critic(slope):
    """Its gradient is the same everywhere, also for events that are matrices, and where there is none."""
    decoder = eqx.nn.Linear(2, 6, key=KEY)
    model = ebm.LatentModel(2, decoder, ebm.GaussianLikelihood((3, 2), 0.01, is_learned=False))
    critic, batch = Linear(jnp.full((3, 2), slope)), jax.random.normal(KEY, (10, 6))
    square = 6 * slope**2
    for objective, exact in (
        (ebm.LogisticGAN(critic, penalty=0.5), square / 2),
        (ebm.WassersteinGAN(critic, penalty=10.0), (np.sqrt(square) - 1) ** 2),
    ):
        free = eqx.tree_at(lambda o: o.penalty, objective, 0.0)
        value, metrics, _, of_critic = game(objective, model, batch)
        free_value, _, _, of_free_critic = game(free, model, batch)
        np.testing.assert_allclose(metrics["penalty"], exact, atol=1e-12)
        np.testing.assert_allclose(value - free_value, objective.penalty * exact)
        pull = of_critic.slope - of_free_critic.slope
        each = slope if isinstance(objective, ebm.LogisticGAN) else 2 * slope * (1 - 1 / max(np.sqrt(square), 1e-12))
        np.testing.assert_allclose(pull, objective.penalty * each, atol=1e-8)


def test_the_wasserstein_penalty_is_between_data_and_draws():
    """Of d(x) = x^2 / 2 with data at 1 and draws at 3: E(x - 1)^2 of x uniform from 1 to 3 is 4 / 3."""
    critic, model = Quadratic(jnp.array([0.0, 0.0, 0.5])), generator(0.0, 3.0)
    objective, batch = ebm.WassersteinGAN(critic, penalty=1.0), jnp.ones((500, 1))
    keys = jax.random.split(KEY, NUM)
    found = jax.jit(jax.vmap(lambda key: game(objective, model, batch, key)[1]["penalty"]))(keys)
    score = (np.mean(found) - 4 / 3) / (np.std(found, ddof=1) / np.sqrt(NUM))
    assert abs(score) < t_limit(1, NUM - 1)


@pytest.mark.parametrize("of_game", [ebm.LogisticGAN, ebm.WassersteinGAN])
def test_each_player_learns_from_its_own_loss(of_game):
    critic, model, batch = log_ratio(0.5, 0.8), generator(0.9, 0.2), jnp.asarray(data(50))
    objective = of_game(critic)
    _, _, of_model, of_critic = game(objective, model, batch)

    def of_generator(model):
        return objective.of_generator(jax.vmap(critic)(drawn(model, 50)))

    def of_other(critic):
        penalty = objective.restraint(jax.random.split(KEY)[1], jax.grad(critic), batch, drawn(model, 50))
        loss = objective.of_critic(jax.vmap(critic)(batch), jax.vmap(critic)(drawn(model, 50)))[0]
        return loss + objective.penalty * penalty

    exact = eqx.filter_grad(of_generator)(model)
    np.testing.assert_allclose(of_model.decoder.scale, exact.decoder.scale)
    np.testing.assert_allclose(of_model.decoder.shift, exact.decoder.shift)
    np.testing.assert_allclose(of_critic.weights, jax.grad(of_other)(critic).weights, atol=1e-12)


def test_the_best_critic_is_the_log_density_ratio():
    """There the gradient of the logistic game is zero, and the divergence that of Jensen and Shannon."""
    mean, scale, model = 0.5, 0.8, generator()
    objective, num = ebm.LogisticGAN(log_ratio(mean, scale)), 2000

    @jax.jit
    def step(key, batch):
        _, metrics, _, of_critic = game(objective, model, batch, key)
        return metrics["divergence"], of_critic.weights

    batches = jnp.asarray(data(NUM * num, mean, scale)).reshape(NUM, num, 1)
    divergence, slopes = jax.vmap(step)(jax.random.split(KEY, NUM), batches)
    grid = jnp.linspace(-9, 9, 20_001)
    log_p, log_q = dist.Normal(mean, scale).log_prob(grid), dist.Normal().log_prob(grid)
    log_m = jnp.logaddexp(log_p, log_q) - np.log(2)
    both = jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m)
    exact = [jnp.sum(both) / 2 * (grid[1] - grid[0]), 0.0, 0.0, 0.0]
    found = np.column_stack([divergence, slopes])
    scores = (np.mean(found, axis=0) - exact) / (np.std(found, axis=0, ddof=1) / np.sqrt(NUM))
    assert np.all(np.abs(scores) < t_limit(4, NUM - 1))


@pytest.mark.parametrize("of_game", [ebm.LogisticGAN, pytest.param(ebm.WassersteinGAN, marks=pytest.mark.slow)])
def test_a_generator_comes_to_the_data(of_game):
    """Mean and standard deviation are those of the data within a tenth, the noise stays, and the critic gives way."""
    points = data(4000, 2.0, 0.5)
    objective = of_game(eqx.nn.MLP(1, "scalar", 16, 1, jax.nn.silu, key=KEY), penalty=0.1)
    rates = {"generator": optax.adam(5e-3, b1=0.0), "critic": optax.adam(1e-2, b1=0.0)}
    optimiser = optax.multi_transform(rates, ("generator", "critic"))
    settings = {"optimiser": optimiser, "num_steps": 900, "averaging": 0.99, "every": 300, "progress_bar": False}
    fitted = ebm.fit(KEY, generator(), points, objective, **settings)
    decoder = fitted.energy.decoder
    found = abs(float(decoder.scale)), float(decoder.shift)
    np.testing.assert_allclose(found, [0.5, 2.0], atol=0.1)
    assert float(fitted.energy.likelihood.scale) == pytest.approx(0.01)
    name = "divergence" if of_game is ebm.LogisticGAN else "distance"
    told = fitted.record["training"][name].values
    assert np.mean(told[-100:]) < 0.2 * np.max(told)
    assert np.isfinite(objective.trained(fitted.parameters)(jnp.zeros(1)))


def test_a_generator_waits_for_its_critic():
    """By Optax alone: one step of three."""
    objective, points = ebm.LogisticGAN(log_ratio(0.3, 0.9)), data(300)
    each = {"generator": optax.MultiSteps(optax.sgd(0.1), 3), "critic": optax.sgd(0.1)}
    settings = {"optimiser": optax.multi_transform(each, ("generator", "critic")), "every": 1, "progress_bar": False}
    two, three = (ebm.fit(KEY, generator(), points, objective, num_steps=num, **settings) for num in (2, 3))
    assert two.energy.decoder.shift == 0 != three.energy.decoder.shift
    assert np.all(two.parameters.weights != objective.critic.weights)


def test_what_makes_no_sense_is_refused():
    points, settings = data(100), {"num_steps": 1, "progress_bar": False}
    objective = ebm.LogisticGAN(log_ratio(0.5, 0.8))
    with pytest.raises(ebm.EnergyError, match="penalty"):
        ebm.LogisticGAN(objective.critic, penalty=-1.0)
    with pytest.raises(ebm.EnergyError, match="LatentModel"):
        ebm.fit(KEY, ebm.MLPEnergy(KEY, 1), points, objective, **settings)
    with pytest.raises(ebm.EnergyError, match="not tilted"):
        ebm.fit(KEY, ebm.tilted(generator(), objective.critic), points, objective, **settings)
    with pytest.raises(ebm.EnergyShapeError, match="data have"):
        ebm.fit(KEY, generator(), np.zeros((10, 2)), objective, **settings)
    with pytest.raises(ebm.EnergyShapeError, match="critic gives shape"):
        ebm.fit(KEY, generator(), points, ebm.LogisticGAN(Affine(jnp.array(1.0), jnp.array(0.0))), **settings)
    categories = ebm.LatentModel(1, eqx.nn.Linear(1, 3, key=KEY), ebm.CategoricalLikelihood((1,), 3))
    with pytest.raises(ebm.EnergyError, match="no finite mean"):
        ebm.fit(KEY, categories, points, objective, **settings)
