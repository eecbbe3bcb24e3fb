"""Shares of modes and their errors, of independent points and of chains."""

import numpy as np
import pytest
from limits import chi2_limits, z_limit

import ebm_ppl as ebm
from ebm_ppl.evaluate.chains import spacing

CENTRES = [[-2.0, 0.0], [2.0, 0.0], [0.0, 9.0]]


def two_state(rng, num_chains, num_draws, stay=0.9, share=0.3):
    """Chains that jump between two modes, and are in the first with the given probability."""
    state = rng.random(num_chains) < share
    states = np.empty((num_chains, num_draws), bool)
    for i in range(num_draws):
        anew = rng.random(num_chains) > stay
        state = np.where(anew, rng.random(num_chains) < share, state)
        states[:, i] = state
    x = np.where(states[..., None], CENTRES[0], CENTRES[1])
    return x + 0.1 * rng.normal(size=x.shape)


def test_shares_are_those_of_the_nearest_centre():
    points = np.array([[-2.0, 0.0], [-1.0, 0.0], [3.0, 1.0], [0.1, 8.0]])
    found = ebm.mode_weights(points, CENTRES)
    np.testing.assert_allclose(found.weight, [0.5, 0.25, 0.25])
    p = (4 * 0.5 + 0.5) / 5
    assert found.std_error[0] == pytest.approx(np.sqrt(p * (1 - p) / 6))
    image = ebm.mode_weights(points.reshape(4, 2, 1), np.reshape(CENTRES, (3, 2, 1)))
    np.testing.assert_array_equal(image.weight, found.weight)


def test_points_far_from_their_centre_count_for_no_mode():
    """Of 2000 points of a mode in two dimensions, exp(-r^2 / 2) lie beyond r standard deviations."""
    near = CENTRES[0] + 0.1 * np.random.default_rng(0).normal(size=(2000, 2))
    found = ebm.mode_weights(np.concatenate([near, np.full((500, 2), 50.0)]), CENTRES, within=0.2)
    share = 0.8 * (1 - np.exp(-2))
    assert abs(found.weight[0] - share) < z_limit(1) * np.sqrt(0.8 * share * np.exp(-2) / 2500)
    np.testing.assert_array_equal(found.weight[1:], 0.0)
    assert ebm.mode_weights(np.array([CENTRES[1]]), CENTRES, within=1e-9).weight[1] == 1
    with pytest.raises(ebm.EnergyError, match="positive"):
        ebm.mode_weights(near, CENTRES, within=0.0)


@pytest.mark.parametrize("chains", [False, True])
def test_errors_are_those_of_replications(chains):
    """Squared scores of the first mode's share add up to those of so many normals."""
    rng, num = np.random.default_rng(0), 200
    scores = []
    for _ in range(num):
        draws = two_state(rng, 4, 400) if chains else two_state(rng, 1, 400, stay=0.0)[0]
        found = ebm.mode_weights(draws, CENTRES, chains=chains)
        scores.append((found.weight[0] - 0.3) / found.std_error[0])
    low, high = chi2_limits(2, num)
    assert low < np.sum(np.square(scores)) < high


def test_an_empty_mode_has_an_error():
    found = ebm.mode_weights(two_state(np.random.default_rng(0), 4, 400), CENTRES, chains=True)
    assert found.weight[2] == 0 and 0 < found.std_error[2] < 0.05


def test_chains_that_each_stay_where_they_are_say_little():
    draws = np.stack([np.random.default_rng(i).normal(size=(100, 2)) * 0.1 + CENTRES[i % 2] for i in range(4)])
    assert ebm.mode_weights(draws, CENTRES, chains=True).std_error[0] > 0.15


def test_thinned_draws_are_far_apart():
    rng = np.random.default_rng(0)
    independent = rng.normal(size=(2, 500, 3))
    assert spacing(independent) == 1 and len(ebm.thinned(independent)) == 1000
    slow = np.cumsum(rng.normal(size=(2, 30, 1)), axis=1)
    assert len(ebm.thinned(slow)) < 20
    draws = two_state(rng, 4, 2000)
    kept = ebm.thinned(draws)
    assert len(kept) == pytest.approx(8000 / (2 * 19), rel=0.4)
    np.testing.assert_array_equal(kept[0], draws[0, 0])


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ebm.EnergyShapeError, match=r"point has shape \(3,\), a centre \(2,\)"):
        ebm.mode_weights(np.zeros((5, 3)), CENTRES)
    with pytest.raises(ebm.EnergyError, match="not finite"):
        ebm.mode_weights(np.full((5, 2), np.nan), CENTRES)
    with pytest.raises(ebm.EnergyError, match="four draws at least"):
        ebm.thinned(np.zeros((5, 3)))
