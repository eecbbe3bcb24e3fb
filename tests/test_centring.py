from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz_stats.base import array_stats
from limits import z_limit
from scipy.integrate import trapezoid
from scipy.special import expit, logit
from scipy.stats import norm

import ebm_ppl as ebm
from ebm_ppl import mcmc
from ebm_ppl.centring import Centring, learn_centring

EFFECTS = 20
TOGETHER = np.repeat([0, 1, 2], [1, 1, EFFECTS])
IN_A_BOX = np.repeat([0, 1], [1, EFFECTS])


def hierarchy(seed, num=800, effects=EFFECTS):
    """Independent draws of (log scale, mean, effects), and the numbers of their sites."""
    rng = np.random.default_rng(seed)
    log_scale, mean = rng.normal(0.5, 1.0, num), rng.normal(2.0, 3.0, num)
    x = mean[:, None] + np.exp(log_scale)[:, None] * rng.normal(size=(num, effects))
    return np.column_stack([log_scale, mean, x])


def in_a_box(seed, num=800):
    """Independent draws of the coordinate of a log scale between -3 and 2, and of effects of that scale."""
    rng = np.random.default_rng(seed)
    log_scale = rng.uniform(-3, 2, num)
    z = logit((log_scale + 3) / 5)
    return np.column_stack([z, np.exp(log_scale)[:, None] * rng.normal(size=(num, EFFECTS))])


def learned(z, sites, is_logistic=None):
    return learn_centring(z[::2], z[1::2], np.asarray(sites), is_logistic)


@pytest.mark.parametrize(
    "draws, sites, is_logistic", [(hierarchy, TOGETHER, None), (in_a_box, IN_A_BOX, IN_A_BOX == 0)]
)
def test_the_map_is_a_bijection_with_the_jacobian_that_it_states(draws, sites, is_logistic):
    centring = learned(draws(0), sites, is_logistic)
    z = jnp.asarray(draws(1)[0])
    u, log_det = centring.coordinates(z)
    back, log_det_back = centring.place(u)
    np.testing.assert_allclose(back, z, rtol=1e-10)
    np.testing.assert_allclose(log_det, jnp.linalg.slogdet(jax.jacobian(lambda z: centring.coordinates(z)[0])(z))[1])
    np.testing.assert_allclose(log_det_back, -log_det)


