"""The evidence along the observations: exact at every step, with errors that are right, and no second engine."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats as st
import xarray as xr
from cases import made
from limits import chi2_limits, t_limit
from problems import NORMAL_Y, PROBLEMS
from scipy.special import logsumexp

import ebm_ppl as ebm
from ebm_ppl.blocks import Arriving, at, axes_of, blocks

NUM_RUNS = 40
SAMPLER = ebm.SMC(num_particles=300)
TIMES = np.array([3, 1, 1, 5, 3, 8])
GRID = np.linspace(-8, 8, 20_001)
FAMILY = 2 * (len(NORMAL_Y) + len(np.unique(TIMES)))
"""Chi-square gates, and as many of the mean."""


def check(tree, exact, before=0.0):
    """z-scores of log p(y_1:t) and of its increments, run by run, in the errors that they state."""
    group = tree["sequential"]
    for name, truth in (("log_evidence", exact), ("elpd", np.diff(exact, prepend=before))):
        scores = (group[f"run_{name}"].values - truth) / group[f"run_{name}_se"].values
        low, high = chi2_limits(FAMILY, NUM_RUNS)
        sums = np.sum(scores**2, axis=0)
        assert np.all((low < sums) & (sums < high)), (name, sums)
        means = np.sqrt(NUM_RUNS) * np.mean(scores, axis=0) / np.std(scores, axis=0, ddof=1)
        assert np.max(np.abs(means)) < t_limit(FAMILY, NUM_RUNS - 1), (name, means)
        assert np.mean(np.abs(scores) < 2) >= 0.9, name
        pooled = (group[name].values - truth) / group[f"{name}_se"].values
        assert np.max(np.abs(pooled)) < t_limit(FAMILY, NUM_RUNS - 1), (name, pooled)


def test_conjugate_model_at_every_observation():
    """Normal mean, known variance: y_1:t is jointly normal for every t.

    In many short stages: resampling stirs the genealogy more than the weights do, and the error must not see it.
    """
    target = PROBLEMS["normal_mean"].target()
    sampler = ebm.SMC(num_particles=300, target_ess=0.95)
    tree = ebm.sequential_evidence(jax.random.key(1), target, sampler, num_runs=NUM_RUNS)
    sizes = range(1, len(NORMAL_Y) + 1)
    exact = [st.multivariate_normal(np.zeros(t), 0.49 * np.eye(t) + 4.0).logpdf(NORMAL_Y[:t]) for t in sizes]
    check(tree, np.array(exact))
    group, whole = tree["sequential"], ebm.read_log_z(tree)
    assert whole.value == pytest.approx(group["log_evidence"].values[-1], abs=1e-12)
    assert whole.value == pytest.approx(group["elpd"].values.sum(), abs=1e-12)
    assert whole.data_id == ebm.log_z(jax.random.key(2), target, ebm.SMC(num_particles=20)).data_id
    np.testing.assert_array_equal(group["num_observations"], 1)
    np.testing.assert_array_equal(tree["smc"]["beta"], 1.0)  # a stage for each phase
    check_ranges(tree, np.array(exact))
    # The particles end at the posterior.
    means = tree["posterior"]["mu"].values.mean(1)
    problem = PROBLEMS["normal_mean"]
    error = means.std(ddof=1) / np.sqrt(NUM_RUNS)
    assert abs(means.mean() - problem.means["mu"]) < t_limit(FAMILY, NUM_RUNS - 1) * error


def check_ranges(tree, exact):
    """Of one observation, from the first on, and in the middle; a range has the errors of neither of its ends."""
    group = tree["sequential"].to_dataset()
    names = ("log_evidence", "log_evidence_se"), ("elpd", "elpd_se")
    found = ebm.evidence_between(tree, stop=3)
    assert (found.value, found.std_error) == pytest.approx([group[name].values[3] for name in names[0]])
    found = ebm.evidence_between(tree, 2, 2)
    assert (found.value, found.std_error) == pytest.approx([group[name].values[2] for name in names[1]])
    runs = [group.isel(chain=[run]) for run in range(NUM_RUNS)]
    scores = []
    for run in runs:
        one = tree.copy()
        one["sequential"] = xr.DataTree(run.assign(elpd=run["run_elpd"][0]))
        part = ebm.evidence_between(one, 2, len(exact) - 2)
        scores.append((part.value - (exact[-2] - exact[1])) / part.std_error)
    low, high = chi2_limits(1, NUM_RUNS)
    assert low < np.sum(np.square(scores)) < high
    with pytest.raises(ebm.EnergyError, match="no observation from time 99"):
        ebm.evidence_between(tree, 99)


def everything(y, other):
    """A tilted prior, a loss outside of the plate and one inside, two sites, a scale, and a local latent site."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    ebm.energy_factor("tilt", 0.5 * jnp.abs(mu - 1.0))
    ebm.energy_factor("misfit", 0.1 * (mu + 0.5) ** 2, role="loss")
    with numpyro.plate("day", len(y)):
        local = numpyro.sample("local", dist.Normal(mu, 0.5))
        numpyro.sample("y", dist.Normal(local, 1.0), obs=y)
        ebm.energy_factor("each", 0.1 * jnp.abs(mu - y), role="loss")
        with numpyro.handlers.scale(scale=0.5):
            numpyro.sample("other", dist.Poisson(jnp.exp(0.3 * mu)), obs=other)


