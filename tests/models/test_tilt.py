"""A generator tilted by its critic: latent sampling of a known density ratio, calibration, and what the weights say."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from limits import chi2_limits, t_limit

import ebm_ppl as ebm

KEY = jax.random.key(0)
CENTRES, SCALES, SHARES = np.array([-1.0, 0.9]), np.array([0.35, 0.5]), np.array([0.4, 0.6])
DATA = dist.MixtureSameFamily(dist.Categorical(SHARES), dist.Normal(CENTRES, SCALES))
"""Two modes within what the generator makes."""
MEAN = SHARES @ CENTRES
SPREAD = np.sqrt(SHARES @ (SCALES**2 + CENTRES**2) - MEAN**2)
EDGES = np.linspace(-3, 3, 31)


class Affine(eqx.Module):
    """G(z) = scale z + shift, of one number."""

    scale: jax.Array
    shift: jax.Array

    def __call__(self, z):
        return self.scale * z + self.shift


NOISE = ebm.GaussianLikelihood((1,), 0.01, is_learned=False)
GENERATOR = ebm.LatentModel(
    1, Affine(jnp.array(-0.5), jnp.array(0.0)), NOISE, base=dist.Normal(0, 2).expand([1]).to_event(1)
)
"""Standard normal numbers, of latent variables twice as wide and of the other sign."""


class Ratio(eqx.Module):
    """slope log(p(x) / N(x; 0, 1)) + offset"""

    slope: float = 1.0
    offset: float = 0.0

    def __call__(self, x):
        return self.slope * (DATA.log_prob(x[0]) - dist.Normal().log_prob(x[0])) + self.offset


class Line(eqx.Module):
    """d(x) = slope x"""

    slope: float

    def __call__(self, x):
        return self.slope * x[0]


def data(num, seed=0):
    return np.asarray(DATA.sample(jax.random.key(100 + seed), (num, 1)))


def generated(num, seed=0):
    return np.random.default_rng(seed).normal(size=(num, 1))


def total_variation(points, weights=None):
    """Between draws and the data's density, over thirty intervals and what is beyond them."""
    found, _ = np.histogram(points, [-np.inf, *EDGES, np.inf], weights=weights)
    below = SHARES @ dist.Normal(CENTRES[:, None], SCALES[:, None]).cdf(EDGES)
    return np.sum(np.abs(found / np.sum(found) - np.diff([0, *below, 1]))) / 2


def reweighted(critic):
    """Points of the generator, and their weights."""
    found = ebm.weigh_tilt(KEY, ebm.tilted(GENERATOR, critic), 100_000)
    return GENERATOR.given(found.z).mean[:, 0], np.exp(found.log_weight), found


def test_a_known_ratio_makes_the_generator_the_data():
    points, weights, found = reweighted(Ratio())
    assert total_variation(points) > 0.2
    assert total_variation(points, weights) < 0.03
    assert abs(found.log_z.value) < t_limit(1, 15) * found.log_z.std_error < 0.03


@pytest.mark.slow  # it is a table of the benchmark, too
def test_a_trained_critic_makes_the_generator_the_data():
    """By the logistic game with a generator that stays as it is."""
    objective = ebm.LogisticGAN(eqx.nn.MLP(1, "scalar", 32, 2, jax.nn.silu, key=KEY))
    rates = {"generator": optax.set_to_zero(), "critic": optax.adam(optax.cosine_decay_schedule(1e-2, 1000))}
    settings = {"num_steps": 1000, "batch_size": 512, "every": 500, "progress_bar": False}
    optimiser = optax.multi_transform(rates, ("generator", "critic"))
    fitted = ebm.fit(KEY, GENERATOR, data(20_000), objective, optimiser=optimiser, **settings)
    assert fitted.energy.decoder.scale == GENERATOR.decoder.scale
    critic = ebm.calibrated(objective.trained(fitted.parameters), data(10_000, seed=1), generated(10_000))
    assert float(critic.slope) == pytest.approx(1.0, abs=0.1)
    points, weights, found = reweighted(critic)
    assert total_variation(points, weights) < 0.03
    assert abs(found.log_z.value) < 0.05


@pytest.mark.parametrize("name", ["SMC", "MALA"])
def test_latent_sampling_has_the_moments_of_the_data(name):
    """G(z) of draws of the tilted prior, by chains or by runs whose spread is the error."""
    target = ebm.target(ebm.LatentModel.generate, ebm.tilted(GENERATOR, Ratio()))
    if name == "SMC":
        found = ebm.sample(KEY, target, ebm.SMC(num_particles=1000), num_chains=16, progress_bar=False)
        log_z = ebm.log_z(KEY, target, ebm.SMC(num_particles=1000), num_runs=16)
        assert abs(log_z.value) < t_limit(3, 15) * log_z.std_error < 0.1
    else:
        settings = {"num_chains": 16, "num_warmup": 300, "num_samples": 1000, "init": "reference"}
        found = ebm.sample(KEY, target, ebm.MALA(), progress_bar=False, **settings)
    x, z = found["posterior"]["x"].values[..., 0], found["posterior"]["z"].values[..., 0]
    np.testing.assert_allclose(x, -0.5 * z)
    for values, exact in ((x, MEAN), ((x - MEAN) ** 2, SPREAD**2)):
        means = np.mean(values, axis=1)
        assert abs(np.mean(means) - exact) < t_limit(3, 15) * np.std(means, ddof=1) / 4


