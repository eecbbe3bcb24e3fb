"""What goes wrong for users, and what each must get: nothing may end in a silent wrong number."""

from __future__ import annotations

import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from limits import z_limit
from problems import funnel_in_a_box
from scipy.stats import norm

import ebm_ppl
from ebm_ppl import probe
from ebm_ppl.probe import check_tails

KEY = jax.random.key(0)
SHORT = {"num_chains": 2, "num_warmup": 100, "num_samples": 200, "progress_bar": False}
SMALL = ebm_ppl.SMC(num_particles=200)


def tilted_normal(energy, role="loss"):
    """A standard normal with an energy of one number."""

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm_ppl.energy_factor("tilt", energy(x), role=role)

    return ebm_ppl.target(model)


# Row 1: NaN on one percent

EDGE = float(norm.ppf(0.99))


def nan_beyond_the_edge(x):
    return jnp.where(x > EDGE, jnp.nan, 0.5 * (x - 1.0) ** 2)


def row_1_log_z():
    """log of the integral of N(x; 0, 1) exp(-(x-1)^2 / 2) up to the edge: the product is a normal at 1/2."""
    return -0.5 * np.log(2) - 0.25 + norm.logcdf(EDGE, 0.5, np.sqrt(0.5))


def test_row_01_nan_on_one_percent():
    target = tilted_normal(nan_beyond_the_edge)
    with pytest.warns(ebm_ppl.EnergyWarning) as caught:
        estimate = ebm_ppl.log_z(KEY, target, ebm_ppl.SMC(num_particles=1000), num_runs=4)
    assert len(caught) == 1 and "NaN" in str(caught[0].message)
    assert abs(estimate.value - row_1_log_z()) < 4 * estimate.std_error
    assert estimate.std_error < 0.1
    assert estimate.diagnostics["num_nan_energy"] > 0


def test_row_01_particles_count_them():
    target = tilted_normal(nan_beyond_the_edge)
    with pytest.warns(ebm_ppl.EnergyWarning, match="NaN") as caught:
        data = ebm_ppl.sample(KEY, target, ebm_ppl.SMC(num_particles=1000), num_chains=4, progress_bar=False)
    assert len(caught) == 1
    assert data["smc"]["num_nan"].sum() == data.attrs["num_nan_energy"] > 0
    assert float(data["posterior"]["x"].max()) <= EDGE
    assert not np.any(np.isnan(data["particles"]["log_weight"]))


def test_row_01_chains_count_them():
    target = tilted_normal(nan_beyond_the_edge)
    with pytest.warns(ebm_ppl.EnergyWarning, match="NaN") as caught:
        data = ebm_ppl.sample(KEY, target, **SHORT)
    assert len(caught) == 1
    assert data["sample_stats"]["nan_energy"].sum() == data.attrs["num_nan_energy"] > 0
    assert float(data["posterior"]["x"].max()) <= EDGE


# Row 2: NaN everywhere


@pytest.mark.parametrize("sampler", [ebm_ppl.NUTS(), SMALL], ids=lambda sampler: sampler.name)
def test_row_02_nan_everywhere(sampler):
    target = tilted_normal(lambda x: x * jnp.nan)
    start = time.monotonic()
    with pytest.raises(ebm_ppl.EnergyError) as error:
        ebm_ppl.sample(KEY, target, sampler, num_chains=2, progress_bar=False)
    assert time.monotonic() - start < 10
    assert isinstance(error.value, ebm_ppl.NonFiniteEnergyError)
    assert "'tilt' (energy nan)" in str(error.value) and "Example point: {'x': " in str(error.value)


def test_row_02_without_a_method():
    start = time.monotonic()
    with pytest.raises(ebm_ppl.NonFiniteEnergyError, match=r"NaN at all .* \(energy nan\).*Example point: {'x': "):
        ebm_ppl.log_z(KEY, tilted_normal(lambda x: x * jnp.nan))
    assert time.monotonic() - start < 10


