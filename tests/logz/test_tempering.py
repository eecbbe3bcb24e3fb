"""Parallel tempering: log Z with an error that holds, draws of the posterior, and ladders that let points pass."""

import dataclasses
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from limits import chi2_limits, f_limits, t_limit, z_limit
from problems import PROBLEMS

import ebm_ppl as ebm
from ebm_ppl.logz.ladder import Rungs
from ebm_ppl.logz.replicas import _swapped, rejections, round_trips
from ebm_ppl.logz.rounds import spread_out, steps_of_barrier
from ebm_ppl.logz.tempering import _log_z, estimate

REPLICAS = 16
SMALL = ebm.ParallelTempering(num_replicas=REPLICAS, num_draws=200, num_rounds=5, num_rungs=9)
NUM_RUNS = 12
NAMES = "regression", "mixture"
LIMIT = t_limit(6, REPLICAS - 1)
KEY = jax.random.key(0)
BETA = np.array([0.0, 0.02, 0.1, 0.4, 1.0])


@cache
def runs(name):
    target = PROBLEMS[name].target()
    return [SMALL.integrate(jax.random.key(seed), target) for seed in range(NUM_RUNS)]


@pytest.mark.parametrize("name", [pytest.param(NAMES[0], marks=pytest.mark.slow), NAMES[1]])
def test_estimate_and_its_error(name):
    found = runs(name)
    errors = np.array([each.value - PROBLEMS[name].log_z for each in found])
    stated = np.array([each.std_error for each in found])
    low, high = f_limits(len(NAMES), NUM_RUNS, NUM_RUNS * (REPLICAS - 1))
    assert low < np.mean(errors**2) / np.mean(stated**2) < high
    score = np.mean(errors) / (np.std(errors, ddof=1) / np.sqrt(NUM_RUNS))
    assert abs(score) < t_limit(len(NAMES), NUM_RUNS - 1)
    for each in found:
        assert not each.doubts and f"log Z {each.value:.3f}" in each.story[2]
        assert each.num_evaluations > REPLICAS * 2 * 190 * (1 + 8 * 3)
        facts = each.diagnostics
        assert facts["num_rungs"] == 9 and facts["barrier"] == pytest.approx(np.sum(facts["rejection"]))
        assert facts["round_trip_rate"] < facts["best_round_trip_rate"]


@pytest.mark.parametrize("name", [pytest.param(NAMES[0], marks=pytest.mark.slow), NAMES[1]])
def test_moments_of_draws(name):
    """Means of independent replicas, of several seeds."""
    problem, seeds = PROBLEMS[name], range(4)
    target, num = problem.target(), sum(2 * np.size(mean) for mean in problem.means.values())
    data = [ebm.sample(jax.random.key(seed), target, SMALL, log_likelihood=False)["posterior"] for seed in seeds]
    limit = t_limit(len(NAMES) * num, REPLICAS * len(seeds) - 1)
    for site, mean in problem.means.items():
        draws = np.concatenate([each[site].values for each in data])
        for moment, truth in ((draws, mean), ((draws - mean) ** 2, problem.variances[site])):
            of_replicas = moment.mean(axis=1)
            error = of_replicas.std(axis=0, ddof=1) / np.sqrt(len(of_replicas))
            assert np.max(np.abs(of_replicas.mean(axis=0) - truth) / error) < limit, site


