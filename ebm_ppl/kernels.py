"""BlackJAX's Markov kernels behind one signature; with `independence.py`, `metric.py` and `warmup.py` all
that knows BlackJAX's MCMC.

    kernel.init(z, log_density) -> state                            state.position is z, .logdensity log p(z)
    kernel.length(key, tuning, dim) -> num_steps                    drawn once for all chains of a batch
    kernel.step(key, state, log_density, tuning, num_steps)         -> state, stats; log p is invariant if adjusted

`tuning` holds the step size and the scale L of the metric (`scale.py`): BlackJAX's kernels run in whitened coordinates
`x`, `z = origin + L x`, with an identity metric, and where the tuning has a centring (`centring.py`) in whitened
non-centred ones. `stats` is a dictionary of scalars under ArviZ's names. Chains share
the number of leapfrog steps, since a batch takes as long as its longest trajectory. Samplers are small frozen settings
objects; each makes its kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
from blackjax.mcmc import adjusted_mclmc, hmc, mclmc, nuts
from blackjax.mcmc.diffusions import DiffusionState, overdamped_langevin
from blackjax.mcmc.hmc import HMCState

from ebm_ppl.centring import Centring
from ebm_ppl.scale import Scale
from ebm_ppl.typing import Array, EnergyError, PRNGKey

LogDensity = Callable[[Array], Array]
State = Any
"""A state of BlackJAX: `position`, `logdensity`, `logdensity_grad`; its own annotations are wider than arrays."""
Stats = dict[str, Any]
Metric = Literal["diag", "dense", "low_rank", "auto"]
MAX_LEAPFROGS = 1024


class Tuning(NamedTuple):
    """What a warm-up learns."""

    step_size: Array
    scale: Scale
    """Of the non-centred coordinates, where there are any."""
    centring: Centring | None = None
    centre: Any = None
    """Mean of particles in the same coordinates, (dim,), where it is known: `independence.py` alone needs it."""


class Kernel(NamedTuple):
    """A Markov kernel on one chain; see the module docstring."""

    init: Callable[..., State]
    step: Callable[[PRNGKey, State, LogDensity, Any, Array], tuple[State, Stats]]
    length: Callable[[PRNGKey, Tuning, int], Array] = lambda key, tuning, dim: jnp.ones((), int)
    jumps: int = 0
    """Evaluations of a step beside those of its `length`."""


@dataclasses.dataclass(frozen=True)
class NUTS:
    """The no-U-turn sampler with multinomial trajectories.

    Args:
        target_accept: acceptance statistic that the warm-up aims at.
        max_tree_depth: at most `2**max_tree_depth - 1` leapfrog steps in a trajectory.
        metric: inverse mass matrix: `"diag"`, `"dense"` (of draws and gradients, its correlations shrunk as far as the
            chains disagree on them; `metric.py`), `"low_rank"`, or `"auto"`: dense in up to 128 dimensions, else
            diagonal plus low rank, and in coordinates that the warm-up non-centres, as far as the draws show one
            coordinate's scale to depend on another (`centring.py`). Draws, gradients and densities are those of the
            model all the same.

    References:
        Hoffman and Gelman (2014), The No-U-Turn Sampler; Betancourt (2017), A conceptual introduction to HMC;
        Papaspiliopoulos, Roberts and Skold (2007), A general framework for the parametrization of hierarchical models.
    """

    target_accept: float = 0.8
    max_tree_depth: int = 10
    metric: Metric = "auto"
    name = "NUTS"

    def kernel(self) -> Kernel:
        blackjax_kernel: Callable = nuts.build_kernel()

        def step(
            key: PRNGKey, state: State, log_density: LogDensity, step_size: Array, num_steps: Array
        ) -> tuple[State, Stats]:
            unit = jnp.ones_like(state.position)
            state, info = blackjax_kernel(key, state, log_density, step_size, unit, self.max_tree_depth)
            ends = info.trajectory_leftmost_state.logdensity, info.trajectory_rightmost_state.logdensity
            return state, {
                "acceptance_rate": info.acceptance_rate,
                "diverging": info.is_divergent,
                "energy": info.energy,
                "n_steps": info.num_integration_steps,
                "tree_depth": info.num_trajectory_expansions,
                "reached_max_treedepth": info.num_trajectory_expansions >= self.max_tree_depth,
                "nan_energy": jnp.isnan(ends[0]) | jnp.isnan(ends[1]),
                "infinite_density": (ends[0] == jnp.inf) | (ends[1] == jnp.inf),
            }

        return Kernel(hmc_state, _in_coordinates(step))


@dataclasses.dataclass(frozen=True)
class HMC:
    """Hamiltonian Monte Carlo with a trajectory of fixed length in the units of the mass matrix.

    Args:
        target_accept: acceptance rate that the warm-up aims at.
        trajectory_length: integration time; pi/2 decorrelates a Gaussian whose covariance is the metric. The number
            of leapfrog steps is drawn uniformly around it, so that no direction is resonant.
        max_leapfrogs: bound on the number of leapfrog steps.
        metric: as in `NUTS`.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics.
    """

    target_accept: float = 0.8
    trajectory_length: float = math.pi / 2
    max_leapfrogs: int = MAX_LEAPFROGS
    metric: Metric = "auto"
    name = "HMC"

    def kernel(self) -> Kernel:
        length = _length_around(lambda dim: self.trajectory_length, self.max_leapfrogs)
        return Kernel(hmc_state, _in_coordinates(_end_point_step(hmc.build_kernel(), _hmc_call)), length)


@dataclasses.dataclass(frozen=True)
class MALA:
    """The Metropolis-adjusted Langevin algorithm, preconditioned by the metric.

    One step of it is one leapfrog step of HMC: with `p ~ N(0, M)` the proposal is
    `z + h^2/2 M^-1 grad log p(z) + h M^-1 p`, Langevin's with step `h^2 / 2`, and the acceptance ratio is the same.

    Args:
        target_accept: acceptance rate that the warm-up aims at; .574 is optimal in high dimension.
        metric: as in `NUTS`.

    References:
        Roberts and Rosenthal (1998), Optimal scaling of discrete approximations to Langevin diffusions.
    """

    target_accept: float = 0.574
    metric: Metric = "auto"
    name = "MALA"

    def kernel(self) -> Kernel:
        return Kernel(hmc_state, _in_coordinates(_end_point_step(hmc.build_kernel(), _hmc_call)))


@dataclasses.dataclass(frozen=True)
class Langevin:
    """The unadjusted Langevin algorithm, `z - h grad V(z) + sqrt(2 h) noise`: biased by its step size h.

    For training alone, where `Jarzynski` weighs its bias away and others live with it.

    References:
        Roberts and Tweedie (1996), Exponential convergence of Langevin distributions and their discrete approximations.
    """

    name = "Langevin"

    def kernel(self) -> Kernel:
        def step(
            key: PRNGKey, state: State, log_density: LogDensity, tuning: Tuning, num_steps: Array
        ) -> tuple[State, Stats]:
            one_step: Callable = overdamped_langevin(jax.value_and_grad(log_density))
            start = DiffusionState(state.position, state.logdensity, state.logdensity_grad)
            end = HMCState(*one_step(key, start, tuning.step_size))
            return end, {"acceptance_rate": jnp.ones_like(end.logdensity), "nan_energy": jnp.isnan(end.logdensity)}

        return Kernel(hmc_state, step)


@dataclasses.dataclass(frozen=True)
class MCLMC:
    """Microcanonical Langevin Monte Carlo; with a Metropolis adjustment unless declined.

    The unadjusted kernel is biased by its step size: it must be chosen explicitly, is marked in the result, and may
    not sit inside SMC.

    Args:
        target_accept: acceptance rate that the warm-up of the adjusted kernel aims at.
        trajectory_length: as in `HMC`, in units where a Gaussian with the metric's covariance decorrelates at pi/2.
        adjusted: whether to correct the discretisation by a Metropolis step.
        max_leapfrogs: bound on the number of integration steps.

    References:
        Robnik, De Luca, Silverstein and Seljak (2023), Microcanonical Hamiltonian Monte Carlo.
    """

    target_accept: float = 0.9
    trajectory_length: float = math.pi / 2
    adjusted: bool = True
    max_leapfrogs: int = MAX_LEAPFROGS
    metric: Metric = "auto"
    name = "MCLMC"

    def kernel(self) -> Kernel:
        def trajectory_length(dim: int) -> float:
            _require_sphere(dim)
            return self.trajectory_length * math.sqrt(dim)  # the velocity has norm one, HMC's has about sqrt(dim)

        length = _length_around(trajectory_length, self.max_leapfrogs)
        return Kernel(
            adjusted_mclmc.init,
            _in_coordinates(_end_point_step(adjusted_mclmc.build_kernel(), _mclmc_call)),
            length,
        )


def require_adjusted(sampler: object, inside: str) -> None:
    """Raises for a kernel that does not leave its target invariant."""
    if isinstance(sampler, MCLMC) and not sampler.adjusted:
        raise EnergyError(
            f"Unadjusted MCLMC does not leave its target invariant, so it may not sit inside {inside}: use "
            "adjusted=True."
        )


class MCLMCTuning(NamedTuple):
    """What BlackJAX's tuner of the unadjusted kernel learns, on each chain."""

    step_size: Any
    inverse_mass_matrix: Any
    decoherence_length: Any


