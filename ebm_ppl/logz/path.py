"""log Z from chains at every rung of a ladder of inverse temperatures: three estimators of the same energies.

    pi_k(z)  proportional to  pi_0(z) exp(-b_k U(z))        0 = b_0 < ... < b_K = 1, h_k = b_{k+1} - b_k

    ladder      a pilot run of SMC chooses the rungs, and leaves a cloud of particles at each
    rung 0      independent draws of the reference
    rung k      chains from particles of its cloud, with its scale and step size; their first steps are thrown away
    energies    U[k, c, d], of draw d of chain c at rung k: all that the estimators see (`Rungs`)

    `SteppingStone`               log Z = sum_k log mean_cd exp(-h_k U[k, c, d])
    `ThermodynamicIntegration`    log Z = log Z_1 - int_{b_1}^1 E_b[U] db, by the means and variances of U at the rungs
    `MBAR`                        log Z_k of all rungs at once, the maximum of a likelihood

Points of zero mass (an energy of +inf or NaN) occur at rung 0 alone, since no chain enters them, and from there all
three estimators weigh by exp(-b U), which is zero.

Chains are independent of one another, and so are rungs. Each estimator is therefore, to first order, a sum over rungs
of means over chains, `log Z ~ sum_k mean_c x_kc`, and its variance is `sum_k var_c(x_kc) / C`, whatever the chains'
autocorrelation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl import parallel, smc
from ebm_ppl.kernels import HMC, MALA, MCLMC, Kernel, Tuning
from ebm_ppl.logz.integral import (
    CONTRADICTION,
    LARGEST_RHAT,
    Integral,
    Opinion,
    check_energies,
    disagreement,
    effective_size,
    opinion_of,
    total_energy,
)
from ebm_ppl.rebase import Joint
from ebm_ppl.scale import DenseScale
from ebm_ppl.smc import SMC, UNSETTLED, Cloud
from ebm_ppl.target import Tilted
from ebm_ppl.typing import Array, EnergyError, PRNGKey

FEWEST = 4
"""Chains, and draws of each, that an error can be read from."""
LOW_ACCEPTANCE = 0.3
MOST_ROUNDS = 100
"""Of Newton's method."""
SOLVED = 1e-8
"""Step of Newton's method, in nats, at which it has arrived."""


@dataclasses.dataclass(frozen=True)
class _OfLadder:
    """What estimators from a ladder of chains have in common.

    Args:
        num_chains: independent chains at each rung; their spread is the error.
        num_warmup: first steps of each chain, which are thrown away.
        num_draws: steps of each chain that count.
        pilot: the SMC that chooses the rungs and the starting points; its `target_ess` says how close the rungs are,
            and its `kernel` moves the chains.
    """

    num_chains: int = 16
    num_warmup: int = 50
    num_draws: int = 200
    pilot: SMC = dataclasses.field(default_factory=lambda: SMC(num_particles=1000, target_ess=0.8, num_moves=2))
    name = "ladder"

    def __post_init__(self):
        if self.num_chains < FEWEST or self.num_draws < FEWEST:
            raise EnergyError(
                f"num_chains and num_draws are {FEWEST} at least; got {self.num_chains} and {self.num_draws}."
            )
        if self.num_warmup < 0:
            raise EnergyError(f"num_warmup is not negative; got {self.num_warmup}.")
        if self.num_chains > self.pilot.num_particles:
            raise EnergyError(
                f"Each chain starts from a particle of its own: {self.num_chains} chains need a pilot of as many "
                f"particles; got {self.pilot.num_particles}."
            )

    def integrate(self, key: PRNGKey, target: Tilted) -> Integral:
        """log Z of all energies of a target at once, from one ladder.

        Raises:
            NonFiniteEnergyError: for an energy of -inf.
            DegenerateParticlesError: where no draw of the reference has any mass.
        """
        ladder = _climb(key, target, self)
        found = self._estimate(ladder.rungs)
        doubts = [*_doubts(ladder, found), *found.doubts]
        story = (
            f"pilot of {self.pilot.num_particles} particles: log Z {ladder.opinion}",
            f"{self.num_chains} chains of {self.num_draws} draws at each of {len(ladder.rungs.beta)} rungs: "
            f"log Z {found.value:.3f} ± {found.std_error:.3f}",
            *found.story,
        )
        return Integral(
            value=found.value,
            std_error=found.std_error,
            num_evaluations=ladder.num_evaluations,
            num_nan=ladder.num_nan,
            story=story,
            doubts=tuple(doubts),
            diagnostics={
                "num_rungs": len(ladder.rungs.beta),
                "largest_rhat": ladder.largest_rhat,
                "least_acceptance": ladder.least_acceptance,
                "pilot": ladder.opinion.value,
                **found.diagnostics,
            },
        )

    def _estimate(self, rungs: Rungs) -> Found:
        raise NotImplementedError


