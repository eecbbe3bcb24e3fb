"""Tempered SMC: evidences, error bars and particles, on every problem with a known evidence."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from limits import chi2_limits, t_limit, z_limit
from problems import FUNNEL_IN_A_BOX, PROBLEMS, Problem, funnel_in_a_box

import ebm_ppl as ebm
from ebm_ppl import parallel, smc

NUM_RUNS = 200
"""Enough that a right 95 % interval falls below 90 % in none of the problems: with fifty runs one in thirty would."""
COSTLY = {"correlated_box": 50, "correlated_normal": 50}
"""Fewer runs of the problems in many dimensions."""
SAMPLER = ebm.SMC(num_particles=500)
USED_AGAIN = {
    "waste-free": ebm.SMC(num_particles=2000, chain_length=10, num_moves=1),
    "persistent": ebm.SMC(num_particles=500, persistence=8, num_moves=1),
}
INDEPENDENCE = ebm.SMC(num_particles=500, kernel=ebm.Independence())
KNOWN = [name for name, problem in PROBLEMS.items() if "SMC" in problem.samplers]
ALIKE = {
    *("beta_binomial", "gamma_poisson", "absolute_loss", "dynamic_support", "correlation", "tilted_prior"),
    *("dirichlet_multinomial", "constant_partition", "quartic", "eight_schools"),
    *("enumerated", "double_well", "correlated_box"),
}
"""Left to the slow tests: to SMC a model is its energies and draws of its reference, which `test_target.py` and the
chains of `test_mcmc.py` check for these as well, and what is then done with them is the same as for the others."""
TWO_PHASES = [name for name in KNOWN if PROBLEMS[name].log_z_prior is not None]
NUM_COMPONENTS = sum(2 * np.size(mean) for name in KNOWN for mean in PROBLEMS[name].means.values())


@dataclasses.dataclass(frozen=True)
class Result:
    problem: Problem
    data: object
    log_z: ebm.LogZ

    @property
    def num_runs(self) -> int:
        return len(self.log_z.replicates)

    @property
    def scores(self) -> np.ndarray:
        """z of each run, by its own error."""
        errors = np.asarray(self.log_z.diagnostics["run_std_errors"])
        return (self.log_z.replicates - self.problem.log_z) / errors


# Every problem


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in KNOWN]
)
def test_evidence_and_particles(name):
    """All runs of one problem, in one call, and all that they promise."""
    check_runs(name, SAMPLER, COSTLY.get(name, NUM_RUNS))


@pytest.mark.parametrize(
    "name",
    [name if name == "three_roles" else pytest.param(name, marks=pytest.mark.slow) for name in KNOWN],
)
@pytest.mark.parametrize("scheme", USED_AGAIN)
def test_particles_used_again(scheme, name):
    """The same promises by waste-free SMC and by persistent sampling."""
    check_runs(name, USED_AGAIN[scheme], 100)


def check_runs(name, sampler, num_runs):
    problem = PROBLEMS[name]
    data = ebm.sample(
        jax.random.key(2024),
        problem.target(),
        sampler,
        num_chains=num_runs,
        progress_bar=False,
        log_likelihood=False,
    )
    result = Result(problem, data, ebm.read_log_z(data))
    check_scores_of_log_z(result)
    check_that_two_standard_errors_cover_the_truth(result)
    check_pooled_value_and_its_error(result)
    check_moments_of_draws(result)
    check_moments_of_weighted_particles(result)
    check_that_the_path_is_whole(result, sampler)


def test_particles_that_lag_behind_are_told_of():
    """A funnel in a wide box: no error bar of its particles knows of the neck that they have not come to."""

    with pytest.warns(ebm.EnergyWarning, match="lag behind their targets"):
        estimate = ebm.log_z(jax.random.key(1), ebm.target(funnel_in_a_box), ebm.SMC(), num_runs=2, progress_bar=False)
    assert estimate.diagnostics["largest_drift"] > smc.UNSETTLED
    assert estimate.value < FUNNEL_IN_A_BOX - 5 * estimate.std_error  # the warning is right


class Overflowing(dist.Normal):
    """A normal distribution of which one draw in fifty falls off the end of floating-point numbers."""

    def sample(self, key, sample_shape=()):
        key_draw, key_lost = jax.random.split(key)
        draws = super().sample(key_draw, sample_shape)
        return jnp.where(jax.random.uniform(key_lost, draws.shape) < 0.02, jnp.inf, draws)


def overflowing():
    x = numpyro.sample("x", Overflowing(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(jnp.sum(x), 0.5), obs=1.0)


def test_draws_at_infinity_hide_no_drift():
    """They have no mass, and no part in the drift of the others, in what is learned from them, or in a spread."""
    target = ebm.target(overflowing)
    with pytest.warns(ebm.EnergyWarning, match="NaN .* times"):
        found = ebm.log_z(jax.random.key(1), target, ebm.SMC(num_particles=400))
    assert 0 < found.diagnostics["largest_drift"] < smc.UNSETTLED
    assert abs(found.value - dist.Normal(0.0, 1.5).log_prob(1.0) - 2 * np.log(0.98)) < z_limit(1) * found.std_error
    laplace = ebm.Laplace().integrate(jax.random.key(1), target)
    assert abs(laplace.value - dist.Normal(0.0, 1.5).log_prob(1.0)) < 1e-6, "exact here, if any ascent arrives"


def test_unknown_drift_is_a_doubt():
    assert smc.lags(np.nan) and smc.lagging(np.nan) and not smc.lags(0.0) and not smc.lagging(smc.UNSETTLED)


def check_scores_of_log_z(result):
    low, high = chi2_limits(len(KNOWN) + len(TWO_PHASES), result.num_runs)
    assert low < np.sum(result.scores**2) < high
    runs = result.data["log_z"]
    if "prior_value" in runs and "data_value" in runs:
        errors = runs["prior_std_error"].values
        deviations = runs["prior_value"].values - result.problem.log_z_prior
        if np.all(errors == 0):  # a prior energy with its log partition is normalised: there is nothing to estimate
            np.testing.assert_array_equal(deviations, 0.0)
        else:
            assert low < np.sum((deviations / errors) ** 2) < high


def check_that_two_standard_errors_cover_the_truth(result):
    assert np.mean(np.abs(result.scores) < 2) >= 0.9


def check_pooled_value_and_its_error(result):
    """The value of all runs together, against the truth, in the error that it states."""
    estimate = result.log_z
    assert abs(estimate.value - result.problem.log_z) < t_limit(len(KNOWN), result.num_runs - 1) * estimate.std_error
    spread = np.std(estimate.replicates, ddof=1) / math.sqrt(result.num_runs)
    assert estimate.std_error >= spread


def check_moments_of_draws(result):
    """Run means are independent, so their spread is their error."""
    limit = t_limit(NUM_COMPONENTS, result.num_runs - 1)
    for site, mean in result.problem.means.items():
        draws = result.data["posterior"][site].values
        for moments, truth in (
            (draws.mean(1), mean),
            (((draws - mean) ** 2).mean(1), result.problem.variances[site]),
        ):
            error = moments.std(0, ddof=1) / math.sqrt(result.num_runs)
            assert np.max(np.abs(moments.mean(0) - truth) / error) < limit, site


def check_moments_of_weighted_particles(result):
    limit = t_limit(NUM_COMPONENTS, result.num_runs - 1)
    weight = np.exp(result.data["particles"]["log_weight"].values)
    np.testing.assert_allclose(weight.sum(1), 1.0, rtol=1e-10)
    assert np.all(weight.std(1) > 0), "the weights of the last stage were dropped"
    for site, mean in result.problem.means.items():
        values = result.data["particles"][site].values
        w = weight.reshape(weight.shape + (1,) * np.ndim(mean))
        for power, truth in ((1, 0.0), (2, result.problem.variances[site])):
            moments = np.sum(w * (values - mean) ** power, axis=1)
            error = moments.std(0, ddof=1) / math.sqrt(result.num_runs)
            assert np.max(np.abs(moments.mean(0) - truth) / error) < limit, site


def check_that_the_path_is_whole(result, sampler):
    """The stages of each run end at one, add up to its log Z by role, and keep the wanted share of particles."""
    path, runs = result.data["smc"], result.data["log_z"]
    role, beta, increments = path["role"].values, path["beta"].values, path["log_z_increment"].values
    codes = {"prior": 0, "data": 1}
    for name, code in codes.items():
        if not np.any(role == code):  # no such energy, or one that is normalised
            assert np.all(runs.get(f"{name}_value", np.zeros(1)) == 0)
            continue
        stages = beta[:, role == code]
        np.testing.assert_array_equal(np.nanmax(stages, axis=1), 1.0)
        steps = np.diff(stages, axis=1, prepend=0.0)
        assert np.all((steps > 0) | np.isnan(steps))
        np.testing.assert_allclose(
            np.nansum(increments[:, role == code], axis=1), runs[f"{name}_value"].values, rtol=1e-10
        )
    share = path["ess"].values / sampler.num_particles
    assert np.nanmin(share) > sampler.target_ess - 0.05


def test_error_of_a_single_run_is_calibrated():
    """Many short stages: resampling stirs the genealogy more than the weights do, and the error must not see it."""
    problem = PROBLEMS["normal_mean"]
    sampler = ebm.SMC(num_particles=300, target_ess=0.95)
    estimate = ebm.log_z(jax.random.key(5), problem.target(), sampler, num_runs=100)
    scores = (estimate.replicates - problem.log_z) / np.asarray(estimate.diagnostics["run_std_errors"])
    low, high = chi2_limits(1, 100)
    assert low < np.sum(scores**2) < high


@pytest.mark.parametrize("scheme", USED_AGAIN)
def test_error_of_particles_used_again_is_calibrated(scheme):
    """Short stages: a chain's states are alike, and the particles of a stage are weighed over and over."""
    problem = PROBLEMS["normal_mean"]
    sampler = dataclasses.replace(USED_AGAIN[scheme], target_ess=0.9)
    estimate = ebm.log_z(jax.random.key(5), problem.target(), sampler, num_runs=100)
    scores = (estimate.replicates - problem.log_z) / np.asarray(estimate.diagnostics["run_std_errors"])
    low, high = chi2_limits(len(USED_AGAIN), 100)
    assert low < np.sum(scores**2) < high


