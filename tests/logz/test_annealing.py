"""log Z from annealed chains: right, with an error that holds, and between its bounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from limits import FAMILY_WISE, chi2_limits, t_limit, z_limit
from problems import PROBLEMS
from scipy.special import expit

import ebm_ppl as ebm
from ebm_ppl import parallel
from ebm_ppl.kernels import Tuning
from ebm_ppl.logz import annealing
from ebm_ppl.logz.annealing import BLOCKS, Path, Stage, refine
from ebm_ppl.logz.bdmc import BOUND_ERRORS, _error_by_family
from ebm_ppl.logz.integral import relative_error
from ebm_ppl.scale import DenseScale

NUM_RUNS = 10
PILOT = ebm.SMC(num_particles=300, target_ess=0.5, num_moves=2)
NUM_CHAINS = 1024


def small(method, **settings):
    return method(**{"num_chains": NUM_CHAINS, "num_stages": 64, "pilot": PILOT} | settings)


def regression_posterior():
    """Mean and Cholesky factor of the covariance."""
    x, y = PROBLEMS["regression"].args
    covariance = np.linalg.inv(x.T @ x / 0.49 + np.eye(4) / 4)
    return covariance @ x.T @ y / 0.49, np.linalg.cholesky(covariance)


def exact_regression(key):
    mean, factor = regression_posterior()
    return mean + factor @ jax.random.normal(key, (4,))


def half_normal():
    """log Z = -log 2, with NaN for the other half."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    ebm.energy_factor("half", jnp.where(x > 0, 0.0, jnp.nan), role="loss")


def standard_error(x):
    return np.std(x, ddof=1) / np.sqrt(len(x))


def test_weights_of_both_directions_agree_for_any_schedule_and_tuning():
    """Few temperatures and moves that accept half: E_F[f exp(A)] = Z E_R[f] all the same, for every f."""
    problem = PROBLEMS["normal_mean"]
    target, num = problem.target(), 8192
    beta = np.array([0.0, 0.02, 0.3, 1.0])
    stages = Stage(np.arange(3), beta[1:], np.diff(beta), np.array([0, 1, 1]), np.array([[1, 2], [3, 1], [2, 2]]))
    scale = DenseScale(np.ones((2, 1, 1)), np.ones((2, 1, 1)))
    path = jax.tree.map(jnp.asarray, Path(stages, Tuning(np.array([2.0, 0.8]), scale)))
    keys, more, starts = (jax.random.split(jax.random.key(seed), num) for seed in range(3))
    draws = problem.means["mu"] + np.sqrt(problem.variances["mu"]) * jax.vmap(lambda key: jax.random.normal(key, (1,)))(
        starts
    )
    method = ebm.HMC()
    forward, _ = map(
        np.concatenate,
        zip(*parallel.over(annealing._forward, parallel.split(keys), target, path, method), strict=True),
    )
    reverse, _ = map(
        np.concatenate,
        zip(*parallel.over(annealing._reverse, parallel.split((more, draws)), target, path, method), strict=True),
    )
    weights = np.exp(forward - problem.log_z)
    scores = [(np.mean(weights) - 1) / standard_error(weights)]
    for shift in (-2.0, 0.0, 2.0):
        ours = expit(forward - problem.log_z - shift)
        theirs = np.exp(-shift) * expit(problem.log_z + shift - reverse)
        scores.append((np.mean(ours) - np.mean(theirs)) / np.hypot(standard_error(ours), standard_error(theirs)))
    assert np.max(np.abs(scores)) < z_limit(len(scores))
    assert np.std(forward) > 1  # a path on which all chains weighed the same would show nothing


@pytest.mark.parametrize("name", ["regression", pytest.param("mixture", marks=pytest.mark.slow)])
def test_estimate_and_its_error(name):
    problem = PROBLEMS[name]
    target = problem.target()
    found = [small(ebm.AIS).integrate(jax.random.key(seed), target) for seed in range(NUM_RUNS)]
    scores = np.array([(each.value - problem.log_z) / each.std_error for each in found])
    assert np.max(np.abs(scores)) < t_limit(2 * NUM_RUNS, 100)  # at least so many chains are effective
    assert np.mean(np.abs(scores) < 2) > 0.5  # 95 % are expected
    for each in found:
        assert not each.doubts and each.lower is None and "log Z" in each.story[0] and "log Z" in each.story[1]
        assert each.num_evaluations > NUM_CHAINS * 64 * 3


