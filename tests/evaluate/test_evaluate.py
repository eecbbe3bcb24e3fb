"""All of it on a line, where likelihood and log Z come from quadrature; and what is said when something is amiss."""

import dataclasses
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st
import xarray as xr
from jax.scipy.special import logsumexp
from limits import FAMILY_WISE, chi2_limits

import ebm_ppl as ebm

BASE = dist.Normal(0.0, 3.0).expand([1]).to_event(1)
GRID = np.linspace(-12, 12, 4001)[:, None]
AIS = ebm.AIS(num_chains=512, num_stages=64, pilot=ebm.SMC(num_particles=500))
BOUNDS = ebm.BDMC(num_chains=512, num_stages=64, pilot=ebm.SMC(num_particles=500))


class Quartic(eqx.Module):
    """a x^2 / 2 + b x^4: two modes that chains go between"""

    weights: jax.Array

    def __call__(self, x):
        return self.weights[0] * x[0] ** 2 / 2 + self.weights[1] * x[0] ** 4


ENERGY = Quartic(jnp.array([-1.0, 0.1]))
LOG_DENSITY = np.asarray(BASE.log_prob(GRID) - jax.vmap(ENERGY)(GRID))
LOG_Z = float(logsumexp(LOG_DENSITY) + np.log(GRID[1, 0] - GRID[0, 0]))


def draws(seed, *shape):
    """Of the density, by its distribution function."""
    mass = np.cumsum(np.exp(LOG_DENSITY - LOG_Z)) * (GRID[1, 0] - GRID[0, 0])
    return np.interp(np.random.default_rng(seed).random((*shape, 1)), mass, GRID[:, 0])


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def tree():
    centres = [[-2.0], [2.0]]
    settings = {"method": AIS, "bounds": BOUNDS, "num_draws": 1000, "num_warmup": 300, "num_simulations": 199}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.EnergyWarning)  # whether chains mix is not the question here
        return ebm.evaluate(jax.random.key(0), ENERGY, draws(1, 400), base=BASE, centres=centres, **settings)


def test_log_likelihood_is_minus_the_energy_relative_to_log_z(tree):
    data, found, log_z = draws(1, 400), tree["log_likelihood"].to_dataset(), ebm.read_log_z(tree)
    each = BASE.log_prob(data) - jax.vmap(ENERGY)(data) - log_z.value
    np.testing.assert_allclose(found["x"], each, rtol=1e-6, atol=1e-6)
    assert float(found["mean"]) == pytest.approx(float(np.mean(each)), rel=1e-6)
    assert float(found["std_error_data"]) == pytest.approx(float(np.std(each, ddof=1) / 20), rel=1e-6)
    assert float(found["std_error_log_z"]) == log_z.std_error > 0
    assert float(found["upper"] - found["lower"]) == pytest.approx(
        float(tree["log_z"]["upper"] - tree["log_z"]["lower"])
    )
    exact = float(np.mean(each)) + log_z.value - LOG_Z
    assert float(found["lower"]) < exact < float(found["upper"])


def test_log_z_is_that_of_quadrature_within_its_error_and_its_bounds():
    num, scores, outside = 8, [], 0
    samples = draws(0, 2, 200)
    for seed in range(num):
        settings = {"samples": samples, "method": AIS, "bounds": BOUNDS, "tests": False}
        group = ebm.evaluate(jax.random.key(seed), ENERGY, draws(1, 50), base=BASE, **settings)["log_z"].to_dataset()
        scores.append((float(group["value"]) - LOG_Z) / float(group["std_error"]))
        outside += (float(group["lower"]) > LOG_Z) + (float(group["upper"]) < LOG_Z)
        assert float(group["upper"] - group["lower"]) < 0.2
    low, high = chi2_limits(1, num)
    assert low < np.sum(np.square(scores)) < high, scores
    assert outside <= st.binom.isf(FAMILY_WISE, 2 * num, 0.03)