@pytest.mark.parametrize("scheme", USED_AGAIN)
def test_particles_used_again_know_no_mass_and_nan(scheme):
    """Half of the reference has no mass, and a part of it no energy at all: counted, and given none."""

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("e", jnp.where(x > 2.0, jnp.nan, jnp.where(x < 0.0, jnp.inf, 3 * x)), role="loss")

    truth = 4.5 + math.log(st.norm.cdf(5.0) - st.norm.cdf(3.0))
    with pytest.warns(ebm.EnergyWarning, match="NaN"):
        estimate = ebm.log_z(jax.random.key(1), ebm.target(model), USED_AGAIN[scheme], num_runs=10)
    assert estimate.diagnostics["num_nan_energy"] > 0
    scores = (estimate.replicates - truth) / np.asarray(estimate.diagnostics["run_std_errors"])
    low, high = chi2_limits(len(USED_AGAIN), 10)
    assert low < np.sum(scores**2) < high


def test_error_of_a_single_family_is_unknown():
    """Of a few particles all descend from one in many runs: no families are left to tell the error by."""
    problem = PROBLEMS["normal_mean"]
    sampler = ebm.SMC(num_particles=4, target_ess=0.95)
    estimate = ebm.log_z(jax.random.key(0), problem.target(), sampler, num_runs=16)
    assert max(estimate.diagnostics["run_std_errors"]) > 1e6


