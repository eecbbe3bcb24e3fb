"""Results in ArviZ's schema: groups, names of dimensions, files, predictions; and the arithmetic of `LogZ`."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from arviz_stats import loo
from limits import t_limit, z_limit
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import random_eqx_module
from scipy.integrate import quad
from scipy.special import expit

import ebm_ppl
from ebm_ppl.arviz import data_id, to_datatree
from ebm_ppl.stages import final_values
from ebm_ppl.typing import Draws, LogZ

Y = jnp.array([0.3, -1.2, 0.8])
CHAINS, DRAWS, PARTICLES, FEATURES = 2, 200, 64, 2


def model(y):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([FEATURES]).to_event(1))
    with numpyro.plate("county", 3):
        effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
        mean = numpyro.deterministic("mean", effect + slope[0])
        numpyro.sample("y", dist.Normal(mean, 3.0), obs=y)
    ebm_ppl.energy_factor("smooth", jnp.sum(jnp.diff(effect) ** 2))
    ebm_ppl.energy_factor("misfit", jnp.sum(slope**2), role="loss", beta=0.5)


DIMS, COORDS = {"slope": ["feature"]}, {"county": ["a", "b", "c"], "feature": ["age", "births"]}


def draw_chains(target, **options):
    short = {"num_chains": CHAINS, "num_warmup": DRAWS, "num_samples": DRAWS, "progress_bar": False}
    return ebm_ppl.sample(jax.random.key(0), target, **short, **options)


@pytest.fixture(scope="module")
def target():
    return ebm_ppl.target(model, Y)


@pytest.fixture(scope="module")
def chains(target):
    return draw_chains(target, dims=DIMS, coords=COORDS)


@pytest.fixture(scope="module")
def particles(target):
    return ebm_ppl.sample(
        jax.random.key(0),
        target,
        ebm_ppl.SMC(num_particles=PARTICLES),
        num_chains=CHAINS,
        progress_bar=False,
        dims=DIMS,
        coords=COORDS,
    )


@pytest.fixture(params=["chains", "particles"])
def data(request):
    return request.getfixturevalue(request.param)


# Groups


COMMON = {"posterior", "sample_stats", "log_likelihood", "observed_data"}


def test_groups(chains, particles):
    assert set(chains.children) == COMMON
    assert set(particles.children) == COMMON | {"particles", "smc", "log_z"}


def test_variables_and_dims(data):
    posterior = data["posterior"]
    assert {name: variable.dims for name, variable in posterior.data_vars.items()} == {
        "slope": ("chain", "draw", "feature"),
        "effect": ("chain", "draw", "county"),
        "mean": ("chain", "draw", "county"),
    }
    np.testing.assert_array_equal(posterior["county"], COORDS["county"])
    np.testing.assert_array_equal(posterior["feature"], COORDS["feature"])
    np.testing.assert_allclose(posterior["mean"], posterior["effect"] + posterior["slope"][..., 0].drop_vars("feature"))


def test_observed_data_and_likelihood_are_of_sites_only(data):
    assert set(data["observed_data"].data_vars) == {"y"} == set(data["log_likelihood"].data_vars)
    assert data["observed_data"]["y"].dims == ("county",)
    np.testing.assert_array_equal(data["observed_data"]["y"], Y)
    exact = dist.Normal(data["posterior"]["mean"].values, 3.0).log_prob(Y)
    np.testing.assert_allclose(data["log_likelihood"]["y"], exact, rtol=1e-10)
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "county")


def test_energies_of_factors_are_statistics(data):
    stats = data["sample_stats"]
    effect, slope = data["posterior"]["effect"].values, data["posterior"]["slope"].values
    np.testing.assert_allclose(stats["energy_smooth"], np.sum(np.diff(effect) ** 2, -1), rtol=1e-10)
    np.testing.assert_allclose(stats["energy_misfit"], 0.5 * np.sum(slope**2, -1), rtol=1e-10)
    assert "energy_y" not in stats


def test_statistics_of_chains_have_arviz_names(chains):
    names = {"diverging", "acceptance_rate", "energy", "n_steps", "tree_depth", "step_size", "lp"}
    assert names <= set(chains["sample_stats"].data_vars)
    assert all(chains["sample_stats"][name].shape[:2] == (CHAINS, DRAWS) for name in names)


def test_attributes(chains, particles):
    assert chains.attrs["sampler"] == "NUTS" and particles.attrs["sampler"] == "SMC"
    for data in (chains, particles):
        assert data["posterior"].attrs["inference_library"] == "ebm_ppl"
        assert data.attrs["data_id"] == data_id(ebm_ppl.target(model, Y))


def test_shapes_of_particle_groups(particles):
    weighted, path = particles["particles"], particles["smc"]
    assert weighted["effect"].dims == ("chain", "particle", "county")
    assert weighted["effect"].shape == (CHAINS, PARTICLES, 3)
    assert weighted["log_weight"].dims == ("chain", "particle")
    np.testing.assert_allclose(np.exp(weighted["log_weight"]).sum("particle"), 1.0, rtol=1e-10)
    assert particles["posterior"]["effect"].shape == (CHAINS, PARTICLES, 3)
    for name in ("beta", "ess", "accept_rate", "log_z_increment"):
        assert path[name].dims == ("chain", "stage"), name
    assert {"prior_value", "prior_std_error", "data_value", "data_std_error"} <= set(particles["log_z"].data_vars)
    assert particles["log_z"]["data_value"].dims == ("chain",)


def test_increments_add_up_to_log_z_by_role(particles):
    path, log_z = particles["smc"], particles["log_z"]
    for code, phase in enumerate(("prior", "data")):
        total = path["log_z_increment"].where(path["role"] == code).sum("stage")
        np.testing.assert_allclose(total, log_z[f"{phase}_value"], rtol=1e-10)
        assert np.all(path["beta"].where(path["role"] == code).max("stage") == 1.0)


def test_log_z_is_known_at_every_stage(particles):
    path, log_z = particles["smc"].to_dataset(), particles["log_z"]
    for at_the_end, of_run in (
        ("log_z", "data_value"),
        ("log_z_std_error", "data_std_error"),
        ("total_evaluations", "num_evaluations"),
    ):
        np.testing.assert_allclose(final_values(path[at_the_end].values), log_z[of_run], rtol=1e-6)
    assert np.all(path["total_evaluations"].diff("stage").fillna(1) > 0)


def test_read_log_z(particles, target):
    found = ebm_ppl.read_log_z(particles)
    runs = particles["log_z"]["data_value"].values
    np.testing.assert_allclose(found.value, np.log(np.mean(np.exp(runs))), rtol=1e-12)
    np.testing.assert_array_equal(found.replicates, runs)
    assert found.std_error > 0 and found.data_id == data_id(target) and set(found.parts) == {"prior", "data"}


def test_log_z_of_chains_is_refused(chains):
    with pytest.raises(ebm_ppl.EnergyError, match="'log_z'"):
        ebm_ppl.read_log_z(chains)


def test_loo_without_an_argument(data):
    found = loo(data)
    assert np.isfinite(found.elpd) and found.n_data_points == 3


def test_log_likelihood_can_be_left_out(target):
    data = draw_chains(target, log_likelihood=False)
    assert "log_likelihood" not in data.children


def test_default_names_of_dims(target, particles):
    predicted = ebm_ppl.posterior_predictive(jax.random.key(1), target, particles)
    assert predicted["posterior_predictive"]["y"].dims == ("chain", "draw", "county")
    prior = ebm_ppl.prior_predictive(jax.random.key(1), target, num_samples=PARTICLES)
    assert prior["prior"]["slope"].dims == ("chain", "draw", "slope_dim_0")


def test_a_plate_named_as_a_dimension_of_every_result():
    def clash():
        with numpyro.plate("draw", 2):
            numpyro.sample("x", dist.Normal(0.0, 1.0))

    draws = Draws(jnp.zeros((1, 3, 2)), {}, {})
    assert to_datatree(ebm_ppl.target(clash), draws)["posterior"]["x"].dims == ("chain", "draw", "draw_dim")


# Files


def same(first: xr.DataTree, second: xr.DataTree) -> None:
    assert set(first.children) == set(second.children)
    for name in first.children:
        xr.testing.assert_identical(first[name].to_dataset(), second[name].to_dataset())
    assert set(first.attrs) == set(second.attrs)


def network_in_a_scope(y):
    """Sites whose names are paths: `first/network/weight`, `first/tilt`, `first/y` in a plate `first/n`."""

    def inner():
        network = random_eqx_module(
            "network", eqx.nn.Linear(1, "scalar", use_bias=False, key=jax.random.key(0)), prior=dist.Normal(0.0, 1.0)
        )
        ebm_ppl.energy_factor("tilt", network(jnp.ones(1)) ** 2)
        with numpyro.plate("n", 3):
            numpyro.sample("y", dist.Normal(network(jnp.ones(1)), 1.0), obs=y)

    with numpyro.handlers.scope(prefix="first"):
        inner()


@pytest.mark.parametrize(
    "sampler",
    [ebm_ppl.NUTS(), pytest.param(ebm_ppl.SMC(num_particles=100), marks=pytest.mark.slow)],
    ids=["NUTS", "SMC"],
)
def test_names_that_are_paths(sampler, tmp_path):
    target = ebm_ppl.target(network_in_a_scope, Y)
    short = {} if sampler.name == "SMC" else {"num_warmup": 100, "num_samples": 100}
    data = ebm_ppl.sample(jax.random.key(0), target, sampler, num_chains=2, progress_bar=False, **short)
    data.update(ebm_ppl.posterior_predictive(jax.random.key(1), target, data))
    data.to_netcdf(tmp_path / "data.nc", engine="h5netcdf")
    data = xr.load_datatree(tmp_path / "data.nc", engine="h5netcdf")
    weight = data["posterior"]["first.network.weight"].values[..., 0, 0]
    np.testing.assert_allclose(data["sample_stats"]["energy_first.tilt"], weight**2, rtol=1e-10)
    exact = dist.Normal(weight[..., None], 1.0).log_prob(Y)
    np.testing.assert_allclose(data["log_likelihood"]["first.y"], exact, rtol=1e-10)
    assert data["observed_data"]["first.y"].dims == ("first.n",)
    assert data["posterior_predictive"]["first.y"].dims == ("chain", "draw", "first.n")


def test_names_that_are_one_variable_are_refused():
    def clash():
        for name in ("a/b", "a.b"):
            numpyro.sample(name, dist.Normal(0.0, 1.0))

    with pytest.raises(ebm_ppl.EnergyError, match=r"'a/b' and 'a\.b'"):
        ebm_ppl.target(clash)


def test_the_prior_fits_into_the_tree_of_the_posterior(particles, target):
    """Its statistics do not take the place of the posterior's."""
    data = particles.copy()
    data.update(ebm_ppl.prior_predictive(jax.random.key(2), target, num_samples=PARTICLES))
    for name in COMMON | {"particles", "smc", "log_z"}:
        assert data[name].to_dataset().equals(particles[name].to_dataset()), name
    effect = data["prior"]["effect"].values
    np.testing.assert_allclose(data["sample_stats_prior"]["energy_smooth"], np.sum(np.diff(effect) ** 2, -1))
    assert {"particles_prior", "smc_prior", "log_z_prior", "prior_predictive"} <= set(data.children)


