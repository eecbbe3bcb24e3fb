"""Variational autoencoders: the bound against closed forms and NumPyro's own, and what they learn."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from limits import f_limits, z_limit
from model_problems import LOADINGS, SCALE, SHIFT, draws, linear_gaussian, marginal
from numpyro.infer import Trace_ELBO
from scipy.special import logsumexp

import ebm_ppl as ebm
from ebm_ppl.models.vae import EvidenceBound
from ebm_ppl.train.objective import Density

_, X = draws(0, 8)


def _losses(objective, model, num, data=X, state=()):
    """Of many keys."""
    density = Density(model, None, data.shape[1:])

    def loss(key):
        return objective.loss(key, density, (), state, jnp.asarray(data))[0]

    return np.asarray(jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(0), num)))


def test_bound_is_numpyros():
    model, num = linear_gaussian("wrong"), 4000
    ours = _losses(EvidenceBound(), model, num)
    elbo = Trace_ELBO()
    of_key = jax.vmap(lambda key: elbo.loss(key, {}, model.model, model.guide, jnp.asarray(X)))
    theirs = np.asarray(jax.jit(of_key)(jax.random.split(jax.random.key(1), num))) / len(X)
    error = np.hypot(np.std(ours), np.std(theirs)) / np.sqrt(num)
    assert np.abs(np.mean(ours) - np.mean(theirs)) < z_limit(1) * error
    assert np.mean(ours) + np.mean(marginal().logpdf(X)) > 0.05  # a gap that a slip would have to hide in


def test_importance_weighted_bound_is_tight_where_draws_are_many():
    model = linear_gaussian("wrong")
    gaps = [np.mean(_losses(EvidenceBound(k), model, 500)) + np.mean(marginal().logpdf(X)) for k in (1, 8, 64)]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


def test_weights_are_unbiased():
    """E exp(log w) = p(x), by the loss of one event."""
    one, num = X[:1], 20_000
    log_w = -_losses(EvidenceBound(), linear_gaussian("wrong"), num, one)
    ratio = np.exp(log_w - marginal().logpdf(one))
    assert np.abs(np.mean(ratio) - 1) < z_limit(1) * np.std(ratio) / np.sqrt(num)


def test_beta_scales_the_rate():
    model = linear_gaussian("wrong")
    density = Density(model, None, (4,))
    key = jax.random.key(0)
    loss, (_, told) = EvidenceBound(beta=3.0).loss(key, density, (), (), jnp.asarray(X))
    np.testing.assert_allclose(loss, 3 * told["rate"] - told["reconstruction"], rtol=1e-10)


def test_a_linear_model_is_learned():
    """Perceptrons without a bend: the likelihood of new data within .02 nats of the truth, and the noise within 5 %."""
    _, data = draws(1, 4000)
    _, new = draws(2, 2000)
    model = ebm.vae(jax.random.key(0), 2, ebm.GaussianLikelihood((4,), 1.0), depth=0)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.02, 1500))
    fitted = ebm.fit(
        jax.random.key(1), model, data, EvidenceBound(), optimiser=optimiser, num_steps=1500, progress_bar=False
    )
    trained = fitted.energy
    weight, bias = trained.decoder.layers[0].weight, trained.decoder.layers[0].bias
    scale = float(trained.likelihood.scale)
    covariance = weight @ weight.T + scale**2 * np.eye(4)
    residual = new - bias
    log_p = -np.sum(residual * np.linalg.solve(covariance, residual.T).T, axis=1) / 2
    log_p -= np.linalg.slogdet(2 * np.pi * covariance)[1] / 2
    assert np.mean(marginal().logpdf(new) - log_p) < 0.02
    assert np.abs(scale / SCALE - 1) < 0.05


def test_gradient_of_a_tilted_prior_is_that_of_the_likelihood():
    """With the exact posterior of a quadratic tilt as guess, the gradient of the bound in the tilt is that of log p.

    U(z) = a |z|^2 / 2 makes the prior N(0, 1 / (1 + a)): d/da log p(x) is known by differences of the closed form.
    """

    class Bell(eqx.Module):
        a: jax.Array

        def __call__(self, z):
            return self.a * z @ z / 2

    def log_p(a):
        covariance = LOADINGS @ LOADINGS.T / (1 + a) + SCALE**2 * np.eye(4)
        return (
            -np.mean(np.sum((X - SHIFT) * np.linalg.solve(covariance, (X - SHIFT).T).T, axis=1)) / 2
            - np.linalg.slogdet(2 * np.pi * covariance)[1] / 2
        )

    exact = (log_p(1e-5) - log_p(-1e-5)) / 2e-5
    model = linear_gaussian("exact", energy=Bell(jnp.zeros(())))  # at a = 0 the encoder is exact
    objective = EvidenceBound(of_prior=ebm.MonteCarloLikelihood(512))

    def slope(key):
        def loss(a):
            tilted = eqx.tree_at(lambda m: m.energy.a, model, a)
            return objective.loss(key, Density(tilted, None, (4,)), (), (), jnp.asarray(X))[0]

        return -jax.grad(loss)(jnp.zeros(()))

    slopes = np.asarray(jax.jit(jax.vmap(slope))(jax.random.split(jax.random.key(0), 2000)))
    assert np.abs(np.mean(slopes) - exact) < z_limit(1) * np.std(slopes) / np.sqrt(len(slopes))
    assert np.abs(exact) > 0.1


@pytest.mark.parametrize(
    "objective",
    [pytest.param(ebm.MonteCarloLikelihood(256), marks=pytest.mark.slow), ebm.Jarzynski(num_walkers=64)],
    ids=["likelihood", "jarzynski"],
)
def test_a_tilted_prior_is_trained_beside_the_model(objective):
    model = ebm.vae(
        jax.random.key(0),
        2,
        ebm.GaussianLikelihood((4,)),
        width=8,
        depth=1,
        energy=ebm.MLPEnergy(jax.random.key(1), 2, 8),
    )
    fitted = ebm.fit(
        jax.random.key(2),
        model,
        draws(1, 256)[1],
        EvidenceBound(of_prior=objective),
        num_steps=20,
        every=20,
        progress_bar=False,
    )
    assert not eqx.tree_equal(fitted.energy.energy, model.energy)
    assert eqx.tree_equal(fitted.energy.base, model.base)  # which is given
    assert "prior_log_z" in fitted.record["training"]


@pytest.mark.parametrize("kind", ["bits", pytest.param("categories", marks=pytest.mark.slow)])
def test_images_by_convolutions(kind):
    rng = np.random.default_rng(0)
    likelihood = {"bits": ebm.BernoulliLikelihood((8, 8)), "categories": ebm.CategoricalLikelihood((8, 8), 3)}[kind]
    data = rng.integers(0, 2 if kind == "bits" else 3, size=(64, 8, 8)).astype(float)
    model = ebm.vae(jax.random.key(0), 2, likelihood, channels=(4, 8))
    fitted = ebm.fit(jax.random.key(1), model, data, EvidenceBound(), num_steps=50, every=50, progress_bar=False)
    loss = fitted.record["training"]["loss"].values
    assert np.mean(loss[-10:]) < loss[0]
    assert fitted.energy.given(jnp.zeros((3, 2))).sample(jax.random.key(0)).shape == (3, 8, 8)


def test_what_it_refuses():
    fit = {"num_steps": 1, "progress_bar": False}
    with pytest.raises(ebm.EnergyError, match="has an encoder"):
        ebm.fit(jax.random.key(0), linear_gaussian(None), X, EvidenceBound(), **fit)
    tilted = linear_gaussian("exact", energy=ebm.MLPEnergy(jax.random.key(0), 2))
    with pytest.raises(ebm.EnergyError, match="of_prior"):
        ebm.fit(jax.random.key(0), tilted, X, EvidenceBound(), **fit)
    with pytest.raises(ebm.EnergyError, match="of_prior"):
        ebm.fit(jax.random.key(0), linear_gaussian("exact", True), X, EvidenceBound(of_prior=ebm.Jarzynski()), **fit)
    with pytest.raises(ebm.EnergyError, match="num_draws is 1 at least"):
        EvidenceBound(num_draws=8, beta=0.5)


def test_many_draws_are_one_average():
    """The loss of K draws is minus the mean log of their mean weight."""
    model, x, key = linear_gaussian("wrong"), jnp.asarray(X[0]), jax.random.key(5)
    loss, _ = EvidenceBound(4).loss(key, Density(model, None, (4,)), (), (), x[None])
    guess = model.posterior_guess(x[None])
    weights = [model.log_joint(x, z[0]) - guess.log_prob(z)[0] for z in guess.sample(jax.random.split(key)[0], (4,))]
    np.testing.assert_allclose(loss, np.log(4) - logsumexp(weights), rtol=1e-10)


def test_events_have_draws_of_their_own():
    """The variance of the loss of eight equal events is an eighth of that of one."""
    model, num = linear_gaussian("wrong"), 4000
    one = np.var(_losses(EvidenceBound(), model, num, X[:1]), ddof=1)
    eight = np.var(_losses(EvidenceBound(), model, num, np.repeat(X[:1], 8, axis=0)), ddof=1)
    low, high = f_limits(1, num - 1, num - 1)
    # Squares of normal draws: their variance of variance is a few times that of the F distribution.
    assert low**3 < 8 * eight / one < high**3