class SteppingStone(_OfLadder):
    """log Z as the sum over rungs of the log mean weight from each rung to the next.

        log Z = sum_k log mean exp(-h_k U)      under rung k

    The settings are those of `MBAR` and `ThermodynamicIntegration`:

    Args:
        num_chains: independent chains at each rung; their spread is the error.
        num_warmup: first steps of each chain, which are thrown away.
        num_draws: steps of each chain that count.
        pilot: the SMC that chooses the rungs and the starting points; its `target_ess` says how close the rungs are,
            and its `kernel` moves the chains.

    Reference:
        Xie, Lewis, Fan, Kuo and Chen (2011), Improving marginal likelihood estimation for Bayesian phylogenetic model
        selection.
    """

    name = "stepping stone"

    def _estimate(self, rungs: Rungs) -> Found:
        log_ratios, relative = stepping_stones(rungs)
        return Found(float(np.sum(log_ratios)), _error_of(relative))


@dataclasses.dataclass(frozen=True)
class ThermodynamicIntegration(_OfLadder):
    """log Z as the integral of the mean energy along the ladder, by the trapezoidal rule with its correction.

        log Z = log Z_1 - sum_{k>0} ( h_k / 2 (m_k + m_{k+1}) + h_k^2 / 12 (v_{k+1} - v_k) )

    with m and v the mean and the variance of U at each rung. The correction needs no more draws, since the slope of the
    mean energy is minus the variance. Its own error is judged by the rule of the next order, which takes the third
    moments too, and is part of the standard error.

    The first step, log Z_1, is a stepping stone: under the reference the mean energy is often infinite (a hard
    constraint, heavy tails), while above it, it is not. The settings are those of `SteppingStone`, with rungs closer
    together.

    Reference:
        Friel, Hurn and Wyse (2014), Improving power posterior estimation of statistical evidence.
    """

    pilot: SMC = dataclasses.field(default_factory=lambda: SMC(num_particles=1000, target_ess=0.95, num_moves=2))
    name = "thermodynamic integration"

    def _estimate(self, rungs: Rungs) -> Found:
        value, relative, discretisation = thermodynamic(rungs)
        sampling = _error_of(relative)
        found = Found(
            value,
            math.hypot(sampling, discretisation),
            story=(f"of the error {sampling:.3f} is from sampling, {discretisation:.3f} from the rule of integration",),
            diagnostics={"sampling_error": sampling, "discretisation_error": discretisation},
        )
        if discretisation <= sampling:
            return found
        doubt = (
            f"The rungs are too far apart for an integral of the mean energy: the rule's own error is "
            f"{discretisation:.3f}, that from sampling {sampling:.3f}. A larger target_ess of the pilot helps, and "
            "SteppingStone() or MBAR() have no such error."
        )
        return dataclasses.replace(found, doubts=(doubt,))


class MBAR(_OfLadder):
    """log Z of all rungs at once, by Bennett's multistate acceptance ratio: every draw counts for every rung.

        1 = mean over draws n of  exp(-b_k U_n) / Z_k / sum_j s_j exp(-b_j U_n) / Z_j,     for each k

    Here s_j is rung j's share of the effective draws, by which the draws are weighed too. The settings are those of
    `SteppingStone`.

    Reference:
        Shirts and Chodera (2008), Statistically optimal analysis of samples from multiple equilibrium states; Kong,
        McCullagh, Meng, Nicolae and Tan (2003), A theory of statistical models for Monte Carlo integration.
    """

    name = "MBAR"

    def _estimate(self, rungs: Rungs) -> Found:
        log_z, std_error = multistate(rungs)
        return Found(float(log_z[-1]), std_error)


