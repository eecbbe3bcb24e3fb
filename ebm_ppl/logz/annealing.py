"""log Z from independent chains that are annealed from the reference to the posterior, and back.

    path            pi_t(z) proportional to pi_0(z) exp(-beta_t U(z)),   0 = beta_0 < ... < beta_T = 1
    kernels         K_t, `num_moves` moves of one kernel of `kernels.py` that is reversible with respect to pi_t
    forward         z_0 ~ pi_0,   z_t ~ K_t(z_{t-1}, .)  for t = 1 .. T
    reverse         z_T ~ pi_T,   z_{t-1} ~ K_t(z_t, .)  for t = T .. 1
    log weight      A = -sum_t (beta_t - beta_{t-1}) U(z_{t-1}), of either

The reverse chain is the time reversal of the forward one. A kernel of `kernels.py` draws its momentum anew for each
move, so that one move is reversible, whatever step size and number of steps it is given without a look at z; and so are
several moves on end. Hence pi_t(z) K_t(z, z') = pi_t(z') K_t(z', z), and the ratio of the two densities of a path is

    p_F / p_R = pi_0(z_0) prod_t K_t(z_{t-1}, z_t) / ( pi_T(z_T) prod_t K_t(z_t, z_{t-1}) )
              = pi_0(z_0) / pi_T(z_T) * prod_t pi_t(z_t) / pi_t(z_{t-1})  =  Z exp(-A)

with Z = Z_T / Z_0. So E_F[f exp(A)] = Z E_R[f] for every f of the path, which `ais.py` and `bdmc.py` make use of.

None of it needs chains that mix. The temperatures, the step sizes and the metrics come from a pilot of SMC
(`smc.run`), which has no other part in the estimate: it is unbiased on the scale of Z for whatever the pilot found.

    pilot           its stages have temperatures beta_p, effective particles ESS_p and clouds
    length          d_p = sqrt(log(N / ESS_p)), about sd(U) times the step: the thermodynamic length of a stage
    beta_t          the pilot's temperatures as a monotone function of the length, at T equal steps of it
    K_t             step size and covariance of the pilot's stage that follows

Steps of equal length are the best for chains that mix, and the variance of A is then (sum_p d_p)^2 / T.

References:
    Neal (2001), Annealed importance sampling; Crooks (1999), Entropy production fluctuation theorem and the
    nonequilibrium work relation; Grosse, Maddison and Salakhutdinov (2013), Annealing between distributions by
    averaging moments.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import PchipInterpolator

from ebm_ppl import parallel, smc
from ebm_ppl.centring import Centring, alike
from ebm_ppl.cloud import Cloud
from ebm_ppl.crosswise import tuning_of
from ebm_ppl.independence import Mover
from ebm_ppl.kernels import Tuning
from ebm_ppl.logz.integral import (
    CONTRADICTION,
    check_energies,
    opinion_of,
    total_energy,
)
from ebm_ppl.rebase import Joint
from ebm_ppl.smc import SMC, lags
from ebm_ppl.target import Tilted
from ebm_ppl.typing import Array, DegenerateParticlesError, Draws, EnergyError, PRNGKey, with_error

BLOCKS = 16
"""Of chains, for the error of a bound: it has one degree of freedom fewer."""
FEWEST_STAGES = 16
"""Room for stages of the pilot; it is doubled as often as needed, so that few lengths of a pilot are compiled for."""
SHORTEST = 1e-3
"""Length of a stage of the pilot whose particles all weigh the same."""


@dataclasses.dataclass(frozen=True)
class Annealing:
    """Settings of chains on one path, in one direction or both."""

    num_chains: int = 1024
    num_stages: int = 256
    num_moves: int = 1
    pilot: SMC = dataclasses.field(default_factory=SMC)

    def __post_init__(self):
        if self.num_chains < 2 * BLOCKS or self.num_chains % BLOCKS:
            raise EnergyError(
                f"num_chains is a multiple of {BLOCKS}, and {2 * BLOCKS} at least; got {self.num_chains}."
            )
        if self.num_stages < 1:
            raise EnergyError(f"num_stages is a positive number of temperatures; got {self.num_stages}.")
        if self.num_moves < 1:
            raise EnergyError(f"num_moves is a positive number of moves at each temperature; got {self.num_moves}.")


class Stage(NamedTuple):
    """One temperature of a path; a whole path has all of them along a leading axis."""

    number: Array
    beta: Array
    step: Array
    """Its difference from the one before."""
    tuned: Array
    """The number of its tuning."""
    num_steps: Array
    """Of the integrator in each move, (num_moves,): the same for all chains, which are independent given these."""


class Path(NamedTuple):
    """All that forward and reverse chains share."""

    stages: Stage
    tunings: Tuning


class Chain(NamedTuple):
    """One chain on its way."""

    z: Array
    log_weight: Array
    num_nan: Array


class Weights(NamedTuple):
    """Of all chains of one direction, on the host."""

    log_weight: np.ndarray
    num_nan: int


def doubts_of_pilot(pilot: Draws, value: float, std_error: float) -> list[str]:
    opinion, noise, drift, *_ = opinion_of(pilot)
    doubts = []
    if lags(drift):
        doubts.append(
            f"The particles of the pilot lag behind their targets (drift {drift:.1f}), and the chains, which it tuned, "
            "may miss parts of the posterior as it did: log Z may be off by far more than the stated error. A "
            "reparametrised model, or more num_moves of the pilot, helps."
        )
    if abs(value - opinion) > CONTRADICTION * math.hypot(std_error, noise):
        doubts.append(
            f"The pilot's log Z ({with_error(opinion, noise)}) contradicts that of the annealed chains "
            f"({with_error(value, std_error)}): one of them is wrong, and the error bar does not say by "
            "how much. A larger pilot, or a reparametrised model, helps."
        )
    return doubts


def told(pilot: Draws) -> str:
    value, std_error, *_ = opinion_of(pilot)
    num_stages = (pilot.stages or {})["beta"].shape[1]
    return (
        f"pilot of {len(pilot.z[0])} particles and {num_stages} stages: log Z {with_error(value, std_error)}, "
        f"{spent_on(pilot):.0f} evaluations"
    )


def spent_on(pilot: Draws) -> float:
    return float(pilot.attrs["num_evaluations"])


def rounding_of(path: Path, value: float) -> float:
    """What rounding of a sum over the stages adds to the error of log Z."""
    return float(np.finfo(path.stages.beta.dtype).eps) * abs(value) * math.sqrt(path.stages.beta.size)


def evaluations_of(path: Path, num_chains: int, sampler: Mover) -> float:
    """Of the log density: in each stage for the weight, for the start of the moves, and for the moves."""
    num_steps = path.stages.num_steps
    moves = np.sum(num_steps) + num_steps.size * sampler.kernel().jumps
    return float(num_chains * (2 * path.stages.beta.size + moves))


# The path


def find_path(key: PRNGKey, target: Tilted, method: Annealing) -> tuple[Path, Draws]:
    """Temperatures and tuned moves from a pilot, and the pilot."""
    key_pilot, key_lengths = jax.random.split(key)
    betas, tunings = [0.0], []

    def learn(clouds: list[Cloud]) -> None:
        cloud = jax.tree.map(lambda x: x[0], clouds[0])
        betas.append(float(cloud.beta))
        share = np.float64(method.pilot.target_ess)
        tunings.append(parallel.once(_tuning, cloud.z, cloud.step_size, cloud.centring, share))

    pilot = smc.run(key_pilot, Joint(target), method.pilot, progress_bar=False, visit=learn)
    assert pilot.stages is not None
    shares = pilot.stages["ess"][0] / method.pilot.num_particles
    beta, tuned = refine(np.array(betas), shares, method.num_stages)
    room = FEWEST_STAGES
    while room < len(tunings):
        room *= 2
    tunings += tunings[-1:] * (room - len(tunings))
    centrings = alike([tuning.centring for tuning in tunings])
    tunings = [tuning._replace(centring=own) for tuning, own in zip(tunings, centrings, strict=True)]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *tunings)
    keys = jax.random.split(key_lengths, (method.num_stages, method.num_moves))
    num_steps = parallel.once(_num_steps, keys, tuned, stacked, method.pilot.kernel, target.dim)
    dtype = pilot.z.dtype
    stages = Stage(
        number=jnp.arange(method.num_stages),
        beta=jnp.asarray(beta[1:], dtype),
        step=jnp.asarray(np.diff(beta), dtype),
        tuned=jnp.asarray(tuned),
        num_steps=num_steps,
    )
    return Path(stages, stacked), pilot


def refine(betas: np.ndarray, shares: np.ndarray, num_stages: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverse temperatures at equal steps of the pilot's thermodynamic length, and the pilot's stage that is next.

    Args:
        betas: the pilot's, from 0 to 1, one more than it has stages.
        shares: of effective particles, one for each stage.

    Returns:
        Inverse temperatures from 0 to 1, shape (num_stages + 1,), and the number of a stage of the pilot for each but
        the first, shape (num_stages,).
    """
    length = np.append(0.0, np.cumsum(np.maximum(np.sqrt(-np.log(np.minimum(shares, 1.0))), SHORTEST)))
    beta = np.asarray(PchipInterpolator(length, betas)(np.linspace(0.0, length[-1], num_stages + 1)))
    beta[0], beta[-1] = 0.0, 1.0
    return beta, np.minimum(np.searchsorted(betas[1:], beta[1:]), len(shares) - 1)


