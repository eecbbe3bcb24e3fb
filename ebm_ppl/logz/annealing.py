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

with Z = Z_T / Z_0. So E_F[f exp(A)] = Z E_R[f] for every f of the path: f = 1 and f = exp(-A) give

    E_F[exp(A)] = Z         so that by Jensen  E_F[A] <= log Z            AIS, and the lower bound
    E_R[exp(-A)] = 1 / Z    so that by Jensen  E_R[A] >= log Z            the upper bound
    E_F[s(A - log Z)] = E_R[s(log Z - A)],  s the logistic function       both together: Bennett's acceptance ratio

None of it needs chains that mix. The temperatures, the step sizes and the metrics come from a pilot of SMC
(`smc.run`), which has no other part in the estimate: it is unbiased on the scale of Z for whatever the pilot found.

    pilot           its stages have temperatures beta_p, effective particles ESS_p and clouds
    length          d_p = sqrt(log(N / ESS_p)), about sd(U) times the step: the thermodynamic length of a stage
    beta_t          the pilot's temperatures as a monotone function of the length, at T equal steps of it
    K_t             step size and covariance of the pilot's stage that follows

Steps of equal length are the best for chains that mix, and the variance of A is then (sum_p d_p)^2 / T.

References:
    Neal (2001), Annealed importance sampling; Grosse, Ghahramani and Adams (2015), Sandwiching the marginal likelihood
    using bidirectional Monte Carlo; Grosse, Ancha and Roy (2016), Measuring the reliability of MCMC inference with
    bidirectional Monte Carlo; Crooks (1999), Entropy production fluctuation theorem and the nonequilibrium work
    relation; Bennett (1976), Efficient estimation of free energy differences from Monte Carlo data; Grosse, Maddison
    and Salakhutdinov (2013), Annealing between distributions by averaging moments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq
from scipy.special import expit

from ebm_ppl import parallel, smc
from ebm_ppl.centring import Centring
from ebm_ppl.kernels import HMC, MALA, MCLMC, Tuning
from ebm_ppl.logz.integral import (
    CONTRADICTION,
    FEW,
    LARGEST_K,
    Integral,
    check_energies,
    effective_share,
    opinion_of,
    pareto_k,
    relative_error,
    total_energy,
)
from ebm_ppl.rebase import Joint
from ebm_ppl.smc import SMC, UNSETTLED
from ebm_ppl.target import Tilted
from ebm_ppl.typing import Array, DegenerateParticlesError, Draws, EnergyError, PRNGKey, log_mean

BLOCKS = 16
"""Of chains, for the error of a bound: it has one degree of freedom fewer."""
BOUND_ERRORS = 2.0
"""Standard errors that a bound leaves to chance."""
LARGE_GAP = 1.0
"""Nats between the bounds beyond which they say little."""
FEWEST_STAGES = 16
"""Room for stages of the pilot; it is doubled as often as needed, so that few lengths of a pilot are compiled for."""
SHORTEST = 1e-3
"""Length of a stage of the pilot whose particles all weigh the same."""


@dataclasses.dataclass(frozen=True)
class _Annealing:
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