@pytest.mark.parametrize(("log_partition", "known"), [(None, False), ("ignore", False), (-0.5, True)])
def test_no_log_likelihood_without_log_z(log_partition, known):
    def energies(y):
        numpyro.sample("x", dist.Normal(0.0, 1.0))
        tilted = ebm_ppl.EnergyDistribution(jnp.square, dist.Normal(0.0, 1.0), log_partition=log_partition)
        with numpyro.plate("n", 3):
            numpyro.sample("y", tilted, obs=y)

    data = draw_chains(ebm_ppl.target(energies, Y))
    assert ("log_likelihood" in data.children) == known
    if known:
        np.testing.assert_allclose(
            data["log_likelihood"]["y"][0, 0], dist.Normal(0.0, 1.0).log_prob(Y) - Y**2 + 0.5, rtol=1e-10
        )


def test_netcdf_round_trip(data, tmp_path):
    path = tmp_path / "result.nc"
    data.to_netcdf(path, engine="h5netcdf")
    with xr.open_datatree(path, engine="h5netcdf") as again:
        again.load()
    same(data, again)
    assert again.attrs["sampler"] == data.attrs["sampler"]
    if "log_z" in data.children:
        assert ebm_ppl.read_log_z(again).value == ebm_ppl.read_log_z(data).value
    else:
        assert loo(again).elpd == loo(data).elpd


