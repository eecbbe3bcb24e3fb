import jax.numpy as jnp
import numpy as np

from ebm_ppl import warmup

DIM = 20


def agreed(covariance, seed, num=300):
    """What two halves of so many normal draws agree upon."""
    z = np.random.default_rng(seed).multivariate_normal(np.zeros(DIM), covariance, size=(2, num))
    halves = [jnp.asarray(np.cov(half.T)) for half in z]
    return np.asarray(warmup._agreed_covariance(*halves, jnp.asarray(z[0].mean(0) - z[1].mean(0))))


def test_correlations_are_kept_where_they_are_worth_it():
    lags = np.abs(np.subtract.outer(np.arange(DIM), np.arange(DIM)))
    for seed in range(5):
        found = agreed(0.9**lags, seed)
        np.testing.assert_allclose(found[lags == 1], 0.9, atol=0.2)


def test_the_noise_of_independent_draws_is_not_taken_for_correlations():
    for seed in range(5):
        found = agreed(np.eye(DIM), seed)
        assert np.array_equal(found, np.diag(np.diag(found)))


def test_a_half_without_spread_leaves_a_metric():
    covariance = np.asarray(warmup._agreed_covariance(jnp.zeros((3, 3)), jnp.eye(3), jnp.zeros(3)))
    assert np.all(np.isfinite(covariance))