def _far_modes():
    """A fifth and four fifths of the mass, a dozen standard deviations apart."""
    x = numpyro.sample("x", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    parts = dist.Normal(jnp.array([[-3.0], [3.0]]), 0.5).log_prob(x).sum(-1)
    ebm.energy_factor("modes", -jnp.logaddexp(jnp.log(0.2) + parts[0], jnp.log(0.8) + parts[1]), role="loss")


@pytest.mark.slow
def test_weights_of_modes_between_which_plain_chains_do_not_pass():
    target = ebm.target(_far_modes)
    chains = ebm.sample(KEY, target, ebm.NUTS(), num_samples=500, progress_bar=False)
    assert set(np.mean(chains["posterior"]["x"].values[..., 0] > 0, axis=1)) <= {0.0, 1.0}
    data = ebm.sample(KEY, target, ebm.ParallelTempering(num_rungs=9, num_draws=512))
    share = np.mean(data["posterior"]["x"].values[..., 0] > 0, axis=1)
    error = np.std(share, ddof=1) / np.sqrt(len(share))
    assert abs(np.mean(share) - 0.8) < LIMIT * error and error < 0.05
    assert data.attrs["round_trips"] > 100


def test_group_of_the_ladder(tmp_path, capsys):
    target = PROBLEMS["regression"].target()
    data = ebm.sample(KEY, target, SMALL, num_chains=REPLICAS)
    assert "parallel tempering: 100%" in capsys.readouterr().err
    data.to_netcdf(tmp_path / "draws.nc")
    data = xr.load_datatree(tmp_path / "draws.nc")
    assert data["posterior"].sizes["chain"] == REPLICAS and data["posterior"].sizes["draw"] == 200
    ladder = data["tempering"].to_dataset()
    beta, rejected = ladder["beta"].values, ladder["rejection_rate"].values
    assert ladder.sizes == {"rung": 9} and beta[0] == 0 and beta[-1] == 1 and np.all(np.diff(beta) > 0)
    assert np.sum(rejected[:-1]) == pytest.approx(data.attrs["communication_barrier"]) and np.isnan(rejected[-1])
    assert np.all(np.diff(ladder["mean_energy"]) < 0) and np.all(ladder["accept_rate"].values[1:] > 0.5)
    assert data.attrs["sampler"] == "parallel tempering" and data.attrs["num_nan_energy"] == 0
    assert {"lp", "acceptance_rate", "diverging", "n_steps"} <= set(data["sample_stats"].data_vars)

    # The run that was drawn from says of log Z what an estimate says, and is one.
    found, alone = ebm.read_log_z(data), SMALL.integrate(KEY, target)
    assert (found.value, found.std_error) == (alone.value, alone.std_error) and found.method == SMALL.name
    assert found.diagnostics["num_evaluations"] == alone.num_evaluations and not found.doubts


def test_log_z_of_all_energies_is_no_evidence():
    """Where prior energies have a log Z of their own, which one run does not know."""
    target = PROBLEMS["three_roles"].target()
    energy = exact_energies(400).reshape(REPLICAS, -1, len(BETA))
    run = SimpleNamespace(beta=BETA, last=SimpleNamespace(energy=energy), num_evaluations=1.0, num_nan=0)
    runs = _log_z(run, target)
    tree = xr.DataTree.from_dict({"log_z": xr.Dataset({name: ("chain", each) for name, each in runs.items()})})
    with pytest.raises(ebm.EnergyError, match="less log Z of the prior"):
        ebm.read_log_z(tree)


# Mass


def _on_the_right(left, right):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    ebm.energy_factor("wall", jnp.where(x > 0, right, left), role="loss")


def on_the_right(left, right=0.0):
    """A normal with one energy on its left half and another on its right; all share one program."""
    return ebm.target(_on_the_right, np.array(left), np.array(right))


def test_constant_energy_is_exact():
    found = SMALL.integrate(KEY, on_the_right(2.5, 2.5))
    assert found.value == pytest.approx(-2.5, abs=1e-9) and found.std_error < 1e-9 and found.num_nan == 0


def test_hard_constraint():
    """Half of a normal: log Z = -log 2."""
    found = SMALL.integrate(KEY, on_the_right(np.inf))
    assert abs(found.value + np.log(2)) < LIMIT * found.std_error
    assert 0.005 < found.std_error < 0.1 and found.num_nan == 0
    assert found.diagnostics["rejection"][0] == pytest.approx(0.5, abs=0.1)


def test_points_with_a_nan_energy_have_no_mass_and_are_counted():
    with pytest.warns(ebm.EnergyWarning, match="was NaN"):
        found = ebm.log_z(KEY, on_the_right(np.nan), SMALL)
    assert abs(found.value + np.log(2)) < LIMIT * found.std_error
    assert found.method == "parallel tempering" and found.diagnostics["num_nan_energy"] > REPLICAS * 200 / 3
    with pytest.warns(ebm.EnergyWarning, match="was NaN"):
        data = ebm.sample(KEY, on_the_right(np.nan), SMALL)
    assert np.all(data["posterior"]["x"] > 0) and data.attrs["num_nan_energy"] > 0


@pytest.mark.parametrize(
    ("left", "error", "message"),
    [(-np.inf, ebm.NonFiniteEnergyError, "infinite density"), (np.nan, ebm.DegenerateParticlesError, "zero mass")],
)
def test_density_that_is_infinite_or_nowhere(left, error, message):
    with pytest.raises(error, match=message):
        SMALL.integrate(KEY, on_the_right(left, np.inf))


# Parts


def exact_energies(num, beta=BETA, seed=0):
    """Independent draws of U = 9 x^2 / 2 under a standard normal tilted by exp(-b U), shape (num, rung)."""
    x = np.random.default_rng(seed).normal(size=(num, len(beta)))
    return 4.5 * x**2 / (1 + 9 * beta)


def test_error_of_rungs_that_depend_on_one_another():
    """All rungs of a replica from the same normal draws: the worst that swaps could do."""
    num, rng = 200, np.random.default_rng(0)
    found = []
    for _ in range(num):
        x = rng.normal(size=(1, REPLICAS, 100))
        found.append(estimate(Rungs(BETA, 4.5 * x**2 / (1 + 9 * BETA)[:, None, None])))
    errors, stated = np.array(found).T
    low, high = f_limits(1, num, num * (REPLICAS - 1))
    assert low < np.mean((errors + np.log(10) / 2) ** 2) / np.mean(stated**2) < high


def test_swaps_leave_each_rung_its_distribution():
    num = 20_000
    energy = exact_energies(num)
    for number in range(2):
        keys = jax.random.split(jax.random.key(number), num)
        order = np.asarray(jax.vmap(lambda key, u, n=number: _swapped(key, jnp.asarray(BETA), u, n))(keys, energy))
        assert np.all(np.sort(order, axis=1) == np.arange(len(BETA)))
        changes = np.take_along_axis(energy, order, axis=1) - energy
        error = np.std(changes, axis=0, ddof=1) / np.sqrt(num)
        pairs = slice(number, number + 2 * ((len(BETA) - number) // 2))
        assert np.max(np.abs(np.mean(changes, axis=0))[pairs] / error[pairs]) < z_limit(8)
        swapped = (order[:, :-1] == np.arange(1, len(BETA)))[:, number::2]
        rejected = rejections(BETA, energy)[:, number::2]
        error = np.std(swapped + rejected, axis=0, ddof=1) / np.sqrt(num)
        assert np.max(np.abs(np.mean(swapped + rejected, axis=0) - 1) / error) < z_limit(8)


def test_points_of_zero_mass_are_not_swapped():
    for dead in (jnp.inf, jnp.nan):
        order = _swapped(KEY, jnp.array([0.0, 0.5, 1.0]), jnp.array([dead, 1e6, 1.0]), jnp.array(0))
        np.testing.assert_array_equal(order, np.arange(3))


def test_rungs_at_equal_steps_of_the_barrier():
    """From a poor ladder in a few rounds. Here Lambda is int E|U - U'| / 2 db = log(10) / pi, whatever the rungs."""
    beta, num = np.linspace(0.0, 1.0, 25), 20_000
    for seed in range(4):
        beta, nearest = spread_out(beta, steps_of_barrier(beta, exact_energies(num, beta, seed)[None]), 25)
        assert nearest[-1] == 23 and np.all(np.diff(nearest) >= 0)
    rejected = rejections(beta, exact_energies(num, beta, seed=4))
    steps = np.mean(rejected, axis=0)
    # Each step has its own noise, and that of the round before, by which the rungs were placed.
    assert np.sum((steps - np.mean(steps)) ** 2 / (2 * np.var(rejected, axis=0) / num)) < chi2_limits(1, 23)[1]
    whole = np.sum(rejected, axis=1)
    assert abs(np.mean(whole) - np.log(10) / np.pi) < z_limit(1) * np.std(whole) / np.sqrt(num)


def test_draws_without_mass_do_not_drag_the_rungs_to_the_reference():
    energy = exact_energies(1000)
    dead = energy.copy()
    dead[::2, 0] = np.inf
    dead[1::4, 0] = np.nan
    assert steps_of_barrier(BETA, dead[None])[0] == pytest.approx(steps_of_barrier(BETA, energy[3::4][None])[0])


def test_walkers_pass_as_often_as_rejections_say():
    """Where moves forget where they were: one round trip in 2 + 2 sum_k r_k / (1 - r_k) moves of all walkers."""
    num, moves, at_first = 100, 1500, 300

    def walk(walker, number):
        energy = 4.5 * jax.random.normal(jax.random.fold_in(KEY, number), (num, len(BETA))) ** 2 / (1 + 9 * BETA)
        keys = jax.random.split(jax.random.fold_in(KEY, moves + number), num)
        order = jax.vmap(lambda key, u: _swapped(key, jnp.asarray(BETA), u, number))(keys, energy)
        return jnp.take_along_axis(walker, order, axis=1), walker[:, jnp.array([0, -1])]

    _, ends = jax.lax.scan(walk, jnp.broadcast_to(jnp.arange(len(BETA)), (num, len(BETA))), jnp.arange(moves))
    ends = np.moveaxis(np.asarray(ends), 0, 1)
    rates = (round_trips(ends) - round_trips(ends[:, :at_first])) / (moves - at_first)
    r = np.mean(rejections(BETA, exact_energies(1_000_000)), axis=0)
    score = (np.mean(rates) - 1 / (2 + 2 * np.sum(r / (1 - r)))) / (np.std(rates, ddof=1) / np.sqrt(num))
    assert abs(score) < t_limit(1, num - 1)


def test_round_trips():
    up_and_down = [(0, 2), (1, 0), (1, 0), (0, 1)]  # walker 0 rises and comes back, walker 1 has only risen
    only_down = [(1, 2), (2, 0), (2, 1)]
    np.testing.assert_array_equal(round_trips(np.array([up_and_down])), [1])
    np.testing.assert_array_equal(round_trips(np.array([only_down])), [0])


def test_number_of_rungs_from_the_barrier(monkeypatch):
    monkeypatch.setattr("ebm_ppl.logz.rounds.FIRST_RUNGS", 9)  # which the other tests have compiled
    method = dataclasses.replace(SMALL, num_rungs=None)
    assert method.integrate(KEY, on_the_right(2.0)).diagnostics["num_rungs"] == 5


@pytest.mark.parametrize(
    ("limit", "extreme", "words"),
    [
        ("LARGEST_RHAT", 0.0, "replicas disagree"),
        ("FEWEST_TRIPS", 1000, "round trips"),
        ("HIGH_REJECTION", -1.0, "too far apart"),
        ("LOW_ACCEPTANCE", 2.0, "hardly move"),
    ],
)
def test_a_ladder_that_is_not_to_be_trusted_is_a_doubt(monkeypatch, limit, extreme, words):
    """With a limit that nothing keeps to."""
    monkeypatch.setattr(f"ebm_ppl.logz.tempering.{limit}", extreme)
    found = SMALL.integrate(KEY, on_the_right(2.0))
    assert len(found.doubts) == 1 and words in found.doubts[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_replicas": 3}, "num_replicas is 4 at least"),
        ({"num_rungs": 1}, "num_rungs is 2 at least"),
        ({"num_rounds": 0}, "num_rounds is a positive number"),
        ({"num_draws": 255}, "num_draws / 64 moves, which must be 4 at least"),
        ({"kernel": ebm.MCLMC(adjusted=False)}, "does not leave its target invariant"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ebm.EnergyError, match=message):
        ebm.ParallelTempering(**settings)


@pytest.mark.parametrize("settings", [{"num_warmup": 10}, {"thin": 2}])
def test_settings_of_chains_are_refused(settings):
    with pytest.raises(ebm.EnergyError, match="tunes itself in rounds"):
        ebm.sample(KEY, on_the_right(0.0), SMALL, **settings)
