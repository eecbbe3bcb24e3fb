"""The answers of the registry, each found again by another route.

Weighted draws from the reference, by NumPyro's own handlers, for targets where they reach the posterior; some
are too concentrated for that, and have routes of their own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as st
from limits import z_limit
from numpyro.handlers import seed, substitute, trace
from problems import PROBLEMS, Problem

import ebm_ppl as ebm

OWN_ROUTE = {"gaussian", "regression", "correlated_box", "correlated_normal"}
WEIGHED = [name for name in PROBLEMS if name not in OWN_ROUTE]
NUM_DRAWS = 400_000


def _weighted_draws(problem: Problem) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Sites drawn from the reference, and their energies by role, from a plain NumPyro trace."""
    means = problem.means

    def base_value(site):
        if isinstance(site.get("fn"), ebm.EnergyDistribution) and not site["is_observed"]:
            return site["fn"].base.sample(site["kwargs"]["rng_key"])

    def one(key):
        drawn = trace(substitute(seed(problem.model, key), substitute_fn=base_value))
        recorded = drawn.get_trace(*problem.args, **problem.kwargs)
        prior, data = jnp.zeros(()), jnp.zeros(())
        for site in recorded.values():
            if site["type"] != "sample":
                continue
            log_prob = jnp.sum(site["fn"].log_prob(site["value"]))
            if isinstance(site["fn"], ebm.EnergyDistribution):
                prior += log_prob - jnp.sum(site["fn"].base.log_prob(site["value"]))
            elif site["is_observed"] and site["infer"].get("energy_role") == "prior":
                prior += log_prob
            elif site["is_observed"]:
                data += log_prob
        return {name: recorded[name]["value"] for name in means}, prior, data

    run = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=20_000))
    return jax.device_get(run(jax.random.split(jax.random.key(0), NUM_DRAWS)))


def _log_mean(log_weight: np.ndarray) -> tuple[float, float]:
    """Log of the mean weight and its standard error."""
    top = log_weight.max()
    weight = np.exp(log_weight - top)
    return top + np.log(weight.mean()), weight.std() / weight.mean() / np.sqrt(len(weight))


@pytest.mark.parametrize("name", WEIGHED)
def test_answer_agrees_with_weighted_draws_of_the_reference(name):
    problem = PROBLEMS[name]
    sites, prior, data = _weighted_draws(problem)
    scores = []
    both, both_error = _log_mean(prior + data)
    if problem.log_z_prior is None:
        np.testing.assert_array_equal(prior, 0.0)
    truth_both = problem.log_z
    if problem.log_z_prior is not None:
        alone, alone_error = _log_mean(prior)
        # A normalised energy has log Z = 0 exactly, and a weight whose mean is one.
        scores.append((alone - problem.log_z_prior) / alone_error)
        truth_both = problem.log_z if not np.any(data) else problem.log_z + problem.log_z_prior
    scores.append((both - truth_both) / both_error)
    weight = np.exp(prior + data - (prior + data).max())
    weight /= weight.sum()
    assert 1 / np.sum(weight**2) > 1_000, "too few effective draws to say anything"
    for site, mean in problem.means.items():
        value = sites[site]
        shape = (-1,) + (1,) * np.ndim(mean)
        w = weight.reshape(shape)
        for power, truth in ((1, 0.0), (2, problem.variances[site])):
            moment = (value - mean) ** power
            estimate = np.sum(w * moment, axis=0)
            error = np.sqrt(np.sum(w**2 * (moment - estimate) ** 2, axis=0))
            scores += list(np.ravel((estimate - truth) / error))
    assert np.max(np.abs(scores)) < z_limit(len(scores) * len(WEIGHED)), scores


