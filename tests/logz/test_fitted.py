"""log Z from a fitted reference: right, with an error that holds, by either of its branches."""

import dataclasses
import warnings

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from limits import chi2_limits, t_limit
from problems import FUNNEL_IN_A_BOX, PROBLEMS, funnel_in_a_box

import ebm_ppl as ebm
from ebm_ppl.logz.fitted import IMPORTANCE
from ebm_ppl.logz.importance import BLOCKS, HAS_VARIANCE, LARGEST_K_OF_FEW, Weighed, weigh
from ebm_ppl.logz.integral import LARGEST_K

NUM_RUNS = 12
SMALL = ebm.SMC(num_particles=300, target_ess=0.5, num_moves=2)
NAMES = "regression", "mixture", "dirichlet_multinomial"
WITH_PRIOR = "three_roles", "enumerated", "double_well"
LIMIT = t_limit(NUM_RUNS * (len(NAMES) + len(WITH_PRIOR)), BLOCKS - 1)
"""Of each score: an error from `BLOCKS` blocks has Student's law."""


def small(**settings):
    return ebm.FittedReference(pilot=SMALL, num_draws=1024, **settings)


def runs(name, method, num=NUM_RUNS):
    problem = PROBLEMS[name]
    target = problem.target()
    found = [method.integrate(jax.random.key(seed), target) for seed in range(num)]
    return found, np.array([(each.value - problem.log_z) / each.std_error for each in found])


@pytest.mark.parametrize("name", [*NAMES[:2], pytest.param(NAMES[2], marks=pytest.mark.slow)])
def test_estimate_and_its_error(name):
    found, scores = runs(name, small(tol=0.01))
    assert np.max(np.abs(scores)) < LIMIT
    assert np.mean(np.abs(scores) < 2) > 0.6  # 94 % are expected; a right answer fails in one of 3000 suites
    for each in found:
        k = each.diagnostics["pareto_k_of_fit"]
        assert k <= LARGEST_K_OF_FEW if each.diagnostics["branch"] == IMPORTANCE else k > HAS_VARIANCE
        assert each.num_evaluations > 2 * 1024 and "log Z" in each.story[-1] and not each.doubts
    weighed = [each for each in found if each.diagnostics["branch"] == IMPORTANCE]
    assert len(weighed) > NUM_RUNS / 2 and max(each.std_error for each in weighed) < 0.015


@pytest.mark.parametrize(
    "name", [WITH_PRIOR[0], *(pytest.param(name, marks=pytest.mark.slow) for name in WITH_PRIOR[1:])]
)
def test_evidence_of_models_with_prior_energies(name):
    problem = PROBLEMS[name]
    found = ebm.log_z(jax.random.key(0), problem.target(), small(tol=0.01), num_runs=2)
    assert abs(found.value - problem.log_z) / found.std_error < LIMIT
    assert found.parts["prior"] == pytest.approx(problem.log_z_prior, abs=LIMIT * 0.02)
    assert found.method == "fitted reference" and not found.doubts
    assert found.replicates.shape == (2,) and found.diagnostics["num_evaluations"] > 4 * 1024
    if len(found.parts) == 2:
        assert found.story[0].startswith("run 1: prior: pilot") and found.story[-1].startswith("run 2: data: ")
        assert found.parts["data"] == found.value


def test_without_a_wanted_error_the_estimate_gets_as_much_as_the_search():
    found, _ = runs("regression", small(), num=2)
    for each in found:
        search, draws = float(each.story[0].split()[-2]), float(each.story[-1].split()[0])
        assert draws >= search and each.num_evaluations >= search + draws


def test_draws_weighed_a_block_at_a_time_are_the_same(monkeypatch):
    target = PROBLEMS["regression"].target()
    at_once = small().integrate(jax.random.key(0), target)
    monkeypatch.setattr("ebm_ppl.logz.importance.MOST_AT_ONCE", 1)
    in_blocks = small().integrate(jax.random.key(0), target)
    assert in_blocks.value == pytest.approx(at_once.value, abs=1e-9)
    assert in_blocks.num_evaluations == at_once.num_evaluations