def test_gradients_go_there_and_back():
    centring = learned(hierarchy(0), TOGETHER)
    z = jnp.asarray(hierarchy(1)[0])
    u, _ = centring.coordinates(z)

    def log_density(z):
        return -jnp.sum(jnp.log1p(z**2))

    def density_of_u(u):
        z, log_det = centring.place(u)
        return log_density(z) + log_det

    gradient = jax.grad(log_density)(z)
    np.testing.assert_allclose(centring.pull(u, gradient), jax.grad(density_of_u)(u), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(centring.push(z, centring.pull(u, gradient)), gradient, rtol=1e-8, atol=1e-10)


def test_a_scale_between_bounds_follows_its_value_and_not_its_coordinate():
    """Far out, where no draw has been, the effects are as wide as at the bound."""
    centring = learned(in_a_box(0), IN_A_BOX, IN_A_BOX == 0)
    assert np.array_equal(centring.is_bent, IN_A_BOX == 0)
    np.testing.assert_allclose(centring.slope[1:], 5, rtol=0.05)
    for far, log_scale in ((-50.0, -3.0), (50.0, 2.0)):
        point = np.zeros((2, EFFECTS + 1))
        point[:, 0], point[1, 1:] = far, 1.0
        u = jax.vmap(lambda z: centring.coordinates(z)[0])(jnp.asarray(point))
        at_mean = jax.vmap(lambda z: centring.coordinates(z)[0])(jnp.asarray(point).at[:, 0].set(centring.mean[0]))
        ratio = (u[1] - u[0])[1:] / (at_mean[1] - at_mean[0])[1:]
        value = 5 * expit(centring.mean[0]) - 3
        np.testing.assert_allclose(np.log(ratio), value - log_scale, rtol=0.05)


def test_a_scale_that_follows_the_coordinate_of_a_value_with_bounds_is_left_so():
    """A standard deviation far below its upper bound: its logarithm is the coordinate itself."""
    both = [learned(hierarchy(0), TOGETHER, is_logistic) for is_logistic in (None, np.ones(EFFECTS + 2, bool))]
    assert both[1].is_bent is None
    np.testing.assert_array_equal(both[0].slope, both[1].slope)


def test_nothing_overflows_far_away():
    centring = learned(hierarchy(0).astype(np.float32), TOGETHER)
    far = jnp.full(EFFECTS + 2, 1e6, jnp.float32)
    assert np.all(np.isfinite(centring.place(far)[0]))
    assert np.all(np.isfinite(centring.pull(far, jnp.ones_like(far))))


def test_a_hierarchy_is_non_centred_by_its_scale_around_its_mean():
    """Of fresh draws the sizes of u tell nothing about the driver."""
    for seed in range(10):
        centring = learned(hierarchy(seed), TOGETHER)
        assert set(np.asarray(centring.driver)[2:]) == {0}
        assert set(np.asarray(centring.leader)[2:]) == {1}
        assert np.all(np.asarray(centring.driver)[:2] == [0, 1])
        u = np.asarray(jax.vmap(centring.coordinates)(jnp.asarray(hierarchy(seed + 100)))[0])
        log_size, driver = np.log(np.abs(u[:, 2:])).ravel(), np.repeat(u[:, 0], EFFECTS)
        assert abs(np.corrcoef(log_size, driver)[0, 1]) * np.sqrt(len(driver)) < z_limit(10), seed


@pytest.mark.parametrize("dim", [2, 30, 100])
def test_normal_draws_stay_where_they_are(dim):
    """However correlated, since the size of no coordinate tells of another."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(400, dim)) @ rng.normal(size=(dim, dim))
        z = np.repeat(z, 2, axis=0)  # each counted twice, as draws of a chain that stood still
        assert learn_centring(z[:400], z[400:], np.zeros(dim, int)) is None, seed


def test_without_a_driver_the_map_is_the_identity_to_the_bit():
    z = jnp.asarray(np.random.default_rng(0).normal(size=7))
    u, log_det = Centring.identity(7).coordinates(z)
    assert np.array_equal(u, z) and log_det == 0


@pytest.mark.parametrize("z", [np.zeros((500, 3)), np.full((500, 3), np.nan), np.zeros((50, 3))])
def test_no_map_is_learned_from_nothing(z):
    assert learned(z, np.zeros(3, int)) is None


NOISE = 3.0
Y = np.random.default_rng(3).normal(0, NOISE, EFFECTS)


def random_effects(y):
    log_scale = numpyro.sample("log_scale", dist.Normal(0.0, 1.0))
    with numpyro.plate("effects", EFFECTS):
        x = numpyro.sample("x", dist.Normal(0.0, jnp.exp(log_scale)))
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y)


def log_scale_moments():
    """By quadrature: y ~ N(0, noise^2 + scale^2) once the effects are integrated out."""
    s = np.linspace(-8.0, 5.0, 4001)
    log_density = norm.logpdf(s) + norm.logpdf(Y[:, None], 0, np.sqrt(NOISE**2 + np.exp(2 * s))).sum(0)
    mass = np.exp(log_density - log_density.max())
    mass /= trapezoid(mass, s)
    mean = trapezoid(s * mass, s)
    return mean, trapezoid((s - mean) ** 2 * mass, s)


@pytest.mark.filterwarnings("ignore:The energy was NaN:ebm_ppl.EnergyWarning")  # trajectories of HMC that diverge
@pytest.mark.parametrize("sampler", [ebm.NUTS(), ebm.HMC()])
def test_chains_in_learned_coordinates_leave_the_posterior_as_it_is(sampler):
    mean, variance = log_scale_moments()
    target = ebm.target(random_effects, Y)
    scores = []
    for seed in range(4):
        draws, _ = mcmc.run(
            jax.random.key(seed), target, sampler, num_chains=4, num_warmup=500, num_samples=1000, progress_bar=False
        )
        assert draws.attrs["non_centred"] == "x by log_scale"
        values = np.asarray(draws.z)[:, :, 0]
        for moment, truth in ((values, mean), ((values - mean) ** 2, variance)):
            ess: Any = array_stats.ess(moment, chain_axis=0, draw_axis=1, method="mean")
            assert ess > 50
            scores.append((np.mean(moment) - truth) / (np.std(moment) / np.sqrt(ess)))
    assert np.max(np.abs(scores)) < z_limit(len(scores)), scores


def one_site():
    """A funnel whose hierarchy the model does not tell of: an energy of one site."""
    z = numpyro.sample("z", dist.Normal(0.0, 3.0).expand([11]).to_event(1))
    energy = 0.5 * jnp.sum(z[1:] ** 2 * (jnp.exp(-z[0]) - 1 / 9)) + 5 * z[0]
    ebm.energy_factor("funnel", energy, role="prior")


def test_a_map_is_learned_where_the_model_does_not_tell_of_a_hierarchy():
    """The chains then go on in a program that has one."""
    target = ebm.target(one_site)
    assert not target.is_hierarchical
    draws, _ = mcmc.run(
        jax.random.key(0), target, ebm.NUTS(), num_chains=4, num_warmup=500, num_samples=1000, progress_bar=False
    )
    assert draws.attrs["non_centred"] == "z by z"
    log_variance = np.asarray(draws.z)[:, :, 0]
    for moment, truth in ((log_variance, 0.0), (log_variance**2, 9.0)):
        ess: Any = array_stats.ess(moment, chain_axis=0, draw_axis=1, method="mean")
        assert ess > 400
        assert abs(np.mean(moment) - truth) / (np.std(moment) / np.sqrt(ess)) < z_limit(2)


def test_a_metric_of_ones_own_choice_is_left_alone():
    target = ebm.target(random_effects, Y)
    draws, _ = mcmc.run(
        jax.random.key(0), target, ebm.NUTS(metric="dense"), num_chains=2, num_warmup=300, num_samples=10,
        progress_bar=False,
    )  # fmt: skip
    assert draws.attrs["non_centred"] == ""