def test_row_02_with_a_distribution_that_numpyro_refuses():
    """An energy of a distribution with a NaN scale: what is not finite is said all the same."""
    target = tilted_normal(lambda x: -dist.Normal(0.0, jnp.sqrt(-jnp.abs(x) - 1)).log_prob(1.0))
    with pytest.raises(ebm_ppl.NonFiniteEnergyError, match=r"'tilt' \(energy nan\).*Example point: {'x': "):
        ebm_ppl.log_z(KEY, target)


def test_row_02_nan_but_for_a_corner_that_rays_miss():
    """One in 256 draws of the reference has an energy; the rays that look at tails see none of them."""
    count = 8

    def corner():
        x = numpyro.sample("x", dist.Normal(0, 1).expand([count]).to_event(1))
        ebm_ppl.energy_factor("tilt", jnp.where(jnp.all(x > 0), 0.0, jnp.nan), role="prior")

    check_tails(ebm_ppl.target(corner), needs_normalisation=True)


# Row 3: all particles at -inf


@pytest.mark.parametrize("role", ["prior", "loss"])
def test_row_03_all_particles_at_zero_mass(role):
    target = tilted_normal(lambda x: jnp.where(x > 100.0, 0.0, jnp.inf), role)
    phase = "prior" if role == "prior" else "data"
    with pytest.raises(ebm_ppl.DegenerateParticlesError, match=f"stage 1 of the {phase} phase"):
        ebm_ppl.log_z(KEY, target, SMALL)


def test_row_03_half_the_particles_leave_no_nan():
    target = tilted_normal(lambda x: jnp.where(x > 0.0, 0.0, jnp.inf))
    data = ebm_ppl.sample(KEY, target, SMALL, num_chains=4, progress_bar=False)
    estimate = ebm_ppl.read_log_z(data)
    assert abs(estimate.value - np.log(0.5)) < 4 * estimate.std_error
    for group in ("posterior", "particles", "log_z", "sample_stats"):
        for name, values in data[group].data_vars.items():
            assert not np.any(np.isnan(values)), (group, name)
    assert float(data["posterior"]["x"].min()) > 0


# Row 4: infinite density


def well_without_bottom(x):
    return jnp.where(jnp.abs(x) < 0.5, -jnp.inf, 0.5 * x**2)


@pytest.mark.parametrize(
    "sampler",
    [ebm_ppl.NUTS(), ebm_ppl.HMC(), ebm_ppl.MALA(), SMALL],
    ids=lambda sampler: sampler.name,
)
def test_row_04_minus_infinity(sampler):
    settings = {"num_chains": 2} if sampler.name == "SMC" else {"num_chains": 2, "num_warmup": 100, "num_samples": 100}
    with pytest.raises(ebm_ppl.NonFiniteEnergyError, match="infinite density"):
        ebm_ppl.sample(KEY, tilted_normal(well_without_bottom), sampler, progress_bar=False, **settings)


def test_row_04_minus_infinity_on_the_sphere_of_velocities():
    """MCLMC needs two dimensions at least."""

    def model():
        x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        ebm_ppl.energy_factor("well", well_without_bottom(x[0]), role="loss")

    with pytest.raises(ebm_ppl.NonFiniteEnergyError, match="infinite density"):
        ebm_ppl.sample(KEY, ebm_ppl.target(model), ebm_ppl.MCLMC(), num_chains=2, num_samples=100, progress_bar=False)


def test_row_04_minus_infinity_in_the_prior():
    with pytest.raises(ebm_ppl.NonFiniteEnergyError, match=r"-inf.*stage 1 of the prior phase"):
        ebm_ppl.log_z(KEY, tilted_normal(well_without_bottom, "prior"), SMALL)


def test_row_04_in_the_last_moves():
    """A hole beside a plateau, one stage away from the reference: no particle starts in it, and no stage follows."""
    target = tilted_normal(lambda x: jnp.where((x > 4.0) & (x < 5.0), -jnp.inf, jnp.where(x > 4.0, 0.0, -0.3 * x)))
    sampler = ebm_ppl.SMC(num_particles=200, target_ess=0.05, num_moves=50)
    with pytest.raises(ebm_ppl.NonFiniteEnergyError, match="stage 1 of the data phase"):
        ebm_ppl.log_z(KEY, target, sampler, num_runs=4)


