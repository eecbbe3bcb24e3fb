"""Calibration and the area under the curve: by hand, by their definitions, and over replications."""

import numpy as np
import pytest
from limits import z_limit

import ebm_ppl as ebm


def test_calibration_is_the_sum_over_bins():
    """Two bins of two and one: |1/2 - .65| 2/3 + |1 - .95| 1/3."""
    found = ebm.calibration([[0.6, 0.4], [0.3, 0.7], [0.05, 0.95]], [0, 0, 1], num_bins=4)
    assert found.error == pytest.approx(2 / 3 * 0.15 + 1 / 3 * 0.05)
    np.testing.assert_array_equal(found.num, [0, 0, 2, 1])
    np.testing.assert_allclose(found.accuracy[2:], [0.5, 1.0])
    np.testing.assert_allclose(found.confidence[2:], [0.65, 0.95])


def test_probabilities_that_hold_have_next_to_no_error_and_others_have_theirs():
    """Confidences that are too high by .1 everywhere have an error of .1."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.5, 0.9, 100_000)
    labels = (rng.random(100_000) < truth).astype(int)
    both = [ebm.calibration(np.stack([1 - p, p], axis=1), labels).error for p in (truth, truth + 0.1)]
    assert both[0] < 0.01  # sqrt(bins / n) is .012
    assert abs(both[1] - 0.1) < 0.005


def test_area_is_the_share_of_pairs():
    inside, outside = np.array([0.0, 1.0, 1.0, 3.0]), np.array([1.0, 2.0, 4.0])
    pairs = np.mean((outside > inside[:, None]) + 0.5 * (outside == inside[:, None]))
    assert ebm.auroc(inside, outside).value == pytest.approx(pairs)
    assert ebm.auroc(-inside, -outside).value == pytest.approx(1 - pairs)


def test_area_and_its_error_over_replications():
    """Of normal scores a unit apart: Phi(1 / sqrt 2); the squared scores have a mean of one."""
    rng, exact = np.random.default_rng(1), 0.7602499
    found = [ebm.auroc(rng.normal(size=80), rng.normal(1.0, 1.0, 120)) for _ in range(400)]
    scores = np.array([(each.value - exact) / each.std_error for each in found])
    assert abs(np.mean(scores)) < z_limit(2) / np.sqrt(400) * 1.1
    assert abs(np.mean(scores**2) - 1) < z_limit(2) * np.sqrt(2 / 400) * 1.1


@pytest.mark.parametrize(
    ("probabilities", "labels", "error"),
    [
        (np.full((3, 2), 0.5), [0, 1], ebm.EnergyShapeError),
        (np.full((2, 2), 0.4), [0, 1], ebm.EnergyError),
        (np.full((2, 2), 0.5), [0, 2], ebm.EnergyError),
    ],
)
def test_bad_input_is_refused(probabilities, labels, error):
    with pytest.raises(error):
        ebm.calibration(probabilities, labels)


def test_scores_with_a_nan_are_refused():
    with pytest.raises(ebm.EnergyError, match="NaN"):
        ebm.auroc([0.0, np.nan], [1.0, 2.0])
