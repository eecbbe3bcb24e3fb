"""log Z from posterior draws and a proposal fitted to half of them, by bridge sampling.

    p(z) = pi_0(z) exp(-U(z)),  log Z = log of its integral;  q normalised, near p / Z;  l(z) = log p(z) - log q(z)

    chains       NUTS on p; the first half of each chain fits q, the second half estimates
    proposal     a mixture of Student t distributions (`mixture.py`); or, warped, a normal one with some heavy tails
    modes        ascents from draws of the reference (`modes.py`): what the chains may have missed
    bridge       Z solves  mean_q[ e^l / (s_1 e^l + s_2 Z) ] = mean_p[ Z / (s_1 e^l + s_2 Z) ]             (`_solve`)

The bridge is the optimal one: s_1 and s_2 are the shares of the two sets of draws, each counted by its effective size.
The fixed point of Meng and Wong's iteration is found as the one root of an equation that falls with log Z. The relative
variance of Z, which is the variance of log Z, is the sum of two parts,

    V_q(f) / E_q(f)^2 / N_q  +  V_p(g) / E_p(g)^2 / ESS_p(g)

with f = p / (s_1 p + s_2 q Z) and g = q Z / (s_1 p + s_2 q Z). The second part has the effective size of
the chains' own values of g in place of their number.

Warp III makes p symmetric about the centre m of q, which leaves Z as it is:

    p(z) -> ( p(z) + p(2 m - z) ) / 2

A sign drawn for each posterior draw, as in the paper, would change nothing: both densities are symmetric.

References:
    Meng and Wong (1996), Simulating ratios of normalizing constants via a simple identity; Meng and Schilling (2002),
    Warp bridge sampling; Fruehwirth-Schnatter (2004), Estimating marginal likelihoods for mixture and Markov switching
    models using bridge sampling techniques; Gronau et al. (2017), A tutorial on bridge sampling.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from ebm_ppl import mcmc, parallel
from ebm_ppl.kernels import NUTS
from ebm_ppl.logz.importance import draw_own
from ebm_ppl.logz.integral import LARGEST_RHAT, Integral, check_energies, disagreement, effective_size, relative_error
from ebm_ppl.logz.modes import find_modes, spread_of, unvisited
from ebm_ppl.mixture import StudentMixture, fit_mixture
from ebm_ppl.scale import location_and_scale
from ebm_ppl.target import Target, Tilted
from ebm_ppl.typing import Array, Draws, EnergyError, EnergyWarning, PRNGKey, with_error

LARGE_ERROR = 0.3
"""Relative error of Z beyond which its logarithm is not normally distributed."""
NEGLIGIBLE = 0.01
"""Mass that the chains may have missed, over what they found."""
TAILS_SHARE = 0.1
"""Share of the warped proposal that has heavy tails: with a normal's own, rare draws beyond them rule the error."""
FEWEST = 8
"""Draws of a chain, half of which must be enough for an effective size."""


