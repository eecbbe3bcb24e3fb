"""Models with a known log evidence, in nats, for the benchmarks of log Z.

Each function builds one `Problem`, and its docstring says how the answer is known. Priors are normalised, so that every
kind of estimator can play, but for `smooth30`, whose prior energy has a log Z of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import gammaln, logsumexp

import ebm_ppl as ebm


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and its log evidence.

    Attributes:
        log_z: the exact value in nats.
        tolerance: its own standard error, where it is an estimate.
    """

    target: ebm.Target
    log_z: float
    tolerance: float = 0.0


def _tilted(prior: dist.Distribution, log_likelihood: Callable) -> ebm.Target:
    """A prior on `x` with a likelihood given as a function."""

    def model() -> None:
        x = numpyro.sample("x", prior)
        ebm.energy_factor("likelihood", -log_likelihood(x), role="loss")

    return ebm.target(model)


def g10() -> Problem:
    """A correlated Gaussian inside a cube: the cube's volume, up to the tails outside of it."""
    likelihood = dist.MultivariateNormal(jnp.zeros(10), 0.2 * jnp.eye(10) + 0.8)
    prior = dist.Uniform(-10, 10).expand([10]).to_event(1)
    return Problem(_tilted(prior, likelihood.log_prob), -10 * math.log(20))


def g32() -> Problem:
    """A Gaussian with a strongly correlated Gaussian likelihood: the density of its mean under their sum."""
    indices = np.arange(32)
    covariance = 0.25 * 0.9 ** np.abs(np.subtract.outer(indices, indices))
    mean = np.random.default_rng(0).normal(0, 1, 32)
    prior = dist.Normal(0, 3).expand([32]).to_event(1)
    likelihood = dist.MultivariateNormal(mean, covariance)
    exact = dist.MultivariateNormal(np.zeros(32), 9 * np.eye(32) + covariance).log_prob(mean)
    return Problem(_tilted(prior, likelihood.log_prob), float(exact))


def mix10() -> Problem:
    """A Gaussian with two separated modes of unequal weight: a sum of two Gaussian integrals."""
    weights, centres, variances = np.array([0.2, 0.8]), np.array([-3.0, 3.0]), np.array([0.25, 0.64])

    def mixture(x: jax.Array, extra: float) -> jax.Array:
        parts = dist.Normal(centres, np.sqrt(variances + extra)).log_prob(x[:, None]).sum(axis=0)
        return jax.nn.logsumexp(parts + np.log(weights))

    prior = dist.Normal(0, 4).expand([10]).to_event(1)
    return Problem(_tilted(prior, lambda x: mixture(x, 0.0)), float(mixture(jnp.zeros(10), 16.0)))


def funnel10() -> Problem:
    """Neal's funnel inside a box: quadrature over its neck."""

    def model() -> None:
        v = numpyro.sample("v", dist.Uniform(-10, 10))
        x = numpyro.sample("x", dist.Uniform(-30, 30).expand([9]).to_event(1))
        log_likelihood = dist.Normal(0, 3).log_prob(v) + dist.Normal(0, jnp.exp(v / 2)).log_prob(x).sum()
        ebm.energy_factor("likelihood", -log_likelihood, role="loss")

    return Problem(ebm.target(model), -39.87748)


def schools() -> Problem:
    """Eight schools, non-centred: quadrature."""
    sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y: jax.Array) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("school", 8):
            eta = numpyro.sample("eta", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    return Problem(ebm.target(model, jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])), -31.31135)


