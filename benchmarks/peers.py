"""The estimators of log Z that `log_z.py` compares: ours, and those of other packages (`estimate.py` has the terms).

Each peer gets what a knowledgeable user gives it: its documented defaults and the same model. Three ways to see that:

    in unconstrained space      log pi_0(z) and -U(z): BlackJAX (`blackjax_peers.py`), pocoMC
    in the unit cube            -U at the image of a uniform point (`cube.py`): dynesty, nautilus, jaxns
    in the model's own space    the prior rewritten site by site, -U as a black box: PyMC, whose moves need no gradient
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from blackjax_peers import blackjax_nested, blackjax_persistent, blackjax_tempered
from cube import OutOfReachError, from_cube, independent_sites
from estimate import Counted, Estimate, Run, draws, evidence, log_likelihood

import ebm_ppl as ebm

VOLUMES = 4096
"""Simulated sequences of volumes for jaxns, as in its examples."""


# Ours


def ours(*method: Any) -> Callable[[ebm.Target], Run]:
    """`ebm.log_z` with a method, or by its default."""

    def tool(target: ebm.Target) -> Run:
        def run(seed: int) -> Estimate:
            log_z = ebm.log_z(jax.random.key(seed), target, *method)
            evaluations = float(log_z.diagnostics["num_evaluations"])
            return Estimate(float(log_z.value), float(log_z.std_error), evaluations, tuple(log_z.doubts))

        return run

    return tool


# In the unit cube


def cube_likelihood(target: ebm.Target) -> tuple[int, Callable[[jax.Array], jax.Array]]:
    """The cube's number of dimensions, and -U as a function on it."""
    dim, to_target = from_cube(target)
    of_target = log_likelihood(target)
    return dim, lambda u: of_target(to_target(u))


def dynesty_static(target: ebm.Target) -> Run:
    """dynesty's static nested sampler, which its documentation has for evidences."""
    import dynesty

    dim, function = cube_likelihood(target)
    likelihood = Counted(function)

    def run(seed: int) -> Estimate:
        sampler = dynesty.NestedSampler(
            lambda u: float(likelihood(u[None])[0]), lambda u: u, dim, rstate=np.random.default_rng(seed)
        )
        sampler.run_nested(print_progress=False)
        results = sampler.results
        return Estimate(float(results.logz[-1]), float(results.logzerr[-1]), likelihood.counted())

    return run


def nautilus(target: ebm.Target) -> Run:
    """nautilus: importance sampling in shells that neural networks bound. Its error is that of its effective draws."""
    from nautilus import Sampler

    dim, function = cube_likelihood(target)
    likelihood = Counted(function)

    def run(seed: int) -> Estimate:
        sampler = Sampler(lambda u: u, likelihood, n_dim=dim, vectorized=True, pass_dict=False, seed=seed)
        sampler.run(verbose=False)
        return Estimate(float(sampler.log_z), float(sampler.n_eff) ** -0.5, likelihood.counted())

    return run


def jaxns(target: ebm.Target) -> Run:
    """jaxns, its evidence conditioned on all points that its slices pass through, as its documentation prefers."""
    from jaxns.core import MAX_SAMPLES_REACHED, NestedSampler
    from jaxns.model import Model
    from jaxns.priors import Prior
    from tensorflow_probability.substrates.jax import distributions as tfpd

    dim, function = cube_likelihood(target)
    cube = tfpd.Uniform(jnp.zeros(dim), jnp.ones(dim))
    model = Model(prior_model=lambda: function(Prior(cube, name="u").realise()))
    sampler = NestedSampler(model=model, collect_phantom_samples=True)

    def run(seed: int) -> Estimate:
        key_run, key_volume = jax.random.split(jax.random.key(seed))
        results = sampler.run(key=key_run).to_result().trim()
        values = results.sample_evidence(VOLUMES, phantom_conditioning=True, key=key_volume).log_Z_samples
        full = int(results.termination_reason) == MAX_SAMPLES_REACHED
        return Estimate(
            float(jnp.mean(values)),
            float(jnp.std(values)),
            float(results.total_num_likelihood_evaluations),
            ("The largest number of samples was reached.",) * full,
        )

    return run


# By a prior object


