"""Dense metrics, of draws and of gradients of which the truth is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from ebm_ppl import metric
from ebm_ppl.metric import Moments

DIM = 20
LAGS = np.abs(np.subtract.outer(np.arange(DIM), np.arange(DIM)))


def agreed(covariance, seed, num=300, widen=1.0):
    """What two halves of so many normal draws agree upon, where draws lie wider than their gradients say."""
    rng = np.random.default_rng(seed)
    z = rng.multivariate_normal(np.zeros(len(covariance)), covariance, size=(2, num))
    g = z @ np.linalg.inv(covariance)
    z = z * np.sqrt(widen)
    first, second = (Moments(*(jnp.asarray(np.cov(x.T)) for x in half)) for half in zip(z, g, strict=True))
    gap = Moments(*(jnp.asarray(x[0].mean(0) - x[1].mean(0)) for x in (z, g)))
    factor, widening = metric.agreed(first, second, gap)
    return np.asarray(widening * factor @ factor.T)


def correlations(covariance):
    deviation = np.sqrt(np.diag(covariance))
    return covariance / np.outer(deviation, deviation)


def largest_ratio(found, true):
    """Condition number of the target in the coordinates of a metric."""
    values = np.linalg.eigvals(np.linalg.solve(found, true)).real
    return values.max() / values.min()


def test_of_a_normal_it_is_the_covariance_after_few_draws():
    covariance = 0.9**LAGS
    for seed in range(5):
        # Of as many draws their covariance alone leaves a condition number of (1 + .26)^2 / (1 - .26)^2 = 2.9.
        assert largest_ratio(agreed(covariance, seed, num=150), covariance) < 1.3


def test_the_noise_of_independent_draws_is_not_taken_for_correlations():
    for seed in range(5):
        np.testing.assert_allclose(correlations(agreed(np.eye(DIM), seed)), np.eye(DIM), atol=0.1)


def test_two_correlated_coordinates_are_found_among_many():
    covariance = np.eye(DIM)
    covariance[0, 1] = covariance[1, 0] = 0.99
    for seed in range(5):
        assert largest_ratio(agreed(covariance, seed), covariance) < 2


@pytest.mark.parametrize("variance", [1e-8, 1e8])
def test_no_unit_of_the_coordinates_is_better_than_another(variance):
    covariance = 0.9**LAGS
    np.testing.assert_allclose(agreed(variance * covariance, 0), variance * agreed(covariance, 0), rtol=1e-6)


def test_the_widest_direction_is_as_wide_as_the_draws():
    """So many draws that the widest of equal directions is too wide by .26 at most: 9 ((1 + sqrt(DIM / num))^2 - 1)."""
    found = agreed(np.eye(DIM), 0, num=100_000, widen=9.0)
    np.testing.assert_allclose(found, 9 * np.eye(DIM), atol=0.4)


def test_the_closest_normal_to_a_normal_is_that_normal():
    """The gradients at draws tell where its mean is, however far the mean of the draws is off."""
    covariance, mean = 0.9**LAGS, np.arange(DIM)
    z = np.random.default_rng(0).multivariate_normal(mean, covariance, size=300)
    found_mean, scale = metric.closest_normal(jnp.asarray(z), jnp.asarray((mean - z) @ np.linalg.inv(covariance)))
    np.testing.assert_allclose(found_mean, mean, atol=1e-8)
    np.testing.assert_allclose(scale.factor @ scale.factor.T, covariance, atol=1e-8)


def test_the_closest_normal_in_one_dimension():
    z = np.random.default_rng(0).normal(3.0, 2.0, size=(300, 1))
    mean, scale = metric.closest_normal(jnp.asarray(z), jnp.asarray((3.0 - z) / 4))
    np.testing.assert_allclose([mean[0], scale.factor[0, 0]], [3.0, 2.0], rtol=1e-8)


@pytest.mark.parametrize("bad", [0.0, np.inf, np.nan])
def test_a_half_that_tells_nothing_leaves_a_metric(bad):
    nothing = jnp.full((3, 3), bad)
    for first in (Moments(nothing, nothing), Moments(jnp.eye(3), nothing), Moments(nothing, jnp.eye(3))):
        factor, _ = metric.agreed(first, Moments(jnp.eye(3), jnp.eye(3)), Moments(jnp.zeros(3), jnp.zeros(3)))
        found = factor @ factor.T
        assert np.all(np.isfinite(found)) and np.all(np.linalg.eigvalsh(found) > 0)
