"""Targets with known answers: the registry that samplers, estimators and benchmarks are held against.

Each `Problem` says how its answer is known. Quadrature is Gauss and Legendre's, in NumPy, on one or two
coordinates; all other coordinates are integrated in closed form. `test_problems.py` checks each answer by another
route.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.stats as st
from scipy.special import betaln, gammaln, logsumexp

import ebm_ppl as ebm

CHAINS = ("NUTS", "HMC", "MALA", "MCLMC")
ALL = (*CHAINS, "SMC")
ONE_DIMENSION = tuple(name for name in ALL if name != "MCLMC")
"""On a line the microcanonical velocity is a sign: its direction cannot be refreshed, and MCLMC does not apply."""
STEEP = ("NUTS", "HMC", "MCLMC", "SMC")
"""Where the gradient grows faster than linearly, MALA is not geometrically ergodic: it sticks in the tails."""
STEEP_LINE = tuple(name for name in STEEP if name in ONE_DIMENSION)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model with its answer.

    Attributes:
        log_z: the value of `ebm.log_z` in nats: the log evidence, or log Z of the prior where there are no data.
            None where the model has no energies at all.
        log_z_prior: log Z of the prior energies; None where there are none.
        means, variances: of the constrained (or deterministic) sites under the posterior.
        how: how the answer is known.
        samplers: names of those that it suits.
    """

    name: str
    model: Callable[..., None]
    args: tuple[Any, ...]
    log_z: float | None
    means: Mapping[str, np.ndarray]
    variances: Mapping[str, np.ndarray]
    how: str
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    log_z_prior: float | None = None
    samplers: tuple[str, ...] = ALL

    def target(self) -> ebm.Target:
        return ebm.target(self.model, *self.args, **self.kwargs)


# Quadrature


