"""The Frechet distance against its closed form."""

import numpy as np
import pytest

import ebm_ppl as ebm


def _with_moments(rng, num, mean, root):
    """A sample that has exactly these."""
    x = rng.normal(size=(num, len(mean)))
    x = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return mean + x @ root.T


def test_distance_of_commuting_covariances():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    a, b = np.array([1.0, 2.0, 0.5]), np.array([0.5, 2.0, 3.0])
    mean = np.array([0.3, -0.2, 1.0])
    x = _with_moments(rng, 50, mean, turn * a)
    y = _with_moments(rng, 80, np.zeros(3), turn * b)
    np.testing.assert_allclose(ebm.frechet_distance(x, y), mean @ mean + np.sum((a - b) ** 2), rtol=1e-9)
    np.testing.assert_allclose(ebm.frechet_distance(x, x), 0.0, atol=1e-9)


def test_what_it_refuses():
    with pytest.raises(ebm.EnergyShapeError, match="shape"):
        ebm.frechet_distance(np.zeros((5, 2)), np.zeros((5, 3)))
    with pytest.raises(ebm.EnergyError, match="two events"):
        ebm.frechet_distance(np.zeros((1, 2)), np.zeros((5, 2)))