# What a partition function means


def _quick(model, *args, num_runs=4, key=0):
    """By the sampler of the registry, so that a model from there runs by the programs that are compiled already."""
    return ebm.log_z(jax.random.key(key), ebm.target(model, *args), SAMPLER, num_runs=num_runs)


def test_constant_energy_is_exact():
    def model():
        numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("constant", 1.7)

    estimate = _quick(model)
    np.testing.assert_allclose(estimate.replicates, -1.7, rtol=1e-12)
    assert estimate.std_error < 1e-6
    assert estimate.value == pytest.approx(-1.7, rel=1e-12)


def test_no_energies_have_log_z_zero():
    def model():
        numpyro.sample("x", dist.Normal(0.0, 1.0))

    estimate = _quick(model)
    assert (estimate.value, estimate.std_error) == (0.0, 0.0)


def test_evidence_is_a_difference_of_stages():
    """A constant in a prior energy cancels in the evidence, and one in a loss does not."""

    def model(in_prior, in_loss, y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("prior", x**2 + in_prior)
        ebm.energy_factor("loss", in_loss, role="loss")
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    def run(in_prior, in_loss):
        return _quick(model, jnp.asarray(in_prior), jnp.asarray(in_loss), jnp.asarray(0.5))

    plain, prior, loss = run(0.0, 0.0), run(3.0, 0.0), run(0.0, 3.0)
    assert set(plain.parts) == {"prior", "data"}
    assert plain.value == plain.parts["data"]
    assert prior.value == pytest.approx(plain.value, abs=1e-8)
    assert prior.parts["prior"] == pytest.approx(plain.parts["prior"] - 3.0, abs=1e-8)
    assert loss.value == pytest.approx(plain.value - 3.0, abs=1e-8)
    assert loss.parts["prior"] == pytest.approx(plain.parts["prior"], abs=1e-8)


def test_log_bayes_factor_of_two_models_of_the_same_data():
    """Two priors of a Gaussian mean: the difference of two known evidences."""
    y = np.array([0.3, 1.2, -0.4])

    def model(y, scale):
        mu = numpyro.sample("mu", dist.Normal(0.0, scale))
        numpyro.sample("y", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=y)

    def evidence(scale):
        covariance = np.eye(3) + scale**2
        return -0.5 * (y @ np.linalg.solve(covariance, y) + np.linalg.slogdet(2 * np.pi * covariance)[1])

    wide, narrow = (_quick(model, y, np.array(scale), num_runs=20, key=key) for key, scale in enumerate((10.0, 1.0)))
    factor = wide - narrow
    assert factor.std_error == pytest.approx(math.hypot(wide.std_error, narrow.std_error))
    assert abs(factor.value - (evidence(10.0) - evidence(1.0))) < t_limit(1, 19) * factor.std_error


def test_different_data_are_not_compared():
    problem = PROBLEMS["normal_mean"]
    one, other = (_quick(problem.model, y) for y in (*problem.args, problem.args[0] + 0.1))
    with pytest.raises(ebm.IncomparableError, match="different observed data"):
        one - other
    assert (one - one).value == 0.0


def test_arithmetic_of_log_z():
    a = ebm.LogZ(3.0, 0.3, method="SMC", data_id="d", lower=2.0, upper=4.0, replicates=np.array([2.9, 3.1]))
    b = ebm.LogZ(1.0, 0.4, method="AIS", data_id="d", lower=0.5, upper=1.5)
    difference, total = a - b, a + b
    assert (difference.value, difference.std_error) == (2.0, pytest.approx(0.5))
    assert (difference.lower, difference.upper) == (0.5, 3.5)
    assert (total.value, total.std_error) == (4.0, pytest.approx(0.5))
    assert (total.lower, total.upper) == (2.5, 5.5)
    assert difference.method == "SMC, AIS"
    assert (-a).value == -3.0 and (-a).std_error == 0.3 and ((-a).lower, (-a).upper) == (-4.0, -2.0)
    shifted = a - 1.0
    assert (shifted.value, shifted.std_error, shifted.lower, shifted.upper) == (2.0, 0.3, 1.0, 3.0)
    np.testing.assert_allclose(shifted.replicates, [1.9, 2.1])
    assert sum([a, b], ebm.LogZ(0.0, 0.0)).value == 4.0
    assert float(a) == 3.0 and str(a) == "3.000 ± 0.300"
    assert str(ebm.LogZ(1.2345678, 0.00026)) == "1.23457 ± 0.00026"
    assert [str(ebm.LogZ(1.0, error)) for error in (0.0, math.inf, math.nan, 1e-9)] == [
        *("1.000 ± 0.000", "1.000 ± inf", "1.000 ± nan", "1.000000 ± 0.000000")
    ]
    other = dataclasses.replace(b, data_id="other")
    none = dataclasses.replace(b, data_id=None)
    for wrong in (lambda: a - other, lambda: a + (-other), lambda: (a + b) - (a + other), lambda: a - none):
        with pytest.raises(ebm.IncomparableError):
            wrong()
    assert (a + (-b)).value == 2.0 and (a + other - (other + b)).value == 2.0 and (a - b).data_id is None


# Keys, kernels, refusals


def test_runs_are_independent_and_reproducible():
    problem = PROBLEMS["normal_mean"]
    once = _quick(problem.model, *problem.args, num_runs=4)
    again = _quick(problem.model, *problem.args, num_runs=4)
    other = _quick(problem.model, *problem.args, num_runs=4, key=1)
    np.testing.assert_array_equal(once.replicates, again.replicates)
    assert len(np.unique(np.concatenate([once.replicates, other.replicates]))) == 8


def test_particles_move_independently():
    """Particles that share an ancestor part from it each in its own direction."""

    def model(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(x.sum(), 0.1), obs=y)

    data = ebm.sample(
        jax.random.key(0), ebm.target(model, 3.0), ebm.SMC(num_particles=300), num_chains=2, progress_bar=False
    )
    for run in data["posterior"]["x"].values:
        moved = np.unique(run, axis=0)
        # Only a particle whose every move was rejected can be a copy of another.
        assert len(moved) > 0.95 * len(run)


@pytest.mark.parametrize(
    "kernel", [ebm.MALA(), pytest.param(ebm.MCLMC(), marks=pytest.mark.slow)], ids=["MALA", "MCLMC"]
)
def test_other_kernels(kernel):
    problem = PROBLEMS["regression"]
    sampler = ebm.SMC(kernel=kernel, num_moves=10 if kernel.name == "MALA" else 3)
    estimate = ebm.log_z(jax.random.key(1), problem.target(), sampler, num_runs=50)
    scores = (estimate.replicates - problem.log_z) / np.asarray(estimate.diagnostics["run_std_errors"])
    low, high = chi2_limits(2, 50)
    assert low < np.sum(scores**2) < high


@pytest.mark.slow
@pytest.mark.parametrize("name", ["three_roles", "mixture"])
def test_moves_that_jump(name):
    """The same promises by an independence sampler: two modes that overlap, and two phases."""
    check_runs(name, INDEPENDENCE, NUM_RUNS)


def test_moves_that_jump_count_each_proposal():
    problem, num = PROBLEMS["regression"], INDEPENDENCE.num_particles
    sampler = dataclasses.replace(INDEPENDENCE, kernel=ebm.Independence(local=ebm.MALA()))
    data = ebm.sample(jax.random.key(0), problem.target(), sampler, num_chains=2, progress_bar=False)
    path = data["smc"]
    done = np.isfinite(path["beta"].values)
    # Two evaluations a move, one where the moves start, and one for the energies where they end.
    np.testing.assert_array_equal(path["num_evaluations"].values[done], num * (2 * path["num_moves"].values[done] + 2))


def test_moves_that_jump_keep_a_mode_that_they_never_propose():
    """A narrow mode of a tenth of the mass, which a Student t distribution of both hardly ever meets."""

    def model():
        x = numpyro.sample("x", dist.Uniform(-10.0, 10.0).expand([6]).to_event(1))
        wide = math.log(0.9) + jnp.sum(st_norm(x, 3.0, 1.0))
        narrow = math.log(0.1) + jnp.sum(st_norm(x, -3.0, 0.3))
        ebm.energy_factor("modes", -jnp.logaddexp(wide, narrow), role="loss")

    def st_norm(x, loc, scale):
        return dist.Normal(loc, scale).log_prob(x)

    estimate = ebm.log_z(jax.random.key(0), ebm.target(model), INDEPENDENCE, num_runs=20)
    scores = (estimate.replicates + 6 * math.log(20)) / np.asarray(estimate.diagnostics["run_std_errors"])
    low, high = chi2_limits(1, 20)
    assert low < np.sum(scores**2) < high


@pytest.mark.slow
def test_moves_that_jump_in_single_precision(run_in_float32):
    printed = run_in_float32(
        """
        import jax, numpy as np, numpyro, numpyro.distributions as dist
        import ebm_ppl as ebm

        def model(y):
            x = numpyro.sample("x", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

        target = ebm.target(model, np.array([1.5, 1.5], np.float32))
        sampler = ebm.SMC(num_particles=500, kernel=ebm.Independence())
        data = ebm.sample(jax.random.key(0), target, sampler, num_chains=20, progress_bar=False)
        assert data["posterior"]["x"].dtype == np.float32
        estimate = ebm.read_log_z(data)
        truth = -np.log(2 * np.pi * 5) - 1.5**2 / 5
        print(*(estimate.replicates - truth) / np.asarray(estimate.diagnostics["run_std_errors"]))
        """
    )
    low, high = chi2_limits(1, 20)
    assert low < np.sum(np.array(printed.split(), float) ** 2) < high


def test_new_data_of_the_same_shape_is_not_traced_again():
    traces = 0

    def model(y):
        nonlocal traces
        traces += 1
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0).expand([3]).to_event(1), obs=y)

    def run(y):
        built = ebm.target(model, y)
        before = traces
        value = ebm.log_z(jax.random.key(0), built, ebm.SMC(num_particles=50)).value
        return value, traces - before

    first, cold = run(np.array([0.1, 0.2, 0.3]))
    second, warm = run(np.array([1.1, 0.2, 0.3]))
    assert cold > 0 and warm == 0
    assert first != second


