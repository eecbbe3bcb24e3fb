"""log Z by bridge sampling: right, with an error that holds for chains with a memory."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from limits import chi2_limits, z_limit
from problems import FUNNEL_IN_A_BOX, PROBLEMS, funnel_in_a_box
from scipy.signal import lfilter
from test_rebase import rebased

import ebm_ppl as ebm
from ebm_ppl.logz.bridge import bridge

NUM_RUNS = 16
CASES = ("regression", False), ("three_roles", True)
LIMIT = z_limit(NUM_RUNS * len(CASES) + 4)
MEMORIES = 0.0, 0.8


CENTRED = ebm.NUTS(metric="dense")
"""In the coordinates of the model, where a funnel stays one."""


def small(**settings):
    return ebm.Bridge(num_warmup=200, num_samples=500, **settings)


def target_of(energy):
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("energy", energy(x), role="loss")

    return ebm.target(model)


def joint_log_z(problem):
    return problem.log_z + (problem.log_z_prior or 0.0)


@pytest.mark.parametrize(("name", "warp"), CASES)
def test_estimate_and_its_error(name, warp):
    problem = PROBLEMS[name]
    target = problem.target()
    found = [small(warp=warp).integrate(jax.random.key(seed), target) for seed in range(NUM_RUNS)]
    scores = np.array([(each.value - joint_log_z(problem)) / each.std_error for each in found])
    low, high = chi2_limits(len(CASES), NUM_RUNS)
    assert np.max(np.abs(scores)) < LIMIT and low < np.sum(scores**2) < high
    for each in found:
        assert each.std_error < 0.02 and each.diagnostics["rhat"] < 1.05
        # Each step of a chain makes a leapfrog step at least, in the warm-up too.
        assert each.num_evaluations > 4 * 700 + (1 + warp) * 2000
        assert ("warped normal" if warp else "mixture") in each.story[1]
        assert not any("no chain has been to" in doubt for doubt in each.doubts)


@pytest.mark.slow
def test_evidence_of_a_model_with_a_prior_energy():
    problem = PROBLEMS["enumerated"]
    careful = ebm.NUTS(target_accept=0.95)  # without it a few trajectories diverge, which is a doubt
    found = ebm.log_z(jax.random.key(0), problem.target(), small(warp=True, sampler=careful), num_runs=2)
    assert abs(found.value - problem.log_z) < LIMIT * found.std_error and found.std_error < 0.02
    assert found.parts["prior"] == pytest.approx(problem.log_z_prior, abs=LIMIT * 0.02)
    assert (
        found.method == "bridge sampling" and not found.doubts and found.story[0].startswith("run 1: prior: 4 chains")
    )


@pytest.mark.parametrize("memory", MEMORIES)
def test_error_is_calibrated_for_chains_with_a_memory(memory):
    """Between a standard normal, times 20, and another normal: log Z = log 20."""
    num, chains, draws = 300, 4, 500
    proposal = st.norm(0.8, 0.6)  # narrow, so that the chains' part of the error is the larger
    scores = []
    for seed in range(num):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(chains, draws))
        x[:, 1:] *= np.sqrt(1 - memory**2)
        x = lfilter([1.0], [1.0, -memory], x)
        fresh = proposal.rvs(1000, random_state=rng)
        ratios = [np.log(20.0) + st.norm.logpdf(z) - proposal.logpdf(z) for z in (x, fresh)]
        found = bridge(*ratios)
        assert (found.effective < chains * draws / 2) == (memory > 0)
        scores.append((found.value - np.log(20.0)) / found.std_error)
    low, high = chi2_limits(len(MEMORIES), num)
    assert low < np.sum(np.square(scores)) < high
    assert abs(np.mean(scores)) * np.sqrt(num) < z_limit(len(MEMORIES))


def test_constant_energy():
    found = small(warp=True).integrate(jax.random.key(0), target_of(lambda x: 2.5 + 0.0 * x))
    assert abs(found.value + 2.5) < LIMIT * found.std_error and found.std_error < 0.02


def test_points_with_a_nan_energy_have_no_mass_and_are_counted():
    """Half of a normal: log Z = -log 2."""
    target = target_of(lambda x: jnp.where(x > 0, 0.0, jnp.nan))
    found = small(warp=True).integrate(jax.random.key(0), target)
    assert abs(found.value + np.log(2)) < LIMIT * found.std_error and found.num_nan > 500


@pytest.mark.slow
def test_chains_that_miss_a_part_of_the_posterior_are_a_doubt():
    """No chain sees the neck of the funnel: the answer is wrong, and says so."""
    with pytest.warns(ebm.EnergyWarning, match="diverged|chains disagree"):
        found = ebm.log_z(jax.random.key(0), ebm.target(funnel_in_a_box), small(warp=True, sampler=CENTRED))
    assert abs(found.value - FUNNEL_IN_A_BOX) > found.std_error and "in doubt" in str(found)


def test_a_mode_that_no_chain_has_been_to_is_a_doubt():
    """All chains start near the other mode, agree, and state a small error."""

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 4.0).expand([3]).to_event(1))
        modes = [dist.Normal(centre, 0.5).log_prob(x).sum() for centre in (-6.0, 1.0)]
        # What the prior takes away from each, so that .3 and .7 of Z are theirs.
        weights = np.log([0.3, 0.7]) + 3 * np.array([36.0, 1.0]) / (2 * 16.25)
        ebm.energy_factor("modes", -jnp.logaddexp(modes[0] + weights[0], modes[1] + weights[1]), role="loss")

    exact = 3 * st.norm.logpdf(0.0, 0.0, np.sqrt(16.25))
    with pytest.warns(ebm.EnergyWarning, match=r"no chain has been to, with about 0\.4\d times the mass"):
        found = ebm.log_z(jax.random.key(0), ebm.target(model), small())
    assert found.value < exact - 5 * found.std_error and len(found.doubts) == 1
    assert abs(found.value - exact - np.log(0.7)) < LIMIT * found.std_error


def test_other_targets_than_those_of_models_are_refused():
    _, other = rebased("regression", num=50)
    with pytest.raises(ebm.EnergyError, match="needs a model's target; got a Rebased"):
        ebm.Bridge().integrate(jax.random.key(0), other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chains": 1}, "num_chains is 2 at least"),
        ({"num_samples": 101}, "num_samples is an even number"),
        ({"num_samples": 6}, "of at least 8"),
        ({"num_ascents": 1}, "num_ascents is at least 2"),
        ({"num_proposal": 1}, "num_proposal is 2 at least"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ebm.EnergyError, match=message):
        ebm.Bridge(**settings)
