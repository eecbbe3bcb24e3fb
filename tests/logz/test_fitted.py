"""log Z from a fitted reference: right, with an error that holds, by either of its branches."""

import jax
import numpy as np
import pytest
from limits import chi2_limits
from problems import PROBLEMS

import ebm_ppl as ebm
from ebm_ppl.logz.fitted import FittedReference, integrate

NUM_RUNS = 12
SMALL = ebm.SMC(num_particles=300, target_ess=0.5, num_moves=2)
NAMES = "regression", "mixture", "dirichlet_multinomial"


def runs(name, **settings):
    problem, method = PROBLEMS[name], FittedReference(pilot=SMALL, num_draws=1024, **settings)
    target = problem.target()
    found = [integrate(jax.random.key(seed), target, method) for seed in range(NUM_RUNS)]
    return found, np.array([(each.value - problem.log_z) / each.std_error for each in found])


@pytest.mark.parametrize("name", NAMES)
def test_estimate_and_its_error(name):
    found, scores = runs(name, tol=0.01)
    low, high = chi2_limits(len(NAMES), NUM_RUNS)
    assert low < np.sum(scores**2) < high
    for each in found:
        assert each.branch == ("importance sampling" if each.pareto_k <= 0.5 else "SMC")
        assert each.num_evaluations > 2 * 1024 and "log Z" in each.story[-1]
    weighed = [each for each in found if each.branch == "importance sampling"]
    assert len(weighed) > NUM_RUNS / 2 and max(each.std_error for each in weighed) < 0.015


def test_without_a_wanted_error_the_estimate_gets_as_much_as_the_search():
    found, _ = runs("regression")
    for each in found:
        search, draws = (float(line.split()[at]) for line, at in ((each.story[0], -2), (each.story[-1], 0)))
        assert draws >= search and each.num_evaluations >= search + draws


def test_heavy_tails_are_left_to_smc(monkeypatch):
    """No weights are good enough here, so that every run goes on from its fitted reference."""
    monkeypatch.setattr("ebm_ppl.logz.fitted.LARGEST_K", -10.0)
    found, scores = runs("regression", tol=0.05, fallback=SMALL)
    low, high = chi2_limits(1, NUM_RUNS)
    assert low < np.sum(scores**2) < high
    assert {each.branch for each in found} == {"SMC"}


@pytest.mark.parametrize("settings", [{"tol": 0.0}, {"num_draws": 100}, {"defence": 0.0}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ebm.EnergyError, match=next(iter(settings))):
        FittedReference(**settings)
