"""Tests of two samples and of many tests: their statistics against formulas, their p-values against the uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats as st
from limits import FAMILY_WISE, t_limit
from scipy.spatial.distance import cdist

import ebm_ppl as ebm
from ebm_ppl.evaluate.significance import median_distance
from ebm_ppl.evaluate.two_sample import permuted

KERNELS = {"gaussian": lambda d, s: np.exp(-(d**2) / (2 * s**2)), "imq": lambda d, s: (1 + d**2 / s**2) ** -0.5}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mmd_is_the_formula(kernel):
    """Of samples of unequal size, with more points than a block has."""
    x, y, scale = normal(0, 60, 3), normal(1, 90, 3) + 0.2, 1.4
    k = {(i, j): KERNELS[kernel](cdist(a, b), scale) for i, a in enumerate((x, y)) for j, b in enumerate((x, y))}
    within = [(k[i, i].sum() - num) / (num * (num - 1)) for i, num in enumerate((60, 90))]
    found = ebm.mmd_test(jax.random.key(0), x, y, kernel=kernel, scale=scale, num_permutations=99)
    assert found.statistic == pytest.approx(sum(within) - 2 * k[0, 1].mean(), rel=1e-9)
    assert found.num_points == 150 and found.scale == scale


def test_scale_is_the_median_distance():
    points = normal(0, 200, 3) + 1e3
    exact = np.median(cdist(points, points)[np.triu_indices(200, 1)])
    assert float(median_distance(jax.random.key(0), jnp.asarray(points))) == pytest.approx(exact, rel=1e-9)


def test_the_smallest_p_value_is_one_of_all_labellings():
    """No labelling of ten and ten points that was drawn is as extreme as the right one."""
    x, y = np.arange(10.0)[:, None], 100 + np.arange(10.0)[:, None]
    found = ebm.mmd_test(jax.random.key(0), x, y, num_permutations=999)
    assert found.p_value == pytest.approx(1 / 1000)


def test_p_values_of_permutations_are_uniform_where_there_is_no_difference():
    def once(key):
        key_points, key_scale, key_labels = jax.random.split(key, 3)
        points = jax.random.normal(key_points, (50, 2))
        return permuted(key_labels, points, 20, median_distance(key_scale, points), "gaussian", 99)[1]

    p_values = np.asarray(jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(0), 1000)))
    counts = np.bincount(np.rint(p_values * 100).astype(int), minlength=101)[1:]
    assert st.chisquare(counts.reshape(20, 5).sum(axis=1)).pvalue > FAMILY_WISE
    assert abs(np.mean(p_values <= 0.05) - 0.05) < 2 * np.sqrt(0.05 * 0.95 / 1000)


def test_power():
    """Over 90 %, of a shift by .7 at 100 points of each sample."""

    def p_value(key, kernel, shift):
        key_points, key_scale, key_labels = jax.random.split(key, 3)
        points = jax.random.normal(key_points, (200, 2)).at[:100, 0].add(shift)
        return permuted(key_labels, points, 100, median_distance(key_scale, points), kernel, 99)[1]

    keys = jax.random.split(jax.random.key(0), 100)
    for kernel in KERNELS:
        found = jax.jit(jax.vmap(lambda key, kernel=kernel: p_value(key, kernel, 0.7)))(keys)
        assert np.mean(np.asarray(found) <= 0.05) > 0.9


def test_classifier_that_learns_nothing_is_a_coin():
    """No more rejections than 5 %, and half of the points right."""
    settings = {"num_steps": 50, "width": 8, "depth": 1}
    found = [
        ebm.classifier_test(jax.random.key(i), normal(2 * i, 50, 2), normal(2 * i + 1, 50, 2), **settings)
        for i in range(200)
    ]
    right, p_values = np.array([each.statistic for each in found]), np.array([each.p_value for each in found])
    assert abs(right.mean() - 0.5) < t_limit(1, 199) * right.std(ddof=1) / np.sqrt(200)
    assert st.binomtest(int(np.sum(p_values <= 0.05)), 200, 0.05, "greater").pvalue > FAMILY_WISE
    assert {each.num_points for each in found} == {50}


@pytest.mark.parametrize("depth", [0, 2])
def test_classifier_tells_a_shift_and_a_network_a_hole(depth):
    x, y = normal(0, 300, 2), normal(1, 400, 2)
    shifted = ebm.classifier_test(jax.random.key(0), x + np.array([1.0, 0.0]), y, depth=depth)
    assert shifted.p_value < 0.001 and shifted.num_points == 300
    best = st.norm.cdf(0.5)  # accuracy of the best rule
    assert abs(shifted.statistic - best) < 4 * np.sqrt(best * (1 - best) / 300)
    assert shifted.p_value == pytest.approx(st.binomtest(round(shifted.statistic * 300), 300, 0.5, "greater").pvalue)
    ring = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert (ebm.classifier_test(jax.random.key(0), ring, 0.1 * y, depth=depth).p_value < 0.001) == (depth > 0)


def test_units_and_constant_coordinates_are_no_matter_to_a_classifier():
    x, y = normal(0, 100, 2), normal(1, 100, 2) + 1.0
    far = [np.c_[1e6 + 1e4 * each, np.full(100, 3.0)] for each in (x, y)]
    assert ebm.classifier_test(jax.random.key(0), *far).p_value < 0.001


def test_holm():
    np.testing.assert_allclose(ebm.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(ebm.holm([0.5, np.nan, 0.001, 0.9]), [1.0, np.nan, 0.003, 1.0])
    assert len(ebm.holm([])) == 0
    with pytest.raises(ebm.EnergyError, match="probabilities"):
        ebm.holm([0.1, 1.2])


def test_holm_keeps_false_alarms_below_the_level():
    """Of any kind, among ten tests of which eight have true hypotheses."""
    rng = np.random.default_rng(0)
    p = rng.random((4000, 10))
    p[:, :2] *= 1e-4
    alarms = sum(bool(np.any(ebm.holm(each)[2:] <= 0.05)) for each in p)
    assert st.binomtest(alarms, 4000, 0.05, "greater").pvalue > FAMILY_WISE and alarms > 0.03 * 4000


@pytest.mark.parametrize(
    ("x", "y", "settings", "error", "message"),
    [
        (normal(0, 5, 2), normal(1, 20, 2), {}, ebm.EnergyError, "10 points of each sample"),
        (normal(0, 20, 2), normal(1, 20, 3), {}, ebm.EnergyShapeError, r"shape \(2,\), one of y \(3,\)"),
        (normal(0, 20, 2), np.full((20, 2), np.inf), {}, ebm.EnergyError, "y has 20 of 20 events"),
        (normal(0, 20, 2), normal(1, 20, 2), {"kernel": "box"}, ebm.EnergyError, "'gaussian', 'imq'; got 'box'"),
        (normal(0, 20, 2), normal(1, 20, 2), {"num_permutations": 3}, ebm.EnergyError, "num_permutations is 19"),
        (np.ones((20, 2)), np.ones((20, 2)), {}, ebm.EnergyError, "must not coincide"),
    ],
    ids=["few", "shapes", "infinite", "kernel", "permutations", "same"],
)
def test_what_makes_no_sense_is_refused(x, y, settings, error, message):
    with pytest.raises(error, match=message):
        ebm.mmd_test(jax.random.key(0), x, y, **settings)


def test_a_classifier_that_is_not_finite_is_told_of():
    x = np.random.default_rng(0).normal(size=(2, 50, 1))
    with pytest.raises(ebm.EnergyError, match="classifier is not finite"):
        ebm.classifier_test(jax.random.key(0), x[0], x[1] + 3, optimiser=optax.sgd(1e300))


def test_settings_of_a_classifier_are_checked():
    with pytest.raises(ebm.EnergyError, match="num_steps is 1 at least"):
        ebm.classifier_test(jax.random.key(0), normal(0, 20, 2), normal(1, 20, 2), num_steps=0)