def test_row_04_found_late():
    """A hole that no draw of the reference sees, but that the last moves fall into."""
    target = tilted_normal(lambda x: jnp.where(jnp.abs(x - 6.0) < 1.0, -jnp.inf, 30.0 * (x - 5.0) ** 2))
    with pytest.raises(ebm_ppl.NonFiniteEnergyError):
        ebm_ppl.log_z(KEY, target, SMALL)


# Row 5: a constant energy


@pytest.mark.parametrize("role", ["prior", "loss"])
def test_row_05_constant_energy(role):
    estimate = ebm_ppl.log_z(KEY, tilted_normal(lambda x: 0.0 * x + 3.7, role), SMALL)
    np.testing.assert_allclose(estimate.value, -3.7, rtol=1e-12)
    assert estimate.std_error < 0.1
    if role == "prior":
        assert estimate.parts.keys() == {"prior"}


def test_row_05_no_energy_at_all():
    estimate = ebm_ppl.log_z(KEY, ebm_ppl.target(lambda: numpyro.sample("x", dist.Normal(0.0, 1.0))), SMALL)
    assert (estimate.value, estimate.std_error) == (0.0, 0.0)


# Rows 6, 7 and 8: energies that are none

GOOD = {
    "square": lambda x: 0.5 * jnp.sum(x**2),
    "steep": lambda x: jnp.sum(x**4),
    "slow": lambda x: jnp.sum(jnp.log1p(x**2)),
    "absolute": lambda x: jnp.sum(jnp.abs(x)),
    "double well": lambda x: jnp.sum((x**2 - 4.0) ** 2),
    "negative well": lambda x: -jnp.exp(-jnp.sum(x**2)),
    "linear": lambda x: jnp.sum(x),
    "logistic": lambda x: jnp.sum(jax.nn.softplus(-3.0 * x)),
    "constant": lambda x: 2.0 + 0.0 * jnp.sum(x),
    "periodic": lambda x: jnp.sum(jnp.cos(x)),
}
FLIPPED = {name: (lambda x, f=GOOD[name]: -f(x)) for name in ("square", "steep", "absolute", "double well")}
DENSITIES = {
    "normal": lambda x: jnp.exp(-0.5 * jnp.sum(x**2)),
    "cauchy": lambda x: jnp.prod(1 / (1 + x**2)),
    "far from the origin": lambda x: 5.0 * jnp.exp(-0.5 * jnp.sum((x - 1.0) ** 2)),
}


def tilted_vector(energy, dim=3):
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))
        ebm_ppl.energy_factor("tilt", energy(x))

    return ebm_ppl.target(model)


def test_rows_06_to_08_say_nothing_about_a_box():
    """A funnel between walls: its density rises far along a ray, until the ray comes to the wall in the neck's site."""

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_tails(ebm_ppl.target(funnel_in_a_box), needs_normalisation=True)


