"""Maximum likelihood of the parameters of a model with latent sites: weighted walkers in place of the latents.

    p_t(y) = int p_t(z, y) dz                               t: the `numpyro.param`s of a model, z its latent sites
    V_t(z) = -log p_t(z, y)                                 `Joint`, an energy whose Z is p_t(y)
    grad log p_t(y) = -E_{p_t(z | y)}[grad V_t(z)]          Fisher's identity: what an optimiser of t goes by

Where an energy learns from data, log Z is to fall; here it is the likelihood itself, and is to rise. Walkers start as
draws of the posterior at the first t and follow it with Jarzynski weights (`jarzynski.py`),

    A_0 = log p_t0(y)        A <- A + V_t(X) - V_t'(X)        log p_t(y) = log E[e^A]        at every step

so that parameters never wait for a chain to converge, and models can be compared by log p at their best parameters when
the fit ends. One population drives t, and the second is the witness whose E[e^A] = p_t(y), whatever t has been.

The start is by tempered SMC, not by draws of the prior whose weights the walk would have to make up for: it chooses its
temperatures by the effective particles and learns its moves, and p_t0(y) comes with it. (So chosen they depend on the
particles, and its own estimate is unbiased up to that, as any adaptive SMC's.) The driver's cloud tells mean and scale
of the posterior as well: walkers move in coordinates x with z = m + L x, where those are 0 and 1.

References:
    Cuin, Carbone and Akyildiz (2025), Learning latent variable models via Jarzynski-adjusted Langevin algorithm;
    Carbone, Hua, Coste and Vanden-Eijnden (2023), Efficient training of energy-based models using Jarzynski equality;
    Kuntz, Lim and Johansen (2023), Particle algorithms for maximum likelihood training of latent variable models;
    Akyildiz, Crucinio, Girolami, Johnston and Sabanis (2023), Interacting particle Langevin algorithm for maximum
    marginal likelihood estimation.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from blackjax.smc.resampling import systematic
from paramax import NonTrainable

from ebm_ppl.arviz import data_id, to_datatree
from ebm_ppl.energy import Energy
from ebm_ppl.evidence import weigh
from ebm_ppl.kernels import MALA
from ebm_ppl.probe import check_tails
from ebm_ppl.scale import DenseScale, location_and_scale
from ebm_ppl.smc import SMC, lagging
from ebm_ppl.target import Target
from ebm_ppl.train.fit import adam, fit
from ebm_ppl.train.jarzynski import Population, State, WeightedWalkers
from ebm_ppl.train.objective import Density, Metrics, without_gradient
from ebm_ppl.train.walkers import Dynamics
from ebm_ppl.typing import Array, Draws, EnergyError, EnergyWarning, LogZ, PRNGKey, as_key

if TYPE_CHECKING:
    import xarray as xr

METHOD = "JALA-EM"
"""As its authors call it."""
RATE = 1e-2
"""Of Adam, where no optimiser is given."""
DYNAMICS = Dynamics(MALA(), num_moves=1, step_size=0.5)
FEW = 0.05
"""Effective share of the witnesses below which log Z is in doubt."""


class Given(NamedTuple):
    """What the parameters leave as it is."""

    target: Target
    bijections: dict[str, Any]
    """From unconstrained parameters."""
    origin: Array
    """m, (dim,)"""
    scale: DenseScale
    """L"""


class Joint(Energy):
    """`V_t(m + L x) = -log p_t(z, y)`: the latents' energy, whose trained arrays are the parameters of a model."""

    parameters: dict[str, Any]
    """t, unconstrained."""
    given: NonTrainable[Given]

    def target(self) -> Target:
        """The model with its parameters at t."""
        target, bijections, *_ = self.given.tree
        return target.with_parameters({name: bijections[name](value) for name, value in self.parameters.items()})

    def place(self, x: Array) -> Array:
        """z"""
        return self.given.tree.origin + self.given.tree.scale.times(x)

    def __call__(self, x: Array) -> Array:
        return -self.target().log_density(self.place(x))