def _tuning(z: Array, step_size: Array, centring: Centring | None, share: Array) -> Tuning:
    """What a stage's cloud says about the moves at its temperature."""
    return tuning_of(z, step_size, centring, share.astype(z.dtype) * len(z))


def _num_steps(keys: Array, tuned: Array, tunings: Tuning, sampler: Mover, dim: int) -> Array:
    """Of the integrator, shape (stage, move)."""
    length = sampler.kernel().length

    def of_stage(stage: tuple[PRNGKey, Array]) -> Array:
        keys, tuned = stage
        tuning: Any = jax.tree.map(lambda x: x[tuned], tunings)
        return jax.vmap(lambda key: length(key, tuning, dim))(keys)

    return jax.lax.map(of_stage, (keys, tuned))


# Chains


def forward_chains(key: PRNGKey, target: Tilted, path: Path, method: Annealing) -> Weights:
    members = parallel.split(jax.random.split(key, method.num_chains))
    found = _gathered(parallel.over(_forward, members, target, path, method.pilot.kernel))
    check_energies(-found.log_weight, "the annealed chains")  # a weight is infinite where the density is
    return found


def reverse_chains(key: PRNGKey, starts: Array, target: Tilted, path: Path, method: Annealing) -> Weights:
    members = parallel.split((jax.random.split(key, method.num_chains), starts))
    found = _gathered(parallel.over(_reverse, members, target, path, method.pilot.kernel))
    if lost := np.sum(found.log_weight == -np.inf):
        raise DegenerateParticlesError(
            f"{lost} of {method.num_chains} reverse chains start from points of zero mass (an energy of +inf or NaN): "
            "`exact` does not draw from this posterior."
        )
    check_energies(-found.log_weight, "the reverse chains")
    return found