def logit31() -> Problem:
    """Breast cancer, standardised, with intercept: a long run, with its standard error."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    x = np.column_stack([np.ones(len(x)), (x - x.mean(axis=0)) / x.std(axis=0)])

    def model(x: jax.Array, y: jax.Array) -> None:
        beta = numpyro.sample("beta", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    return Problem(ebm.target(model, x, y), -55.2231, tolerance=0.0015)


def student40_2() -> Problem:
    """Forty modes of a Student t in the plane, over a wide Student t: both are normalised, so that log Z = 0."""
    return _student40(2)


def student40_10() -> Problem:
    """The same in ten dimensions."""
    return _student40(10)


def _student40(dim: int) -> Problem:
    centres = np.random.default_rng(1).uniform(-40, 40, (40, dim))
    prior = dist.MultivariateStudentT(3.0, jnp.zeros(dim), 30.0 * jnp.eye(dim))

    def log_likelihood(x: jax.Array) -> jax.Array:
        modes = dist.MultivariateStudentT(3.0, centres, jnp.eye(dim)).log_prob(x)
        return jax.nn.logsumexp(modes) - math.log(40) - prior.log_prob(x)

    return Problem(_tilted(prior, log_likelihood), 0.0)


def wells32() -> Problem:
    """Sixteen double wells of unequal depth, 2^16 modes: a product of quadratures on a line."""
    prior = dist.Normal(0, 2).expand([32]).to_event(1)

    def log_likelihood(x: jax.Array) -> jax.Array:
        a, b = x[:16], x[16:]
        return jnp.sum(-(a**4) + 6 * a**2 + 0.5 * a) - jnp.sum(b**2) / 2

    grid = np.linspace(-6, 6, 20_001)
    well = logsumexp(-(grid**4) + 6 * grid**2 + 0.5 * grid - grid**2 / 8) + math.log(grid[1] - grid[0])
    well -= 0.5 * math.log(2 * math.pi * 4)
    return Problem(_tilted(prior, log_likelihood), 16 * (well - 0.5 * math.log(5)))


def gauss100() -> Problem:
    """A correlated Gaussian likelihood in 100 dimensions: the density of its mean under the sum of both Gaussians."""
    return gauss(100)


def gauss(dim: int) -> Problem:
    """A Gaussian likelihood with covariance `.1 * .9^|i-j|` and a random mean under N(0, I): a closed form.

    That covariance is a Markov chain's, so that the likelihood is written in transitions, at a cost of O(dim).
    """
    variance, correlation = 0.1, 0.9
    mean = np.random.default_rng(0).normal(0, 1, dim)

    def log_likelihood(x: jax.Array) -> jax.Array:
        away = x - mean
        first = dist.Normal(0, math.sqrt(variance)).log_prob(away[0])
        rest = dist.Normal(correlation * away[:-1], math.sqrt(variance * (1 - correlation**2))).log_prob(away[1:])
        return first + jnp.sum(rest)

    covariance = variance * correlation ** np.abs(np.subtract.outer(np.arange(dim), np.arange(dim)))
    exact = dist.MultivariateNormal(np.zeros(dim), np.eye(dim) + covariance).log_prob(mean)
    return Problem(_tilted(dist.Normal(0, 1).expand([dim]).to_event(1), log_likelihood), float(exact))


def cox() -> Problem:
    """A log-Gaussian Cox process on 20 x 20 cells, in whitened coordinates; simulated counts.

    The answer is the mean of twelve runs of SMC (2000 particles, an effective share of .8), with its standard error.
    Importance sampling from the Laplace approximation, far less precise here, says -188.01 with an error of .17.
    """
    side, variance, scale = 20, 1.91, 1 / 33
    mean = math.log(126) - variance / 2
    cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2) / side
    distance = np.linalg.norm(cells[:, None] - cells[None], axis=-1)
    factor = np.linalg.cholesky(variance * np.exp(-distance / scale) + 1e-9 * np.eye(side**2))
    rng = np.random.default_rng(7)
    y = rng.poisson(np.exp(mean + factor @ rng.normal(size=side**2)) / side**2)

    def model(factor: jax.Array, y: jax.Array) -> None:
        x = numpyro.sample("x", dist.Normal(0, 1).expand([side**2]).to_event(1))
        numpyro.sample("y", dist.Poisson(jnp.exp(mean + factor @ x) / side**2).to_event(1), obs=y)

    return Problem(ebm.target(model, factor, y), -188.003, tolerance=0.017)


def spike20() -> Problem:
    """Skilling's spike and slab in a cube: a first-order transition that tempering cannot pass; 100 parts to 1."""

    def log_likelihood(x: jax.Array) -> jax.Array:
        spike, slab = (dist.Normal(0, scale).log_prob(x).sum() for scale in (0.01, 0.1))
        return jnp.logaddexp(math.log(100.0) + spike, slab)

    prior = dist.Uniform(-0.5, 0.5).expand([20]).to_event(1)
    return Problem(_tilted(prior, log_likelihood), math.log(101))