def test_groups_hold_what_they_should(tree):
    energies = {name: tree[f"energies_{name}"]["energy"] for name in ("data", "samples", "base")}
    assert energies["data"].shape == energies["base"].shape == (400,) and energies["samples"].shape == (4, 1000)
    drawn = tree["posterior"]["x"].values
    np.testing.assert_allclose(energies["samples"], jax.vmap(jax.vmap(ENERGY))(drawn), rtol=1e-6)
    assert float(energies["base"].median()) > float(energies["data"].median())
    modes = tree["modes"].to_dataset()
    for name in ("data", "samples"):
        assert abs(float(modes[name][0]) - 0.5) < 4 * float(modes[f"{name}_std_error"][0])
    assert {"rhat", "ess_bulk", "ess_tail"} == set(tree["convergence"].data_vars)
    assert tree.attrs["num_data"] == 400 and tree.attrs["missing"] == "" and tree.attrs["key"] == [0, 0]


def test_data_of_the_density_pass_and_others_do_not(tree):
    tests = tree["tests"].to_dataset()
    assert list(tests["test"].values) == ["stein_data", "stein_samples", "mmd", "classifier"]
    assert np.all(tests["p_value"] > FAMILY_WISE) and np.all(tests["p_value_holm"] >= tests["p_value"])
    one_mode = np.abs(draws(2, 400))
    other = (
        ebm.evaluate(
            jax.random.key(0),
            ENERGY,
            one_mode + 0.3,
            base=BASE,
            bounds=None,
            log_z=LOG_Z,
            samples=draws(3, 4, 250),
            num_simulations=199,
        )["tests"]
        .to_dataset()
        .set_index(test="test")
    )
    holm = dict(zip(other["test"].values, other["p_value_holm"].values, strict=True))
    assert max(holm["stein_data"], holm["mmd"], holm["classifier"]) <= 0.05 < holm["stein_samples"]


def test_it_survives_a_file(tree, tmp_path):
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as read:
        xr.testing.assert_identical(read.load()["tests"], tree["tests"])
        xr.testing.assert_equal(read, tree)
        assert ebm.read_log_z(read).value == ebm.read_log_z(tree).value


def test_the_same_key_gives_the_same():
    settings = {"samples": draws(0, 2, 200), "method": AIS, "bounds": None, "num_simulations": 99, "base": BASE}
    first, second = (ebm.evaluate(jax.random.key(3), ENERGY, draws(1, 50), **settings) for _ in range(2))
    for group in ("tests", "log_likelihood", "energies_base"):
        xr.testing.assert_identical(first[group].to_dataset(), second[group].to_dataset())


def test_without_a_base_there_is_no_likelihood_unless_log_z_is_given():
    flat = lambda x: ENERGY(x) + x[0] ** 2 / 18  # noqa: E731
    settings = {"samples": draws(0, 2, 200), "tests": False}
    found = ebm.evaluate(jax.random.key(0), flat, draws(1, 50), **settings)
    assert {"log_likelihood", "log_z", "energies_base"}.isdisjoint(found.children)
    assert "pass base=..." in found.attrs["missing"]
    log_z = LOG_Z + np.log(3 * np.sqrt(2 * np.pi))
    given = ebm.evaluate(jax.random.key(0), flat, draws(1, 50), log_z=log_z, **settings)
    each = np.interp(draws(1, 50)[:, 0], GRID[:, 0], LOG_DENSITY - LOG_Z)
    np.testing.assert_allclose(given["log_likelihood"]["x"], each, atol=1e-4)
    assert given.attrs["missing"] == "" and float(given["log_likelihood"]["std_error_log_z"]) == 0


def test_chains_without_a_base():
    flat = lambda x: ENERGY(x) + x[0] ** 2 / 18  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.EnergyWarning)
        found = ebm.evaluate(jax.random.key(0), flat, draws(1, 50), num_chains=2, num_draws=200, tests=False)
    assert found["posterior"]["x"].shape == (2, 200, 1) and "sample_stats" in found.children