def test_every_kind_of_energy_in_an_order_with_ties():
    """Against quadrature on mu, with the local sites integrated in closed form."""
    y, other = np.array([0.4, 1.9, -0.7, 2.5, 1.1, 0.2]), np.array([1, 3, 0, 2, 1, 4])
    tree = ebm.sequential_evidence(
        jax.random.key(3), ebm.target(everything, y, other), SAMPLER, times=TIMES, num_runs=NUM_RUNS
    )
    each = st.norm.logpdf(y, GRID[:, None], np.sqrt(1.25)) - 0.1 * np.abs(GRID[:, None] - y)
    each += 0.5 * st.poisson.logpmf(other, np.exp(0.3 * GRID[:, None]))
    prior = st.norm.logpdf(GRID, 0, 2) - 0.5 * np.abs(GRID - 1)
    prior -= logsumexp(prior)
    start = prior - 0.1 * (GRID + 0.5) ** 2
    unique, sizes = np.unique(TIMES, return_counts=True)
    exact = np.array([logsumexp(start + each[:, TIMES <= time].sum(1)) for time in unique])
    check(tree, exact, before=logsumexp(start))
    group = tree["sequential"]
    np.testing.assert_array_equal(group["time"], unique)
    np.testing.assert_array_equal(group["num_observations"], sizes)
    error = group.attrs["before_se"]
    assert abs(group.attrs["before"] - logsumexp(start)) < t_limit(FAMILY, NUM_RUNS - 1) * error
    assert group.attrs["outside"] == "misfit"
    whole = group.attrs["before"] + group["elpd"].values.sum()
    assert whole == pytest.approx(ebm.read_log_z(tree).value, abs=1e-12)


def test_hard_constraints_and_what_is_impossible():
    """y uniform below theta: observations take the mass of particles away, and one above its prior that of all."""

    def model(y):
        theta = numpyro.sample("theta", dist.Uniform(0.0, 10.0))
        with numpyro.plate("n", len(y)):
            ebm.energy_factor("y", jnp.where(y < theta, jnp.log(theta), jnp.inf), role="loss")

    y = np.array([1.3, 0.4, 6.2, 2.0])
    sampler = ebm.SMC(num_particles=200)
    runs = ebm.sequential_evidence(jax.random.key(0), ebm.target(model, y), sampler, num_runs=10)["sequential"]
    theta = np.linspace(0, 10, 200_001)[1:]
    exact = [np.log(np.mean(np.where(theta > y[:t].max(), theta**-t, 0.0))) for t in range(1, 5)]
    scores = (runs["log_evidence"].values - exact) / runs["log_evidence_se"].values
    assert np.max(np.abs(scores)) < t_limit(4, 9), scores
    y[3] = 11.0
    with pytest.raises(ebm.DegenerateParticlesError, match=r"from time \d .*zero mass"):
        ebm.sequential_evidence(jax.random.key(0), ebm.target(model, y), sampler, num_runs=10)