def _line(lower: float, upper: float, panels: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Nodes on an interval, twenty to a panel, and the logs of their weights."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(lower, upper, panels + 1)
    half = np.diff(edges)[:, None] / 2
    return np.ravel(edges[:-1, None] + half * (nodes + 1)), np.ravel(np.log(half * weights))


def _moments(log_mass: np.ndarray, **sites: Any) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Log total mass, and means and variances of sites, given by their values at the nodes.

    The trailing axes of a site are those of `log_mass`. A pair is the mean and variance given the node.
    """
    total = logsumexp(log_mass)
    mass = np.exp(log_mass - total)
    axes = tuple(range(-mass.ndim, 0))
    means, variances = {}, {}
    for name, site in sites.items():
        centre, spread = site if isinstance(site, tuple) else (site, 0.0)
        means[name] = np.sum(mass * centre, axis=axes)
        shifted = centre - np.expand_dims(means[name], axes)
        variances[name] = np.sum(mass * (shifted**2 + spread), axis=axes)
    return float(total), means, variances


def _gaussian_posterior(
    prior: np.ndarray, design: np.ndarray, noise: np.ndarray, y: np.ndarray
) -> tuple[float, Any, Any]:
    """x ~ N(0, prior), y ~ N(design x, noise): log evidence, posterior mean and variances."""
    marginal = design @ prior @ design.T + noise
    gain = np.linalg.solve(marginal, design @ prior).T
    log_z = st.multivariate_normal(np.zeros(len(y)), marginal).logpdf(y)
    return float(log_z), gain @ y, np.diag(prior - gain @ design @ prior)


# Closed forms


def _gaussian() -> Problem:
    scales = np.array([0.05, 0.3, 1.0, 4.0, 20.0])
    correlation = 0.5 + 0.5 * np.eye(5)
    mean, covariance = np.arange(5.0), scales[:, None] * correlation * scales

    def model(mean, covariance):
        numpyro.sample("x", dist.MultivariateNormal(mean, covariance))

    return Problem(
        name="gaussian",
        model=model,
        args=(mean, covariance),
        log_z=None,
        means={"x": mean},
        variances={"x": scales**2},
        how="A correlated Gaussian with scales from .05 to 20 and no energies: its own parameters.",
        samplers=CHAINS,
    )


NORMAL_Y = np.array([2.1, 3.4, 2.8, 1.9, 3.1, 2.5, 2.2, 3.6])


def _normal_mean() -> Problem:
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        with numpyro.plate("observation", y.shape[0]):
            numpyro.sample("y", dist.Normal(mu, 0.7), obs=y)

    num = len(NORMAL_Y)
    log_z, mean, variance = _gaussian_posterior(np.array([[4.0]]), np.ones((num, 1)), 0.49 * np.eye(num), NORMAL_Y)
    return Problem(
        name="normal_mean",
        model=model,
        args=(NORMAL_Y,),
        log_z=log_z,
        means={"mu": mean[0]},
        variances={"mu": variance[0]},
        how="Conjugate: the data are jointly Gaussian.",
        samplers=ONE_DIMENSION,
    )


def _regression() -> Problem:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(25, 4)) @ np.array([[1, 0.8, 0, 0], [0, 0.6, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0.5]])
    y = x @ np.array([1.0, -2.0, 0.5, 0.0]) + 0.7 * rng.normal(size=25)

    def model(x, y):
        beta = numpyro.sample("beta", dist.Normal(0.0, 2.0).expand([4]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ beta, 0.7).to_event(1), obs=y)

    log_z, mean, variance = _gaussian_posterior(4.0 * np.eye(4), x, 0.49 * np.eye(25), y)
    return Problem(
        name="regression",
        model=model,
        args=(x, y),
        log_z=log_z,
        means={"beta": mean},
        variances={"beta": variance},
        how="Conjugate linear regression: the data are jointly Gaussian.",
    )


def _beta_binomial() -> Problem:
    def model(y):
        p = numpyro.sample("p", dist.Beta(2.0, 5.0))
        numpyro.sample("y", dist.Binomial(20, p), obs=y)

    posterior = st.beta(2 + 13, 5 + 7)
    choose = gammaln(21) - gammaln(14) - gammaln(8)
    return Problem(
        name="beta_binomial",
        model=model,
        args=(np.array(13),),
        log_z=float(choose + betaln(15, 12) - betaln(2, 5)),
        means={"p": posterior.mean()},
        variances={"p": posterior.var()},
        how="Conjugate: the posterior is a Beta.",
        samplers=ONE_DIMENSION,
    )


def _gamma_poisson() -> Problem:
    y = np.array([4, 2, 7, 3, 5, 6])

    def model(y):
        rate = numpyro.sample("rate", dist.Gamma(3.0, 1.5))
        with numpyro.plate("observation", y.shape[0]):
            numpyro.sample("y", dist.Poisson(rate), obs=y)

    shape, inverse_scale = 3.0 + y.sum(), 1.5 + len(y)
    log_z = 3 * math.log(1.5) - gammaln(3.0) + gammaln(shape) - shape * math.log(inverse_scale) - gammaln(y + 1).sum()
    return Problem(
        name="gamma_poisson",
        model=model,
        args=(y,),
        log_z=float(log_z),
        means={"rate": np.asarray(shape / inverse_scale)},
        variances={"rate": np.asarray(shape / inverse_scale**2)},
        how="Conjugate: the posterior is a Gamma.",
        samplers=ONE_DIMENSION,
    )


def _dirichlet_multinomial() -> Problem:
    alpha, counts = np.array([1.5, 1.0, 3.0, 2.0]), np.array([5, 1, 9, 4])

    def model(counts):
        p = numpyro.sample("p", dist.Dirichlet(jnp.asarray(alpha)))
        numpyro.sample("counts", dist.Multinomial(19, p), obs=counts)

    after, total = alpha + counts, (alpha + counts).sum()
    mean = after / total

    def log_beta(a):
        return gammaln(a).sum() - gammaln(a.sum())

    choose = gammaln(20) - gammaln(counts + 1).sum()
    return Problem(
        name="dirichlet_multinomial",
        model=model,
        args=(counts,),
        log_z=float(choose + log_beta(after) - log_beta(alpha)),
        means={"p": mean},
        variances={"p": mean * (1 - mean) / (total + 1)},
        how="Conjugate on the simplex: the posterior is a Dirichlet.",
    )


def _mixture() -> Problem:
    weights = np.array([0.3, 0.7])
    centres, scales, prior_scale = np.array([[-1.2, -1.0], [1.0, 1.2]]), np.array([0.6, 0.9]), 3.0

    def model(weights, centres, scales):
        x = numpyro.sample("x", dist.Normal(0.0, prior_scale).expand([2]).to_event(1))
        components = dist.Normal(centres, scales[:, None]).to_event(1)
        log_density = jnp.log(weights) + components.log_prob(x)
        ebm.energy_factor("mixture", -jnp.logaddexp(log_density[0], log_density[1]), role="loss")

    total = scales**2 + prior_scale**2
    log_masses = np.log(weights) - np.sum(centres**2, 1) / (2 * total) - np.log(2 * np.pi * total)
    shrink = prior_scale**2 / total
    after = (shrink[:, None] * centres).T, (shrink * scales**2)[None]
    log_z, means, variances = _moments(log_masses, x=after)
    return Problem(
        name="mixture",
        model=model,
        args=(weights, centres, scales),
        log_z=log_z,
        means=means,
        variances=variances,
        how="A Gaussian prior times two Gaussians of unequal weight: a mixture of two Gaussians again.",
    )


def _correlated_box() -> Problem:
    covariance = 0.2 * np.eye(10) + 0.8

    def model(covariance):
        x = numpyro.sample("x", dist.Uniform(-10.0, 10.0).expand([10]).to_event(1))
        likelihood = dist.MultivariateNormal(jnp.zeros(10), covariance)
        numpyro.sample("y", dist.MultivariateNormal(x, covariance), obs=likelihood.mean)

    return Problem(
        name="correlated_box",
        model=model,
        args=(covariance,),
        log_z=-10 * math.log(20.0),
        means={"x": np.zeros(10)},
        variances={"x": np.ones(10)},
        how="A correlated Gaussian likelihood in a uniform box ten standard deviations wide: the box's log volume.",
    )


def _correlated_normal() -> Problem:
    lag = np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    covariance, y = 0.25 * 0.9**lag, np.array([-1.6, -1.2, -0.7, -0.9, 0.1, 1.1, 1.4, 2.2])

    def model(covariance, y):
        x = numpyro.sample("x", dist.Normal(0.0, 3.0).expand([8]).to_event(1))
        numpyro.sample("y", dist.MultivariateNormal(x, covariance), obs=y)

    log_z, mean, variance = _gaussian_posterior(9.0 * np.eye(8), np.eye(8), covariance, y)
    return Problem(
        name="correlated_normal",
        model=model,
        args=(covariance, y),
        log_z=log_z,
        means={"x": mean},
        variances={"x": variance},
        how="Conjugate: Gaussian prior, strongly correlated Gaussian likelihood.",
    )


# Quadrature over one or two coordinates


def _funnel() -> Problem:
    y = np.array([0.3, -1.1, 2.0, 0.6])

    def model(y):
        v = numpyro.sample("v", dist.Normal(0.0, 1.0))
        with numpyro.plate("arm", y.shape[0]):
            x = numpyro.sample("x", dist.Normal(0.0, jnp.exp(v / 2)))
            numpyro.sample("y", dist.Normal(x, 0.8), obs=y)

    v, log_weight = _line(-8.0, 8.0)
    signal, noise = np.exp(v), 0.64
    log_mass = log_weight + st.norm.logpdf(v)
    log_mass = log_mass + st.norm.logpdf(y[:, None], 0.0, np.sqrt(signal + noise)).sum(0)
    share = signal / (signal + noise)
    log_z, means, variances = _moments(log_mass, v=v, x=(share * y[:, None], share * noise))
    return Problem(
        name="funnel",
        model=model,
        args=(y,),
        log_z=log_z,
        means=means,
        variances=variances,
        how="A centred hierarchy: quadrature over the log variance, the arms given it are Gaussian.",
    )


FUNNEL_IN_A_BOX = -39.87748
"""Its log Z, by quadrature over the neck."""


def funnel_in_a_box() -> None:
    """Neal's funnel between walls, which is no `Problem`: tempered SMC falls short on it, and must say so."""
    v = numpyro.sample("v", dist.Uniform(-10.0, 10.0))
    x = numpyro.sample("x", dist.Uniform(-30.0, 30.0).expand([9]).to_event(1))
    log_likelihood = dist.Normal(0.0, 3.0).log_prob(v) + dist.Normal(0.0, jnp.exp(v / 2)).log_prob(x).sum()
    ebm.energy_factor("likelihood", -log_likelihood, role="loss")


def _dynamic_support() -> Problem:
    y = np.array([0.9, 1.4])

    def model(y):
        a = numpyro.sample("a", dist.Gamma(4.0, 2.0))
        u = numpyro.sample("u", dist.Uniform(0.0, a))
        with numpyro.plate("observation", y.shape[0]):
            numpyro.sample("y", dist.Normal(u, 0.6), obs=y)

    (log_a, weight_a), (s, weight_s) = _line(-5.0, 3.5), _line(0.0, 1.0)
    log_a, weight_a = log_a[:, None], weight_a[:, None]
    a = np.exp(log_a)
    u = a * s
    log_mass = weight_a + weight_s + st.gamma(4.0, scale=0.5).logpdf(a) + log_a
    log_mass = log_mass + st.norm.logpdf(y[:, None, None], u, 0.6).sum(0)
    log_z, means, variances = _moments(log_mass, a=a, u=u)
    return Problem(
        name="dynamic_support",
        model=model,
        args=(y,),
        log_z=log_z,
        means=means,
        variances=variances,
        how="A support that depends on a latent: quadrature over log a and u / a.",
    )


def _correlation() -> Problem:
    rng = np.random.default_rng(3)
    y = rng.multivariate_normal(np.zeros(2), [[1.0, 0.6], [0.6, 1.0]], size=15)

    def model(y):
        factor = numpyro.sample("factor", dist.LKJCholesky(2, 2.0))
        numpyro.deterministic("rho", factor[1, 0])
        numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(2), scale_tril=factor).expand([15]).to_event(1), obs=y)

    rho, log_weight = _line(-1.0, 1.0)
    squares, product = np.sum(y**2), np.sum(y[:, 0] * y[:, 1])
    log_prior = np.log(0.75) + np.log1p(-(rho**2))
    log_likelihood = -15 * np.log(2 * np.pi) - 7.5 * np.log1p(-(rho**2))
    log_likelihood = log_likelihood - (squares - 2 * rho * product) / (2 * (1 - rho**2))
    log_z, means, variances = _moments(log_weight + log_prior + log_likelihood, rho=rho)
    return Problem(
        name="correlation",
        model=model,
        args=(y,),
        log_z=log_z,
        means=means,
        variances=variances,
        how="A Cholesky factor of a 2 x 2 correlation matrix: quadrature over the correlation.",
        samplers=ONE_DIMENSION,
    )