class MarginalLikelihood(WeightedWalkers):
    """The marginal likelihood of a model's parameters; its data are the draws at which the walkers start.

    Args:
        log_z: log p(y) that comes with the draws of the driver and of the witness, (2,).

    Reference: Cuin, Carbone and Akyildiz (2025).
    """

    log_z: Array = eqx.field(default_factory=lambda: jnp.zeros(2))
    name = "marginal likelihood"

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        return (), _start(self, density, data)

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        fixed = without_gradient(density)
        state, told = self.weighed(state, fixed)
        energy = jax.lax.stop_gradient(state.driver.weights) @ jax.vmap(density.total)(state.driver.points)
        # Its gradient is Fisher's, and its value what is to be minimised.
        loss = energy - jax.lax.stop_gradient(energy + told["log_z_of_driver"])
        state, of_moves = self.moved(key, state, fixed)
        return loss, (state, of_moves | told)


class FittedLatent(NamedTuple):
    """A model at its most likely parameters."""

    parameters: dict[str, Any]
    """Values of the `numpyro.param`s, in the model's own space."""
    log_z: LogZ
    """log p(y) there."""
    posterior: xr.DataTree
    """Draws of the latents there, in ArviZ's schema: chain 0 drove the parameters, chain 1 did not."""
    record: xr.DataTree
    """Group `training` by step: loss (-log p(y) by the driver), log_z and its standard error by the witness, ..."""
    target: Target
    """The model at these parameters, for `log_z`, `sample` and the rest of the package."""


def fit_latent(
    key: PRNGKey,
    target: Target,
    sampler: SMC | None = None,
    *,
    dynamics: Dynamics = DYNAMICS,
    resample: float = 0.5,
    optimiser: optax.GradientTransformation | None = None,
    num_steps: int = 1000,
    averaging: float = 0.99,
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress_bar: bool = True,
) -> FittedLatent:
    """The parameters of a model at which its data are most likely, `max_t log int p_t(z, y) dz`, and log p(y) there.

    Parameters are the model's `numpyro.param`s, which start at their values and move in unconstrained space; all
    continuous latent sites are integrated over. Models with as many parameters are compared by `log_z` as it is. It is
    a maximum: one with more parameters owes for each of them, log(num) / 2 by BIC.

    Args:
        target: from `ebm_ppl.target`.
        sampler: of the posterior at the first parameters, where the walkers start: two populations of its
            `num_particles`, 512 by default.
        dynamics: the moves of a step, in coordinates in which that posterior has unit scale.
        resample: effective share of the walkers below which they are resampled.
        optimiser: of Optax, schedules included; Adam at a rate of .01 by default.
        num_steps: of the optimiser.
        averaging: decay of an exponential average of the unconstrained parameters over steps, which the result has.
        checkpoint, every, progress_bar: as of `fit`.

    Raises:
        EnergyError: for a model without parameters, latent sites or data, with a subsampled plate, or with a prior
            energy whose log partition is not known.
        NoReferenceError, IntractablePartitionError: where log Z has no meaning for the model.
        NonFiniteEnergyError: where log p(y) or its gradient is not finite, with the step.

    Reference: Cuin, Carbone and Akyildiz (2025).

    Example:
        >>> def model(x, y):
        ...     scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
        ...     weights = numpyro.sample("weights", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
        ...     numpyro.sample("y", dist.StudentT(4, x @ weights, scale).to_event(1), obs=y)
        >>> fitted = ebm_ppl.fit_latent(jax.random.key(0), ebm_ppl.target(model, x, y))
        >>> fitted.parameters["scale"], fitted.log_z
    """
    sampler = SMC(num_particles=512) if sampler is None else sampler
    bijections = _checked(target)
    parameters = _unconstrained(target, bijections)
    key_start, key_steps, key_final = jax.random.split(as_key(key), 3)
    draws = weigh(key_start, target, sampler, 2, progress_bar)
    known: Any = draws.log_z
    origin, scale = location_and_scale(jnp.asarray(draws.z[0]), jnp.ones(sampler.num_particles, draws.z.dtype))
    joint = Joint(parameters, NonTrainable(Given(target, bijections, origin, scale)))
    points = jax.vmap(scale.whitened)(draws.z.reshape(-1, target.dim) - origin)
    objective = MarginalLikelihood(sampler.num_particles, resample, dynamics, jnp.asarray(known["data_value"]))
    fitted = fit(
        key_steps,
        joint,
        points,
        objective,
        optimiser=adam(RATE) if optimiser is None else optimiser,
        num_steps=num_steps,
        batch_size=1,
        averaging=averaging,
        checkpoint=checkpoint,
        every=every,
        progress_bar=progress_bar,
    )
    joint, (z, particles, told) = fitted.energy, _at_last(key_final, fitted.energy, objective, fitted.state)
    best = joint.target()
    doubts = lagging(float(np.max(known["drift"])))
    if not (ess := float(told["ess"])) > FEW:
        doubts += (
            f"Only {ess:.1%} of the walkers count in log Z: the parameters outran them. A smaller learning rate, more "
            "moves in a step or more particles help.",
        )
        warnings.warn(doubts[-1], EnergyWarning, stacklevel=2)
    std_error = math.hypot(float(told["log_z_std_error"]), float(known["data_std_error"][1]))
    log_z = LogZ(
        value=float(told["log_z"]),
        std_error=std_error,
        method=METHOD,
        parts={"data": float(told["log_z"])},
        data_id=data_id(target),
        diagnostics={"ess": ess, "log_bias": -(std_error**2) / 2},
        doubts=doubts,
    )
    attrs = {"inference_library": "ebm_ppl", "sampler": METHOD, "sampler_settings": repr(objective)}
    posterior = to_datatree(best, Draws(z, {}, attrs, particles))
    return FittedLatent(jax.device_get(best.parameters()), log_z, posterior, fitted.record, best)


