"""log Z from chains at every rung of a ladder of inverse temperatures: three estimators of the same energies.

    `SteppingStone`               log Z = sum_k log mean_cd exp(-h_k U[k, c, d])          h_k = b_{k+1} - b_k
    `ThermodynamicIntegration`    log Z = log Z_1 - int_{b_1}^1 E_b[U] db, by the means and variances of U at the rungs
    `MBAR`                        log Z_k of all rungs at once, the maximum of a likelihood

The ladder, with its energies U[k, c, d] of draw d of chain c at rung k, is that of `ladder.py`; each estimator is a
function of these alone, from `Rungs` to `Found`. Points of zero mass weigh exp(-b U), which is zero, in all three.

Chains are independent of one another, and so are rungs. Each estimator is therefore, to first order, a sum over rungs
of means over chains, `log Z ~ sum_k mean_c x_kc`, and its variance is `sum_k var_c(x_kc) / C`, whatever the chains'
autocorrelation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from ebm_ppl.logz.integral import Integral, effective_size
from ebm_ppl.logz.ladder import Rungs, climb, doubts_of
from ebm_ppl.smc import SMC
from ebm_ppl.target import Tilted
from ebm_ppl.typing import EnergyError, PRNGKey, with_error

FEWEST = 4
"""Chains, and draws of each, that an error can be read from."""
MOST_ROUNDS = 100
"""Of Newton's method."""
SOLVED = 1e-8
"""Step of Newton's method, in nats, at which it has arrived."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What an estimator makes of a ladder's energies."""

    value: float
    std_error: float
    story: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    diagnostics: dict[str, float] = dataclasses.field(default_factory=dict)


# The estimators


def stepping_stone(rungs: Rungs) -> Found:
    """See `SteppingStone`."""
    log_ratios, relative = stepping_stones(rungs)
    return Found(float(np.sum(log_ratios)), error_of(relative))


def thermodynamic_integration(rungs: Rungs) -> Found:
    """See `ThermodynamicIntegration`."""
    value, relative, discretisation = thermodynamic(rungs)
    sampling = error_of(relative)
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


def mbar(rungs: Rungs) -> Found:
    """See `MBAR`."""
    log_z, contributions = multistate(rungs)
    return Found(float(log_z[-1]), error_of(np.mean(contributions, axis=2)))


def error_of(contributions: np.ndarray) -> float:
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


def multistate(rungs: Rungs) -> tuple[np.ndarray, np.ndarray]:
    """log Z of each rung, shape (rung,), and each draw's contribution to that of the last, (rung, chain, draw).

    The draws of rung k are worth `n_k` independent ones, each `w_k = n_k / (C D)`. With f = -log Z and

        p_j(n) = n_j exp(f_j - b_j U_n) / sum_i n_i exp(f_i - b_i U_n)

    Newton's method solves `n_j = sum_n w(n) p_j(n)`, the slope of a concave likelihood of f, from the stepping stones.
    With H its curvature, draw n of rung k moves log Z by `w_k (H^-1 (p(n) - mean_k p))_K` to first order.

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

    def shares(f: np.ndarray, energy: np.ndarray) -> np.ndarray:
        """p of each draw of a rung, shape (chain, draw, rung)."""
        log_p = np.log(sizes) + f - beta * np.where(np.isfinite(energy), energy, 0.0)[..., None]
        log_p = np.where(np.isfinite(energy)[..., None] | (beta == 0), log_p, -np.inf)
        p = np.exp(log_p - np.max(log_p, axis=-1, keepdims=True))
        return p / np.sum(p, axis=-1, keepdims=True)

    def equations(f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slope and curvature of the likelihood, for all rungs but the first: log Z of the reference is 0."""
        total, outer = np.zeros(num_rungs), np.zeros((num_rungs, num_rungs))
        for weight, each in zip(worth, energy, strict=True):
            rows = shares(f, each).reshape(-1, num_rungs)
            total += weight * np.sum(rows, axis=0)
            outer += weight * rows.T @ rows
        return (sizes - total)[1:], (np.diag(total) - outer)[1:, 1:]

    for _ in range(MOST_ROUNDS):
        slope, curvature = equations(f)
        step = np.linalg.solve(curvature, slope)
        f[1:] += step / max(1.0, np.max(np.abs(step)))
        if np.max(np.abs(step)) < SOLVED:
            break
    else:
        raise EnergyError(
            f"MBAR's equations were not solved in {MOST_ROUNDS} rounds: the energies of neighbouring rungs do not "
            "overlap. More rungs help (a larger target_ess of the pilot, where one chooses them)."
        )
    last = np.linalg.solve(curvature, np.eye(num_rungs - 1)[-1])
    moved = np.stack([size * shares(f, each)[..., 1:] @ last for size, each in zip(sizes, energy, strict=True)])
    return -f, moved - np.mean(moved, axis=(1, 2), keepdims=True)


# The settings


@dataclasses.dataclass(frozen=True)
class _OfLadder:
    """Settings of a ladder of chains, and the one way from it to log Z; a recipe adds what it makes of the energies."""

    num_chains: int = 16
    num_warmup: int = 50
    num_draws: int = 200
    pilot: SMC = dataclasses.field(default_factory=lambda: SMC(num_particles=1000, target_ess=0.8, num_moves=2))
    name: ClassVar[str]
    _estimate: ClassVar[Callable[[Rungs], Found]]

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
        ladder = climb(key, target, self.pilot, self.num_chains, self.num_warmup, self.num_draws)
        found = self._estimate(ladder.rungs)
        story = (
            f"pilot of {self.pilot.num_particles} particles: log Z {ladder.opinion}",
            f"{self.num_chains} chains of {self.num_draws} draws at each of {len(ladder.rungs.beta)} rungs: "
            f"log Z {with_error(found.value, found.std_error)}",
            *found.story,
        )
        return Integral(
            value=found.value,
            std_error=found.std_error,
            num_evaluations=ladder.num_evaluations,
            num_nan=ladder.num_nan,
            story=story,
            doubts=(*doubts_of(ladder, found.value, found.std_error), *found.doubts),
            diagnostics={
                "num_rungs": len(ladder.rungs.beta),
                "largest_rhat": ladder.largest_rhat,
                "least_acceptance": ladder.least_acceptance,
                "pilot": ladder.opinion.value,
                **found.diagnostics,
            },
        )


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
    _estimate = staticmethod(stepping_stone)


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
    _estimate = staticmethod(thermodynamic_integration)


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
    _estimate = staticmethod(mbar)