def test_refusals_are_sentences():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("e", x**2)

    target = ebm.target(model)
    with pytest.raises(ebm.EnergyError, match="target_ess is a share"):
        ebm.SMC(target_ess=1.0)
    with pytest.raises(ebm.EnergyError, match="got 1000 with chain_length 7"):
        ebm.SMC(chain_length=7)
    with pytest.raises(ebm.EnergyError, match="got 2000 with chain_length 1000"):
        ebm.SMC(num_particles=2000, chain_length=1000)
    with pytest.raises(ebm.EnergyError, match="persistence is a number of stages"):
        ebm.SMC(persistence=0)
    with pytest.raises(ebm.EnergyError, match="Unadjusted MCLMC"):
        ebm.SMC(kernel=ebm.MCLMC(adjusted=False))
    with pytest.raises(ebm.EnergyError, match="fitted to particles, which a chain does not have"):
        ebm.sample(jax.random.key(0), target, ebm.Independence())
    with pytest.raises(ebm.EnergyError, match="fitted to particles, which a chain does not have"):
        ebm.as_numpyro_kernel(ebm.Independence(), model)
    with pytest.raises(ebm.EnergyError, match="fitted to particles, which a replica of parallel tempering"):
        ebm.ParallelTempering(kernel=ebm.Independence())
    for setting in ({"num_samples": 10}, {"num_warmup": 10}, {"thin": 2}):
        with pytest.raises(ebm.EnergyError, match="SMC has particles instead of draws"):
            ebm.sample(jax.random.key(0), target, ebm.SMC(), **setting)
    with pytest.raises(ebm.EnergyError, match="no group 'log_z'"):
        ebm.read_log_z(ebm.prior_predictive(jax.random.key(0), ebm.target(lambda: numpyro.sample("x", dist.Normal()))))