@pytest.mark.parametrize("name", GOOD)
def test_rows_06_to_08_say_nothing_about_good_energies(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_tails(tilted_vector(GOOD[name]), needs_normalisation=True)


@pytest.mark.parametrize("name", FLIPPED)
def test_row_06_flipped_sign(name):
    with pytest.warns(ebm_ppl.EnergyWarning, match="'tilt'.*sign flipped"):
        try:
            check_tails(tilted_vector(FLIPPED[name]), needs_normalisation=True)
        except ebm_ppl.NoReferenceError as error:
            assert "sign" in str(error) and name != "absolute"  # a normal base outweighs -|x|


def test_row_06_flipped_sign_in_a_run():
    with pytest.warns(ebm_ppl.EnergyWarning, match="sign"):
        ebm_ppl.sample(KEY, tilted_normal(lambda x: -0.2 * x**2), **SHORT)


def test_row_06_flipped_sign_of_a_distribution():
    def model():
        numpyro.sample("x", ebm_ppl.EnergyDistribution(lambda x: -0.3 * x**2, dist.Normal(0.0, 1.0)))

    with pytest.warns(ebm_ppl.EnergyWarning, match="'x'.*sign flipped"):
        check_tails(ebm_ppl.target(model), needs_normalisation=False)


def test_row_06_says_nothing_about_a_network_that_tilts_a_base():
    """Its tails are linear, and may well fall: a normal base falls faster."""

    def model(base):
        numpyro.sample(
            "x", ebm_ppl.EnergyDistribution(lambda x: -3.0 * jnp.sum(jnp.abs(x)), base.expand([3]).to_event(1))
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_tails(ebm_ppl.target(model, dist.Normal(0.0, 1.0)), needs_normalisation=True)
    with pytest.raises(ebm_ppl.NoReferenceError, match="sign"):
        check_tails(ebm_ppl.target(model, dist.Laplace(0.0, 1.0)), needs_normalisation=True)


@pytest.mark.parametrize("name", DENSITIES)
def test_row_07_density_instead_of_an_energy(name):
    with pytest.warns(ebm_ppl.EnergyWarning, match="'tilt'.*was a density passed"):
        check_tails(tilted_vector(DENSITIES[name]), needs_normalisation=True)


def test_row_08_not_normalisable():
    for energy in (FLIPPED["square"], FLIPPED["steep"]):
        with pytest.warns(ebm_ppl.EnergyWarning), pytest.raises(ebm_ppl.NoReferenceError) as error:
            ebm_ppl.log_z(KEY, tilted_vector(energy), SMALL)
        assert "cannot be normalised" in str(error.value)
        assert "bound it from below" in str(error.value) and "base" in str(error.value)


def test_row_08_nothing_on_the_line():
    def model():
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        ebm_ppl.energy_factor("tilt", 0.0 * x)

    with pytest.raises(ebm_ppl.NoReferenceError, match="'x' is improper: give it a proper prior"):
        ebm_ppl.log_z(KEY, ebm_ppl.target(model), SMALL)


def test_row_08_an_improper_base():
    def model():
        base = dist.ImproperUniform(dist.constraints.real, (), ())
        numpyro.sample("x", ebm_ppl.EnergyDistribution(lambda x: x**2, base))

    with pytest.raises(ebm_ppl.NoReferenceError, match="'x' is improper"):
        ebm_ppl.log_z(KEY, ebm_ppl.target(model), SMALL)


def test_row_08_what_the_heuristic_misses_is_documented_and_true():
    assert "heuristic" in probe.__doc__ and "misses" in probe.__doc__
    narrow = tilted_vector(lambda x: -5.0 * jnp.where(x[0] > 0.999 * jnp.linalg.norm(x), jnp.sum(x**2), 0.0), dim=8)
    check_tails(narrow, needs_normalisation=True)


# Row 10: an improper prior


def improper_mean(y):
    mean = numpyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_row_10_improper_prior_and_evidence():
    y = jnp.array([0.3, 1.2, 2.0])
    target = ebm_ppl.target(improper_mean, y)
    for ask in (lambda: ebm_ppl.log_z(KEY, target, SMALL), lambda: ebm_ppl.sample(KEY, target, SMALL)):
        with pytest.raises(ebm_ppl.NoReferenceError, match=r"'mean' is improper.*MCMC"):
            ask()
    draws = ebm_ppl.sample(KEY, target, **SHORT)["posterior"]["mean"].values
    from arviz_stats import ess

    assert abs(draws.mean() - y.mean()) < z_limit(1) * np.sqrt(1 / 3 / float(ess(draws)))


# Row 11: the partition function that is forgotten


def unnormalised_conditional(log_partition):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    quartic = ebm_ppl.EnergyDistribution(lambda x: theta * x**4, dist.Normal(0.0, 1.0), log_partition=log_partition)
    numpyro.sample("y", quartic, obs=0.3)


def test_row_11_no_partition_function():
    with pytest.raises(ebm_ppl.IntractablePartitionError, match="'y' depends on 'theta'"):
        ebm_ppl.sample(KEY, ebm_ppl.target(unnormalised_conditional, None), **SHORT)


def test_row_11_explicit_opt_out():
    """Without Z(theta) the posterior is Gamma(2, 1 + y^4 / 1), which is what was asked for."""
    data = ebm_ppl.sample(KEY, ebm_ppl.target(unnormalised_conditional, "ignore"), **SHORT)
    draws = data["posterior"]["theta"].values
    from arviz_stats import ess

    rate = 1 + 0.3**4
    assert abs(draws.mean() - 2 / rate) < z_limit(1) * np.sqrt(2) / rate / np.sqrt(float(ess(draws)))


# Row 12: shapes


def test_row_12_vector_for_a_scalar_factor():
    with pytest.raises(ebm_ppl.EnergyShapeError, match=r"'tilt' has shape \(5,\).*shape \(\)"):
        tilted_normal(lambda x: jnp.ones(5) * x)


def test_row_12_missing_batch_dimension():
    def model():
        with numpyro.plate("n", 5):
            x = numpyro.sample("x", dist.Normal(0.0, 1.0))
            ebm_ppl.energy_factor("tilt", jnp.sum(x**2))

    with pytest.raises(ebm_ppl.EnergyShapeError, match=r"'tilt' has shape \(\).*shape \(5,\)"):
        ebm_ppl.target(model)


def test_row_12_vector_for_a_scalar_energy():
    def model(x):
        numpyro.sample("x", ebm_ppl.EnergyDistribution(jnp.square, dist.Normal(jnp.zeros(5), 1.0).to_event(1)))

    with pytest.raises(ebm_ppl.EnergyShapeError, match=r"\(5,\); expected \(\)"):
        jax.eval_shape(numpyro.handlers.seed(model, 0), jnp.ones(5))


# Row 13: dtypes


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float16])
def test_row_13_coarse_dtypes_are_cast(dtype):
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm_ppl.energy_factor("tilt", (2.0 * jnp.abs(x)).astype(dtype))

    with pytest.warns(ebm_ppl.EnergyWarning, match=f"'tilt' has dtype {jnp.dtype(dtype).name}"):
        energy = ebm_ppl.target(model).energies(jnp.array([1.5]))["tilt"]
    assert energy == 3.0 and energy.dtype == jnp.float64