@pytest.mark.slow
def test_heavy_tails_are_left_to_smc(monkeypatch):
    """No weights are good enough here, so that every run goes on from its fitted reference."""
    monkeypatch.setattr("ebm_ppl.logz.importance.LARGEST_K_OF_FEW", -10.0)
    found, scores = runs("regression", small(tol=0.05, fallback=SMALL))
    low, high = chi2_limits(1, NUM_RUNS)
    assert low < np.sum(scores**2) < high
    assert {each.diagnostics["branch"] for each in found} == {"SMC from the fitted reference"}


def test_draws_do_not_decide_whether_they_are_kept(monkeypatch):
    """Their weights have a heavy tail, those that judged the fit had not: a wide error bar, no other branch."""

    def with_heavy_tail(*arguments):
        uniform = np.random.default_rng(0).random(weigh(*arguments).log_weight.shape)
        return Weighed(np.log(0.2) - 0.8 * np.log(uniform), 0)  # of mean 1

    monkeypatch.setattr("ebm_ppl.logz.fitted.weigh", with_heavy_tail)
    found = small().integrate(jax.random.key(0), PROBLEMS["regression"].target())
    assert found.diagnostics["branch"] == IMPORTANCE and found.diagnostics["pareto_k"] > LARGEST_K
    assert abs(found.value) < 2 * found.std_error and found.std_error > 0.02


def test_weights_are_kept_where_smc_fails(monkeypatch):
    """No weights are good enough here, and SMC never comes to an end."""
    monkeypatch.setattr("ebm_ppl.logz.importance.LARGEST_K_OF_FEW", -10.0)
    found = small(fallback=dataclasses.replace(SMALL, max_stages=1, target_ess=0.99999)).integrate(
        jax.random.key(0), PROBLEMS["regression"].target()
    )
    assert abs(found.value - PROBLEMS["regression"].log_z) < LIMIT * found.std_error
    assert "SMC failed where they do: Tempering stalled" in found.doubts[0]


@pytest.mark.slow
def test_a_reference_that_does_not_fit_is_a_doubt():
    """On the funnel the pilot's particles miss the neck: no answer can be relied upon, and all of them say so."""
    target = ebm.target(funnel_in_a_box)
    with pytest.warns(ebm.EnergyWarning, match="contradicts the estimate|lag behind"):
        found = ebm.log_z(jax.random.key(0), target, small(fallback=SMALL, max_draws=4096))
    assert found.diagnostics["data"][0]["pilot"] < FUNNEL_IN_A_BOX - 1  # the doubt is right
    assert found.doubts and "in doubt" in str(found) and (found - found).doubts == found.doubts


def test_constant_energy_is_integrated_exactly():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("constant", 2.5 + 0.0 * x, role="loss")

    found = ebm.log_z(jax.random.key(0), ebm.target(model), small())
    assert abs(found.value + 2.5) < 4 * found.std_error and found.std_error < 0.01


def test_points_with_a_nan_energy_weigh_nothing_and_are_counted():
    """Half of a normal: log Z = -log 2."""

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("half", jax.numpy.where(x > 0, 0.0, jax.numpy.nan), role="loss")

    with pytest.warns(ebm.EnergyWarning, match="was NaN"), warnings.catch_warnings():
        found = ebm.log_z(jax.random.key(0), ebm.target(model), small(tol=0.01))
    assert abs(found.value + np.log(2)) < LIMIT * found.std_error
    assert found.diagnostics["num_nan_energy"] > 0


def test_infinite_density_is_an_error():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("pole", jax.numpy.where(x > 1.0, -jax.numpy.inf, 0.0), role="loss")

    with pytest.raises(ebm.NonFiniteEnergyError, match="infinite density"):
        ebm.log_z(jax.random.key(0), ebm.target(model), small())


@pytest.mark.parametrize("settings", [{"tol": 0.0}, {"num_draws": 100}, {"defence": 0.0}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ebm.EnergyError, match=next(iter(settings))):
        ebm.FittedReference(**settings)
