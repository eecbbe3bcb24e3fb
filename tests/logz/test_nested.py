"""log Z by nested sampling: right, with an error that holds, on plateaus too, and in doubt where slices are too few."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.ns.base import NSInfo, StateWithLogLikelihood
from blackjax.ns.utils import compute_num_live
from limits import chi2_limits, z_limit
from problems import PROBLEMS
from scipy.stats import norm

import ebm_ppl as ebm
from ebm_ppl.logz.nested import LONG_MEMORY, Drawn, Run, Step

NUM_RUNS = 12
NAMES = "regression", "mixture", "funnel"
SHARE = 0.3
SMALL = ebm.NestedSampling(num_live=200, num_delete=20)


def runs(target, log_z, method, num_runs=NUM_RUNS):
    found = [method.integrate(jax.random.key(seed), target) for seed in range(num_runs)]
    return found, np.array([(each.value - log_z) / each.std_error for each in found])


@cache
def of(name, method=SMALL):
    return runs(PROBLEMS[name].target(), PROBLEMS[name].log_z, method)


def test_live_points_that_are_one_to_rounding_end_a_run():
    """A ridge: across it they are nearer than the numbers can tell long before they hold next to nothing."""

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(jnp.sum(x), 0.5), obs=1.0)

    method = ebm.NestedSampling(num_live=100, num_delete=20, remaining=1e-14)
    found = method.integrate(jax.random.key(0), ebm.target(model))
    assert abs(found.value - norm(0.0, 1.5).logpdf(1.0)) < z_limit(1) * found.std_error
    assert "to the last 1e-14 nats" not in found.story[0], "it ended sooner, and says so"


def on_a_line(edge, right, left, slope=0.0):
    """A normal with an energy that jumps at an edge; all of them share one program."""
    return ebm.target(_jump, *map(np.asarray, (edge, right, left, slope)))


def _jump(edge, right, left, slope):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    ebm.energy_factor("jump", jnp.where(x > edge, right, left + slope * x), role="loss")


def _stairs():
    """A wide plateau, a narrower one below it, and a curved floor."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    stairs = jnp.where(x > 1.0, (x - 1.0) ** 2, jnp.where(x > -0.5, 2.0, 5.0))
    ebm.energy_factor("stairs", stairs, role="loss")


@pytest.mark.parametrize("name", [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.slow), NAMES[2]])
def test_estimate_and_its_error(name):
    found, scores = of(name)
    low, high = chi2_limits(len(NAMES), NUM_RUNS)
    assert low < np.sum(scores**2) < high
    assert abs(np.sum(scores)) / math.sqrt(NUM_RUNS) < z_limit(len(NAMES))
    for each in found:
        assert each.std_error == pytest.approx(math.sqrt(each.diagnostics["information"] / 200), rel=0.25)
        # A slice looks at both ends of its interval and at one point inside, at the least.
        births = SMALL.num_delete * each.diagnostics["num_steps"]
        assert each.num_evaluations > 200 + 3 * 5 * PROBLEMS[name].target().dim * births
        assert not each.doubts and f"log Z {each.value:.3f}" in each.story[0]


def test_evidence_of_a_model_with_prior_energies():
    problem = PROBLEMS["three_roles"]
    found = ebm.log_z(jax.random.key(0), problem.target(), SMALL, num_runs=2)
    assert abs(found.value - problem.log_z) / found.std_error < z_limit(1)
    assert found.method == "nested sampling" and found.replicates.shape == (2,) and not found.doubts


def test_too_few_slices_are_a_doubt():
    """One slice between a survivor and the point born from it: the error is beyond its bar, and said to be."""
    found, scores = of("regression", ebm.NestedSampling(num_live=200, num_delete=20, num_inner_steps=1))
    assert np.sum(scores**2) > chi2_limits(1, NUM_RUNS)[1]  # the doubt is right
    for each in found:
        assert each.diagnostics["memory"] > LONG_MEMORY
        assert any("num_inner_steps" in doubt for doubt in each.doubts)


def test_constant_energy_is_integrated_exactly():
    found = SMALL.integrate(jax.random.key(0), on_a_line(0.0, 2.5, 2.5))
    assert found.value == pytest.approx(-2.5, abs=1e-12) and found.std_error < 1e-12
    assert found.num_evaluations == 200 and not found.doubts