def unadjusted_mclmc() -> Kernel:
    """The unadjusted kernel; its states, which carry a momentum, come from `tune_unadjusted_mclmc`."""
    blackjax_kernel: Callable = mclmc.build_kernel(desired_energy_var_max_ratio=1e6)

    def step(
        key: PRNGKey, state: Any, log_density: LogDensity, tuning: MCLMCTuning, num_steps: Array
    ) -> tuple[Any, Stats]:
        state, info = blackjax_kernel(
            key, state, log_density, tuning.inverse_mass_matrix, tuning.decoherence_length, tuning.step_size
        )
        return state, {
            "energy_error": info.energy_change,
            "diverging": ~info.nonans,
            "energy": -info.logdensity,
            "n_steps": num_steps,
            "nan_energy": ~info.nonans,
            "infinite_density": info.logdensity == jnp.inf,
        }

    return Kernel(mclmc.init, step)


def tune_unadjusted_mclmc(
    key: PRNGKey, position: Array, log_density: LogDensity, num_steps: int
) -> tuple[Any, MCLMCTuning]:
    """BlackJAX's three-phase tuning of step size, metric and momentum decoherence, on one chain."""
    _require_sphere(position.size)
    key_init, key_tune = jax.random.split(key)
    state, params, _ = blackjax.mclmc_find_L_and_step_size(
        mclmc_kernel=mclmc.build_kernel(),
        num_steps=num_steps,
        state=mclmc.init(position, log_density, key_init),
        rng_key=key_tune,
        logdensity_fn=log_density,
        frac_tune1=1 / 3,
        frac_tune2=1 / 4,
        frac_tune3=1 / 3,
    )
    return state, MCLMCTuning(params.step_size, params.inverse_mass_matrix, params.L)


