"""Calibration of a generator: its moves in closed form, who learns from what, and what comes of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from arviz_stats.base import array_stats
from flowjax.distributions import Normal
from limits import t_limit, z_limit
from model_problems import LOADINGS, SCALE, SHIFT, draws, linear_gaussian, posterior_variances

import ebm_ppl as ebm
from ebm_ppl.train.objective import Density, Objective

KEY = jax.random.key(0)
STILL = {"noise": 0.0, "num": 5, "step_size": 0.1}
SHORT = ebm.Calibration(num=100, step_size=3e-4, noise=6e-4**0.5, slack=float("inf"), weight=1.0)
"""Moves of latents that are Langevin's but for what no test here can see."""


class Bowl(eqx.Module):
    """E(x) = stiffness |x - centre|^2 / 2"""

    centre: jax.Array
    stiffness: float = eqx.field(static=True, default=1.0)

    def __call__(self, x):
        return self.stiffness * jnp.sum((x - self.centre) ** 2) / 2


class Nothing(Objective):
    """A loss of the model's that is zero."""

    name = "nothing"
    is_comparable = True

    def preview(self, density, x):
        return jnp.zeros(())

    def loss(self, key, density, parameters, state, batch):
        return jnp.zeros(()), (state, {})


def loss_and_gradients(objective, model, data, key=KEY):
    """Also of the state after the step."""
    density = Density(model, None, data.shape[1:])
    parameters, state = objective.init(key, density, data)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    def loss(arrays, parameters):
        density = Density(eqx.combine(arrays, rest), None, data.shape[1:])
        return objective.loss(key, density, parameters, state, data)

    (value, aux), slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(arrays, parameters)
    return value, aux, slopes


def test_moves_without_noise_are_those_of_gradient_descent():
    start, how = jnp.array([[1.0, -2.0], [0.5, 0.0]]), ebm.Calibration(**STILL, slack=1e9)
    moved = how.moved(KEY, start, lambda x: x)
    np.testing.assert_allclose(moved, start * 0.9**5, rtol=1e-12)


def test_the_hinge_holds_back_at_first_and_lets_go():
    """One number, pushed by a force of -1 and held by 2 g_k (x - x_0) once x - x_0 is beyond the slack."""
    how = ebm.Calibration(**STILL, slack=0.0)
    moved = how.moved(KEY, jnp.array([[3.0]]), lambda x: -jnp.ones_like(x))
    x = 0.0
    for k in range(1, 6):
        x += 0.1 * (1 - 2 * (1 - k / 5) * x)
    assert float(moved[0, 0]) == pytest.approx(3.0 + x)
    free = ebm.Calibration(**STILL, slack=1e9).moved(KEY, jnp.array([[3.0]]), lambda x: -jnp.ones_like(x))
    assert moved[0, 0] < free[0, 0] == pytest.approx(3.5)


def test_moves_at_the_temperature_of_their_noise():
    """Langevin's stationary variance of a bowl, that of an unadjusted step included, after moves enough."""
    how = ebm.Calibration(num=200, step_size=0.1, noise=0.2**0.5, slack=1e9)
    moved = how.moved(KEY, jnp.zeros((20_000, 1)), lambda x: x)
    variance, expected = np.var(moved), 1 / (1 - 0.1 / 2)
    assert abs(variance - expected) < t_limit(1, 100) * expected * np.sqrt(2 / len(moved))


def test_the_weight_follows_the_distance_within_its_bounds():
    how = ebm.Calibration(weight=10.0, rate=0.5, tolerance=1.0, largest=11.0)
    for distance, expected in ((1.0, 10.0), (2.0, 10.5), (0.0, 9.5), (100.0, 11.0), (-100.0, 0.0)):
        assert float(how.next_weight(jnp.array(10.0), jnp.array(distance))[0]) == pytest.approx(expected)


def test_the_model_learns_by_the_distance_and_the_energy_by_the_gap():
    """A generator that shifts normal noise, and a bowl: gradients in closed form."""
    model = linear_gaussian()
    data = jnp.asarray(draws(1, 16)[1])
    how = ebm.Calibration(**STILL, slack=1e9, weight=3.0)
    objective = ebm.Calibrated(Nothing(), Bowl(jnp.zeros(4)), how)
    value, (state, told), (of_model, (own, of_energy)) = loss_and_gradients(objective, model, data)
    _, key_draws, _ = jax.random.split(KEY, 3)
    made = model.given(model.base.sample(key_draws, (16,))).mean
    share = 1 - 0.9**5
    distance = np.mean(np.sum((share * made) ** 2, axis=1))
    gap = np.mean(np.sum(data**2, axis=1) - np.sum((0.9**5 * made) ** 2, axis=1)) / 2
    assert float(told["distance"]) == pytest.approx(distance)
    assert float(value) == pytest.approx(3 * distance + gap) and float(told["energy_gap"]) == pytest.approx(-gap)
    # d/d shift of mean |G - x_K|^2 with x_K held, and d/d centre of the gap with everything else held.
    np.testing.assert_allclose(of_model.decoder.bias, 3 * 2 * share * np.mean(made, axis=0), rtol=1e-9)
    np.testing.assert_allclose(of_energy.centre, np.mean(0.9**5 * made, axis=0) - np.mean(data, axis=0), rtol=1e-9)
    assert own == ()
    assert float(state.weight) == pytest.approx(3.0 + how.rate * (distance - how.tolerance))