# Predictions


def tilted(y=None):
    """The prior energy makes x ~ N(0, 1/4); y is logistic in it."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    ebm_ppl.energy_factor("tilt", 1.5 * x**2 + 0.8 * x**4)
    with numpyro.plate("n", 4):
        numpyro.sample("y", dist.Bernoulli(logits=1.0 + 2 * x), obs=y)


BERNOULLI = jnp.array([1, 1, 0, 1])


def expectation(function, *energies):
    """Under N(0, 1) tilted by energies, by quadrature."""

    def density(x):
        return np.exp(-0.5 * x**2 - sum(energy(x) for energy in energies))

    return quad(lambda x: function(x) * density(x), -8, 8)[0] / quad(density, -8, 8)[0]


def tilt(x):
    return 1.5 * x**2 + 0.8 * x**4


def z_score(replicates, exact):
    replicates = np.asarray(replicates)
    return (replicates.mean() - exact) / (replicates.std(ddof=1) / np.sqrt(len(replicates)))


NUM_REPLICATES = 16
LIMIT = t_limit(1, NUM_REPLICATES - 1)


def test_prior_predictive_follows_the_tilted_prior():
    target = ebm_ppl.target(tilted, BERNOULLI)
    runs = [ebm_ppl.prior_predictive(jax.random.key(seed), target, num_samples=200) for seed in range(NUM_REPLICATES)]
    assert set(runs[0].children) >= {"prior", "prior_predictive"}
    assert runs[0]["prior_predictive"]["y"].shape == (1, 200, 4)
    spread = [float((run["prior"]["x"] ** 2).mean()) for run in runs]
    assert abs(z_score(spread, expectation(lambda x: x**2, tilt))) < LIMIT
    assert abs(z_score(spread, 1.0)) > LIMIT  # the reference without its energy
    ones = [float(run["prior_predictive"]["y"].mean()) for run in runs]
    assert abs(z_score(ones, expectation(lambda x: expit(1 + 2 * x), tilt))) < LIMIT


def test_prior_predictive_without_prior_energies_is_exact():
    def plain(y):
        x = numpyro.sample("x", dist.Gamma(3.0, 2.0))
        numpyro.sample("y", dist.Poisson(x), obs=y)

    prior = ebm_ppl.prior_predictive(jax.random.key(0), ebm_ppl.target(plain, 2), num_samples=2000)
    x, y = prior["prior"]["x"].values.ravel(), prior["prior_predictive"]["y"].values.ravel()
    assert prior.attrs["sampler"] == "exact" and x.shape == y.shape == (2000,)
    assert abs(x.mean() - 1.5) < z_limit(1) * np.sqrt(0.75 / 2000)
    assert abs(y.mean() - 1.5) < z_limit(1) * np.sqrt((1.5 + 0.75) / 2000)


def test_posterior_predictive():
    target = ebm_ppl.target(tilted, BERNOULLI)
    settings = ebm_ppl.SMC(num_particles=200)
    data = ebm_ppl.sample(jax.random.key(0), target, settings, num_chains=NUM_REPLICATES, progress_bar=False)
    data.update(ebm_ppl.posterior_predictive(jax.random.key(1), target, data))
    predicted = data["posterior_predictive"]["y"]
    assert predicted.dims == ("chain", "draw", "n") and set(np.unique(predicted)) == {0, 1}

    def misfit(x):
        return -3 * np.log(expit(1 + 2 * x)) - np.log(expit(-1 - 2 * x))

    exact = expectation(lambda x: expit(1 + 2 * x), tilt, misfit)
    assert abs(z_score(predicted.mean(("draw", "n")), exact)) < LIMIT


def test_predictions_of_discrete_latents():
    def mixture(y):
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("n", 3):
            label = numpyro.sample("label", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(10.0 * label + loc[label], 1.0), obs=y)

    target = ebm_ppl.target(mixture, jnp.array([0.0, 10.0, 0.5]))
    prior = ebm_ppl.prior_predictive(jax.random.key(0), target, num_samples=500)
    predicted = prior["prior_predictive"]["y"].values.reshape(500, 3)
    shares = (predicted > 5).mean(1)  # the two clusters are seven standard deviations apart
    assert abs(shares.mean() - 0.3) < z_limit(1) * shares.std() / np.sqrt(500) + 1e-3


def test_an_energy_cannot_be_predicted():
    def energies(y):
        numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", ebm_ppl.EnergyDistribution(jnp.square, dist.Normal(0.0, 1.0)), obs=y)

    with pytest.raises(ebm_ppl.EnergyError, match=r"\('y',\).*no sampler"):
        ebm_ppl.prior_predictive(jax.random.key(0), ebm_ppl.target(energies, 0.3), num_samples=3)


# LogZ


def test_difference_of_evidences():
    a = LogZ(-10.0, 0.3, "SMC", parts={"data": -10.0}, replicates=np.array([-10.0]), data_id="d")
    b = LogZ(-12.5, 0.4, "SMC", data_id="d")
    factor = a - b
    assert isinstance(factor, LogZ) and factor.value == 2.5 and factor.method == "SMC"
    np.testing.assert_allclose(factor.std_error, 0.5)
    total = a + b
    assert total.value == -22.5
    np.testing.assert_allclose(total.std_error, 0.5)
    assert str(factor) == "2.500 ± 0.500" and float(factor) == 2.5


def test_constants_shift_everything():
    a = LogZ(-10.0, 0.3, "AIS", replicates=np.array([-9.0, -11.0]), lower=-11.0, upper=-9.5, data_id="d")
    for shifted in (a + 2.0, 2.0 + a, a - (-2.0)):
        assert (shifted.value, shifted.std_error, shifted.lower, shifted.upper) == (-8.0, 0.3, -9.0, -7.5)
        np.testing.assert_array_equal(shifted.replicates, [-7.0, -9.0])
        assert shifted.data_id == "d"
    flipped = -a
    assert (flipped.value, flipped.std_error, flipped.lower, flipped.upper) == (10.0, 0.3, 9.5, 11.0)
    assert -flipped == a


def test_a_constant_minus_an_estimate():
    a = LogZ(-10.0, 0.3, lower=-11.0, upper=-9.5)
    found = 1.0 - a
    assert (found.value, found.std_error, found.lower, found.upper) == (11.0, 0.3, 10.5, 12.0)


def test_bounds_of_a_difference():
    a, b = LogZ(0.0, 0.1, "A", lower=-1.0, upper=2.0), LogZ(5.0, 0.1, "B", lower=3.0, upper=9.0)
    assert ((a - b).lower, (a - b).upper, (a - b).method) == (-10.0, -1.0, "A, B")
    assert ((a + b).lower, (a + b).upper) == (2.0, 11.0)
    assert ((a - LogZ(0.0, 0.1)).lower, (a - LogZ(0.0, 0.1)).upper) == (None, None)


def test_sum_of_estimates():
    total = sum([LogZ(1.0, 0.3), LogZ(2.0, 0.4)])
    assert total.value == 3.0
    np.testing.assert_allclose(total.std_error, 0.5)


def test_a_difference_of_the_same_data_may_go_on():
    a, b = LogZ(-10.0, 0.3, data_id="d"), LogZ(-12.5, 0.4, data_id="d")
    with pytest.raises(ebm_ppl.IncomparableError):
        (a - b) - LogZ(0.0, 0.1, data_id="e")


def test_different_data_cannot_be_compared():
    with pytest.raises(ebm_ppl.IncomparableError, match="different observed data"):
        LogZ(0.0, 1.0, data_id="a") - LogZ(0.0, 1.0, data_id="b")
    with pytest.raises(ebm_ppl.IncomparableError):
        LogZ(0.0, 1.0, data_id="a") - LogZ(0.0, 1.0)


def test_fingerprint_of_data():
    def renamed(y):
        numpyro.sample("other", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0).expand([3]), obs=y)

    assert data_id(ebm_ppl.target(renamed, Y)) == data_id(ebm_ppl.target(model, Y))
    assert data_id(ebm_ppl.target(renamed, Y + 1e-3)) != data_id(ebm_ppl.target(model, Y))
    assert data_id(ebm_ppl.target(lambda: numpyro.sample("x", dist.Normal(0.0, 1.0)))) is None


def observing(y, *, mask=True, scale=1.0, batch=(3,), to_event=0):
    """Fingerprint of a model whose one site counts as said."""

    def model(y):
        mean = numpyro.sample("x", dist.Normal(0.0, 1.0))
        with numpyro.handlers.scale(scale=scale):
            numpyro.sample("y", dist.Normal(mean, 1.0).expand(batch).mask(mask).to_event(to_event), obs=y)

    return data_id(ebm_ppl.target(model, y))


def test_fingerprint_sees_what_counts():
    all_of_it, some = observing(Y), np.array([True, False, True])
    assert (
        observing(Y, mask=np.full(3, True)) == observing(Y, scale=np.ones(3)) == observing(Y, to_event=1) == all_of_it
    )
    different = [
        all_of_it,
        observing(Y, mask=some),
        observing(Y, mask=False),
        observing(Y, scale=2.0),
        observing(Y, scale=np.array([2.0, 1.0, 1.0])),
    ]
    assert len(set(different)) == len(different)
    assert observing(Y, mask=some, to_event=1) == observing(Y, mask=some), "a mask inside of the event"
    assert observing(Y.at[1].set(np.nan), mask=some) == observing(Y, mask=some), "what a mask hides is no data"
    assert observing(Y.at[1].set(0.0), mask=some) != observing(Y.at[1].set(0.0)), "and no zero either"
    table = jnp.stack([Y, Y])
    by_row = np.array([[True, True, True], [False, False, False]])
    assert observing(table, mask=by_row, batch=(2, 3)) == observing(table, mask=by_row[:, :1], batch=(2, 3))
    assert observing(table, mask=by_row, batch=(2, 3)) != observing(table, mask=~by_row[:, :1], batch=(2, 3))


def test_fingerprint_sees_all_digits_and_no_type():
    with jax.enable_x64(True):
        stamps = np.array([1_764_000_000_123_456_789, 1_764_000_000_123_456_790, 0])
        assert observing(stamps) != observing(stamps + 1), "double precision has no room for these"
        assert observing(np.array(Y, float)) != observing(np.array(Y, float) + 1e-12)
        assert observing(np.array([16777216, 0, 1])) != observing(np.array([16777217, 0, 1])), "nor single for these"
        assert (
            observing(np.array([3, 0, 1]))
            == observing(np.array([3.0, -0.0, 1.0]))
            == observing(np.array([3.0, 0, 1], "f"))
        )
    assert (
        observing(np.array([1, 0, 1])) == observing(np.array([True, False, True])) == observing(jnp.array([1.0, 0, 1]))
    )


def test_discrete_sites_inside_scan_are_refused_for_predictions():
    """NumPyro's `infer_discrete` fails on them with an empty assertion."""

    def hidden_markov(y):
        stay = numpyro.sample("stay", dist.Beta(2.0, 2.0))

        def step(state, y):
            switched = jnp.array([[1.0, 0.0], [0.0, 1.0]])
            rows = stay * switched + (1 - stay) * (1 - switched)
            state = numpyro.sample("state", dist.Categorical(rows[state]), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(2.0 * state, 0.5), obs=y)
            return state, None

        scan(step, 0, y)

    target = ebm_ppl.target(hidden_markov, jnp.array([0.1, 2.2, 1.8, -0.3]))
    with pytest.raises(ebm_ppl.EnergyError, match="scan over discrete sites"):
        ebm_ppl.prior_predictive(jax.random.key(0), target, num_samples=5)