@eqx.filter_jit
def _start(objective: MarginalLikelihood, density: Density, points: Array) -> State:
    return objective.start(density, points, jnp.zeros(len(points), points.dtype), objective.log_z)


@eqx.filter_jit
def _at_last(
    key: PRNGKey, joint: Joint, objective: MarginalLikelihood, state: State
) -> tuple[Array, dict[str, Array], Metrics]:
    """Equally weighted draws, (2, num, dim), weighted ones, and what the weights say, at the last parameters."""
    state, told = objective.weighed(state, Density(joint, None, state.driver.points.shape[1:]))

    def drawn(key: PRNGKey, population: Population) -> tuple[Array, Array, Array]:
        z = jax.vmap(joint.place)(population.points)
        return z[systematic(key, population.weights, len(z))], z, jax.nn.log_softmax(population.log_weight)

    both = map(drawn, jax.random.split(key), (state.driver, state.witness))
    resampled, z, log_weight = map(jnp.stack, zip(*both, strict=True))
    return resampled, {"z": z, "log_weight": log_weight}, told


def _unconstrained(target: Target, bijections: dict[str, Any]) -> dict[str, Any]:
    """The first parameters."""

    def of(name: str, value: Any) -> Any:
        found = jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), bijections[name].inv(value))
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found)):
            raise EnergyError(
                f"Parameter '{name}' starts at {value}, which is on the edge of what its constraint allows, or beyond: "
                "start inside."
            )
        return found

    return {name: of(name, value) for name, value in target.parameters().items()}


def _checked(target: Target) -> dict[str, Any]:
    """The bijections of the parameters of a model that log p(y) can be followed for."""
    spec = target.spec
    if not spec.params:
        raise EnergyError(
            "The model has no parameters to fit: numpyro.param('scale', 1.0, constraint=...) makes one. With priors "
            "instead the model is Bayesian: sample and log_z."
        )
    if not target.dim:
        raise EnergyError(
            "The model has no continuous latent site to integrate over: its likelihood is known, and numpyro.infer.SVI "
            "or Optax maximises it."
        )
    if spec.subsampled:
        raise EnergyError(
            f"The plates {', '.join(map(repr, spec.subsampled))} are subsampled: log p(y) would be that of one fixed "
            "part of the data. Give all data, without subsample_size."
        )
    if all(role == "prior" for _, role in spec.roles):
        raise EnergyError("The model has no data: observe a site, by numpyro.sample(..., obs=y).")
    unknown = [name for name, role in spec.roles if role == "prior" and name not in spec.normalized]
    if unknown:
        raise EnergyError(
            f"The prior energies {', '.join(map(repr, unknown))} have a log Z of their own, which log p(y) would have "
            "to be rid of at every step: make each an EnergyDistribution with its log_partition."
        )
    target.require_tractable()
    target.require_reference()
    target.require_known_constant()
    check_tails(target, needs_normalisation=True)
    return target.parameter_bijections()