def _eight_schools() -> Problem:
    y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(sigma, y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("school", 8):
            effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)

    share, log_weight = _line(0.0, 1.0)  # tau = 5 tan(pi share / 2): its prior is uniform in `share`
    tau = 5.0 * np.tan(np.pi / 2 * share)
    spread = sigma[:, None] ** 2 + tau**2
    precision = 1 / 25 + np.sum(1 / spread, 0)
    mu, mu_variance = np.sum(y[:, None] / spread, 0) / precision, 1 / precision
    log_likelihood = -0.5 * np.sum(y[:, None] ** 2 / spread, 0) + 0.5 * mu**2 * precision
    log_likelihood = log_likelihood - 0.5 * (np.log(25 * precision) + np.sum(np.log(2 * np.pi * spread), 0))
    effect = tau * (y[:, None] - mu) / spread
    effect_variance = sigma[:, None] ** 2 / spread + tau**2 * mu_variance / spread**2
    log_z, means, variances = _moments(
        log_weight + log_likelihood, mu=(mu, mu_variance), tau=tau, effect=(effect, effect_variance)
    )
    return Problem(
        name="eight_schools",
        model=model,
        args=(sigma, y),
        log_z=log_z,
        means=means,
        variances=variances,
        how="Quadrature over the spread between schools, all else given it is Gaussian.",
    )


