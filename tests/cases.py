"""Models of every kind that a target must split, by name, with their targets made once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module, nnx_module, random_eqx_module
from numpyro.handlers import condition, reparam, scale, scope
from numpyro.infer.reparam import LocScaleReparam, TransformReparam

import ebm_ppl

Y = jnp.array([0.3, -1.2, 0.8, 1.9])
COUNTS = jnp.array([2, 0, 3, 1])


def quartic(x):
    return x**4


def rough(x):
    return jnp.sum(jnp.diff(x) ** 2)


def observe(mean, sd=1.0, y=Y):
    with numpyro.plate("observation", len(y)):
        numpyro.sample("y", dist.Normal(mean, sd), obs=y)


# Models


def constrained(y):
    sd = numpyro.sample("sd", dist.HalfNormal(2.0))
    share = numpyro.sample("share", dist.Beta(2.0, 3.0))
    low = numpyro.sample("low", dist.Uniform(-3.0, 1.0))
    width = numpyro.sample("width", dist.LogNormal(0.0, 0.5))
    observe(low + share * width, sd, y)


def simplex():
    share = numpyro.sample("share", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0, 1.5])))
    numpyro.sample("counts", dist.Multinomial(total_count=6, probs=share), obs=COUNTS)


def cholesky():
    factor = numpyro.sample("factor", dist.LKJCholesky(3, 2.0))
    sd = numpyro.sample("sd", dist.HalfNormal(jnp.ones(3)).to_event(1))
    rows = jnp.arange(6.0).reshape(2, 3) / 3
    with numpyro.plate("n", 2):
        numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(3), scale_tril=sd[:, None] * factor), obs=rows)


def dynamic_support():
    high = numpyro.sample("high", dist.Exponential(0.5))
    middle = numpyro.sample("middle", dist.Uniform(0.0, high))
    above = numpyro.sample("above", dist.TruncatedNormal(0.0, 1.0, low=middle))
    observe(above)


def ordered():
    base = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    points = numpyro.sample("points", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))
    observe(points.sum())


def nested_plates():
    with numpyro.plate("group", 2, dim=-2):
        mean = numpyro.sample("mean", dist.Normal(0.0, 3.0))
        with numpyro.plate("member", 4, dim=-1):
            sd = numpyro.sample("sd", dist.Gamma(2.0, 2.0))
            numpyro.sample("y", dist.Normal(mean, sd), obs=jnp.stack([Y, Y + 1]))


def subsampled(y):
    mean = numpyro.sample("mean", dist.Normal(0.0, 3.0))
    with numpyro.plate("observation", 4, subsample_size=2) as index:
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])


def local_in_subsample(y):
    with numpyro.plate("observation", 4, subsample_size=2) as index:
        mean = numpyro.sample("mean", dist.Gamma(2.0, 2.0))
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])


def hierarchy():
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", 4):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=Y)


def log_normal():
    width = numpyro.sample("width", dist.TransformedDistribution(dist.Normal(0.3, 0.5), dist.transforms.ExpTransform()))
    observe(0.0, width)


def scaled_observation():
    sd = numpyro.sample("sd", dist.HalfNormal(2.0))
    with scale(scale=0.25):
        observe(0.0, sd)


def mixture():
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(2)))
    loc = numpyro.sample("loc", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with numpyro.plate("observation", 4):
        label = numpyro.sample("label", dist.Categorical(weights), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(loc[label], 1.0), obs=Y)


def mixture_with_factors():
    mixture()
    x = numpyro.sample("x", dist.Gamma(2.0, 1.0))
    switch = numpyro.sample("switch", dist.Bernoulli(0.3))
    ebm_ppl.energy_factor("coupling", x * switch)
    ebm_ppl.energy_factor("misfit", (x - switch) ** 2, role="loss", beta=0.5)


def parameters():
    loc = numpyro.param("loc", 0.7)
    sd = numpyro.param("sd", 2.0, constraint=dist.constraints.positive)
    mean = numpyro.sample("mean", dist.Normal(loc, sd))
    observe(mean)


def deterministics():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    doubled = numpyro.deterministic("doubled", 2 * x)
    numpyro.deterministic("vector", jnp.stack([x, doubled]))
    observe(doubled)


NETWORK = eqx.nn.MLP(1, "scalar", 3, 1, activation=jax.nn.softplus, key=jax.random.key(0))


def trained_network(y):
    network = eqx_module("network", NETWORK)
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    observe(jax.vmap(network)(y[:, None]), sd, y)


def random_network(y):
    network = random_eqx_module("network", NETWORK, prior=dist.Normal(0.0, 1.0))
    observe(jax.vmap(network)(y[:, None]), 1.0, y)


def nnx_network(y):
    from flax import nnx

    network = nnx_module("network", nnx.Linear(1, 1, rngs=nnx.Rngs(0), param_dtype=jnp.float64))
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    observe(network(y[:, None])[:, 0], sd, y)


def keywords(y, *, x=None, power=1, use_slope=True):
    mean = numpyro.sample("intercept", dist.Normal(0.0, 1.0))
    if use_slope:
        mean = mean + numpyro.sample("slope", dist.Normal(0.0, 1.0)) * x**power
    observe(mean, 1.0, y)


def tilted_in_a_plate():
    with numpyro.plate("n", 4):
        x = numpyro.sample("x", ebm_ppl.EnergyDistribution(quartic, dist.Gamma(2.0, 2.0), beta=0.3))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=Y)


def tilted_to_event():
    tilted = ebm_ppl.EnergyDistribution(quartic, dist.Gamma(2.0, 2.0)).expand([4]).to_event(1)
    x = numpyro.sample("x", tilted)
    observe(x)


def tilted_and_masked():
    tilted = ebm_ppl.EnergyDistribution(quartic, dist.Gamma(2.0, 2.0)).expand([4])
    x = numpyro.sample("x", tilted.mask(jnp.array([True, False, True, True])).to_event(1))
    observe(x)


def tilted_simplex():
    base = dist.Dirichlet(jnp.array([1.0, 2.0, 3.0]))
    share = numpyro.sample("share", ebm_ppl.EnergyDistribution(rough, base, beta=2.0))
    observe(share[0])


def tilted_with_partition():
    strength = numpyro.sample("strength", dist.Gamma(2.0, 2.0))
    tilted = ebm_ppl.EnergyDistribution(
        lambda x: 0.5 * strength * x**2, dist.Normal(0.0, 1.0), log_partition=-0.5 * jnp.log1p(strength)
    )
    with numpyro.plate("n", 4):
        x = numpyro.sample("x", tilted)
        numpyro.sample("y", dist.Normal(x, 1.0), obs=Y)


def tilted_observation():
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    tilted = ebm_ppl.EnergyDistribution(
        lambda x: 0.5 * theta * x**2, dist.Normal(0.0, 1.0), log_partition=-0.5 * jnp.log1p(theta)
    )
    with numpyro.plate("n", 4):
        numpyro.sample("y", tilted, obs=Y)


def ignored_partition():
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    numpyro.sample(
        "x", ebm_ppl.EnergyDistribution(lambda x: theta * x**2, dist.Normal(0.0, 1.0), log_partition="ignore")
    )


def factors():
    x = numpyro.sample("x", dist.Gamma(2.0, 1.0).expand([4]).to_event(1))
    ebm_ppl.energy_factor("smooth", rough(x), beta=0.7)
    ebm_ppl.energy_factor("misfit", jnp.sum(jnp.abs(x - Y)), role="loss", beta=0.5)
    with numpyro.plate("element", 4):
        ebm_ppl.energy_factor("each", x**2, role="loss", beta=jnp.arange(4.0))
        numpyro.factor("plain", -x)


def masked_observation():
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("observation", 4), numpyro.handlers.mask(mask=jnp.array([True, True, False, True])):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=Y)


def improper():
    mean = numpyro.sample("mean", dist.ImproperUniform(dist.constraints.positive, (), ()))
    observe(mean)


def masked_latent():
    mean = numpyro.sample("mean", dist.Gamma(jnp.ones(2), 1.0).mask(jnp.array([True, False])).to_event(1))
    observe(mean.sum())


def autoregression():
    def step(carry, y):
        x = numpyro.sample("x", dist.Normal(0.9 * carry, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        return x, None

    scan(step, 0.0, Y)


def two_scopes():
    for name in ("first", "second"):
        with scope(prefix=name):
            sd = numpyro.sample("sd", dist.HalfNormal(1.0))
            ebm_ppl.energy_factor("tilt", sd**2)
            observe(0.0, sd)


def enumerated_in_a_scope():
    with scope(prefix="inner", divider="/", hide_types=["plate"]):  # NumPyro cannot enumerate in a renamed plate
        mixture()


def free_site():
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(0.0, sd).expand([4]).to_event(1))


@dataclasses.dataclass(frozen=True)
class Case:
    model: Callable
    args: tuple = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


DECENTRED = reparam(hierarchy, config={"theta": LocScaleReparam(0.0)})
PARTLY = reparam(hierarchy, config={"theta": LocScaleReparam(0.4)})
CASES = {
    "constrained": Case(constrained, (Y,)),
    "simplex": Case(simplex),
    "cholesky": Case(cholesky),
    "dynamic support": Case(dynamic_support),
    "ordered": Case(ordered),
    "nested plates": Case(nested_plates),
    "subsampled": Case(subsampled, (Y,)),
    "local in subsample": Case(local_in_subsample, (Y,)),
    "hierarchy": Case(hierarchy),
    "LocScaleReparam": Case(DECENTRED),
    "LocScaleReparam, partly": Case(PARTLY),
    "TransformReparam": Case(reparam(log_normal, config={"width": TransformReparam()})),
    "scope": Case(scope(constrained, prefix="outer"), (Y,)),
    "two scopes": Case(two_scopes),
    "reparam in a scope": Case(scope(DECENTRED, prefix="outer", divider="/")),
    "scaled observation": Case(scaled_observation),
    "scaled model": Case(scale(hierarchy, scale=0.5)),
    "scaled model in a scope": Case(scope(scale(constrained, scale=0.5), prefix="outer"), (Y,)),
    "mixture": Case(mixture),
    "mixture with factors": Case(mixture_with_factors),
    "mixture in a scope": Case(enumerated_in_a_scope),
    "parameters": Case(parameters),
    "deterministics": Case(deterministics),
    "trained network": Case(trained_network, (Y,)),
    "random network": Case(random_network, (Y,)),
    "nnx network": Case(nnx_network, (Y,)),
    "keywords": Case(keywords, (Y,), {"x": Y**2, "power": 2}),
    "other keywords": Case(keywords, (Y,), {"use_slope": False}),
    "tilted in a plate": Case(tilted_in_a_plate),
    "tilted to event": Case(tilted_to_event),
    "tilted and masked": Case(tilted_and_masked),
    "tilted simplex": Case(tilted_simplex),
    "tilted with partition": Case(tilted_with_partition),
    "tilted observation": Case(tilted_observation),
    "ignored partition": Case(ignored_partition),
    "factors": Case(factors),
    "masked observation": Case(masked_observation),
    "improper": Case(improper),
    "masked latent": Case(masked_latent),
    "scan": Case(autoregression),
    "conditioned": Case(condition(free_site, data={"y": Y})),
}
SUBSAMPLED = ("subsampled", "local in subsample")
NO_REFERENCE = (
    "local in subsample",
    "scaled model",
    "scaled model in a scope",
    "tilted and masked",
    "improper",
    "masked latent",
)
MADE: dict[str, ebm_ppl.Target] = {}


def made(name: str) -> ebm_ppl.Target:
    """The target of a case, made once."""
    if name not in MADE:
        case = CASES[name]
        if name in SUBSAMPLED:
            with pytest.warns(ebm_ppl.EnergyWarning, match=r"'observation' is subsampled \(2 of 4\)"):
                MADE[name] = ebm_ppl.target(case.model, *case.args, **case.kwargs)
        else:
            MADE[name] = ebm_ppl.target(case.model, *case.args, **case.kwargs)
    return MADE[name]