@pytest.mark.parametrize("exact", [exact_regression, None])
def test_bounds_bracket_the_truth(exact):
    problem = PROBLEMS["regression"]
    target, method = problem.target(), small(ebm.BDMC, exact=exact)
    found = [method.integrate(jax.random.key(seed), target) for seed in range(NUM_RUNS)]
    kind = "heuristic" if exact is None else "true"
    assert all(each.diagnostics["bounds"] == kind and kind in each.story[2] and not each.doubts for each in found)

    scores = np.array([(each.value - problem.log_z) / each.std_error for each in found])
    assert np.max(np.abs(scores)) < z_limit(NUM_RUNS)
    assert np.mean(np.abs(scores) < 2) > 0.5
    fails = sum((each.lower > problem.log_z) + (each.upper < problem.log_z) for each in found)
    assert fails <= st.binom.isf(FAMILY_WISE, 2 * NUM_RUNS, st.t.sf(BOUND_ERRORS, BLOCKS - 1))
    for each in found:
        assert each.lower < each.value < each.upper < each.lower + 1
        assert each.diagnostics["forward"] > each.lower and each.diagnostics["reverse"] < each.upper
    one = small(ebm.AIS).integrate(jax.random.key(0), target)
    assert np.mean([each.std_error for each in found]) < one.std_error  # two directions are better than one


@pytest.mark.slow
def test_starts_that_descend_from_few_draws_are_not_independent():
    """How many particles of a run of SMC lie in each of two modes is up to their few ancestors."""

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 3.0).expand([3]).to_event(1))
        modes = [dist.Normal(centre, 0.2).log_prob(x).sum() for centre in (-2.0, 2.0)]
        ebm.energy_factor("modes", -jnp.logaddexp(modes[0] + np.log(0.2), modes[1] + np.log(0.8)), role="loss")

    target, log_z = ebm.target(model), 3 * st.norm.logpdf(2.0, 0.0, np.hypot(3.0, 0.2))
    method = small(ebm.BDMC, num_stages=256, pilot=dataclasses.replace(PILOT, num_particles=100))
    found = [method.integrate(jax.random.key(seed), target) for seed in range(NUM_RUNS)]
    scores = np.array([(each.value - log_z) / each.std_error for each in found])
    low, high = chi2_limits(1, NUM_RUNS)
    assert low < np.sum(scores**2) < high
    assert all(each.lower < log_z < each.upper for each in found)