# Energies


def _with_tilted_prior(log_prior: np.ndarray, log_mass: np.ndarray, sites: dict[str, Any], **facts: Any) -> Problem:
    """A model with prior energies and data, from its log masses at the nodes without the data and with them."""
    log_z_prior, _, _ = _moments(log_prior)
    log_z, means, variances = _moments(log_mass, **sites)
    return Problem(log_z=log_z - log_z_prior, log_z_prior=log_z_prior, means=means, variances=variances, **facts)


def _double_well() -> Problem:
    def model():
        x = numpyro.sample("x", dist.Normal(0.3, 1.0))
        ebm.energy_factor("well", (x**2 - 1) ** 2, role="prior", beta=0.8)

    x, log_weight = _line(-8.0, 8.0)
    log_z, means, variances = _moments(log_weight + st.norm.logpdf(x, 0.3) - 0.8 * (x**2 - 1) ** 2, x=x)
    return Problem(
        name="double_well",
        model=model,
        args=(),
        log_z=log_z,
        log_z_prior=log_z,
        means=means,
        variances=variances,
        how="A tilted prior without data: quadrature.",
        samplers=STEEP_LINE,
    )


def _tilted_prior() -> Problem:
    y = np.array([0.4, 1.1, 0.2])

    def model(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.5).expand([2]).to_event(1))
        ebm.energy_factor("banana", (x[1] - 0.5 * x[0] ** 2) ** 2, role="prior", beta=2.0)
        numpyro.sample("y", dist.Normal(x[0] + x[1], 1.0).expand([3]).to_event(1), obs=y)

    (a, weight_a), (b, weight_b) = _line(-12.0, 12.0, 16), _line(-12.0, 12.0, 16)
    a, weight_a = a[:, None], weight_a[:, None]
    log_prior = weight_a + weight_b + st.norm.logpdf(a, 0.0, 1.5) + st.norm.logpdf(b, 0.0, 1.5)
    log_prior = log_prior - 2.0 * (b - 0.5 * a**2) ** 2
    log_mass = log_prior + st.norm.logpdf(y[:, None, None], a + b).sum(0)
    return _with_tilted_prior(
        log_prior,
        log_mass,
        {"x": np.stack(np.broadcast_arrays(a, b))},
        name="tilted_prior",
        model=model,
        args=(y,),
        how="A curved prior energy and data: quadrature over both coordinates, with data and without.",
        samplers=STEEP,
    )