@dataclasses.dataclass(frozen=True)
class Bridge:
    """log Z by bridge sampling between draws of the posterior and of a proposal fitted to others of them.

    Args:
        num_chains: independent chains.
        num_warmup: warm-up steps of each chain.
        num_samples: draws of each chain, an even number: half fit the proposal, half estimate.
        num_proposal: draws of the proposal; as many as those of the posterior that estimate, where None.
        warp: whether to bridge from a normal proposal to the posterior made symmetric about it (Warp III), at two
            evaluations a draw, instead of from a mixture to the posterior. For posteriors with one mode.
        sampler: settings of the chains.
        num_ascents: gradient ascents from draws of the reference, in search of modes that no chain has been to: chains
            that all went to the same one agree.

    References:
        Meng and Wong (1996), Simulating ratios of normalizing constants via a simple identity; Gronau et al. (2017), A
        tutorial on bridge sampling.
    """

    num_chains: int = 4
    num_warmup: int = 500
    num_samples: int = 2000
    num_proposal: int | None = None
    warp: bool = False
    sampler: NUTS = dataclasses.field(default_factory=NUTS)
    num_ascents: int = 64
    name = "bridge sampling"

    def __post_init__(self):
        if self.num_chains < 2:
            raise EnergyError(f"num_chains is 2 at least, so that chains can disagree; got {self.num_chains}.")
        if self.num_samples < FEWEST or self.num_samples % 2:
            raise EnergyError(f"num_samples is an even number of at least {FEWEST}; got {self.num_samples}.")
        if self.num_ascents < 2:
            raise EnergyError(f"num_ascents is at least 2; got {self.num_ascents}.")
        if self.num_proposal is not None and self.num_proposal < 2:
            raise EnergyError(f"num_proposal is 2 at least; got {self.num_proposal}.")

    def integrate(self, key: PRNGKey, target: Tilted) -> Integral:
        """log Z of all energies of a target at once, from one run of chains and one proposal.

        Raises:
            EnergyError: for a target other than a `Target`, whose density the chains need.
            NonFiniteEnergyError: for an energy of -inf, or where no chain finds a starting point.
            DegenerateParticlesError: where no draw of the proposal has any mass.
        """
        if not isinstance(target, Target):
            raise EnergyError(
                f"Bridge() samples the posterior by chains, for which it needs a model's target; got a "
                f"{type(target).__name__}. Use FittedReference() or SMC() there."
            )
        key_chains, key_fit, key_proposal, key_starts = jax.random.split(key, 4)
        chains = self._chains(key_chains, target)
        z = np.asarray(chains.z)
        for_fit, for_bridge = np.split(z, 2, axis=1)
        proposal = _fit(key_fit, for_fit.reshape(-1, target.dim), self.warp)
        num = self.num_proposal or for_bridge.shape[0] * for_bridge.shape[1]
        keys = parallel.split(jax.random.split(key_proposal, num))
        fresh = np.concatenate(jax.device_get(parallel.over(_draw, keys, proposal, hurry=True)))
        of_posterior, nan_posterior = _log_ratio(for_bridge.reshape(-1, target.dim), target, proposal, self.warp)
        of_proposal, nan_proposal = _log_ratio(fresh, target, proposal, self.warp)
        bridged = bridge(of_posterior.reshape(for_bridge.shape[:2]), of_proposal)

        values = np.asarray(chains.stats["lp"]), *np.moveaxis(z, -1, 0)
        rhat, divergent = max(map(disagreement, values)), chains.attrs["num_divergent"]
        densities = 1 + self.warp
        starts = draw_own(key_starts, target, self.num_ascents)
        modes, ascents = find_modes(target, starts, spread_of(starts))
        missed = math.exp(min(unvisited(modes, z.reshape(-1, target.dim)) - bridged.value, 700.0))
        return Integral(
            value=bridged.value,
            std_error=bridged.std_error,
            num_evaluations=chains.attrs["num_evaluations"] + densities * (of_posterior.size + num) + ascents,
            num_nan=chains.attrs["num_nan_energy"] + nan_posterior + nan_proposal,
            story=(
                f"{self.num_chains} chains of {self.num_samples} draws: R-hat {rhat:.3f}, {divergent} divergences",
                f"{of_posterior.size} draws of the posterior, worth {bridged.effective:.0f}, and {num} of the "
                f"{'warped normal' if self.warp else 'mixture'} fitted to the others: "
                f"log Z {with_error(bridged.value, bridged.std_error)}",
                f"{np.sum(modes.hits)} ascents arrived: {len(modes.z)} modes; at those that no chain has been to, "
                f"{missed:.2g} of its mass",
            ),
            doubts=tuple(_doubts(bridged, rhat, divergent, missed)),
            diagnostics={"rhat": rhat, "num_divergent": divergent, "effective_draws": bridged.effective},
        )

    def _chains(self, key: PRNGKey, target: Target) -> Draws:
        with warnings.catch_warnings():
            # NaN energies are counted in the integral, where `log_z` warns of them.
            warnings.simplefilter("ignore", EnergyWarning)
            draws, _ = mcmc.run(
                key,
                target,
                self.sampler,
                num_chains=self.num_chains,
                num_warmup=self.num_warmup,
                num_samples=self.num_samples,
                progress_bar=False,
            )
        return draws


class Bridged(NamedTuple):
    """An optimal bridge."""

    value: float
    """log Z, in nats."""
    std_error: float
    effective: float
    """Independent draws that the posterior's are worth."""