def test_error_by_family():
    """Of means of numbers of which each four share half of their variance."""
    rng, num = np.random.default_rng(0), 4000
    families = np.repeat(np.arange(num // 4), 4)
    x = 10 + rng.normal(size=num) + rng.normal(size=num // 4)[families]
    shuffled = rng.permutation(num)
    found = _error_by_family(x[shuffled], families[shuffled])
    assert found == pytest.approx(np.sqrt((1 + 4) / num) / 10, rel=0.1)  # 1000 families know it to 2 %
    assert _error_by_family(x, np.arange(num)) == pytest.approx(relative_error(x))
    assert _error_by_family(x, np.zeros(num, int)) == np.inf


@pytest.mark.slow
def test_evidence_of_a_model_with_a_prior_energy():
    problem = PROBLEMS["three_roles"]
    found = ebm.log_z(jax.random.key(0), problem.target(), small(ebm.BDMC), num_runs=2)
    assert abs(found.value - problem.log_z) < t_limit(2, 100) * found.std_error
    assert found.parts["prior"] == pytest.approx(problem.log_z_prior, abs=t_limit(2, 100) * found.std_error)
    assert found.method == "BDMC" and not found.doubts and found.lower < problem.log_z < found.upper
    assert found.upper - found.lower < 0.5 and found.replicates.shape == (2,)


def test_exact_draws_are_refused_where_the_evidence_is_a_difference():
    target = PROBLEMS["three_roles"].target()
    with pytest.raises(ebm.EnergyError, match="difference of two log Z"):
        ebm.BDMC(exact=exact_regression).integrate(jax.random.key(0), target)


@pytest.mark.slow
def test_exact_draws_of_another_shape_or_without_mass():
    target = PROBLEMS["regression"].target()
    with pytest.raises(ebm.EnergyError, match=r"shape \(4,\); got \(2,\)"):
        small(ebm.BDMC, exact=lambda key: jnp.zeros(2)).integrate(jax.random.key(0), target)
    with pytest.raises(ebm.DegenerateParticlesError, match="reverse chains start from points of zero mass"):
        small(ebm.BDMC, exact=lambda key: -1 - jax.random.uniform(key, (1,)), num_stages=8).integrate(
            jax.random.key(0), ebm.target(half_normal)
        )


def test_bounds_that_cross_are_a_doubt():
    """Half of the forward chains end in a mode that has 1/20 of the mass: chains back from it alone say too little."""

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 2.0))
        modes = dist.Normal(jnp.array([-2.0, 2.0]), 0.1).log_prob(x) + jnp.log(jnp.array([0.05, 0.95]))
        ebm.energy_factor("modes", -jnp.logaddexp(modes[0], modes[1]), role="loss")

    def minor(key):
        return -2 + 0.1 * jax.random.normal(key, (1,))

    found = small(ebm.BDMC, exact=minor).integrate(jax.random.key(0), ebm.target(model))
    assert any("lies above" in doubt and "does not draw" in doubt for doubt in found.doubts)


def test_a_path_too_fast_is_a_doubt():
    target = PROBLEMS["regression"].target()
    found = small(ebm.BDMC, exact=exact_regression, num_stages=4).integrate(jax.random.key(0), target)
    assert any("nats apart" in doubt for doubt in found.doubts)
    assert found.lower < PROBLEMS["regression"].log_z < found.upper
    found = small(ebm.AIS, num_stages=4).integrate(jax.random.key(0), target)
    assert any("chains are effective" in doubt for doubt in found.doubts)


@pytest.mark.parametrize(
    ("limit", "words"), [("smc.UNSETTLED", "lag behind"), ("logz.annealing.CONTRADICTION", "contradicts")]
)
def test_a_pilot_that_is_not_to_be_trusted_is_a_doubt(monkeypatch, limit, words):
    """With a limit that nothing keeps to."""
    monkeypatch.setattr(f"ebm_ppl.{limit}", -1.0)
    found = small(ebm.AIS).integrate(jax.random.key(0), PROBLEMS["regression"].target())
    assert len(found.doubts) == 1 and words in found.doubts[0]


def test_constant_energy_is_integrated_exactly():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("constant", 2.5 + 0.0 * x, role="loss")

    target = ebm.target(model)
    for method in ebm.AIS, ebm.BDMC:
        found = small(method, num_stages=8).integrate(jax.random.key(0), target)
        assert found.value == pytest.approx(-2.5, abs=1e-12) and found.std_error < 1e-12 and not found.doubts
    assert found.lower <= found.value <= found.upper < found.lower + 1e-12


def test_points_with_a_nan_energy_weigh_nothing_and_are_counted():
    """The upper bound has the share of the reference that has mass as its slack."""
    found = small(ebm.BDMC, num_stages=8).integrate(jax.random.key(0), ebm.target(half_normal))
    assert abs(found.value + np.log(2)) < z_limit(1) * found.std_error and found.num_nan > 0
    assert found.lower < -np.log(2) and found.upper == pytest.approx(0.0, abs=1e-12)


def test_infinite_density_is_an_error():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("pole", jnp.where(x > 1.0, -jnp.inf, 0.0), role="loss")

    target = ebm.target(model)
    with pytest.raises(ebm.NonFiniteEnergyError, match="infinite density"):
        small(ebm.AIS).integrate(jax.random.key(0), target)
    chain = annealing._start(jnp.array([2.0]))  # where the pilot has not seen the pole
    weighed = annealing._weigh(chain, target, Stage(0, 0.5, 0.5, 0, 1))
    assert weighed.log_weight == jnp.inf


def test_temperatures_at_equal_steps_of_length():
    beta, tuned = refine(np.array([0.0, 0.1, 1.0]), np.array([0.5, 0.5]), 2)
    np.testing.assert_allclose(beta, [0.0, 0.1, 1.0], atol=1e-12)
    np.testing.assert_array_equal(tuned, [0, 1])
    beta, tuned = refine(np.array([0.0, 1e-6, 0.01, 1.0]), np.array([0.5, 0.5, 0.999]), 50)
    assert beta[0] == 0 and beta[-1] == 1 and np.all(np.diff(beta) > 0) and np.all(np.diff(tuned) >= 0)
    assert np.sum(beta < 1e-6) > 20  # as long as the second stage


@pytest.mark.parametrize("method", [ebm.AIS, ebm.BDMC])
@pytest.mark.parametrize("settings", [{"num_chains": 100}, {"num_chains": 16}, {"num_stages": 0}, {"num_moves": 0}])
def test_settings_that_make_no_sense(method, settings):
    with pytest.raises(ebm.EnergyError, match=next(iter(settings))):
        method(**settings)