def test_the_models_own_loss_comes_on_top():
    model, data = linear_gaussian("wrong"), jnp.asarray(draws(1, 16)[1])
    nothing, bound = (
        loss_and_gradients(ebm.Calibrated(each, Bowl(jnp.zeros(4))), model, data)[0]
        for each in (Nothing(), ebm.EvidenceBound())
    )
    alone = ebm.EvidenceBound().loss(jax.random.split(KEY, 3)[0], Density(model, None, (4,)), (), (), data)[0]
    assert float(bound - nothing) == pytest.approx(float(alone))


def test_a_generator_whose_mean_is_off_is_calibrated():
    """Normal noise about 0, whose own loss says nothing, and data about 2: it comes nine tenths of the way and more."""
    data = np.random.default_rng(0).normal(2.0, 0.1, (1000, 1))
    flow = Normal(jnp.zeros(1), 0.1 * jnp.ones(1))
    how = {"num_steps": 500, "optimiser": optax.adam(1e-2), "averaging": 0.99, "progress_bar": False}
    for seed in range(2):
        energy = ebm.SpectralNorm(ebm.MLPEnergy(jax.random.key(seed), 1, 16, 2))
        calibration = ebm.Calibration(num=5, step_size=0.15, noise=0.01, weight=5.0)
        objective = ebm.Calibrated(Nothing(), energy, calibration)
        fitted = ebm.fit(jax.random.key(seed), ebm.FlowModel(flow), data, objective, **how)
        assert abs(float(jnp.mean(fitted.energy.sample(KEY, 4000))) - 2.0) < 0.2
        weights = fitted.record["training"]["weight"].values
        assert 0 < weights.min() and weights.max() < calibration.largest
        assert np.isfinite(float(objective.trained(fitted.parameters)(jnp.ones(1))))


def test_a_guess_that_is_the_posterior_stays_as_it_is():
    """C and the gradients of the encoder are zero."""
    model, x = linear_gaussian(), jnp.asarray(draws(2, 512)[1])

    @jax.jit
    def one(key):
        return loss_and_gradients(ebm.CalibratedGuess(Nothing(), SHORT), model, x, key)

    _, (_, told), (slopes, _) = jax.vmap(one)(jax.random.split(KEY, 100))
    found = np.column_stack([told["distance"], slopes.encoder.weight.reshape(100, -1), slopes.encoder.bias])
    scores = found.mean(axis=0) / (found.std(axis=0, ddof=1) / 10)
    assert np.max(np.abs(scores)) < t_limit(len(scores), 99), scores


def test_a_guess_is_drawn_to_the_posterior():
    """The encoder alone learns, by the moves alone, of a linear model whose posterior is known: means and widths."""
    model, x = linear_gaussian("wrong"), jnp.asarray(draws(2, 256)[1])
    arrays, rest = eqx.partition(model.encoder, eqx.is_inexact_array)
    exact = linear_gaussian("exact").posterior_guess(x)
    objective, optimiser = ebm.CalibratedGuess(Nothing(), SHORT), optax.adam(optax.linear_schedule(0.03, 0.0, 400))

    def off(encoder):
        guess = eqx.tree_at(lambda model: model.encoder, model, encoder).posterior_guess(x)
        of_means = jnp.mean(jnp.sum((guess.mean - exact.mean) ** 2 / posterior_variances(), axis=1))
        return float(of_means), float(jnp.mean(jnp.abs(jnp.log(guess.variance / exact.variance))))

    @jax.jit
    def step(given, key):
        arrays, memory = given

        def loss(arrays):
            whole = eqx.tree_at(lambda model: model.encoder, model, eqx.combine(arrays, rest))
            density = Density(whole, None, (4,))
            parameters, state = objective.init(key, density, x)
            return objective.loss(key, density, parameters, state, x)[0]

        updates, memory = optimiser.update(jax.grad(loss)(arrays), memory)
        return (optax.apply_updates(arrays, updates), memory), None

    (trained, _), _ = jax.lax.scan(step, (arrays, optimiser.init(arrays)), jax.random.split(KEY, 400))
    before, after = off(model.encoder), off(eqx.combine(trained, rest))
    assert all(late < 0.1 * early for early, late in zip(before, after, strict=True)), (before, after)


def test_what_cannot_be_calibrated_is_refused():
    data = draws(0, 8)[1]
    tilted = linear_gaussian(energy=Bowl(jnp.zeros(2)))
    for model in (tilted, Bowl(jnp.zeros(4))):
        with pytest.raises(ebm.EnergyError, match="Calibrated trains a LatentModel whose prior has no energy"):
            ebm.fit(KEY, model, data, ebm.Calibrated(Nothing(), Bowl(jnp.zeros(4))), num_steps=1, progress_bar=False)
    for settings in (
        {"num": 0},
        {"step_size": 0.0},
        {"noise": -1.0},
        {"tolerance": 0.0},
        {"weight": 200.0},
        {"rate": 0},
    ):
        with pytest.raises(ebm.EnergyError):
            ebm.Calibration(**settings)