def _three_roles() -> Problem:
    def model(y):
        x = numpyro.sample("x", dist.Gamma(2.0, 1.0))
        ebm.energy_factor("prior_energy", 0.5 * (x - 3.0) ** 2, role="prior")
        ebm.energy_factor("loss", jnp.log1p((x - 1.0) ** 2), role="loss", beta=1.5)
        numpyro.sample("y", dist.Poisson(x), obs=y)

    x, log_weight = _line(0.0, 15.0)
    log_prior = log_weight + st.gamma(2.0).logpdf(x) - 0.5 * (x - 3.0) ** 2
    return _with_tilted_prior(
        log_prior,
        log_prior - 1.5 * np.log1p((x - 1.0) ** 2) + st.poisson(x).logpmf(3),
        {"x": x},
        name="three_roles",
        model=model,
        args=(np.array(3),),
        how="A prior energy, a loss and an observation on the positive half line: quadrature.",
        samplers=ONE_DIMENSION,
    )


def _absolute_loss() -> Problem:
    y = np.array([-0.5, 0.8, 1.3, 1.7, 6.0])

    def model(y):
        m = numpyro.sample("m", dist.Normal(0.0, 3.0))
        ebm.energy_factor("misfit", jnp.sum(jnp.sqrt(0.01 + (y - m) ** 2)), role="loss", beta=0.7)

    m, log_weight = _line(-15.0, 15.0, 150)
    log_mass = log_weight + st.norm.logpdf(m, 0.0, 3.0) - 0.7 * np.sqrt(0.01 + (y[:, None] - m) ** 2).sum(0)
    log_z, means, variances = _moments(log_mass, m=m)
    return Problem(
        name="absolute_loss",
        model=model,
        args=(y,),
        log_z=log_z,
        means=means,
        variances=variances,
        how="A Gibbs posterior of a smoothed absolute loss: quadrature.",
        samplers=ONE_DIMENSION,
    )