def test_latent_sampling_covers_the_modes_that_a_generator_smears_out():
    """Five by five of them, by the ratio to a normal distribution that has a few per cent of its mass near any."""
    side, scale = np.arange(-2.0, 3), 0.05
    centres = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    wide = dist.Normal(0, 1.5).expand([2]).to_event(1)
    noise = ebm.GaussianLikelihood((2,), 0.01, is_learned=False)
    model = ebm.LatentModel(2, eqx.nn.Identity(), noise, base=wide)
    modes = dist.MixtureSameFamily(dist.Categorical(np.full(25, 0.04)), dist.Normal(centres, scale).to_event(1))
    target = ebm.target(ebm.LatentModel.generate, ebm.tilted(model, lambda x: modes.log_prob(x) - wide.log_prob(x)))
    found = ebm.sample(KEY, target, ebm.SMC(num_particles=1000), num_chains=1, progress_bar=False)
    bare, better = (
        ebm.mode_weights(x, centres, within=4 * scale).weight
        for x in (wide.sample(KEY, (2000,)), found["posterior"]["x"].values.reshape(-1, 2))
    )
    assert np.sum(bare) < 0.2 and np.sum(better) > 0.99 and np.all(better > 0)


def test_weights_of_a_normal_tilt_and_their_errors():
    """exp(a x) leaves exp(-a^2) of the draws, and log Z has the errors that it says."""
    slope, num = 0.5, 4000
    model, scores, shares = ebm.tilted(GENERATOR, Line(slope)), [], []
    for key in jax.random.split(KEY, 40):
        found = ebm.weigh_tilt(key, model, num)
        scores.append((found.log_z.value - slope**2 / 2) / found.log_z.std_error)
        shares.append(found.effective_size / num)
        assert found.pareto_k < 0.7 and not found.log_z.doubts
    np.testing.assert_allclose(found.log_weight, -0.5 * slope * found.z[:, 0])
    low, high = chi2_limits(2, 40)
    assert low < np.sum(np.square(scores)) < high
    # In logarithms, where the share is nearly normal.
    of_shares = np.log(shares)
    assert abs(np.mean(of_shares) + slope**2) < t_limit(2, 39) * np.std(of_shares, ddof=1) / np.sqrt(40) + 1 / num


def test_few_effective_draws_are_warned_of():
    with pytest.warns(ebm.EnergyWarning, match="draws of the base effective, with Pareto's k"):
        found = ebm.weigh_tilt(KEY, ebm.tilted(GENERATOR, Line(5.0)), 1000)
    assert found.effective_size < 100 and found.log_z.doubts
    flat = ebm.weigh_tilt(KEY, ebm.tilted(GENERATOR, Line(0.0)), 1000)
    assert flat.effective_size == pytest.approx(1008) and flat.log_z.value == pytest.approx(0.0)


def test_calibration_finds_the_scale_of_a_log_ratio():
    """Of a critic that is half the log ratio and 3 nats too high, with other numbers of data than of draws."""
    found = []
    for seed in range(16):
        critic = ebm.calibrated(Ratio(0.5, 3.0), data(3000, seed), generated(1500, seed))
        found.append([critic.slope, critic.offset])
    error = np.std(found, axis=0, ddof=1) / 4
    assert np.all(np.abs(np.mean(found, axis=0) - [2.0, -6.0]) < t_limit(2, 15) * error)
    assert abs(ebm.weigh_tilt(KEY, ebm.tilted(GENERATOR, critic)).log_z.value) < 0.1


def test_calibration_where_there_is_nothing_to_learn_or_no_mistake():
    points, draws = data(500), generated(500)
    with pytest.warns(ebm.EnergyWarning, match="nothing to tilt by"):
        critic = ebm.calibrated(Ratio(-1.0), points, draws)
    assert critic.slope == 0
    sure = ebm.calibrated(Line(1.0), points + 10, draws - 10)
    assert np.isfinite(sure.slope) and sure(jnp.array([10.0])) > 5


def test_another_tilt_takes_the_place_of_the_first():
    once = ebm.tilted(GENERATOR, Line(2.0))
    twice = ebm.tilted(once, Line(0.7))
    z = jnp.array([0.4])
    np.testing.assert_allclose(twice.energy(z), 0.7 * 0.2)
    np.testing.assert_allclose(twice.prior.log_prob(z), GENERATOR.prior.log_prob(z) - 0.7 * 0.2)
    assert twice.with_prior(None).energy is None and once.energy.model.energy is None


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ebm.EnergyError, match="no tilt"):
        ebm.weigh_tilt(KEY, GENERATOR)
    with pytest.raises(ebm.EnergyError, match="num is 1"):
        ebm.weigh_tilt(KEY, ebm.tilted(GENERATOR, Line(1.0)), 0)
    with pytest.raises(ebm.EnergyShapeError, match="generated"):
        ebm.calibrated(Line(1.0), np.zeros((5, 1)), np.zeros((5, 2)))
    with pytest.raises(ebm.EnergyError, match="not finite at 10"):
        ebm.calibrated(Line(np.nan), np.zeros((5, 1)), np.zeros((5, 1)))
