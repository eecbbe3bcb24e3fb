"""The contract of latent-variable models: identities that hold exactly, and NumPyro's view of them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from arviz_stats import mcse
from flowjax.bijections import Affine
from flowjax.distributions import Normal, Transformed
from limits import z_limit
from model_problems import draws, linear_gaussian, marginal, posterior_variances
from numpyro.infer import Predictive, log_likelihood

import ebm_ppl as ebm

Z, X = draws(0, 5)


def test_the_weight_of_the_exact_encoder_is_the_likelihood_at_every_draw():
    model = linear_gaussian("exact")
    keys = jax.random.split(jax.random.key(1), len(X))
    np.testing.assert_allclose(jax.vmap(model.log_weight)(keys, jnp.asarray(X)), marginal().logpdf(X), atol=1e-10)


def test_the_bound_less_the_free_energy_is_the_divergence_of_the_encoder():
    """-ELBO - U(x) = KL(q || p(z | x)), with the mean over q by Gauss and Hermite, exact for quadratic functions."""
    model, exact = linear_gaussian("wrong"), linear_gaussian("exact")
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid, weight = np.array([(a, b) for a in nodes for b in nodes]), np.outer(weights, weights).ravel() / (2 * np.pi)
    for x, log_p in zip(X, marginal().logpdf(X), strict=True):
        q, p = model.posterior_guess(x), exact.posterior_guess(x)
        z = q.mean + jnp.sqrt(q.variance) * grid
        elbo = weight @ (jax.vmap(model.log_joint, (None, 0))(x, z) - q.log_prob(z))
        divergence = sum(
            st.entropy([1.0]) + np.log(sp / sq) + (sq**2 + (mq - mp) ** 2) / (2 * sp**2) - 0.5
            for mq, sq, mp, sp in zip(q.mean, np.sqrt(q.variance), p.mean, np.sqrt(p.variance), strict=True)
        )
        assert divergence > 0.05
        np.testing.assert_allclose(log_p - elbo, divergence, atol=1e-10)


def test_posterior_and_evidence_by_the_target_of_its_model():
    model = linear_gaussian(None)
    target = ebm.target(model.model, jnp.asarray(X))
    z = jnp.asarray(Z).ravel()
    np.testing.assert_allclose(target.log_density(z), jnp.sum(jax.vmap(model.log_joint)(X, Z)), rtol=1e-12)
    with pytest.warns(ebm.EnergyWarning, match="Laplace"):  # of which a normal posterior is not to be wary
        found = ebm.log_z(jax.random.key(0), ebm.target(model.model, jnp.asarray(X[:1])), ebm.Laplace())
    np.testing.assert_allclose(found.value, marginal().logpdf(X[0]), atol=1e-4)


@pytest.mark.parametrize("sampler", [ebm.NUTS(), ebm.SMC(num_particles=1000)], ids=["NUTS", "SMC"])
def test_a_wrong_guess_is_refined_to_the_posterior(sampler):
    model, exact, x = linear_gaussian("wrong"), linear_gaussian("exact").posterior_guess(X), jnp.asarray(X)
    target = ebm.target(ebm.LatentModel.refined, model, x)
    assert target.roles() == {"refinement": "loss"}
    z = jnp.asarray(Z).ravel()
    np.testing.assert_allclose(target.log_reference(z), jnp.sum(model.posterior_guess(x).log_prob(Z)), rtol=1e-10)
    np.testing.assert_allclose(target.log_density(z), jnp.sum(jax.vmap(model.log_joint)(x, Z)), rtol=1e-10)
    how = {} if isinstance(sampler, ebm.SMC) else {"init": "reference", "num_warmup": 300, "num_samples": 500}
    data = ebm.sample(jax.random.key(0), target, sampler, num_chains=4, progress_bar=False, **how)
    mean, error = (np.asarray(each) for each in (data["posterior"]["z"].mean(["chain", "draw"]), mcse(data)["z"]))
    assert np.max(np.abs(mean - exact.mean) / error) < z_limit(10)
    assert np.max(np.abs(mean - model.posterior_guess(x).mean) / error) > 2 * z_limit(10)


def test_the_evidence_of_a_refined_guess_is_the_likelihood():
    for seed, encoder in enumerate(("exact", "wrong")):
        target = ebm.target(ebm.LatentModel.refined, linear_gaussian(encoder), jnp.asarray(X))
        found = ebm.log_z(jax.random.key(seed), target, ebm.SMC(num_particles=1000))
        assert abs(found.value - np.sum(marginal().logpdf(X))) < z_limit(2) * max(found.std_error, 1e-9)


def test_it_is_a_numpyro_model_like_any_other():
    model = linear_gaussian("exact")
    prior = Predictive(model.model, num_samples=2000)(jax.random.key(0), num=1)
    assert prior["x"].shape == (2000, 1, 4) and prior["z"].shape == (2000, 1, 2)
    score = (np.mean(prior["x"][:, 0], axis=0) - marginal().mean) / np.sqrt(np.diag(marginal().cov) / 2000)
    assert np.max(np.abs(score)) < z_limit(4)
    values = log_likelihood(model.model, {"z": jnp.asarray(Z)[None]}, jnp.asarray(X))["x"][0]
    np.testing.assert_allclose(values, st.norm.logpdf(X, model.given(jnp.asarray(Z)).mean, 0.5).sum(axis=1), rtol=1e-10)
    guided = Predictive(model.guide, num_samples=3)(jax.random.key(1), jnp.asarray(X))
    assert guided["z"].shape == (3, 5, 2)


def test_its_latents_are_sites_of_a_larger_model():
    """A site and a factor more; energies are those of each part, and data may be missing."""
    model = linear_gaussian(None)

    def larger(y):
        z = numpyro.sample("z", model.prior)
        ebm.energy_factor("small", 0.5 * jnp.sum(z**2))
        numpyro.sample("y", dist.Normal(model.given(z).mean[:2], 1.0).to_event(1), obs=y)

    target = ebm.target(larger, jnp.zeros(2))
    assert target.roles() == {"small": "prior", "y": "data"}
    data = ebm.sample(jax.random.key(0), target, num_chains=2, num_warmup=100, num_samples=100, progress_bar=False)
    assert data["posterior"]["z"].shape == (2, 100, 2)


def test_a_tilted_prior_counts_in_the_joint_density():
    bent = ebm.FunctionEnergy(lambda z: jnp.sum(z**4))
    plain, tilted = linear_gaussian(None), linear_gaussian(None, energy=bent)
    assert isinstance(tilted.prior, ebm.EnergyDistribution)
    x, z = jnp.asarray(X[0]), jnp.asarray(Z[0])
    np.testing.assert_allclose(tilted.joint_energy(x, z) - plain.joint_energy(x, z), bent(z), rtol=1e-9)
    known = plain.with_prior(bent, log_partition=-0.5)
    np.testing.assert_allclose(known.joint_energy(x, z) - tilted.joint_energy(x, z), -0.5, rtol=1e-9)
    assert ebm.target(tilted.model, x[None]).roles() == {"z": "prior", "x": "data"}


def test_a_flow_as_base():
    flow = Transformed(Normal(jnp.zeros(2)), Affine(jnp.array([1.0, 2.0]), jnp.ones(2) * 0.5))
    model = linear_gaussian(None, base=ebm.FlowDistribution(flow))
    z = jnp.asarray(Z[0])
    np.testing.assert_allclose(model.prior.log_prob(z), st.norm.logpdf(z, [1, 2], 0.5).sum(), rtol=1e-10)


LIKELIHOODS = {
    "bits": (ebm.BernoulliLikelihood((2, 3)), 6, lambda o: st.bernoulli(1 / (1 + np.exp(-o.reshape(2, 3)))).logpmf),
    "numbers": (ebm.GaussianLikelihood((2, 3), 0.3), 6, lambda o: st.norm(o.reshape(2, 3), 0.3).logpdf),
    "categories": (ebm.CategoricalLikelihood((2, 3), 4), 24, None),
}


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_likelihoods(kind):
    likelihood, num, reference = LIKELIHOODS[kind]
    outputs = np.random.default_rng(0).normal(size=(5, num))
    fn = likelihood(jnp.asarray(outputs))
    assert likelihood.num_outputs == num and fn.batch_shape == (5,) and fn.event_shape == (2, 3)
    x = fn.sample(jax.random.key(0))
    if reference is None:
        logits = outputs.reshape(5, 2, 3, 4)
        log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        expected = np.take_along_axis(log_p, np.asarray(x)[..., None], axis=-1).sum(axis=(1, 2, 3))
    else:
        expected = [reference(o)(np.asarray(each)).sum() for o, each in zip(outputs, x, strict=True)]
    np.testing.assert_allclose(fn.log_prob(x), expected, rtol=1e-6)


def test_each_element_may_have_noise_of_its_own():
    scale = np.array([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]])
    outputs, x = np.random.default_rng(0).normal(size=(2, 5, 2, 3))
    found = ebm.GaussianLikelihood((2, 3), scale)(jnp.asarray(outputs.reshape(5, 6))).log_prob(x)
    np.testing.assert_allclose(found, st.norm.logpdf(x, outputs, scale).sum(axis=(1, 2)), rtol=1e-10)
    with pytest.raises(ebm.EnergyShapeError, match=r"scale has shape \(3,\); expected one number, or \(2, 3\)"):
        ebm.GaussianLikelihood((2, 3), scale[0])
    with pytest.raises(ebm.EnergyError, match="positive standard deviation"):
        ebm.GaussianLikelihood((2, 3), scale - 0.1)


def test_shapes_that_do_not_fit_are_refused():
    likelihood = ebm.GaussianLikelihood((4,))
    with pytest.raises(ebm.EnergyShapeError, match=r"decoder's output has shape \(2,\); expected \(4,\)"):
        ebm.LatentModel(2, lambda z: z, likelihood)
    with pytest.raises(ebm.EnergyShapeError, match=r"encoder's output has shape \(4,\); expected \(8,\)"):
        ebm.LatentModel(4, lambda z: z, likelihood, encoder=lambda x: x)
    with pytest.raises(ebm.EnergyShapeError, match=r"base of z has shape \(3,\); expected \(4,\)"):
        ebm.LatentModel(4, lambda z: z, likelihood, base=dist.Normal(jnp.zeros(3)).to_event(1))
    with pytest.raises(ebm.EnergyError, match="no encoder"):
        linear_gaussian(None).posterior_guess(jnp.zeros(4))
    with pytest.raises(ebm.EnergyError, match="positive standard deviation"):
        ebm.GaussianLikelihood((4,), 0.0)
    with pytest.raises(ebm.EnergyError, match="2 at least"):
        ebm.CategoricalLikelihood((4,), 1)


def test_the_encoder_guesses_for_any_batch():
    model = linear_gaussian("exact")
    guess = model.posterior_guess(jnp.asarray(X).reshape(5, 1, 4))
    assert guess.batch_shape == (5, 1) and guess.event_shape == (2,)
    np.testing.assert_allclose(guess.variance, np.broadcast_to(posterior_variances(), (5, 1, 2)), rtol=1e-10)


def test_draws_of_a_tilted_prior():
    """exp(-3/2 |z|^2) on N(0, I) is N(0, I/4), and x follows."""
    model = linear_gaussian(None, energy=ebm.FunctionEnergy(lambda z: 1.5 * z @ z))
    z = np.asarray(model.sample_latents(jax.random.key(0), 2000))
    assert z.shape == (2000, 2)
    score = (np.mean(z**2, axis=0) - 0.25) / (0.25 * np.sqrt(2 / 2000))
    assert np.max(np.abs(score)) < z_limit(2)
    assert model.sample(jax.random.key(0), 10).shape == (10, 4)
