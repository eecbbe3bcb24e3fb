"""The split of a model: its terms add up to NumPyro's own potential energy, and its reference is what it says."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from cases import CASES, NO_REFERENCE, Y, constrained, keywords, made, observe, quartic, rough
from jax.scipy.special import expit
from limits import FAMILY_WISE, z_limit
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import initialize_model, potential_energy

import ebm_ppl
from ebm_ppl.target import predictive_model


def numpyro_log_density(name: str) -> Callable:
    """NumPyro's own log density of a case, at the unconstrained values of its sites."""
    case, target = CASES[name], made(name)
    model = seed(substitute(case.model, data=target.constants), 0)
    enumerated = bool(target.spec.discrete)
    if enumerated:
        from numpyro.contrib.funsor import config_enumerate, enum

        model = enum(config_enumerate(model), -target.spec.plate_depth - 1)
    return lambda sites: -potential_energy(model, case.args, case.kwargs, sites, enum=enumerated)


@pytest.mark.parametrize("name", CASES)
def test_terms_add_up_to_numpyros_potential_energy(name):
    target, theirs = made(name), numpyro_log_density(name)

    @jax.jit
    def both(z):
        def ours(z):
            log_reference, energies = target.terms(z)
            return log_reference - sum(energies.values())

        log_reference, stages = target.staged_terms(z)
        by_stage = log_reference - jnp.sum(stages)
        return by_stage, jax.value_and_grad(ours)(z), jax.value_and_grad(lambda z: theirs(target.unravel(z)))(z)

    for seed_ in range(2):
        z = jax.random.normal(jax.random.key(seed_), (target.dim,))
        by_stage, (value, gradient), (their_value, their_gradient) = both(z)
        assert np.isfinite(value)
        np.testing.assert_allclose(by_stage, value, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(value, their_value, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(gradient, their_gradient, rtol=1e-10, atol=1e-10)


HIERARCHICAL = [
    "dynamic support",
    "hierarchy",
    "LocScaleReparam, partly",
    "scaled model",
    "tilted with partition",
    "ignored partition",
]


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_hierarchical_where_the_prior_of_a_site_depends_on_another(name):
    assert made(name).is_hierarchical == (name in HIERARCHICAL)


def test_coordinates_of_values_between_bounds_are_logistic():
    def model():
        numpyro.sample("share", dist.Beta(2.0, 3.0))
        top = numpyro.sample("top", dist.HalfNormal(1.0))
        numpyro.sample("below", dist.Uniform(-1.0, top).expand([2]).to_event(1))
        with numpyro.plate("group", 2):
            numpyro.sample("within", dist.Uniform(-5.0, 5.0))
        numpyro.sample("simplex", dist.Dirichlet(jnp.ones(3)))
        numpyro.sample("free", dist.Normal(0.0, 1.0))

    target = ebm_ppl.target(model)
    names = np.array(target.latent_names)[target.site_numbers]
    np.testing.assert_array_equal(target.is_logistic, np.isin(names, ["share", "below", "within"]))
    z = jax.random.normal(jax.random.key(0), (target.dim,))
    place = expit(z)
    values = target.constrain(z)
    np.testing.assert_allclose(values["share"], place[names == "share"][0])
    np.testing.assert_allclose(values["below"], -1 + (values["top"] + 1) * place[names == "below"])
    np.testing.assert_allclose(values["within"], -5 + 10 * place[names == "within"])


@pytest.mark.parametrize("name", ["constrained", "dynamic support", "mixture", "tilted in a plate"])
def test_the_same_against_initialize_model(name):
    case, target = CASES[name], made(name)
    info = initialize_model(jax.random.key(0), case.model, model_args=case.args, model_kwargs=case.kwargs)
    assert set(info.param_info.z) == set(target.latent_names)
    z = target.ravel(info.param_info.z)
    np.testing.assert_allclose(target.log_density(z), -info.potential_fn(info.param_info.z), rtol=1e-12)
    ours, theirs = target.constrain(z), info.postprocess_fn(info.param_info.z)
    for site in ours:
        np.testing.assert_allclose(ours[site], theirs[site], rtol=1e-12)


ROLES = {
    "factors": {"smooth": "prior", "misfit": "loss", "each": "loss", "plain": "loss"},
    "tilted in a plate": {"x": "prior", "y": "data"},
    "tilted observation": {"y": "data"},
    "two scopes": {
        "first/tilt": "prior",
        "second/tilt": "prior",
        "first/y": "data",
        "second/y": "data",
    },
    "mixture with factors": {"coupling": "prior", "y": "data", "misfit": "loss"},
    "hierarchy": {"y": "data"},
}


@pytest.mark.quick
@pytest.mark.parametrize("name", ROLES)
def test_roles(name):
    target = made(name)
    assert target.roles() == ROLES[name]
    ranks = [role != "prior" for _, role in target.spec.roles]
    assert ranks == sorted(ranks)


def test_each_energy_is_what_it_says():
    target = made("factors")
    z = jnp.array([0.1, -0.4, 0.3, 0.9])
    x = jnp.exp(z)
    exact = {
        "smooth": 0.7 * rough(x),
        "misfit": 0.5 * jnp.sum(jnp.abs(x - Y)),
        "each": jnp.sum(jnp.arange(4.0) * x**2),
        "plain": jnp.sum(x),
    }
    energies = target.energies(z)
    assert list(energies) == list(target.energy_names)
    for name in exact:
        np.testing.assert_allclose(energies[name], exact[name], rtol=1e-12)
    reference = jnp.sum(dist.Gamma(2.0, 1.0).log_prob(x) + z)
    np.testing.assert_allclose(target.log_reference(z), reference, rtol=1e-12)
    log_reference, stages = target.staged_terms(z)
    np.testing.assert_allclose(log_reference, reference, rtol=1e-12)
    np.testing.assert_allclose(stages, [exact["smooth"], exact["misfit"] + exact["each"] + exact["plain"]], rtol=1e-12)


def test_log_partition_is_part_of_the_energy():
    target = made("tilted observation")
    z = jnp.array([0.4])
    theta = jnp.exp(z[0])
    exact = jnp.sum(0.5 * theta * Y**2 - 0.5 * jnp.log1p(theta) - dist.Normal(0.0, 1.0).log_prob(Y))
    np.testing.assert_allclose(target.energies(z)["y"], exact, rtol=1e-12)


def test_energies_of_an_enumerated_model_by_hand():
    target = made("mixture with factors")
    z = jax.random.normal(jax.random.key(3), (target.dim,))
    values = target.constrain(z)
    x, loc, weights = values["x"], values["loc"], values["weights"]
    on, off = 0.3, 0.7
    log_prior = jnp.log(off + on * jnp.exp(-x))
    log_joint = jnp.log(off * jnp.exp(-0.5 * x**2) + on * jnp.exp(-x - 0.5 * (x - 1) ** 2))
    each = jnp.exp(dist.Normal(loc, 1.0).log_prob(Y[:, None])) @ weights
    energies = target.energies(z)
    np.testing.assert_allclose(energies["prior"], -log_prior, rtol=1e-10)
    np.testing.assert_allclose(energies["data"], log_prior - log_joint - jnp.sum(jnp.log(each)), rtol=1e-10)


def test_prior_takes_the_data_away():
    target = made("factors").prior()
    z = jnp.array([0.1, -0.4, 0.3, 0.9])
    assert target.roles() == {"smooth": "prior"} and target.spec.observed == ()
    np.testing.assert_allclose(target.energies(z)["smooth"], made("factors").energies(z)["smooth"])
    np.testing.assert_allclose(target.log_reference(z), made("factors").log_reference(z))
    assert made("hierarchy").prior().energies(jnp.zeros(6)) == {}


# Shapes and spaces


@pytest.mark.parametrize("name", ["constrained", "cholesky", "nested plates", "mixture", "tilted simplex"])
def test_unravel_and_ravel_are_inverse(name):
    target = made(name)
    z = jnp.arange(1.0, target.dim + 1)
    np.testing.assert_array_equal(target.ravel(target.unravel(z)), z)
    assert {site: value.shape for site, value in target.unravel(z).items()} == dict(target.spec.latents)


def test_constrain_gives_latents_and_deterministics():
    values = made("deterministics").constrain(jnp.array([0.7]))
    assert set(values) == {"x", "doubled", "vector"}
    np.testing.assert_allclose(values["vector"], [0.7, 1.4])
    share = made("simplex").constrain(jnp.array([0.1, 0.2, -0.5]))["share"]
    np.testing.assert_allclose(share.sum(), 1.0)
    assert set(made("LocScaleReparam").constrain(jnp.zeros(6))) == {"mu", "tau", "theta_decentered", "theta"}


def test_dims_are_the_plates():
    dims = dict(made("nested plates").spec.dims)
    assert dims == {"mean": ("group", None), "sd": ("group", "member"), "y": ("group", "member")}
    dims = dict(made("factors").spec.dims)
    assert dims["x"] == dims["smooth"] == dims["misfit"] == (None,)
    assert dims["each"] == dims["plain"] == ("element", None)  # a factor's value, the empty vector, has an axis too


def test_log_likelihood_is_pointwise_and_of_data_only():
    target = made("factors")
    assert target.log_likelihood(jnp.zeros(4)) == {} and target.observed_data() == {}
    target = made("scaled observation")
    found = target.log_likelihood(jnp.array([0.4]))
    np.testing.assert_allclose(found["y"], dist.Normal(0.0, jnp.exp(0.4)).log_prob(Y), rtol=1e-12)
    np.testing.assert_array_equal(target.observed_data()["y"], Y)


@pytest.mark.parametrize("name", ["improper", "mixture", "tilted in a plate", "masked latent"])
def test_observed_data_needs_no_reference(name):
    np.testing.assert_array_equal(made(name).observed_data()["y"], Y)


# The reference


def reference_draws(name, num):
    target = made(name)
    z = jax.jit(jax.vmap(target.sample_reference))(jax.random.split(jax.random.key(1), num))
    return z, jax.device_get(jax.jit(jax.vmap(target.constrain))(z))


def test_reference_draws_of_constrained_sites():
    _, draws = reference_draws("constrained", 2000)
    exact = {
        "sd": st.halfnorm(scale=2.0),
        "share": st.beta(2, 3),
        "low": st.uniform(-3, 4),
        "width": st.lognorm(0.5),
    }
    for site, law in exact.items():
        assert st.kstest(draws[site], law.cdf).pvalue > FAMILY_WISE / len(exact), site


def test_reference_draws_of_dynamic_supports():
    _, draws = reference_draws("dynamic support", 2000)
    uniforms = {
        "high": st.expon(scale=2.0).cdf(draws["high"]),
        "middle": draws["middle"] / draws["high"],
        "above": (st.norm.cdf(draws["above"]) - st.norm.cdf(draws["middle"])) / st.norm.sf(draws["middle"]),
    }
    for site, uniform in uniforms.items():
        assert st.kstest(uniform, "uniform").pvalue > FAMILY_WISE / 3, site


def test_reference_draws_ignore_the_tilt():
    _, draws = reference_draws("tilted in a plate", 1000)
    assert st.kstest(draws["x"].ravel(), st.gamma(2, scale=0.5).cdf).pvalue > FAMILY_WISE
    _, draws = reference_draws("tilted simplex", 1000)
    assert st.kstest(draws["share"][:, 0], st.beta(1, 5).cdf).pvalue > FAMILY_WISE


def test_reference_draws_under_enumeration():
    _, draws = reference_draws("mixture", 1000)
    assert st.kstest(draws["weights"][:, 0], "uniform").pvalue > FAMILY_WISE
    assert st.kstest(draws["loc"].ravel(), st.norm(0, 3).cdf).pvalue > FAMILY_WISE


@pytest.mark.parametrize("name", ["constrained", "dynamic support", "simplex", "LocScaleReparam", "tilted simplex"])
def test_reference_density_belongs_to_its_draws(name):
    """E[q(z) / pi_0(z)] = 1 over draws of pi_0, for a normal q narrower than them: a missing Jacobian shows."""
    target = made(name)
    z, _ = reference_draws(name, 4000)
    centre, spread = jnp.median(z, axis=0), 0.5 * jnp.subtract(*jnp.quantile(z, jnp.array([0.8, 0.2]), axis=0))
    log_q = dist.Normal(centre, 0.6 * spread).to_event(1).log_prob(z)
    ratio = np.exp(log_q - jax.jit(jax.vmap(target.log_reference))(z))
    score = (ratio.mean() - 1) / (ratio.std(ddof=1) / np.sqrt(len(ratio)))
    assert abs(score) < z_limit(5), score
    wrong = ratio * 1.5  # the test has the power to see a constant that is half too large
    assert abs(wrong.mean() - 1) / (wrong.std(ddof=1) / np.sqrt(len(ratio))) > z_limit(5)


# Refusals


REASONS = {
    "improper": "'mean' is improper",
    "masked latent": "'mean' is masked",
    "tilted and masked": "'x' is masked",
    "scaled model": "'tau' is scaled",
    "scaled model in a scope": "'outer/sd' is scaled",
    "local in subsample": "'mean' is scaled",
}


@pytest.mark.parametrize("name", CASES)
def test_reference_is_refused_only_where_it_is_none(name):
    target = made(name)
    if name not in NO_REFERENCE:
        target.require_reference()
        return
    for refused in (target.require_reference, lambda: target.sample_reference(jax.random.key(0))):
        with pytest.raises(ebm_ppl.NoReferenceError, match=REASONS[name]) as error:
            refused()
        assert "MCMC" in str(error.value)


def test_log_z_is_refused_without_a_reference():
    with pytest.raises(ebm_ppl.NoReferenceError, match="'mean' is improper"):
        ebm_ppl.log_z(jax.random.key(0), made("improper"))


def test_discrete_sites_that_cannot_be_enumerated():
    def model():
        count = numpyro.sample("count", dist.Poisson(3.0))
        observe(1.0 * count)

    with pytest.raises(ebm_ppl.EnergyError, match=r"'count' \(Poisson.*cannot be enumerated"):
        ebm_ppl.target(model)


def test_latent_delta():
    with pytest.raises(ebm_ppl.EnergyError, match=r"'known' is a Delta; use `numpyro.deterministic`"):
        ebm_ppl.target(lambda: numpyro.sample("known", dist.Delta(1.0)))


def test_latent_delta_in_a_plate():
    def model():
        with numpyro.plate("n", 3):
            numpyro.sample("known", dist.Delta(1.0))

    with pytest.raises(ebm_ppl.EnergyError, match="'known' is a Delta"):
        ebm_ppl.target(model)


def test_tilted_mixture():
    def model():
        tilted = ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.MixtureGeneral(dist.Categorical(jnp.ones(2) / 2), [tilted, tilted]))

    with pytest.raises(ebm_ppl.EnergyError, match="Mixture"):
        ebm_ppl.target(model)


def test_evidence_with_an_unknown_constant():
    def model():
        numpyro.sample("theta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 1.0)), obs=0.3)

    with pytest.raises(ebm_ppl.IntractablePartitionError, match="'y'"):
        ebm_ppl.target(model).require_known_constant()
    made("tilted observation").require_known_constant()


# Traces


def test_new_data_of_the_same_shape_does_not_retrace():
    traces = []

    @eqx.filter_jit
    def log_density(target, z):
        traces.append(1)
        return target.log_density(z)

    values = [log_density(ebm_ppl.target(constrained, y), jnp.zeros(4)) for y in (Y, 2 * Y, np.asarray(Y))]
    assert len(traces) == 1
    assert values[0] != values[1] and values[0] == values[2]
    log_density(ebm_ppl.target(constrained, Y[:3]), jnp.zeros(4))
    assert len(traces) == 2


def test_new_keyword_data_does_not_retrace():
    traces = []

    @eqx.filter_jit
    def log_density(target, z):
        traces.append(1)
        return target.log_density(z)

    for factor in (1.0, 2.0):
        log_density(ebm_ppl.target(keywords, Y, x=factor * Y, power=2), jnp.ones(2))
    assert len(traces) == 1
    log_density(ebm_ppl.target(keywords, Y, x=Y, power=3), jnp.ones(2))
    assert len(traces) == 2


def test_new_parameters_of_an_energy_do_not_retrace():
    traces = []

    @eqx.filter_jit
    def log_density(target, z):
        traces.append(1)
        return target.log_density(z)

    def model(energy):
        numpyro.sample("x", ebm_ppl.EnergyDistribution(energy, dist.Normal(jnp.zeros(2), 1.0).to_event(1)))

    z = jnp.array([0.5, -1.0])
    for scale_ in (1.0, 3.0):
        energy = ebm_ppl.QuadraticEnergy(scale_ * jnp.eye(2))
        exact = dist.Normal(0.0, 1.0).log_prob(z).sum() - energy(z)
        np.testing.assert_allclose(log_density(ebm_ppl.target(model, energy), z), exact, rtol=1e-12)
    assert len(traces) == 1


def test_models_that_need_concrete_values_are_frozen():
    def model(groups, y):
        with numpyro.plate("group", int(groups.max()) + 1):
            mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        observe(mean[groups], 1.0, y)

    groups = np.array([0, 1, 1, 2])
    target = ebm_ppl.target(model, groups, Y)
    assert target.dim == 3 and target.args == ()
    z = jnp.array([0.1, 0.2, 0.3])
    exact = jnp.sum(dist.Normal(0.0, 1.0).log_prob(z)) + jnp.sum(dist.Normal(z[groups], 1.0).log_prob(Y))
    np.testing.assert_allclose(eqx.filter_jit(target.log_density)(z), exact, rtol=1e-12)
    np.testing.assert_allclose(target.observed_data()["y"], Y)


def test_arguments_may_be_containers_of_other_libraries():
    class Column:
        def __init__(self, values):
            self.values = values

        def __array__(self, dtype=None, copy=None):
            return np.asarray(self.values, dtype)

    target = ebm_ppl.target(constrained, Column([0.3, -1.2, 0.8, 1.9]))
    z = jnp.ones(4)
    np.testing.assert_allclose(target.log_density(z), made("constrained").log_density(z), rtol=1e-12)


def test_observed_sites_are_sampled_by_the_predictive_model():
    target = made("constrained")
    recorded = trace(seed(predictive_model(target), 0)).get_trace(*target.args)
    assert not recorded["y"]["is_observed"]
    assert not np.array_equal(recorded["y"]["value"], Y)
    values = {name: site["value"] for name, site in recorded.items() if name in target.latent_names}
    noise = [
        trace(seed(substitute(predictive_model(target), data=values), key)).get_trace(*target.args)["y"]["value"]
        for key in (1, 2)
    ]
    assert not np.any(noise[0] == noise[1])


def test_subsample_indices_are_held():
    target = made("subsampled")
    index = target.constants["observation"]
    z = jnp.array([0.4])
    exact = dist.Normal(0.0, 3.0).log_prob(0.4) + 2.0 * jnp.sum(dist.Normal(0.4, 1.0).log_prob(Y[index]))
    np.testing.assert_allclose(target.log_density(z), exact, rtol=1e-12)
    np.testing.assert_allclose(eqx.filter_jit(target.log_density)(z), exact, rtol=1e-12)