def check(message, *, energy=ENERGY, **settings):
    """What is warned of is among the doubts."""
    settings = {"base": BASE, "log_z": LOG_Z, "bounds": None, "tests": False, "samples": draws(0, 2, 200)} | settings
    data = settings.pop("data", draws(1, 50))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = ebm.evaluate(jax.random.key(0), energy, data, **settings)
    assert {each.category for each in warned} == {ebm.EnergyWarning} and {each.filename for each in warned} == {
        __file__
    }
    assert [" ".join(str(each.message).split()) for each in warned] == found.attrs["doubts"].split("\n")
    assert message in found.attrs["doubts"]
    return found


def test_chains_that_disagree_are_in_doubt():
    check("an R-hat of up to", samples=np.stack([np.abs(draws(0, 200)), -np.abs(draws(1, 200))]))


def test_discrete_events_have_a_likelihood_where_log_z_and_draws_are_given():
    """Of a Boltzmann machine of three bits, by the sum over its states."""
    bits, states = dist.Bernoulli(0.3).expand([3]).to_event(1), np.asarray(ebm.enumerate_states(3))
    energy = ebm.BoltzmannEnergy(jax.random.key(0), 3)
    energy = eqx.tree_at(lambda x: x.bias, energy, jnp.array([1.0, -1.0, 0.5]))
    log_density = np.asarray(bits.log_prob(states) - jax.vmap(energy)(states))
    value = ebm.enumerate_log_z(lambda x: energy(x) - bits.log_prob(x), 3)
    p = np.exp(log_density - float(value))
    assert p.sum() == pytest.approx(1)
    rng = np.random.default_rng(0)
    data, samples = (states[rng.choice(8, shape, p=p)] for shape in (200, (2, 400)))
    found = ebm.evaluate(jax.random.key(0), energy, data, base=bits, log_z=value, samples=samples, num_simulations=99)
    each = np.log(p)[(data @ [4, 2, 1]).astype(int)]
    np.testing.assert_allclose(found["log_likelihood"]["x"], each, rtol=1e-6)
    assert found["tests"]["test"].values.tolist() == ["mmd", "classifier"] and found.attrs["doubts"] == ""
    assert np.all(found["tests"]["p_value"] > 1e-4)


def test_independent_draws_as_a_single_chain_are_not_in_doubt():
    """And one chain that goes from one mode to the other, once, is."""
    data, settings = draws(1, 50), {"log_z": LOG_Z, "tests": False}
    found = ebm.evaluate(jax.random.key(0), ENERGY, data, samples=draws(0, 1, 1000), **settings)
    assert found.attrs["doubts"] == "" and 0.99 < float(found["convergence"]["rhat"].max()) < 1.01
    check("an R-hat of up to", samples=np.sort(draws(0, 1, 1000), axis=1))


def test_draws_of_chains_are_tested_up_to_the_number_that_is_wanted():
    data, settings = draws(1, 50), {"log_z": LOG_Z, "num_points": 120, "num_simulations": 19}
    found = ebm.evaluate(jax.random.key(0), ENERGY, data, samples=draws(0, 2, 400), **settings)
    num = dict(zip(found["tests"]["test"].values, found["tests"]["num_points"].values, strict=True))
    assert 100 < num["stein_samples"] <= 120 and num["mmd"] == 170


def test_energies_that_are_not_finite_are_counted():
    beyond = lambda x: jnp.where(x[0] > 2.0, jnp.inf, ENERGY(x))  # noqa: E731
    data = draws(1, 50)
    num = int(np.sum(data > 2.0))
    found = check(f"not finite at {num} of 50 points of data", energy=beyond, samples=np.minimum(draws(0, 2, 200), 2.0))
    assert num > 0 and int(np.sum(np.isinf(found["log_likelihood"]["x"]))) == num
    assert float(found["log_likelihood"]["mean"]) == -np.inf


def test_an_estimate_outside_of_its_bounds_is_in_doubt():
    check("one of them misses a part of the density", log_z=LOG_Z + 5, bounds=BOUNDS)


def test_a_test_that_cannot_be_made_is_nan_and_says_why():
    found = check("The test 'mmd' could not be made", data=draws(1, 5), tests=True, num_simulations=99)
    tests = found["tests"].to_dataset()
    assert np.isnan(tests["p_value"].values).tolist() == [True, False, True, True]