def test_row_13_coarse_energies_of_a_distribution():
    def rounded(x):
        return jnp.round(x).astype(int)

    with pytest.warns(ebm_ppl.EnergyWarning, match="'rounded'.*dtype int64"):
        ebm_ppl.EnergyDistribution(rounded, dist.Normal(0.0, 1.0))


def test_row_13_booleans_are_refused():
    with pytest.raises(ebm_ppl.EnergyError, match="dtype bool"):
        tilted_normal(lambda x: x > 0)


# Row 14: single precision


def test_row_14_large_energies_in_single_precision(run_in_float32):
    printed = run_in_float32("""
        import warnings, jax, numpyro, numpyro.distributions as dist, ebm_ppl

        def model():
            x = numpyro.sample("x", dist.Normal(0.0, 1.0))
            ebm_ppl.energy_factor("tilt", 3.0e6 + 0.5 * (x - 1.0) ** 2, role="loss")

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            estimate = ebm_ppl.log_z(jax.random.key(0), ebm_ppl.target(model), ebm_ppl.SMC(num_particles=500))
        print(repr(float(estimate.value)), repr(float(estimate.std_error)))
        for warning in caught:
            print(warning.category.__name__, warning.message)
        """)
    first, *messages = printed.strip().splitlines()
    value, std_error = map(float, first.split())
    double = ebm_ppl.log_z(
        KEY, tilted_normal(lambda x: 3.0e6 + 0.5 * (x - 1.0) ** 2), ebm_ppl.SMC(num_particles=500), num_runs=4
    )
    exact = -3.0e6 - 0.5 * np.log(2) - 0.25
    assert abs(double.value - exact) < 4 * double.std_error
    assert abs(value - double.value) < 4 * np.hypot(std_error, double.std_error)
    assert std_error < 2.0  # single precision resolves three millions to a quarter
    assert len(messages) == 1 and messages[0].startswith("EnergyWarning") and "single precision" in messages[0]