def pocomc(target: ebm.Target) -> Run:
    """pocoMC: persistent SMC preconditioned by normalising flows, the last of which is integrated over."""
    from pocomc import Sampler

    likelihood = Counted(log_likelihood(target))

    def run(seed: int) -> Estimate:
        prior = _Reference(target, jax.random.key(seed))
        sampler = Sampler(prior, likelihood, n_dim=target.dim, vectorize=True, random_state=seed)
        sampler.run(progress=False)
        value, std_error = sampler.evidence()
        return Estimate(float(value), float(std_error), likelihood.counted())

    return run


class _Reference:
    """The reference in unconstrained space, with what pocoMC asks of a prior."""

    def __init__(self, target: ebm.Target, key: jax.Array):
        self.target, self.key, self.dim = target, key, target.dim
        self.bounds = np.tile([-np.inf, np.inf], (target.dim, 1))
        self.logpdf = Counted(target.log_reference)

    def rvs(self, size: int = 1) -> np.ndarray:
        self.key, key = jax.random.split(self.key)
        return np.array(draws(key, self.target, size))


# In the model's own space


def pymc_smc(target: ebm.Target) -> Run:
    """PyMC's `sample_smc`, one chain: it proposes from a Gaussian fitted to the particles. It states no error."""
    import pymc

    likelihood = Counted(lambda values: log_likelihood(target)(target.unconstrain(values)))
    with pymc.Model() as model:
        sites = {name: _pymc_site(name, *site) for name, site in independent_sites(target).items()}
        pymc.Potential("likelihood", _black_box(likelihood, list(sites))(*sites.values()))

    def run(seed: int) -> Estimate:
        result = pymc.sample_smc(
            model=model, chains=1, cores=1, random_seed=seed, progressbar=False, compute_convergence_checks=False
        )
        value = np.ravel(np.asarray(result.sample_stats["log_marginal_likelihood"].values).tolist())[-1]
        return Estimate(float(value), None, likelihood.counted())

    return run


def _pymc_site(name: str, fn: dist.Distribution, shape: tuple[int, ...]) -> Any:
    import pymc

    match fn:
        case dist.Normal():
            return pymc.Normal(name, fn.loc, fn.scale, shape=shape)
        case dist.Uniform():
            return pymc.Uniform(name, fn.low, fn.high, shape=shape)
        case dist.HalfCauchy():
            return pymc.HalfCauchy(name, fn.scale, shape=shape)
        case dist.LogNormal():
            return pymc.LogNormal(name, fn.loc, fn.scale, shape=shape)
        case dist.Dirichlet():
            return pymc.Dirichlet(name, np.asarray(fn.concentration))
        case dist.MultivariateStudentT():
            return pymc.MvStudentT(name, fn.df, mu=np.asarray(fn.loc), chol=np.asarray(fn.scale_tril))
    raise OutOfReachError(f"{type(fn).__name__} is not rewritten in PyMC here.")


def _black_box(likelihood: Counted, names: list[str]) -> Callable[..., Any]:
    """The likelihood as an operation of PyTensor on the values of the named sites."""
    import pytensor.tensor as pt
    from pytensor.graph.basic import Apply
    from pytensor.graph.op import Op

    class BlackBox(Op):
        def make_node(self, *inputs: Any) -> Apply:
            return Apply(self, [pt.as_tensor(x) for x in inputs], [pt.dscalar()])

        def perform(self, node: Apply, inputs: list[np.ndarray], outputs: list[list[Any]]) -> None:
            points = {name: np.asarray(x)[None] for name, x in zip(names, inputs, strict=True)}
            outputs[0][0] = np.asarray(likelihood(points)[0])

    return BlackBox()


OURS: dict[str, Callable[[ebm.Target], Run]] = {
    "default": ours(),
    "SMC": ours(ebm.SMC()),
    "FittedReference": ours(ebm.FittedReference()),
}
PEERS: dict[str, Callable[[ebm.Target], Run]] = {
    "BlackJAX tempered": lambda target: evidence(blackjax_tempered, target),
    "BlackJAX persistent": lambda target: evidence(blackjax_persistent, target),
    "BlackJAX nested": lambda target: evidence(blackjax_nested, target),
    "PyMC": lambda target: evidence(pymc_smc, target),
    "dynesty": lambda target: evidence(dynesty_static, target),
    "nautilus": lambda target: evidence(nautilus, target),
    "jaxns": lambda target: evidence(jaxns, target),
    "pocoMC": lambda target: evidence(pocomc, target),
}
TOOLS = OURS | PEERS
