"""log Z from a ladder of chains: three estimators, right, with errors that hold."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from limits import chi2_limits, t_limit, z_limit
from problems import PROBLEMS
from scipy.signal import lfilter

import ebm_ppl as ebm
from ebm_ppl.logz.ladder import Rungs

NUM_RUNS = 20
CHAINS = 16
METHODS = ebm.SteppingStone, ebm.ThermodynamicIntegration, ebm.MBAR
NAMES = "regression", "mixture"
WITH_PRIOR = "three_roles"
LIMIT = t_limit(len(METHODS) * (NUM_RUNS * len(NAMES) + 1), CHAINS - 1)
"""Of each score, were its whole error from one rung: that of several has more degrees of freedom."""
SQUARES = chi2_limits(len(METHODS) * len(NAMES), NUM_RUNS)

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def small(method, num_draws=100):
    pilot = ebm.SMC(num_particles=300, target_ess=0.9, num_moves=2)
    return method(num_chains=CHAINS, num_warmup=20, num_draws=num_draws, pilot=pilot)


def target_of(energy):
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("energy", energy(x), role="loss")

    return ebm.target(model)


CONSTANT = target_of(lambda x: 2.5 + 0.0 * x)
HARD = target_of(lambda x: jnp.where(x > 0, 0.0, jnp.inf))
NAN = target_of(lambda x: jnp.where(x > 0, 0.0, jnp.nan))


@each_method
@pytest.mark.parametrize("name", [pytest.param(NAMES[0], marks=pytest.mark.slow), NAMES[1]])
def test_estimate_and_its_error(name, method):
    problem = PROBLEMS[name]
    target = problem.target()
    found = [small(method).integrate(jax.random.key(seed), target) for seed in range(NUM_RUNS)]
    scores = np.array([(each.value - problem.log_z) / each.std_error for each in found])
    assert np.max(np.abs(scores)) < LIMIT
    low, high = SQUARES
    # The error of an integral is that of its rule as well, which has one sign.
    assert np.sum(scores**2) < high and (np.sum(scores**2) > low or method is ebm.ThermodynamicIntegration)
    for each in found:
        assert each.num_evaluations > CHAINS * 120 * (each.diagnostics["num_rungs"] - 1)
        assert each.diagnostics["least_acceptance"] > 0.5 and "log Z" in each.story[1]


@each_method
def test_evidence_of_a_model_with_a_prior_energy(method):
    problem = PROBLEMS[WITH_PRIOR]
    found = ebm.log_z(jax.random.key(1), problem.target(), small(method, num_draws=200))
    assert abs(found.value - problem.log_z) / found.std_error < LIMIT
    assert found.parts["prior"] == pytest.approx(problem.log_z_prior, abs=LIMIT * found.std_error)
    assert found.std_error < 0.06 and found.method == method.name and not found.doubts
    assert found.story[0].startswith("prior: pilot")


BETA = np.array([0.0, 0.05, 0.2, 0.5, 1.0])
NORMAL_LOG_Z = -0.5 * np.log(10.0)


def ladder_of_normals(seed, memory, num_draws=100):
    """Autocorrelated chains for U = 9 x^2 / 2 under a standard normal, whose draws are exact: -log(10) / 2."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(BETA), CHAINS, num_draws))
    x[1:, :, 1:] *= np.sqrt(1 - memory**2)
    x[1:] = lfilter([1.0], [1.0, -memory], x[1:])
    return Rungs(BETA, 4.5 * x**2 / (1 + 9 * BETA)[:, None, None])


@each_method
@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_error_is_calibrated_for_chains_with_a_memory(memory, method):
    num = 300
    found = [method()._estimate(ladder_of_normals(seed, memory)) for seed in range(num)]
    errors = np.array([each.value - NORMAL_LOG_Z for each in found])
    scores = errors / np.array([each.std_error for each in found])
    low, high = chi2_limits(2 * len(METHODS), num)
    assert np.sum(scores**2) < high
    if method is not ebm.ThermodynamicIntegration:
        assert np.sum(scores**2) > low
        assert abs(np.mean(scores)) * np.sqrt(num) < z_limit(2 * len(METHODS))


def test_error_of_the_rule_of_integration():
    """On the same energies the correction makes the rule better, and what error is left is in the error bar."""
    found = [ebm.ThermodynamicIntegration()._estimate(ladder_of_normals(seed, 0.0, 2000)) for seed in range(20)]
    bias = abs(np.mean([each.value for each in found]) - NORMAL_LOG_Z)
    stated = np.mean([each.diagnostics["discretisation_error"] for each in found])
    mean, h = 4.5 / (1 + 9 * BETA), np.diff(BETA)
    stone = -0.5 * np.log(1 + 9 * BETA[1])
    uncorrected = abs(stone - h[1:] @ (mean[1:-1] + mean[2:]) / 2 - NORMAL_LOG_Z)
    assert bias < 0.3 * uncorrected and 0.5 * bias < stated < uncorrected


def test_rungs_too_far_apart_for_an_integral_are_a_doubt():
    few = Rungs(*(x[[0, 1, 4]] for x in ladder_of_normals(0, 0.0)))
    found = ebm.ThermodynamicIntegration()._estimate(few)
    assert "too far apart" in found.doubts[0] and abs(found.value - NORMAL_LOG_Z) < 2 * found.std_error
    assert not ebm.ThermodynamicIntegration()._estimate(Rungs(few.beta[:2], few.energy[:2])).doubts


@each_method
def test_constant_energy_is_exact(method):
    found = ebm.log_z(jax.random.key(0), CONSTANT, small(method))
    assert found.value == pytest.approx(-2.5, abs=1e-9) and found.std_error < 1e-9


@each_method
def test_hard_constraint(method):
    """Half of a normal: log Z = -log 2."""
    found = small(method).integrate(jax.random.key(0), HARD)
    assert abs(found.value + np.log(2)) < LIMIT * found.std_error
    assert 0.01 < found.std_error < 0.1 and found.num_nan == 0


@pytest.mark.slow
def test_points_with_a_nan_energy_have_no_mass_and_are_counted():
    with pytest.warns(ebm.EnergyWarning, match="was NaN"):
        found = ebm.log_z(jax.random.key(0), NAN, small(ebm.MBAR))
    assert abs(found.value + np.log(2)) < LIMIT * found.std_error
    assert found.diagnostics["num_nan_energy"] > CHAINS * 100 / 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chains": 3}, "num_chains and num_draws are 4 at least"),
        ({"num_draws": 3}, "num_chains and num_draws are 4 at least"),
        ({"num_warmup": -1}, "num_warmup is not negative"),
        ({"num_chains": 40, "pilot": ebm.SMC(num_particles=20)}, "a particle of its own"),
    ],
)
@each_method
def test_settings_that_make_no_sense(method, settings, message):
    with pytest.raises(ebm.EnergyError, match=message):
        method(**settings)