@dataclasses.dataclass(frozen=True)
class Found:
    """What an estimator makes of a ladder's energies."""

    value: float
    std_error: float
    story: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    diagnostics: dict[str, float] = dataclasses.field(default_factory=dict)


# The ladder


class Rungs(NamedTuple):
    """The energies of a ladder of chains."""

    beta: np.ndarray
    """Inverse temperatures from 0 to 1, shape (rung,)."""
    energy: np.ndarray
    """Of the draws, in nats, shape (rung, chain, draw); +inf for zero mass."""


class Ladder(NamedTuple):
    """A ladder's energies, and what speaks for and against them."""

    rungs: Rungs
    opinion: Opinion
    """The pilot's."""
    largest_rhat: float
    """Of the energies of a rung."""
    least_acceptance: float
    num_evaluations: float
    num_nan: int


class Rung(NamedTuple):
    """Where the chains of a rung start from; several along a leading axis."""

    key: Array
    beta: Array
    z: Array
    """The pilot's particles, shape (particle, dim)."""
    step_size: Array


def _climb(key: PRNGKey, target: Tilted, method: _OfLadder) -> Ladder:
    """The pilot, draws of the reference, and chains at every rung after it."""
    key_pilot, key_reference, key_chains = jax.random.split(key, 3)
    clouds: list[Cloud] = []
    pilot = smc.run(
        key_pilot,
        Joint(target),
        method.pilot,
        progress_bar=False,
        visit=lambda stage: clouds.append(jax.tree.map(lambda x: x[0], stage[0])),
    )
    opinion = opinion_of(pilot)

    keys = parallel.split(jax.random.split(key_reference, method.num_chains * method.num_draws))
    at_zero = np.concatenate(jax.device_get(parallel.over(_energy_of_reference, keys, target, hurry=True)))
    num_nan = check_energies(at_zero, "draws of the reference")

    keys = jax.random.split(key_chains, len(clouds))
    starts = [Rung(key, cloud.beta, cloud.z, cloud.step_size) for key, cloud in zip(keys, clouds, strict=True)]
    rungs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    # One rung to a part, so that their number, which the pilot chooses, is no part of the compiled shapes.
    parts = parallel.split(rungs, most=len(clouds))
    settings = method.pilot.kernel, method.num_chains, method.num_warmup, method.num_draws
    records = jax.device_get(parallel.over(_chains, parts, target, *settings))
    record = {name: np.concatenate([part[name] for part in records]) for name in records[0]}
    above = np.asarray(record["energy"], float)
    check_energies(above, "chains of the ladder")

    energy = np.concatenate([at_zero.reshape(1, method.num_chains, method.num_draws).astype(float), above])
    energy = np.where(np.isnan(energy), np.inf, energy)
    return Ladder(
        rungs=Rungs(np.array([0.0, *(float(cloud.beta) for cloud in clouds)]), energy),
        opinion=opinion,
        largest_rhat=max(disagreement(each) for each in above),
        least_acceptance=float(np.min(record["accepted"])),
        num_evaluations=opinion.num_evaluations + at_zero.size + float(np.sum(record["num_evaluations"])),
        num_nan=opinion.num_nan + num_nan + int(np.sum(record["num_nan"])),
    )


def _energy_of_reference(key: PRNGKey, target: Tilted) -> Array:
    return total_energy(target, target.sample_reference(key))[1]