def test_data_that_the_models_own_objective_refuses_are_refused():
    class Positive(Nothing):
        def check(self, data):
            if np.any(data < 0):
                raise ebm.EnergyError("positive numbers only")

    for objective in (ebm.Calibrated(Positive(), Bowl(jnp.zeros(4))), ebm.CalibratedGuess(Positive())):
        with pytest.raises(ebm.EnergyError, match="positive numbers only"):
            ebm.fit(KEY, linear_gaussian(), -np.ones((8, 4)), objective, num_steps=1, progress_bar=False)


def test_an_energy_that_is_not_a_number_is_told():
    nothing = lambda x: jnp.sum(x) * jnp.nan  # noqa: E731
    with pytest.raises(ebm.NonFiniteEnergyError):
        ebm.fit(
            KEY, linear_gaussian(), draws(0, 8)[1], ebm.Calibrated(Nothing(), nothing), num_steps=1, progress_bar=False
        )


OPERATORS = {
    "seen in part": np.eye(4)[[0, 2]],
    "lower resolution": np.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]),
    "noise alone": np.eye(4),
    "rows alike": np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_event_is_restored_as_its_posterior_says(name):
    """Of a linear model with normal noise, where x given y is normal, too; one draw of z has the share of the noise."""
    matrix, noise = OPERATORS[name], 0.3
    x = draws(3, 1)[1][0]
    y = matrix @ x + noise * np.random.default_rng(1).normal(size=len(matrix))
    target = ebm.target(ebm.restoration, linear_gaussian(), ebm.LinearOperator(matrix), jnp.asarray(y), noise)
    how = {"num_chains": 4, "num_warmup": 300, "num_samples": 500, "progress_bar": False}
    found = ebm.sample(KEY, target, ebm.NUTS(metric="diag"), **how)["posterior"]["x"].values
    prior = LOADINGS @ LOADINGS.T + SCALE**2 * np.eye(4)
    gain = prior @ matrix.T @ np.linalg.inv(matrix @ prior @ matrix.T + noise**2 * np.eye(len(matrix)))
    expected = SHIFT + gain @ (y - matrix @ SHIFT)
    for part in range(4):
        error = found[..., part].std() / np.sqrt(float(array_stats.ess(found[..., part], chain_axis=0, draw_axis=1)))
        assert abs(found[..., part].mean() - expected[part]) < z_limit(4 * len(OPERATORS)) * error


def test_without_noise_what_is_seen_is_kept_and_the_rest_is_the_models():
    """The decomposition into range and null space, at one draw of z."""
    matrix, model = OPERATORS["lower resolution"], linear_gaussian()
    operator, y = ebm.LinearOperator(matrix), jnp.array([0.3, -2.0])
    traced = numpyro.handlers.trace(numpyro.handlers.seed(ebm.restoration, 0)).get_trace(model, operator, y, 1e-6)
    x, made = traced["x"]["value"], model.given(traced["z"]["value"]).mean
    np.testing.assert_allclose(operator(x), y, atol=1e-9)
    inverse = np.linalg.pinv(matrix)
    np.testing.assert_allclose(x, inverse @ y + (np.eye(4) - inverse @ matrix) @ made, atol=1e-9)


def test_the_energy_tilts_the_latents_of_a_restoration():
    model, operator, y = linear_gaussian(), ebm.LinearOperator(np.eye(4)[:1]), jnp.array([1.0])
    plain = ebm.target(ebm.restoration, model, operator, y, 0.1)
    tilted = ebm.tilted(model, lambda x: -2.0 * Bowl(jnp.ones(4))(x))
    tilted = ebm.target(ebm.restoration, tilted, operator, y, 0.1)
    z = jnp.array([0.3, -0.7])
    expected = -2.0 * Bowl(jnp.ones(4))(model.given(z).mean)
    assert float(tilted.log_density(z) - plain.log_density(z)) == pytest.approx(float(expected))


def test_restoration_of_what_does_not_fit_is_refused():
    model, operator = linear_gaussian(), ebm.LinearOperator(np.eye(4)[:1])
    bits = ebm.vae(KEY, 2, ebm.BernoulliLikelihood((4,)))
    for given, y, noise, error in (
        (bits, jnp.ones(1), 0.1, ebm.EnergyError),
        (model, jnp.ones(1), 0.0, ebm.EnergyError),
        (model, jnp.ones(2), 0.1, ebm.EnergyShapeError),
    ):
        with pytest.raises(error):
            ebm.target(ebm.restoration, given, operator, y, noise)
    with pytest.raises(ebm.EnergyShapeError, match="no more rows than columns"):
        ebm.LinearOperator(np.ones((3, 2)))