@dataclasses.dataclass(frozen=True)
class AIS(_Annealing):
    """log Z by annealed importance sampling: the mean weight of independent chains from the reference.

        Z = mean_i w_i,  w_i = exp(A_i)        se(log Z) = sd_i(w_i) / (Z sqrt(n))

    Z is unbiased; its logarithm is too low by about se^2 / 2, which is left as it is, so that runs can be averaged on
    the scale of Z. With n' effective chains, se^2 is below 1 / n': where `FEW` are effective the bias is below .005
    nats and a twentieth of the standard error, and where fewer are, that is a doubt. `diagnostics["bias"]` has it.

    Args:
        num_chains: annealed chains, a multiple of 16.
        num_stages: temperatures after the reference. The variance of a log weight falls as their inverse.
        num_moves: moves of a chain at each temperature.
        pilot: the SMC that finds the temperatures and tunes the moves, whose kernel the chains use.

    References:
        Neal (2001), Annealed importance sampling.
    """

    name = "AIS"

    def integrate(self, key: PRNGKey, target: Tilted) -> Integral:
        """log Z of all energies of a target at once, from a pilot and chains of their own."""
        key_pilot, key_chains = jax.random.split(key)
        path, pilot = _find_path(key_pilot, target, self)
        seen = _forward_chains(key_chains, target, path, self)
        value, share, k = log_mean(seen.log_weight), effective_share(seen.log_weight), pareto_k(seen.log_weight)
        std_error = relative_error(np.exp(seen.log_weight - np.max(seen.log_weight)))
        spent = _evaluations(path, self.num_chains)
        doubts = _doubts_of_pilot(pilot, value, std_error)
        if not k <= LARGEST_K or self.num_chains * share < FEW:
            doubts.append(
                f"Only {self.num_chains * share:.0f} of {self.num_chains} annealed chains are effective, with Pareto k "
                f"{k:.2f}: log Z is probably too low, by more than the stated error. More num_stages or num_moves help."
            )
        return Integral(
            value=value,
            std_error=math.hypot(std_error, _rounding(path, value)),
            num_evaluations=_spent(pilot) + spent,
            num_nan=int(pilot.attrs["num_nan_energy"]) + seen.num_nan,
            story=(
                _told(pilot),
                f"{self.num_chains} chains of {self.num_stages} stages, {share:.0%} effective, Pareto k {k:.2f}: "
                f"log Z {value:.3f} ± {std_error:.3f}, {spent:.0f} evaluations",
            ),
            doubts=tuple(doubts),
            diagnostics={"effective_share": share, "pareto_k": k, "bias": -(std_error**2) / 2},
        )


@dataclasses.dataclass(frozen=True)
class BDMC(_Annealing):
    """log Z between two bounds, by bidirectional Monte Carlo: chains from the reference, and chains back to it.

    The chains of each direction form 16 blocks, and with one estimate of log Z from each block,

        L_b = log mean_{i in b} exp(A_i)         E[L_b] <= log Z      forward
        U_b = -log mean_{i in b} exp(-A_i)       E[U_b] >= log Z      reverse, from draws of the posterior
        lower = mean_b L_b - 2 se                upper = mean_b U_b + 2 se

    where se = sd_b / sqrt(16): each bound fails with a probability of 3 % at most (Student's law of 15 degrees of
    freedom, for blocks whose estimates are about normal), and of less where it has a slack. `value` is Bennett's
    acceptance ratio of all chains of both directions, the root of

        sum_forward s(A_i - value) = sum_reverse s(value - A_j)

    with the standard error of the two means.

    Where only a share a of the reference has any mass (a hard constraint), reverse chains never see the rest, and
    E_R[exp(-A)] is a / Z: the upper bound holds, with a slack of -log a that no number of stages removes.

    The upper bound is true where `exact` gives draws of the posterior, as it can for simulated data: parameters from
    the prior and data from them are a draw from the joint, and so those parameters are one from the posterior of those
    data. Without it the reverse chains start from the particles of a second run of SMC, and both bounds together are
    only heuristic: parts of the posterior that SMC does not find are missing from the upper bound, and then both may
    agree on a wrong number. `diagnostics["bounds"]` says which: "true" or "heuristic". The lower bound is always true.

    Args:
        num_chains: annealed chains in each direction, a multiple of 16.
        num_stages, num_moves, pilot: as in `AIS`; without `exact` the starts are particles of such a pilot, too.
        exact: from a key to one exact draw of the posterior, in unconstrained space, shape (dim,); a function of JAX.
            It belongs to one set of energies, so that models whose prior energies have a log Z of their own refuse it.

    Raises:
        EnergyError: for exact draws of another shape, or for a model whose evidence is a difference.
        DegenerateParticlesError: for exact draws of zero mass.

    References:
        Grosse, Ghahramani and Adams (2015); Grosse, Ancha and Roy (2016); Bennett (1976).
    """

    exact: Callable[[PRNGKey], Array] | None = None
    name = "BDMC"

    def integrate(self, key: PRNGKey, target: Tilted) -> Integral:
        """log Z of all energies of a target at once, from a pilot and chains in both directions."""
        key_pilot, key_starts, key_forward, key_reverse = jax.random.split(key, 4)
        if self.exact is not None and len(target.phases()) > 1:
            raise EnergyError(
                "The evidence of a model with prior energies is a difference of two log Z, and exact draws of one "
                "posterior cannot start the chains of both: use BDMC() without `exact`."
            )
        path, pilot = _find_path(key_pilot, target, self)
        starts, runs = _starts(key_starts, target, self)
        runs = [pilot, *runs]
        forward = _forward_chains(key_forward, target, path, self)
        reverse = _reverse_chains(key_reverse, starts, target, path, self)
        value, std_error = bennett(forward.log_weight, reverse.log_weight)
        rounding = _rounding(path, value)
        low, low_error = _bound(forward.log_weight)
        high, high_error = _bound(-reverse.log_weight)
        lower, upper = low - BOUND_ERRORS * low_error - rounding, -high + BOUND_ERRORS * high_error + rounding
        kind = "heuristic" if self.exact is None else "true"
        origin = "particles of another run of SMC" if self.exact is None else "exact draws of the posterior"
        spent = _evaluations(path, self.num_chains)
        return Integral(
            value=value,
            std_error=math.hypot(std_error, rounding),
            num_evaluations=sum(map(_spent, runs)) + 2 * spent,
            num_nan=sum(int(run.attrs["num_nan_energy"]) for run in runs) + forward.num_nan + reverse.num_nan,
            lower=lower,
            upper=upper,
            story=(
                _told(pilot),
                f"{self.num_chains} chains of {self.num_stages} stages from the reference: log Z above {lower:.3f}",
                f"as many back from {origin}: log Z below {upper:.3f}; the bounds are {kind}",
                f"Bennett's acceptance ratio: log Z {value:.3f} ± {std_error:.3f}, {2 * spent:.0f} evaluations",
            ),
            doubts=tuple(_doubts_of_pilot(pilot, value, std_error) + _disagreement(lower, upper, kind)),
            diagnostics={
                "bounds": kind,
                "forward": low,
                "forward_std_error": low_error,
                "reverse": -high,
                "reverse_std_error": high_error,
            },
        )


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