@pytest.mark.parametrize("name", ["correlated_normal", "regression"])
def test_conjugate_answer_by_the_identity_of_bayes(name):
    """prior x likelihood / posterior is the same number at every point, only if all three are right."""
    problem = PROBLEMS[name]
    if name == "regression":
        site, scale = "beta", 2.0
        design, y = problem.args
        noise = 0.49 * np.eye(25)
    else:
        site, scale = "x", 3.0
        (noise, y), design = problem.args, np.eye(8)
    precision = np.linalg.inv(noise)
    dim = design.shape[1]
    posterior = np.linalg.inv(design.T @ precision @ design + np.eye(dim) / scale**2)
    mean = posterior @ design.T @ precision @ y
    for x in np.random.default_rng(0).normal(size=(5, dim)):
        log_z = st.norm.logpdf(x, 0, scale).sum() + st.multivariate_normal(design @ x, noise).logpdf(y)
        log_z -= st.multivariate_normal(mean, posterior).logpdf(x)
        np.testing.assert_allclose(log_z, problem.log_z, rtol=1e-10)
    np.testing.assert_allclose(mean, problem.means[site], rtol=1e-10)
    np.testing.assert_allclose(np.diag(posterior), problem.variances[site], rtol=1e-10)


def test_correlated_box_by_weighted_draws_of_a_wider_gaussian():
    problem = PROBLEMS["correlated_box"]
    (covariance,) = problem.args
    proposal = st.multivariate_normal(np.zeros(10), 1.3 * covariance)
    x = proposal.rvs(size=100_000, random_state=0)
    log_weight = st.multivariate_normal(np.zeros(10), covariance).logpdf(x) - 10 * np.log(20) - proposal.logpdf(x)
    log_weight[np.any(np.abs(x) > 10, axis=1)] = -np.inf
    log_z, error = _log_mean(log_weight)
    assert error < 0.01
    assert abs(log_z - problem.log_z) < z_limit(1) * error
    # What the box cuts off lies ten standard deviations out.
    assert 10 * 2 * st.norm.sf(10) < 1e-20


def test_eight_schools_by_a_grid_over_both_hyperparameters():
    problem = PROBLEMS["eight_schools"]
    sigma, y = problem.args
    mu, log_tau = np.linspace(-40, 40, 401)[:, None], np.linspace(-18, 12, 1501)
    tau = np.exp(log_tau)
    log_mass = st.norm.logpdf(mu, 0, 5) + st.halfcauchy.logpdf(tau, scale=5) + log_tau
    for value, scale in zip(y, sigma, strict=True):
        log_mass = log_mass + st.norm.logpdf(value, mu, np.sqrt(scale**2 + tau**2))
    mass = np.exp(log_mass) * 0.2 * 0.02
    np.testing.assert_allclose(np.log(mass.sum()), problem.log_z, atol=2e-6)
    np.testing.assert_allclose(np.log(mass.sum()), -31.31135, atol=1e-5)
    mass /= mass.sum()
    np.testing.assert_allclose(np.sum(mass * mu), problem.means["mu"], rtol=1e-5)
    np.testing.assert_allclose(np.sum(mass * tau), problem.means["tau"], rtol=1e-5)


def test_gaussian_by_its_draws():
    problem = PROBLEMS["gaussian"]
    mean, covariance = problem.args
    x = st.multivariate_normal(mean, covariance).rvs(size=100_000, random_state=0)
    scores = (x.mean(0) - problem.means["x"]) / (x.std(0) / np.sqrt(len(x)))
    squares = (x - mean) ** 2
    scores = np.append(scores, (squares.mean(0) - problem.variances["x"]) / (squares.std(0) / np.sqrt(len(x))))
    assert np.max(np.abs(scores)) < z_limit(len(scores))


@pytest.mark.quick
def test_registry_is_complete():
    assert len(PROBLEMS) >= 10
    for problem in PROBLEMS.values():
        assert problem.means.keys() == problem.variances.keys()
        assert ("SMC" in problem.samplers) == (problem.log_z is not None)
        has_prior = "prior" in problem.target().roles().values()
        assert has_prior == (problem.log_z_prior is not None)