def bridge(of_posterior: np.ndarray, of_proposal: np.ndarray) -> Bridged:
    """The optimal bridge between chains and independent draws.

    Args:
        of_posterior: log p - log q at draws of the posterior, shape (chain, draw).
        of_proposal: the same at draws of the proposal, shape (num,); -inf for zero mass.
    """
    num = len(of_proposal)
    effective = min(effective_size(of_posterior), float(of_posterior.size))
    share = effective / (effective + num)
    value = _solve(of_posterior, of_proposal, share)
    shift = value + math.log1p(-share) - math.log(share)
    f, g = expit(of_proposal - shift), expit(shift - of_posterior)
    from_proposal = relative_error(f) ** 2
    from_posterior = np.var(g, ddof=1) / np.mean(g) ** 2 / effective_size(g)
    return Bridged(value, math.sqrt(from_proposal + from_posterior), effective)


def _solve(of_posterior: np.ndarray, of_proposal: np.ndarray, share: float) -> float:
    """log Z of the optimal bridge, for the share of the posterior's draws."""
    offset = math.log1p(-share) - math.log(share)

    def surplus(log_z: float) -> float:
        shift = log_z + offset
        return np.mean(expit(of_proposal - shift)) / share - np.mean(expit(shift - of_posterior)) / (1 - share)

    both = np.concatenate([np.ravel(of_posterior), of_proposal[np.isfinite(of_proposal)]])
    low, high = np.min(both), np.max(both)
    margin = 1.0
    while surplus(low - margin) < 0 or surplus(high + margin) > 0:
        margin *= 2
    root: Any = brentq(surplus, low - margin, high + margin, xtol=1e-10)
    return float(root)


def _fit(key: PRNGKey, z: np.ndarray, warp: bool) -> StudentMixture:
    """The proposal for draws of shape (num, dim)."""
    weights = np.full(len(z), 1 / len(z), z.dtype)
    if warp:
        moments = jax.device_get(parallel.once(location_and_scale, z, weights))
        return StudentMixture.normal(*moments).with_tails(TAILS_SHARE)
    return fit_mixture(key, z, weights)


def _draw(key: PRNGKey, proposal: StudentMixture) -> Array:
    return proposal.sample(key)


def _log_ratio(z: np.ndarray, target: Target, proposal: StudentMixture, warp: bool) -> tuple[np.ndarray, int]:
    """log p - log q at points of shape (num, dim), and the number of NaN among densities, which count as zero mass."""
    parts = parallel.over(_log_densities, parallel.split(jnp.asarray(z)), target, proposal, warp)
    log_p, log_q = (np.concatenate(x).astype(float) for x in zip(*jax.device_get(parts), strict=True))
    num_nan = int(np.sum(np.isnan(log_p)))
    log_p = np.where(np.isnan(log_p), -np.inf, log_p)
    check_energies(-log_p, "draws of a bridge")
    return np.logaddexp.reduce(log_p, axis=1) - math.log(log_p.shape[1]) - log_q, num_nan


def _log_densities(z: Array, target: Target, proposal: StudentMixture, warp: bool) -> tuple[Array, Array]:
    """log p, at the mirrored point too where warped, and log q."""
    points = [z, 2 * proposal.mean[0] - z] if warp else [z]
    return jnp.stack([target.log_density(point) for point in points]), proposal.log_density(z)


def _doubts(bridged: Bridged, rhat: float, divergent: int, missed: float) -> list[str]:
    doubts = []
    if missed > NEGLIGIBLE:
        doubts.append(
            f"There are modes that no chain has been to, with about {missed:.2g} times the mass that the chains found "
            "(by the normal distributions that touch them): log Z is probably too low. Use FittedReference(), which "
            "takes them in."
        )
    if not rhat <= LARGEST_RHAT:
        doubts.append(
            f"The chains disagree (R-hat {rhat:.2f} of the log density or a coordinate): their draws are not yet those "
            "of the posterior, and log Z may be off by more than the stated error. More num_warmup and num_samples, or "
            "a reparametrised model, help."
        )
    if divergent:
        doubts.append(
            f"{divergent} trajectories of the chains diverged: part of the posterior may be missing from the draws, "
            "and its mass from log Z. A larger target_accept of the sampler or a reparametrised model helps."
        )
    if not bridged.std_error <= LARGE_ERROR:
        doubts.append(
            f"The relative error of Z is {bridged.std_error:.0%}: draws and proposal hardly overlap, and the error bar "
            "rests on few of them. More num_samples help, and warp=False where the posterior is not bell-shaped."
        )
    return doubts