def _constant_partition() -> Problem:
    def model(y):
        well = ebm.EnergyDistribution(lambda x: 1.2 * (x**2 - 1) ** 2, dist.Normal(0.0, 1.5))
        x = numpyro.sample("x", well)
        numpyro.sample("y", dist.Normal(x, 0.9), obs=y)

    x, log_weight = _line(-8.0, 8.0)
    log_prior = log_weight + st.norm.logpdf(x, 0.0, 1.5) - 1.2 * (x**2 - 1) ** 2
    return _with_tilted_prior(
        log_prior,
        log_prior + st.norm.logpdf(0.4, x, 0.9),
        {"x": x},
        name="constant_partition",
        model=model,
        args=(np.array(0.4),),
        how="An unnormalised latent whose Z is a constant, found on the way: quadrature.",
        samplers=STEEP_LINE,
    )


def _enumerated() -> Problem:
    y = np.array([1.7, -0.4, 2.2, 5.0, 1.1])

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        ebm.energy_factor("flat", 0.05 * mu**4, role="prior")
        with numpyro.plate("observation", y.shape[0]):
            outlier = numpyro.sample("outlier", dist.Bernoulli(0.2), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(jnp.where(outlier == 1, 0.0, mu), jnp.where(outlier == 1, 4.0, 0.5)), obs=y)

    mu, log_weight = _line(-7.0, 7.0)
    log_prior = log_weight + st.norm.logpdf(mu, 0.0, 2.0) - 0.05 * mu**4
    inlier = np.log(0.8) + st.norm.logpdf(y[:, None], mu, 0.5)
    log_mass = log_prior + np.logaddexp(inlier, np.log(0.2) + st.norm.logpdf(y[:, None], 0.0, 4.0)).sum(0)
    return _with_tilted_prior(
        log_prior,
        log_mass,
        {"mu": mu},
        name="enumerated",
        model=model,
        args=(y,),
        how="Discrete sites summed out in closed form, under a tilted prior: quadrature over what is left.",
        samplers=STEEP_LINE,
    )


def _quartic() -> Problem:
    y = np.array([0.9, 0.5])
    node, log_weight_node = _line(0.0, 9.0, 2)

    def log_partition(theta):
        """log E[exp(-theta x^4)] under N(0, 1), on nodes that shrink with the strength."""
        scale = 1 / (1 + theta**0.25)
        x = scale * jnp.asarray(node)
        exponents = jnp.asarray(log_weight_node) - x**2 / 2 - theta * x**4
        top = jnp.max(exponents)
        return top + jnp.log(2 * scale * jnp.sum(jnp.exp(exponents - top))) - 0.5 * math.log(2 * math.pi)

    def model(y):
        theta = numpyro.sample("theta", dist.LogNormal(0.5, 0.8))
        quartic = ebm.EnergyDistribution(
            lambda x: theta * x**4, dist.Normal(0.0, 1.0), log_partition=log_partition(theta)
        )
        x = numpyro.sample("x", quartic)
        with numpyro.plate("observation", y.shape[0]):
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y)

    (log_theta, weight), (x, weight_x) = _line(-6.0, 7.0), _line(-6.0, 6.0, 16)
    log_theta, weight = log_theta[:, None], weight[:, None]
    theta = np.exp(log_theta)
    log_conditional = weight_x + st.norm.logpdf(x) - theta * x**4
    log_conditional = log_conditional - logsumexp(log_conditional, axis=1, keepdims=True)
    log_mass = weight + st.norm.logpdf(log_theta, 0.5, 0.8) + log_conditional
    log_mass = log_mass + st.norm.logpdf(y[:, None, None], x, 0.5).sum(0)
    log_z, means, variances = _moments(log_mass, theta=theta, x=x)
    return Problem(
        name="quartic",
        model=model,
        args=(y,),
        log_z=log_z,
        log_z_prior=0.0,
        means=means,
        variances=variances,
        how="An energy with unknown strength and its log partition: quadrature over strength and value.",
        samplers=STEEP,
    )


PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        _gaussian(),
        _normal_mean(),
        _regression(),
        _beta_binomial(),
        _gamma_poisson(),
        _dirichlet_multinomial(),
        _mixture(),
        _correlated_box(),
        _correlated_normal(),
        _funnel(),
        _dynamic_support(),
        _correlation(),
        _eight_schools(),
        _double_well(),
        _tilted_prior(),
        _three_roles(),
        _absolute_loss(),
        _constant_partition(),
        _enumerated(),
        _quartic(),
    )
}
