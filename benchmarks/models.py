"""The five models of the NUTS benchmark, each written once for NumPyro and once for PyMC, over the same data.

    model       NumPyro program, shared by ebm_ppl and NumPyro          quantities whose effective sample size counts
    schools     eight schools, non-centred                              mu, tau, the eight effects
    logistic    breast cancer, 30 standardised features and 1           the 31 coefficients
    gaussian    100-d, covariance .9^|i-j|                              the 100 coordinates
    network     diabetes, 10 features, 8 tanh units, 1 output           log sigma, predictions at 20 training inputs
    spatial     sudden infant deaths in 100 counties                    tau, a, b, the 100 county effects

Nothing heavy is imported at the top: the cold timings start a fresh process that pays only for the tool it measures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
NAMES = ("schools", "logistic", "gaussian", "network", "spatial")
HIDDEN = 8
PREDICTIONS = 20
COUNTIES = Path(__file__).parent.parent / "notebooks" / "data"


# Data


def data(name: str) -> Arrays:
    """The data of a model."""
    return {
        "schools": _schools_data,
        "logistic": _logistic_data,
        "gaussian": _gaussian_data,
        "network": _network_data,
        "spatial": _spatial_data,
    }[name]()


def _schools_data() -> Arrays:
    effect = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    return {"sigma": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]), "y": effect}


def _logistic_data() -> Arrays:
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return {"x": np.column_stack([np.ones(len(x)), _standardised(x)]), "y": y.astype(np.int64)}


def _gaussian_data() -> Arrays:
    distance = np.abs(np.subtract.outer(np.arange(100), np.arange(100)))
    return {"factor": np.linalg.cholesky(0.9**distance)}


def _network_data() -> Arrays:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return {"x": _standardised(x), "y": _standardised(y)}


def _spatial_data() -> Arrays:
    counties = np.genfromtxt(COUNTIES / "sids_counties.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    pairs = np.loadtxt(COUNTIES / "sids_neighbours.csv", delimiter=",", skiprows=1, dtype=int)
    deaths, births = counties["sids_deaths"].astype(float), counties["births"]
    laplacian = np.zeros((len(counties), len(counties)))
    np.add.at(laplacian, (pairs.ravel(), pairs.ravel()), 1)
    laplacian[pairs[:, 0], pairs[:, 1]] = laplacian[pairs[:, 1], pairs[:, 0]] = -1
    return {
        "expected": births * deaths.sum() / births.sum(),
        "nonwhite": _standardised(np.sqrt(counties["nonwhite_births"] / births)),
        "deaths": deaths,
        "pairs": pairs,
        "eigenvalues": np.linalg.eigvalsh(laplacian),
    }


def _standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=0)) / x.std(axis=0)


# Quantities


def quantities(name: str, data: Arrays, draws: Arrays) -> Arrays:
    """What the effective sample size is taken of, each of shape (chain, draw, ...), from draws of the latent sites."""
    if name == "schools":
        theta = draws["mu"][..., None] + draws["tau"][..., None] * draws["eta"]
        return {"mu": draws["mu"], "tau": draws["tau"], "theta": theta}
    if name == "network":
        hidden = np.tanh(data["x"][:PREDICTIONS] @ draws["w1"] + draws["b1"][:, :, None, :])
        mean = (hidden @ draws["w2"][..., None])[..., 0] + draws["b2"][..., None]
        return {"mean": mean, "log_sigma": np.log(draws["sigma"])}
    return draws


# NumPyro


def numpyro_model(name: str, tool: str) -> Callable[..., None]:
    """The NumPyro program; its keyword arguments are the data.

    Only in `spatial` do the tools differ: ours meets an `EnergyDistribution`, NumPyro the same log density as a
    factor, so that its cold start does not pay for importing ebm_ppl.
    """
    if name == "spatial":
        return _spatial_energy() if tool == "ebm_ppl" else _spatial_factor()
    return {"schools": _schools, "logistic": _logistic, "gaussian": _gaussian, "network": _network}[name]()


def _schools() -> Callable[..., None]:
    import numpyro
    import numpyro.distributions as dist

    def model(sigma, y):
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("school", len(y)):
            eta = numpyro.sample("eta", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    return model


def _logistic() -> Callable[..., None]:
    import numpyro
    import numpyro.distributions as dist

    def model(x, y):
        beta = numpyro.sample("beta", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    return model


def _gaussian() -> Callable[..., None]:
    import numpyro
    import numpyro.distributions as dist

    def model(factor):
        numpyro.sample("x", dist.MultivariateNormal(np.zeros(len(factor)), scale_tril=factor))

    return model


def _network() -> Callable[..., None]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model(x, y):
        inputs = x.shape[1]
        w1 = numpyro.sample("w1", dist.Normal(0, inputs**-0.5).expand([inputs, HIDDEN]).to_event(2))
        b1 = numpyro.sample("b1", dist.Normal(0, 1).expand([HIDDEN]).to_event(1))
        w2 = numpyro.sample("w2", dist.Normal(0, HIDDEN**-0.5).expand([HIDDEN]).to_event(1))
        b2 = numpyro.sample("b2", dist.Normal(0, 1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ w1 + b1) @ w2 + b2, sigma), obs=y)

    return model


def _spatial_energy() -> Callable[..., None]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    import ebm_ppl as ebm

    def model(expected, nonwhite, deaths, pairs, eigenvalues):
        tau = numpyro.sample("tau", dist.LogNormal(1, 1.5))
        base = dist.Normal(0, 1).expand([len(expected)]).to_event(1)
        log_z = -0.5 * jnp.sum(jnp.log1p(tau * eigenvalues))

        def differences(phi):
            return 0.5 * jnp.sum((phi[pairs[:, 0]] - phi[pairs[:, 1]]) ** 2)

        phi = numpyro.sample("phi", ebm.EnergyDistribution(differences, base, beta=tau, log_partition=log_z))
        _numpyro_counts(phi, expected, nonwhite, deaths)

    return model


def _spatial_factor() -> Callable[..., None]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model(expected, nonwhite, deaths, pairs, eigenvalues):
        tau = numpyro.sample("tau", dist.LogNormal(1, 1.5))
        phi = numpyro.sample("phi", dist.Normal(0, 1).expand([len(expected)]).to_event(1))
        energy = 0.5 * jnp.sum((phi[pairs[:, 0]] - phi[pairs[:, 1]]) ** 2)
        numpyro.factor("smooth", -tau * energy + 0.5 * jnp.sum(jnp.log1p(tau * eigenvalues)))
        _numpyro_counts(phi, expected, nonwhite, deaths)

    return model


def _numpyro_counts(phi: Any, expected: Any, nonwhite: Any, deaths: Any) -> None:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    a = numpyro.sample("a", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.Normal(0, 1))
    with numpyro.plate("county", len(expected)):
        numpyro.sample("deaths", dist.Poisson(expected * jnp.exp(a + b * nonwhite + phi)), obs=deaths)


# PyMC


def pymc_model(name: str, data: Arrays) -> Any:
    """The same model as a `pymc.Model`, with latent variables of the same names and shapes."""
    import pymc as pm

    with pm.Model() as model:
        {
            "schools": _pymc_schools,
            "logistic": _pymc_logistic,
            "gaussian": _pymc_gaussian,
            "network": _pymc_network,
            "spatial": _pymc_spatial,
        }[name](pm, **data)
    return model


def _pymc_schools(pm: Any, sigma: np.ndarray, y: np.ndarray) -> None:
    mu = pm.Normal("mu", 0, 5)
    tau = pm.HalfCauchy("tau", 5)
    eta = pm.Normal("eta", 0, 1, shape=len(y))
    pm.Normal("y", mu + tau * eta, sigma, observed=y)


def _pymc_logistic(pm: Any, x: np.ndarray, y: np.ndarray) -> None:
    beta = pm.Normal("beta", 0, 1, shape=x.shape[1])
    pm.Bernoulli("y", logit_p=x @ beta, observed=y)


def _pymc_gaussian(pm: Any, factor: np.ndarray) -> None:
    pm.MvNormal("x", np.zeros(len(factor)), chol=factor)


def _pymc_network(pm: Any, x: np.ndarray, y: np.ndarray) -> None:
    inputs = x.shape[1]
    w1 = pm.Normal("w1", 0, inputs**-0.5, shape=(inputs, HIDDEN))
    b1 = pm.Normal("b1", 0, 1, shape=HIDDEN)
    w2 = pm.Normal("w2", 0, HIDDEN**-0.5, shape=HIDDEN)
    b2 = pm.Normal("b2", 0, 1)
    sigma = pm.HalfNormal("sigma", 1)
    pm.Normal("y", pm.math.tanh(x @ w1 + b1) @ w2 + b2, sigma, observed=y)


def _pymc_spatial(
    pm: Any, expected: np.ndarray, nonwhite: np.ndarray, deaths: np.ndarray, pairs: np.ndarray, eigenvalues: np.ndarray
) -> None:
    tau = pm.LogNormal("tau", 1, 1.5)
    phi = pm.Normal("phi", 0, 1, shape=len(expected))
    energy = 0.5 * ((phi[pairs[:, 0]] - phi[pairs[:, 1]]) ** 2).sum()
    pm.Potential("smooth", -tau * energy + 0.5 * pm.math.log(1 + tau * eigenvalues).sum())
    a = pm.Normal("a", 0, 1)
    b = pm.Normal("b", 0, 1)
    pm.Poisson("deaths", expected * pm.math.exp(a + b * nonwhite + phi), observed=deaths)
