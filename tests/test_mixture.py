"""Mixtures of Student t distributions: a density against NumPyro's, and fits to clouds whose density is known."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from limits import z_limit
from scipy.special import gammaln
from scipy.stats import qmc

from ebm_ppl.mixture import DEGREES, TAILS, StudentMixture, _log_peak, fit_mixture

NUM_POINTS, NUM_DRAWS = 1000, 20_000


def made(degrees=7.0):
    factor = jnp.array([[[1.0, 0.0], [0.6, 0.5]], [[0.2, 0.0], [0.0, 2.0]], [[1.5, 0.0], [-1.0, 0.3]]])
    inverse = jnp.stack([jnp.linalg.inv(each) for each in factor])
    mean = jnp.array([[0.0, 1.0], [3.0, -2.0], [-4.0, 0.0]])
    return StudentMixture(jnp.log(jnp.array([0.2, 0.5, 0.3])), mean, factor, inverse, jnp.full(3, degrees))


def as_numpyro(mixture):
    components = dist.MultivariateStudentT(mixture.degrees, mixture.mean, mixture.factor)
    return dist.MixtureSameFamily(dist.Categorical(logits=mixture.log_weight), components)


def two_clusters(rng, num):
    first = rng.uniform(size=(num, 1)) < 0.2
    return np.where(first, rng.normal(-3, 0.5, (num, 4)), rng.normal(1, 0.8, (num, 4)))


def fit(z, weights=None, seed=0):
    return fit_mixture(jax.random.key(seed), jnp.asarray(z), jnp.ones(len(z)) if weights is None else weights)


def test_density_is_that_of_numpyro():
    z = np.random.default_rng(0).normal(0, 4, (50, 2))
    np.testing.assert_allclose(jax.vmap(made().log_density)(z), as_numpyro(made()).log_prob(z), rtol=1e-12)


def independent_draws(num):
    return np.asarray(jax.vmap(made().sample)(jax.random.split(jax.random.key(0), num)))


def draws_from_a_cube(num):
    return made().from_cube(np.random.default_rng(0).uniform(size=(num, 4)))


@pytest.mark.parametrize("dim", [1, 2, 10, 33, 400])
def test_its_constant_is_exact_in_single_precision(dim):
    """Gamma functions of a thousand degrees of freedom are resolved to .0005 there; their ratio must be to far less."""
    for nu in (*DEGREES, TAILS):
        exact = gammaln((nu + dim) / 2) - gammaln(nu / 2) - dim / 2 * np.log(nu * np.pi)
        single, double = (float(_log_peak(jnp.asarray(nu, dtype), dim)) for dtype in (np.float32, np.float64))
        assert abs(double - exact) < 1e-10, nu
        assert abs(single - exact) < 4 * np.finfo(np.float32).eps * (3 * dim + abs(exact)), nu


@pytest.mark.parametrize("draws", [independent_draws, draws_from_a_cube])
def test_draws_have_the_moments_of_the_density(draws):
    z = draws(NUM_DRAWS)
    weight, spread = np.exp(made().log_weight), 7 / 5 * np.einsum("kij,klj->kil", made().factor, made().factor)
    mean = weight @ made().mean
    centred = made().mean - mean
    covariance = np.einsum("k,kij->ij", weight, spread + centred[:, :, None] * centred[:, None, :])
    products = (z - mean)[:, :, None] * (z - mean)[:, None, :]
    scores = [
        (z.mean(0) - mean) / (z.std(0) / np.sqrt(NUM_DRAWS)),
        ((products.mean(0) - covariance) / (products.std(0) / np.sqrt(NUM_DRAWS)))[np.tril_indices(2)],
    ]
    assert np.max(np.abs(np.concatenate(scores))) < z_limit(2 * 5)


def test_a_cube_evenly_filled_is_a_mixture_evenly_filled():
    """Each component gets its share, each ball around a mean its quantile, as closely as a net of 2^14 points can."""
    cube = qmc.Sobol(4, rng=np.random.default_rng(0)).random(2**14)
    z, mixture = made().from_cube(cube), made()
    for k, share in enumerate((0.2, 0.5, 0.3)):
        mine = z[np.digitize(cube[:, 0], [0.2, 0.7]) == k]
        assert abs(len(mine) / len(z) - share) < 1e-3
        distances = np.sum(((mine - mixture.mean[k]) @ mixture.inverse[k].T) ** 2, axis=1) / 2
        np.testing.assert_allclose(st.f(2, 7).cdf(np.quantile(distances, [0.1, 0.5, 0.9])), [0.1, 0.5, 0.9], atol=0.01)


def test_tails_are_a_share_of_each_component():
    z = np.random.default_rng(1).normal(0, 6, (50, 2))
    heavy = made(TAILS)
    expected = np.logaddexp(np.log(0.9) + jax.vmap(made().log_density)(z), np.log(0.1) + jax.vmap(heavy.log_density)(z))
    np.testing.assert_allclose(jax.vmap(made().with_tails(0.1).log_density)(z), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("cloud", "num_components"),
    [(lambda rng, num: rng.multivariate_normal(np.zeros(6), 0.2 * np.eye(6) + 0.8, num), 1), (two_clusters, 2)],
    ids=["one normal", "two clusters"],
)
def test_components_are_as_many_as_the_cloud_has(cloud, num_components):
    """And points that were not seen are as likely under the fit as sampling error allows: dim^2 / 4 num a component."""
    rng = np.random.default_rng(1)
    mixture = fit(cloud(rng, NUM_POINTS))
    assert len(mixture.log_weight) == num_components
    if num_components == 2:
        weight, error = float(np.exp(np.min(mixture.log_weight))), np.sqrt(0.2 * 0.8 / NUM_POINTS)
        assert abs(weight - 0.2) < z_limit(1) * error


def test_tails_are_seen():
    rng = np.random.default_rng(2)
    heavy, light = rng.standard_t(3, (4000, 1)), rng.normal(size=(4000, 1))
    assert float(fit(light).degrees[0]) >= 40
    far = fit(heavy).log_density(jnp.array([30.0])) - dist.StudentT(3).log_prob(30.0)
    assert abs(far) < 1.5  # a normal distribution would be off by hundreds


def test_points_of_no_weight_count_for_nothing():
    rng = np.random.default_rng(3)
    z = two_clusters(rng, NUM_POINTS)
    padded = np.concatenate([z, np.full((500, 4), 1e3)])
    mixture = fit(padded, np.repeat([1.0, 0.0], [NUM_POINTS, 500]))
    gap = jax.vmap(mixture.log_density)(z) - jax.vmap(fit(z).log_density)(z)
    assert np.max(np.abs(gap)) < 0.5 and abs(np.mean(gap)) < 0.01


def test_units_do_not_matter():
    rng = np.random.default_rng(4)
    z, units = two_clusters(rng, NUM_POINTS), np.array([1e-3, 1.0, 50.0, 1e4])
    plain, scaled = fit(z), fit(z * units)
    gap = jax.vmap(plain.log_density)(z) - jax.vmap(scaled.log_density)(z * units) - np.log(units).sum()
    assert np.max(np.abs(gap)) < 1e-4


def test_few_points_in_many_dimensions():
    """Fewer points than dimensions: still a density, and one that is wide enough for the points to come."""
    rng = np.random.default_rng(5)
    z = rng.normal(size=(30, 50))
    mixture = fit(z)
    unseen = jax.vmap(mixture.log_density)(rng.normal(size=(200, 50)))
    exact = dist.Normal(0, 1).expand([50]).to_event(1).log_prob(jnp.zeros(50)) - 25
    assert np.all(np.isfinite(unseen)) and np.mean(unseen) > exact - 50