def bennett(forward: np.ndarray, reverse: np.ndarray) -> tuple[float, float]:
    """log Z and its standard error from equally many log weights of both directions, by Bennett's acceptance ratio."""
    both = np.concatenate([forward[np.isfinite(forward)], reverse])
    margin = (
        math.log(len(reverse)) + 2.0
    )  # here the logistic functions of one side are below 1 / n, of the other near 1

    def surplus(log_z: float) -> float:
        return float(np.sum(expit(forward - log_z)) - np.sum(expit(log_z - reverse)))

    value = float(brentq(surplus, np.min(both) - margin, np.max(both) + margin, xtol=1e-12))  # pyright: ignore
    return value, math.hypot(relative_error(expit(forward - value)), relative_error(expit(value - reverse)))


def _bound(log_weight: np.ndarray) -> tuple[float, float]:
    """Mean and standard error, over the blocks, of the log of a block's mean weight: on average too low."""
    blocks = np.array([log_mean(block) for block in log_weight.reshape(BLOCKS, -1)])
    if not np.all(np.isfinite(blocks)):  # a block without mass bounds nothing
        return -math.inf, 0.0
    return float(np.mean(blocks)), float(np.std(blocks, ddof=1) / math.sqrt(BLOCKS))


def _disagreement(lower: float, upper: float, kind: str) -> list[str]:
    if lower > upper:
        cause = (
            "`exact` does not draw from this posterior"
            if kind == "true"
            else "the reverse chains start from particles that are no draws of the posterior (more num_particles or "
            "num_moves of the pilot help)"
        )
        return [
            f"The lower bound ({lower:.3f}) lies above the upper one ({upper:.3f}), which is chance in less than one "
            f"run of a hundred: else {cause}."
        ]
    if upper - lower > LARGE_GAP:
        return [
            f"The bounds are {upper - lower:.1f} nats apart ({lower:.2f} and {upper:.2f}): the chains lag behind the "
            "path, and log Z may be anywhere between. More num_stages or num_moves help."
        ]
    return []


def _doubts_of_pilot(pilot: Draws, value: float, std_error: float) -> list[str]:
    opinion, noise, drift, *_ = opinion_of(pilot)
    doubts = []
    if drift > UNSETTLED:
        doubts.append(
            f"The particles of the pilot lag behind their targets (drift {drift:.1f}), and the chains, which it tuned, "
            "may miss parts of the posterior as it did: log Z may be off by far more than the stated error. A "
            "reparametrised model, or more num_moves of the pilot, helps."
        )
    if abs(value - opinion) > CONTRADICTION * math.hypot(std_error, noise):
        doubts.append(
            f"The pilot's log Z ({opinion:.2f} ± {noise:.2f}) contradicts that of the annealed chains ({value:.2f} ± "
            f"{std_error:.2f}): one of them is wrong, and the error bar does not say by how much. A larger pilot, or a "
            "reparametrised model, helps."
        )
    return doubts