def test_plateaus():
    floor = math.sqrt(1 / 3) * math.exp(-1 / 3) * norm.sf(1 / math.sqrt(3))
    log_z = math.log(floor + math.exp(-2) * (norm.cdf(1) - norm.cdf(-0.5)) + math.exp(-5) * norm.cdf(-0.5))
    found, scores = runs(ebm.target(_stairs), log_z, SMALL)
    low, high = chi2_limits(1, NUM_RUNS)
    assert low < np.sum(scores**2) < high
    assert max(each.std_error for each in found) < 0.2


@pytest.mark.parametrize("wall", [math.inf, math.nan])
def test_part_of_the_reference_has_no_mass(wall):
    """The error knows that the share with mass is an estimate, too."""
    found, scores = runs(on_a_line(norm.isf(SHARE), 0.0, wall), math.log(SHARE), SMALL)
    low, high = chi2_limits(2, NUM_RUNS)
    assert low < np.sum(scores**2) < high
    for each in found:
        assert each.num_evaluations > 400
        assert each.num_nan == (each.num_evaluations - 200 if math.isnan(wall) else 0)


def test_little_below_a_wide_plateau_is_a_doubt():
    found = SMALL.integrate(jax.random.key(0), on_a_line(norm.isf(0.02), 0.0, 6.0))
    assert any("plateau" in doubt for doubt in found.doubts)


def test_volumes_count_live_points_as_blackjax_does():
    """Two steps, the second with a tie to the first contour, and a tie among the live points of the end."""
    steps = [
        Step(death[:, None], death, death[-1], np.array([3.0, 3.0]), born, np.array(9.0))
        for death, born in ((np.array([0.0, 1.0]), np.array([2.0, 3.0])), (np.array([1.0, 2.0]), np.array([5.0, 4.0])))
    ]
    live = np.array([3.0, 3.0, 4.0, 5.0])
    run = Run(Drawn(np.zeros((4, 1)), 4, 0), live[:, None], live, steps, np.empty((0, 2)), 1, 0.0)
    birth = np.array([np.nan, np.nan, np.nan, 1.0, np.nan, 1.0, 2.0, 2.0])
    nothing = np.zeros(len(birth))
    theirs = compute_num_live(NSInfo(StateWithLogLikelihood(nothing, nothing, run.deaths, birth), None))
    assert run.z[:, 0].tolist() == run.deaths.tolist()  # each point beside its own -U
    assert run.num_live.tolist() == np.asarray(theirs).tolist() == [4, 3, 2, 3, 4, 3, 2, 1]


@pytest.mark.parametrize("edge", [1.0, 4.0])
def test_infinite_density_is_an_error(edge):
    """Found among the draws of the reference, or on the way."""
    with pytest.raises(ebm.NonFiniteEnergyError, match="infinite density"):
        SMALL.integrate(jax.random.key(0), on_a_line(edge, -np.inf, 0.0, slope=-1.0))


@pytest.mark.parametrize(("edge", "message"), [(40.0, "zero mass"), (4.0, "have any mass")])
def test_too_little_mass_is_an_error(edge, message):
    with pytest.raises(ebm.DegenerateParticlesError, match=message):
        SMALL.integrate(jax.random.key(0), on_a_line(edge, 0.0, np.inf))


def test_a_run_that_does_not_end_says_how_far_it_came():
    method = ebm.NestedSampling(num_live=200, num_delete=20, max_steps=3)
    with pytest.raises(ebm.EnergyError, match=r"max_steps = 3.* nats of log Z"):
        method.integrate(jax.random.key(0), PROBLEMS["mixture"].target())


def test_live_points_must_span_the_space():
    method = ebm.NestedSampling(num_live=8, num_delete=1)
    with pytest.raises(ebm.EnergyError, match="number of coordinates, 4"):
        method.integrate(jax.random.key(0), PROBLEMS["regression"].target())


@pytest.mark.parametrize(
    "settings", [{"num_delete": 0}, {"num_delete": 500}, {"num_inner_steps": 0}, {"remaining": 0.0}, {"max_steps": 0}]
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ebm.EnergyError, match=next(iter(settings))):
        ebm.NestedSampling(**settings)