def simplex10() -> Problem:
    """Counts of ten categories, some of them empty: conjugate."""
    alpha, counts = np.full(10, 0.5), np.array([0, 0, 1, 40, 3, 0, 120, 7, 15, 2])

    def model(observed: jax.Array) -> None:
        p = numpyro.sample("p", dist.Dirichlet(alpha))
        numpyro.sample("counts", dist.Multinomial(int(counts.sum()), p), obs=observed)

    def log_beta(a: np.ndarray) -> float:
        return gammaln(a).sum() - gammaln(a.sum())

    choose = gammaln(counts.sum() + 1) - gammaln(counts + 1).sum()
    return Problem(ebm.target(model, counts), float(choose + log_beta(alpha + counts) - log_beta(alpha)))


def smooth30() -> Problem:
    """A smooth curve through 30 points under a prior energy: Gaussian, with the prior's own log Z taken off."""
    num, strength, noise = 30, 5.0, 0.5
    y = np.sin(np.linspace(0, 6, num))

    def model(y: jax.Array) -> None:
        f = numpyro.sample("f", dist.Normal(0, 2).expand([num]).to_event(1))
        ebm.energy_factor("smooth", strength * jnp.sum(jnp.diff(f) ** 2), role="prior")
        numpyro.sample("y", dist.Normal(f, noise).to_event(1), obs=y)

    steps = np.diff(np.eye(num), axis=0)
    covariance = np.linalg.inv(np.eye(num) / 4 + 2 * strength * steps.T @ steps)
    marginal = covariance + noise**2 * np.eye(num)
    log_z = -0.5 * (y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(2 * np.pi * marginal)[1])
    return Problem(ebm.target(model, y), float(log_z))


def process3() -> Problem:
    """Gaussian process regression, its three scales unknown: closed form given these, quadrature over them."""
    x = np.linspace(0, 4, 25)
    y = np.sin(2 * x) + 0.2 * np.random.default_rng(3).normal(size=25)
    squares = np.subtract.outer(x, x) ** 2

    def covariance(length: jax.Array, height: jax.Array, noise: jax.Array) -> jax.Array:
        return height**2 * jnp.exp(-squares / (2 * length**2)) + (noise**2 + 1e-8) * jnp.eye(25)

    def model(y: jax.Array) -> None:
        scales = [numpyro.sample(name, dist.LogNormal(0, 1)) for name in ("length", "height", "noise")]
        numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(25), covariance(*scales)), obs=y)

    nodes, weights = np.polynomial.legendre.leggauss(60)

    def log_mass(z: jax.Array) -> jax.Array:
        likelihood = dist.MultivariateNormal(jnp.zeros(25), covariance(*jnp.exp(z))).log_prob(y)
        return likelihood + dist.Normal(0, 1).log_prob(z).sum()

    axes = [(high + low) / 2 + (high - low) / 2 * nodes for low, high in ((-3, 2.5), (-2.5, 4), (-4, 1.5))]
    volume = sum(math.log((high - low) / 2) for low, high in ((-3, 2.5), (-2.5, 4), (-4, 1.5)))
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    log_weight = np.log(weights[:, None, None] * weights[:, None] * weights).ravel()
    with jax.enable_x64(True):
        values = np.concatenate([jax.jit(jax.vmap(log_mass))(part) for part in np.split(grid, 60)])
    return Problem(ebm.target(model, y), float(logsumexp(values + log_weight) + volume))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    problem.__name__: problem
    for problem in (
        g10,
        g32,
        mix10,
        funnel10,
        schools,
        logit31,
        student40_2,
        student40_10,
        wells32,
        gauss100,
        cox,
        spike20,
        simplex10,
        smooth30,
        process3,
    )
}