def _gathered(parts: list[tuple[Array, Array]]) -> Weights:
    log_weight, num_nan = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Weights(log_weight.astype(float), int(np.sum(num_nan)))


def _forward(key: PRNGKey, target: Tilted, path: Path, sampler: Mover) -> tuple[Array, Array]:
    """Log weight of a chain from the reference, and the number of NaN energies on its way."""
    key_start, key_moves = jax.random.split(key)

    def stage(chain: Chain, at: Stage) -> tuple[Chain, None]:
        chain = _weigh(chain, target, at)
        return _move(jax.random.fold_in(key_moves, at.number), chain, target, path, at, sampler), None

    chain, _ = jax.lax.scan(stage, _start(target.sample_reference(key_start)), path.stages)
    return chain.log_weight, chain.num_nan


def _reverse(member: tuple[PRNGKey, Array], target: Tilted, path: Path, sampler: Mover) -> tuple[Array, Array]:
    """The same of a chain back from a draw of the posterior."""
    key, z = member

    def stage(chain: Chain, at: Stage) -> tuple[Chain, None]:
        chain = _move(jax.random.fold_in(key, at.number), chain, target, path, at, sampler)
        return _weigh(chain, target, at), None

    chain, _ = jax.lax.scan(stage, _start(z), path.stages, reverse=True)
    return chain.log_weight, chain.num_nan


def _start(z: Array) -> Chain:
    return Chain(z, jnp.zeros((), z.dtype), jnp.zeros((), int))


def _weigh(chain: Chain, target: Tilted, at: Stage) -> Chain:
    """The same point with the weight of a step between two temperatures."""
    log_reference, energy = total_energy(target, chain.z)
    nan = jnp.isnan(energy) | ~jnp.isfinite(log_reference)
    alive = chain.log_weight > -jnp.inf
    log_weight = chain.log_weight - at.step * jnp.where(nan, jnp.inf, energy)
    return Chain(chain.z, jnp.where(alive, log_weight, -jnp.inf), chain.num_nan + (alive & nan))


def _move(key: PRNGKey, chain: Chain, target: Tilted, path: Path, at: Stage, sampler: Mover) -> Chain:
    """The chain after the moves of a stage, each with a step size shortened by a factor of its own, as in SMC."""
    tuning: Any = jax.tree.map(lambda x: x[at.tuned], path.tunings)
    kernel = sampler.kernel()

    def log_density(z: Array) -> Array:
        log_reference, energy = total_energy(target, z)
        return log_reference - at.beta * energy

    def once(state: Any, move: tuple[PRNGKey, Array]) -> tuple[Any, Array]:
        key, num_steps = move
        key_shorter, key_step = jax.random.split(key)
        shorter = jnp.exp(-jax.random.uniform(key_shorter, dtype=tuning.step_size.dtype))
        shortened = tuning._replace(step_size=tuning.step_size * shorter)
        state, stats = kernel.step(key_step, state, log_density, shortened, num_steps)
        return state, stats["nan_energy"]

    keys = jax.random.split(key, len(at.num_steps))
    state, nan = jax.lax.scan(once, kernel.init(chain.z, log_density), (keys, at.num_steps))
    counted = jnp.where(chain.log_weight > -jnp.inf, jnp.sum(nan), 0)
    return Chain(state.position, chain.log_weight, chain.num_nan + counted)
