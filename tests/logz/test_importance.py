"""Weights of draws: an error bar that knows of weights which no draw has shown."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ebm_ppl as ebm
from ebm_ppl.logz.importance import BLOCKS, Weighed, draw, weigh
from ebm_ppl.mixture import StudentMixture
from ebm_ppl.rebase import Rebased
from ebm_ppl.scale import DenseScale

NUM_RUNS = 1000


def weighed(k, seed, per_block=256):
    """Weights of a Pareto law, whose mean is 1 / (1 - k)."""
    uniform = np.random.default_rng(seed).random((BLOCKS, per_block))
    return Weighed(-k * np.log(uniform), 0)


@pytest.mark.parametrize("k", [0.3, 0.65])
def test_two_standard_errors_cover_the_truth(k):
    """With a variance and without."""
    found = [weighed(k, seed) for seed in range(NUM_RUNS)]
    errors = np.array([each.value + np.log1p(-k) for each in found])
    covered = np.mean(np.abs(errors) < 2 * np.array([each.std_error for each in found]))
    assert covered > 0.9 - 3 * np.sqrt(0.9 * 0.1 / NUM_RUNS)


def test_two_standard_errors_of_sixteen_blocks_cover_as_much_as_of_many():
    """95.4 %, where errors that take the spread of sixteen for known would cover 93.6 %."""
    num, rng = 8000, np.random.default_rng(3)
    found = [Weighed(np.log(1 + 0.1 * rng.uniform(-1, 1, (BLOCKS, 64))), 0) for _ in range(num)]
    covered = np.mean([abs(each.value) < 2 * each.std_error for each in found])
    assert abs(covered - 0.954) < 3 * np.sqrt(0.954 * 0.046 / num)


def test_unseen_weights_are_those_beyond_the_largest():
    """Of a Pareto law their mean is w / (1 - k) beyond w, and one draw in N has one."""
    for k, seed in ((0.3, 0), (0.65, 1)):
        found = weighed(k, seed, per_block=4096)
        largest, num = np.exp(np.max(found.log_weight)), found.num
        beyond = largest ** (-1 / k) * largest / (1 - k)  # E[w; w > largest], exactly
        one_in_num = beyond / (num * largest ** (-1 / k))
        assert found.unseen == pytest.approx(one_in_num / np.exp(found.value), rel=0.35)  # as well as k is known


def reference():
    """Half as wide as the target, which is its own reference."""

    def model():
        numpyro.sample("x", dist.Normal(0.0, 2.0).expand([2]).to_event(1))

    normal = StudentMixture.normal(np.zeros(2), DenseScale(np.eye(2), np.eye(2)))
    return Rebased(ebm.target(model), normal.with_tails(0.1), np.array(0.1))


def test_blocks_are_draws_of_their_own():
    z, seen = draw(jax.random.key(0), reference(), 2**10)
    assert z.shape == (2**10, 2) and len(np.unique(z, axis=0)) == len(z)
    assert seen.log_weight.shape == (BLOCKS, 2**6)


def test_draws_are_weighed_in_parts():
    """Of a target that is its own reference Z is 1, from as many draws as are weighed by one call, and from more."""
    for num in (2**11, 2**14):
        found = weigh(jax.random.key(1), reference(), num)
        assert found.num == num and abs(found.value) < 4 * found.std_error < 0.1