def _chains(
    rung: Rung, target: Tilted, sampler: HMC | MALA | MCLMC, num_chains: int, num_warmup: int, num_draws: int
) -> dict[str, Array]:
    """The chains of a rung: energies of their draws, of shape (chain, draw), and how they fared."""
    kernel: Kernel = sampler.kernel()
    num, dim = rung.z.shape
    key_start, key_steps = jax.random.split(rung.key)
    # The particles that a chain starts from have a share in the scale that moves it; the warm-up forgets that.
    scale = DenseScale.of_cloud(rung.z, num)
    start = jax.random.choice(key_start, rung.z, (num_chains,), replace=False)

    def log_density(z: Array) -> Array:
        log_reference, energy = total_energy(target, z)
        return log_reference - rung.beta * energy

    def step(states: Any, number: Array) -> tuple[Any, dict[str, Array]]:
        key_length, key_jitter, key_step = jax.random.split(jax.random.fold_in(key_steps, number), 3)
        num_steps = kernel.length(key_length, Tuning(rung.step_size, scale), dim)
        # As in SMC, which has found the step size for steps that are shortened so.
        shorter = jnp.exp(-jax.random.uniform(key_jitter, (num_chains,), start.dtype))

        def one(key: PRNGKey, state: Any, factor: Array) -> tuple[Any, dict[str, Array]]:
            return kernel.step(key, state, log_density, Tuning(rung.step_size * factor, scale), num_steps)

        states, stats = jax.vmap(one)(jax.random.split(key_step, num_chains), states, shorter)
        energy = jax.vmap(lambda z: total_energy(target, z)[1])(states.position)
        return states, {
            "energy": jnp.where(stats["infinite_density"], -jnp.inf, energy),
            "accepted": jnp.mean(stats["acceptance_rate"]),
            "num_evaluations": num_chains * (num_steps + 1),
            "num_nan": jnp.sum(stats["nan_energy"]),
        }

    states = jax.vmap(lambda z: kernel.init(z, log_density))(start)
    _, record = jax.lax.scan(step, states, jnp.arange(num_warmup + num_draws))
    return {
        "energy": record["energy"][num_warmup:].T,
        "accepted": jnp.mean(record["accepted"]),
        "num_evaluations": num_chains + jnp.sum(record["num_evaluations"]),
        "num_nan": jnp.sum(record["num_nan"]),
    }


def _doubts(ladder: Ladder, found: Found) -> list[str]:
    doubts = []
    opinion = ladder.opinion
    if not ladder.largest_rhat <= LARGEST_RHAT:
        doubts.append(
            f"The chains of a rung disagree on its energies (R-hat {ladder.largest_rhat:.2f}): log Z may be off by "
            "more than the stated error. More steps (num_warmup, num_draws), a larger pilot or a reparametrised model "
            "help."
        )
    if not ladder.least_acceptance >= LOW_ACCEPTANCE:
        doubts.append(
            f"The chains of a rung accept {ladder.least_acceptance:.0%} of their steps: they hardly move. A pilot of "
            "more moves (num_moves), or a reparametrised model, helps."
        )
    if opinion.drift > UNSETTLED:
        doubts.append(
            f"The pilot's particles lag behind their targets (drift {opinion.drift:.1f}), so that the chains start "
            "where they should not: log Z may be off by far more than the stated error. A pilot of more moves "
            "(num_moves), a longer warm-up (num_warmup) or a reparametrised model help."
        )
    elif abs(found.value - opinion.value) > CONTRADICTION * math.hypot(found.std_error, opinion.std_error):
        doubts.append(
            f"The pilot's log Z ({opinion.value:.2f} ± {opinion.std_error:.2f}) contradicts that of the ladder "
            f"({found.value:.2f} ± {found.std_error:.2f}): one of them is wrong, and the error bar does not say by how "
            "much. More steps (num_warmup, num_draws), a larger pilot or a reparametrised model help."
        )
    return doubts


# The estimators


def _error_of(contributions: np.ndarray) -> float:
    """Standard error of a sum over rungs of means over chains, from contributions of shape (rung, chain)."""
    return float(np.sqrt(np.sum(np.var(contributions, axis=1, ddof=1)) / contributions.shape[1]))


def stepping_stones(rungs: Rungs) -> tuple[np.ndarray, np.ndarray]:
    """log Z_{k+1} / Z_k of each step, shape (rung - 1,), and each chain's mean weight over that of all."""
    log_weight = -np.diff(rungs.beta)[:, None, None] * rungs.energy[:-1]
    top = np.max(log_weight, axis=(1, 2), keepdims=True)
    of_chains = np.mean(np.exp(log_weight - top), axis=2)
    means = np.mean(of_chains, axis=1, keepdims=True)
    return np.ravel(np.log(means) + top[..., 0]), of_chains / means