def test_doubts_about_log_z_are_kept():
    doubted = dataclasses.replace(ebm.LogZ(LOG_Z, 0.1, "SMC"), doubts=("It lags behind.",))
    found = ebm.evaluate(
        jax.random.key(0),
        ENERGY,
        draws(1, 50),
        base=BASE,
        log_z=doubted,
        bounds=None,
        samples=draws(0, 2, 200),
        tests=False,
    )
    assert "It lags behind." in found.attrs["doubts"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": np.full((5, 1), np.nan)}, ebm.EnergyError, "data has 5 of 5 events"),
        ({"base": dist.Normal(0.0, 1.0)}, ebm.EnergyShapeError, r"base has event shape \(\)"),
        ({"base": dist.Poisson(1.0).expand([1]).to_event(1), "log_z": None}, ebm.EnergyError, "discrete"),
        ({"energy": lambda x: x}, ebm.EnergyShapeError, "one number for each event"),
        ({"samples": np.zeros((100, 1))}, ebm.EnergyShapeError, r"samples\[None\]"),
        ({"samples": np.full((2, 100, 1), np.inf)}, ebm.EnergyError, "200 of 200 samples are not finite"),
        ({"num_points": 0}, ebm.EnergyError, "num_points is 1"),
        ({"centres": np.zeros((2, 3))}, ebm.EnergyShapeError, "a centre"),
        ({"num_simulations": 5, "tests": True}, ebm.EnergyError, "num_simulations is 19"),
    ],
    ids=["data", "base", "discrete", "energy", "samples", "infinite", "points", "centres", "simulations"],
)
def test_what_makes_no_sense_is_refused(settings, error, message):
    settings = {"base": BASE, "log_z": LOG_Z, "bounds": None, "tests": False, "samples": draws(0, 2, 200)} | settings
    energy, data = settings.pop("energy", ENERGY), settings.pop("data", draws(1, 50))
    with pytest.raises(error, match=message):
        ebm.evaluate(jax.random.key(0), energy, data, **settings)


def test_histograms_of_energies(tree):
    figure = ebm.plot_energy_histograms(tree)
    (axis,) = figure.axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert [label.split(",")[0] for label in labels] == ["noise (base)", "draws (negatives)", "held-out data"]
    bars = axis.containers[1]
    centre = np.average([bar.get_center()[0] for bar in bars], weights=[bar.get_height() for bar in bars])
    assert centre == pytest.approx(float(tree["energies_samples"]["energy"].mean()), abs=0.1)
    figure.canvas.draw()
    with pytest.raises(ebm.EnergyError, match="what evaluate returns"):
        ebm.plot_energy_histograms(xr.DataTree())


def test_landscape():
    def wells(x):
        return (x[0] ** 2 - 1) ** 2 + x[1] ** 2

    base = dist.Normal(0.0, 3.0).expand([2]).to_event(1)
    points = np.random.default_rng(0).normal(size=(2, 1500, 2))
    figure = ebm.plot_landscape(wells, base=base, samples=points, data=points[0, :100])
    left, right, _ = figure.axes
    assert "2,000 of 3,000" in left.get_title() and "100 of 100" in right.get_title()
    shown = right.collections[-1].get_offsets()
    np.testing.assert_array_equal(shown, points[0, :100])
    low, high = left.get_xlim()
    assert low < points[..., 0].min() and high > points[..., 0].max()
    figure.canvas.draw()
    assert len(ebm.plot_landscape(wells, extent=(-2, 2, -1, 1)).axes) == 2
    for arguments, error, message in (
        ({}, ebm.EnergyError, "samples or data, or an extent"),
        ({"data": np.zeros((5, 3))}, ebm.EnergyShapeError, r"data have shape \(5, 3\)"),
    ):
        with pytest.raises(error, match=message):
            ebm.plot_landscape(wells, **arguments)
    with pytest.raises(ebm.EnergyError, match="finite nowhere"):
        ebm.plot_landscape(lambda x: jnp.inf * (1 + x[0] ** 2), extent=(-1, 1, -1, 1))