@pytest.mark.slow
def test_row_14_without_a_method(run_in_float32):
    """Of observed values, whose energies no probe of the tails looks at."""
    printed = run_in_float32("""
        import warnings, jax, numpy as np, numpyro, numpyro.distributions as dist, ebm_ppl

        def model(y):
            x = numpyro.sample("x", dist.Normal(0.0, 1.0))
            with numpyro.plate("n", len(y)):
                numpyro.sample("y", dist.Normal(x, 1e-3), obs=y)

        y = np.repeat(np.array([-2.0, 2.0], np.float32), 10)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            method = ebm_ppl.FittedReference(num_ascents=16, num_draws=256, max_draws=256)
            estimate = ebm_ppl.log_z(jax.random.key(0), ebm_ppl.target(model, y), method)
        print(repr(float(estimate.value)), repr(float(estimate.std_error)))
        for warning in caught:
            print(warning.category.__name__, warning.message)
        """)
    first, *messages = printed.strip().splitlines()
    value, std_error = map(float, first.split())
    assert value < -4e6 and std_error > 1e-7 * abs(value)
    assert any(line.startswith("EnergyWarning") and "single precision" in line for line in messages)


def test_row_14_small_energies_say_nothing(run_in_float32):
    printed = run_in_float32("""
        import warnings, jax, numpyro, numpyro.distributions as dist, ebm_ppl
        warnings.simplefilter("error")

        def model():
            x = numpyro.sample("x", dist.Normal(0.0, 1.0))
            ebm_ppl.energy_factor("tilt", 0.5 * (x - 1.0) ** 2, role="loss")

        estimate = ebm_ppl.log_z(jax.random.key(0), ebm_ppl.target(model), ebm_ppl.SMC(num_particles=500))
        print(estimate.value, estimate.std_error)
        """)
    value, std_error = map(float, printed.split())
    assert abs(value + 0.5 * np.log(2) + 0.25) < 4 * std_error


# Row 15: no key is used twice


METHODS_WITH_KEYS = {
    "NUTS": lambda key, target: ebm_ppl.sample(key, target, ebm_ppl.NUTS(), **VERY_SHORT),
    "MCLMC": lambda key, target: ebm_ppl.sample(key, target, ebm_ppl.MCLMC(), **VERY_SHORT),
    "SMC": lambda key, target: ebm_ppl.log_z(key, target, ebm_ppl.SMC(num_particles=50)),
    "fitted reference": lambda key, target: ebm_ppl.log_z(
        key, target, ebm_ppl.FittedReference(num_draws=64, num_ascents=4)
    ),
    "prior predictive": lambda key, target: ebm_ppl.prior_predictive(key, target, num_samples=10),
}
VERY_SHORT = {"num_warmup": 60, "num_samples": 5, "num_chains": 2, "progress_bar": False}


@pytest.mark.filterwarnings("ignore::ebm_ppl.EnergyWarning")  # so little is not enough
@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=pytest.mark.slow if name == "fitted reference" else ()) for name in METHODS_WITH_KEYS],
)
def test_row_15_no_key_is_used_twice(method):
    """By JAX's own checker, in a program of its own."""

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.array([1.0, 2.0]))

    with jax.debug_key_reuse(True):
        METHODS_WITH_KEYS[method](jax.random.key(0), ebm_ppl.target(model))


# Row 16: tempering stalls


@pytest.mark.parametrize("role", ["prior", "loss"])
def test_row_16_tempering_stalls(role):
    target = tilted_normal(lambda x: 1e12 * (x - 3.0) ** 2, role)
    phase = "prior" if role == "prior" else "data"
    with pytest.raises(ebm_ppl.TemperingStalledError) as error:
        ebm_ppl.log_z(KEY, target, SMALL)
    for word in (f"of the {phase} phase", "inverse temperature", "effective particles", "acceptance"):
        assert word in str(error.value)


def test_row_16_a_path_of_as_many_stages_as_allowed_has_not_stalled():
    found = ebm_ppl.log_z(KEY, tilted_normal(lambda x: 2.0 + 0.0 * x), ebm_ppl.SMC(num_particles=200, max_stages=1))
    assert found.value == pytest.approx(-2.0, abs=1e-12)


def test_row_16_cap_on_the_number_of_stages():
    target = tilted_normal(lambda x: 1e4 * (x - 3.0) ** 2)
    with pytest.raises(ebm_ppl.TemperingStalledError, match="stage 3 of the data phase"):
        ebm_ppl.log_z(KEY, target, ebm_ppl.SMC(num_particles=200, max_stages=3))