def thermodynamic(rungs: Rungs) -> tuple[float, np.ndarray, float]:
    """log Z, each chain's contribution to its error (rung, chain), and the error of the rule of integration."""
    log_ratios, first_step = stepping_stones(Rungs(rungs.beta[:2], rungs.energy[:2]))
    beta, energy = rungs.beta[1:], rungs.energy[1:]
    mean = np.mean(energy, axis=(1, 2))
    centred = energy - mean[:, None, None]
    variance, third = np.mean(centred**2, axis=(1, 2)), np.mean(centred**3, axis=(1, 2))

    h = np.diff(beta)
    weight, correction = np.zeros_like(beta), np.zeros_like(beta)
    weight[:-1] += h / 2
    weight[1:] += h / 2
    correction[:-1] -= h**2 / 12
    correction[1:] += h**2 / 12
    value = log_ratios[0] - weight @ mean - correction @ variance
    contributions = weight[:, None] * np.mean(centred, axis=2) + correction[:, None] * np.mean(centred**2, axis=2)
    # The rule of the next order, since the slope of the mean energy is -variance, and its curvature the third moment.
    next_order = h**2 @ np.diff(variance) / 10 + h**3 @ (third[:-1] + third[1:]) / 120
    error_of_rule = abs(next_order - correction @ variance)
    return float(value), np.concatenate([first_step, contributions]), float(error_of_rule)


def multistate(rungs: Rungs) -> tuple[np.ndarray, float]:
    """log Z of each rung, shape (rung,), and the standard error of the last.

    The draws of rung k are worth `n_k` independent ones, each `w_k = n_k / (C D)`. With f = -log Z and

        p_j(n) = n_j exp(f_j - b_j U_n) / sum_i n_i exp(f_i - b_i U_n)

    Newton's method solves `n_j = sum_n w(n) p_j(n)`, the slope of a concave likelihood of f, from the stepping stones.
    The error comes from the spread of the chains about these equations, through their Jacobian H: `H^-1 S H^-1`.

    Raises:
        EnergyError: where Newton's method does not arrive.
    """
    beta, energy = rungs
    num_rungs, num_chains, num_draws = energy.shape
    # Independent by construction where zero mass may be, at rung 0.
    sizes = np.array([num_chains * num_draws, *(effective_size(each) for each in energy[1:])], float)
    sizes = np.minimum(sizes, num_chains * num_draws)
    worth = sizes / (num_chains * num_draws)
    f = np.concatenate([[0.0], -np.cumsum(stepping_stones(rungs)[0])])
    finite = np.where(np.isfinite(energy), energy, 0.0)

    def equations(f: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slope and curvature of the likelihood, and each chain's part of the slope, shape (rung, chain, rung)."""
        total, outer = np.zeros(num_rungs), np.zeros((num_rungs, num_rungs))
        parts = np.zeros((num_rungs, num_chains, num_rungs))
        for k in range(num_rungs):
            log_p = np.log(sizes) + f - beta * finite[k][..., None]
            log_p = np.where(np.isfinite(energy[k])[..., None] | (beta == 0), log_p, -np.inf)
            p = np.exp(log_p - np.max(log_p, axis=-1, keepdims=True))
            p /= np.sum(p, axis=-1, keepdims=True)
            parts[k] = worth[k] * np.sum(p, axis=1)
            total += np.sum(parts[k], axis=0)
            rows = p.reshape(-1, num_rungs)
            outer += worth[k] * rows.T @ rows
        return sizes - total, np.diag(total) - outer, parts

    for _ in range(MOST_ROUNDS):
        slope, curvature, parts = equations(f)
        # log Z of the reference is 0 and stays so.
        step = np.linalg.solve(curvature[1:, 1:], slope[1:])
        f[1:] += step / max(1.0, np.max(np.abs(step)))
        if np.max(np.abs(step)) < SOLVED:
            break
    else:
        raise EnergyError(
            f"MBAR's equations were not solved in {MOST_ROUNDS} rounds: the energies of neighbouring rungs do not "
            "overlap. A larger target_ess of the pilot helps."
        )
    centred = (parts - np.mean(parts, axis=1, keepdims=True))[..., 1:].reshape(-1, num_rungs - 1)
    spread = centred.T @ centred * num_chains / (num_chains - 1)
    last = np.linalg.solve(curvature[1:, 1:], np.eye(num_rungs - 1)[-1])
    return -f, float(np.sqrt(last @ spread @ last))