@pytest.mark.parametrize(
    "name, plate",
    [("factors", None), ("nested plates", "member"), ("nested plates", "group"), ("masked observation", None)],
)
def test_all_blocks_are_the_target(name, plate):
    """What is in and what comes in add up to the energies of the target, at any two positions."""
    target = made(name)
    axes, num = axes_of(target, plate)
    _, block = blocks(np.arange(num) // 2, num, any(axis is None for _, axis in axes))
    z = jax.random.normal(jax.random.key(0), (5, target.dim))
    end = at(int(block.max()) + 1, 0.0)

    def stages(start, stop):
        return jax.jit(jax.vmap(Arriving(target, block, start, stop, axes).staged_terms))(z)

    log_reference, whole = jax.jit(jax.vmap(target.staged_terms))(z)
    middle = at(1, 0.3)
    for first, last in ((at(0, 0.0), end), (end, end), (middle, end)):
        found, energies = stages(first, last)
        np.testing.assert_allclose(found, log_reference, rtol=1e-12)
        np.testing.assert_allclose(energies.sum(1), whole.sum(1), rtol=1e-10)
    np.testing.assert_allclose(stages(at(0, 0.0), end)[1], whole, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(stages(at(0, 0.0), middle)[1][:, 1], stages(middle, end)[1][:, 0] - whole[:, 0])


def test_refusals_name_the_remedy():
    def evidence(model, *args, **settings):
        return ebm.sequential_evidence(jax.random.key(0), ebm.target(model, *args), **settings)

    def scalar():
        x = numpyro.sample("x", dist.Normal())
        ebm.energy_factor("e", x**2, role="loss")

    def no_data():
        numpyro.sample("x", dist.Normal())

    with pytest.raises(ebm.EnergyError, match=r"plates \['group', 'member'\]: say which"):
        ebm.sequential_evidence(jax.random.key(0), made("nested plates"))
    with pytest.raises(ebm.EnergyError, match="No data in a plate 'day'"):
        ebm.sequential_evidence(jax.random.key(0), made("nested plates"), plate="day")
    with pytest.raises(ebm.EnergyError, match="summed out"):
        ebm.sequential_evidence(jax.random.key(0), made("mixture"))
    with pytest.raises(ebm.EnergyError, match=r"put them in a numpyro\.plate"):
        evidence(scalar)
    with pytest.raises(ebm.EnergyError, match="no data"):
        evidence(no_data)
    with pytest.raises(ebm.EnergyError, match="shape"):
        ebm.sequential_evidence(jax.random.key(0), made("constrained"), times=[1, 2])
    with pytest.raises(ebm.EnergyError, match="NaN"):
        ebm.sequential_evidence(jax.random.key(0), made("constrained"), times=[1, 2, np.nan, 3])
    with pytest.raises(ebm.NoReferenceError):
        ebm.sequential_evidence(jax.random.key(0), made("improper"))


@pytest.mark.slow
def test_chunks_change_rounding_only():
    target = PROBLEMS["normal_mean"].target()
    whole, in_chunks = (
        ebm.sequential_evidence(jax.random.key(1), target, ebm.SMC(num_particles=60, chunk_size=size))
        for size in (None, 7)
    )
    np.testing.assert_allclose(in_chunks["sequential"]["elpd"], whole["sequential"]["elpd"], rtol=1e-9)