def _told(pilot: Draws) -> str:
    value, std_error, *_ = opinion_of(pilot)
    num_stages = (pilot.stages or {})["beta"].shape[1]
    return (
        f"pilot of {len(pilot.z[0])} particles and {num_stages} stages: log Z {value:.3f} ± {std_error:.3f}, "
        f"{_spent(pilot):.0f} evaluations"
    )


def _spent(pilot: Draws) -> float:
    return float(pilot.attrs["num_evaluations"])


def _rounding(path: Path, value: float) -> float:
    """What rounding of a sum over the stages adds to the error of log Z."""
    return float(np.finfo(path.stages.beta.dtype).eps) * abs(value) * math.sqrt(path.stages.beta.size)


def _evaluations(path: Path, num_chains: int) -> float:
    """Of the log density: in each stage for the weight, for the start of the moves, and for their steps."""
    return float(num_chains * (2 * path.stages.beta.size + np.sum(path.stages.num_steps)))


# The path


def _find_path(key: PRNGKey, target: Tilted, method: _Annealing) -> tuple[Path, Draws]:
    """Temperatures and tuned moves from a pilot, and the pilot."""
    key_pilot, key_lengths = jax.random.split(key)
    betas, tunings = [0.0], []

    def learn(clouds: list[smc.Cloud]) -> None:
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
    return smc.tuning_of(z, step_size, centring, share.astype(z.dtype) * len(z))


def _num_steps(keys: Array, tuned: Array, tunings: Tuning, sampler: HMC | MALA | MCLMC, dim: int) -> Array:
    """Of the integrator, shape (stage, move)."""
    length = sampler.kernel().length

    def of_stage(stage: tuple[PRNGKey, Array]) -> Array:
        keys, tuned = stage
        tuning: Any = jax.tree.map(lambda x: x[tuned], tunings)
        return jax.vmap(lambda key: length(key, tuning, dim))(keys)

    return jax.lax.map(of_stage, (keys, tuned))


# Chains


def _starts(key: PRNGKey, target: Tilted, method: BDMC) -> tuple[Array, list[Draws]]:
    """Where the reverse chains start, and the run that they come from unless they are exact."""
    key_run, key_which = jax.random.split(key)
    if method.exact is not None:
        starts = jax.vmap(method.exact)(jax.random.split(key_run, method.num_chains))
        if starts.shape != (method.num_chains, target.dim):
            raise EnergyError(f"exact returns a point of shape ({target.dim},); got {starts.shape[1:]}.")
        return starts, []
    # Not the pilot's own particles: a metric of the very points that it moves favours the directions of their spread.
    run = smc.run(key_run, Joint(target), method.pilot, progress_bar=False)
    order = np.asarray(jax.random.permutation(key_which, len(run.z[0])))
    return run.z[0][np.resize(order, method.num_chains)], [run]


def _forward_chains(key: PRNGKey, target: Tilted, path: Path, method: _Annealing) -> Weights:
    members = parallel.split(jax.random.split(key, method.num_chains))
    found = _gathered(parallel.over(_forward, members, target, path, method.pilot.kernel))
    check_energies(-found.log_weight, "the annealed chains")  # a weight is infinite where the density is
    return found


def _reverse_chains(key: PRNGKey, starts: Array, target: Tilted, path: Path, method: _Annealing) -> Weights:
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


def _forward(key: PRNGKey, target: Tilted, path: Path, sampler: HMC | MALA | MCLMC) -> tuple[Array, Array]:
    """Log weight of a chain from the reference, and the number of NaN energies on its way."""
    key_start, key_moves = jax.random.split(key)

    def stage(chain: Chain, at: Stage) -> tuple[Chain, None]:
        chain = _weigh(chain, target, at)
        return _move(jax.random.fold_in(key_moves, at.number), chain, target, path, at, sampler), None

    chain, _ = jax.lax.scan(stage, _start(target.sample_reference(key_start)), path.stages)
    return chain.log_weight, chain.num_nan


def _reverse(
    member: tuple[PRNGKey, Array], target: Tilted, path: Path, sampler: HMC | MALA | MCLMC
) -> tuple[Array, Array]:
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


def _move(key: PRNGKey, chain: Chain, target: Tilted, path: Path, at: Stage, sampler: HMC | MALA | MCLMC) -> Chain:
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