def test_improper_reference_is_refused_for_log_z_alone():
    def model(y):
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    target = ebm.target(model, jnp.asarray(0.5))
    with pytest.raises(ebm.NoReferenceError, match="'x' is improper"):
        ebm.log_z(jax.random.key(0), target)


def test_progress_bar_changes_nothing(capsys):
    problem = PROBLEMS["normal_mean"]
    target = problem.target()
    shown = ebm.log_z(jax.random.key(0), target, SAMPLER, num_runs=4, progress_bar=True)
    assert "SMC data" in capsys.readouterr().err
    hidden = ebm.log_z(jax.random.key(0), target, SAMPLER, num_runs=4, progress_bar=False)
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(shown.replicates, hidden.replicates)


def test_runs_of_a_model_without_linear_algebra_go_in_threads(monkeypatch):
    """Our own covariances are of one matrix each: a batch of them would make the runs take turns."""
    prepare, in_threads = parallel.prepare_over, {}

    def recorded(function, *args, **settings):
        program = prepare(function, *args, **settings)
        in_threads[function.__name__] = program.in_threads
        return program

    monkeypatch.setattr(parallel, "prepare_over", recorded)
    ebm.log_z(jax.random.key(0), PROBLEMS["regression"].target(), SAMPLER, num_runs=2)
    assert in_threads == {"initial": True, "enter": True, "_stage": True}