def _require_sphere(dim: int) -> None:
    if dim < 2:
        raise EnergyError("MCLMC moves on a sphere of velocities, so it needs two dimensions at least; use NUTS().")


def hmc_state(position: Array, log_density: LogDensity) -> State:
    """State of every adjusted kernel at a position: log density and gradient."""
    return hmc.init(position, log_density)


def _in_coordinates(step: Callable) -> Callable:
    """A step in the coordinates of a tuning as a step of z; the state keeps its gradient with respect to z."""
    whitened_step = _whitened(step)

    def step_in_coordinates(
        key: PRNGKey, state: State, log_density: LogDensity, tuning: Tuning, num_steps: Array
    ) -> tuple[State, Stats]:
        centring = tuning.centring
        if centring is None:
            return whitened_step(key, state, log_density, tuning, num_steps)

        def density_of_u(u: Array) -> Array:
            z, log_det = centring.place(u)
            return log_density(z) + log_det

        u, log_det = centring.coordinates(state.position)
        start = HMCState(u, state.logdensity - log_det, centring.pull(u, state.logdensity_grad))
        end, stats = whitened_step(key, start, density_of_u, tuning, num_steps)
        z, log_det = centring.place(end.position)
        there = HMCState(z, end.logdensity - log_det, centring.push(z, end.logdensity_grad))
        moved = jnp.any(end.position != u)
        return jax.tree.map(lambda new, old: jnp.where(moved, new, old), there, state), stats

    return step_in_coordinates


def _whitened(step: Callable) -> Callable:
    """A step in coordinates x, `u = origin + L x`, as a step of u."""

    def whitened_step(
        key: PRNGKey, state: State, log_density: LogDensity, tuning: Tuning, num_steps: Array
    ) -> tuple[State, Stats]:
        origin, scale = state.position, tuning.scale

        def whitened_density(x: Array) -> Array:
            return log_density(origin + scale.times(x))

        start = HMCState(jnp.zeros_like(origin), state.logdensity, scale.pull(state.logdensity_grad))
        end, stats = step(key, start, whitened_density, tuning.step_size, num_steps)
        # Where nothing moved the gradient is kept, so that rounding cannot build up over rejections.
        moved = jnp.any(end.position != 0)
        gradient = jnp.where(moved, scale.push(end.logdensity_grad), state.logdensity_grad)
        return HMCState(origin + scale.times(end.position), end.logdensity, gradient), stats

    return whitened_step


def _hmc_call(kernel: Callable, key: PRNGKey, state: State, density: LogDensity, step_size: Array, steps: Array):
    return kernel(key, state, density, step_size, jnp.ones_like(state.position), steps)


def _mclmc_call(kernel: Callable, key: PRNGKey, state: State, density: LogDensity, step_size: Array, steps: Array):
    return kernel(key, state, density, step_size, (steps,))


def _length_around(trajectory_length: Callable[[int], float], max_leapfrogs: int) -> Callable:
    """Number of leapfrog steps, uniform on [1/2, 3/2] of the mean, so that no direction is resonant."""

    def length(key: PRNGKey, tuning: Tuning, dim: int) -> Array:
        mean = trajectory_length(dim) / tuning.step_size
        stretched = mean * jax.random.uniform(key, minval=0.5, maxval=1.5)
        return jnp.clip(jnp.round(stretched), 1, max_leapfrogs).astype(int)

    return length


def _end_point_step(blackjax_kernel: Callable, call: Callable) -> Callable:
    """A step of one proposal at the end of a trajectory of given length."""

    def step(
        key: PRNGKey, state: State, log_density: LogDensity, step_size: Array, num_steps: Array
    ) -> tuple[State, Stats]:
        state, info = call(blackjax_kernel, key, state, log_density, step_size, num_steps)
        return state, {
            "acceptance_rate": info.acceptance_rate,
            "diverging": info.is_divergent,
            "energy": info.energy,
            "n_steps": num_steps,
            "nan_energy": jnp.isnan(info.proposal.logdensity),
            "infinite_density": info.proposal.logdensity == jnp.inf,
        }

    return step
