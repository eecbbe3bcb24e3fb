"""log Z from a reference that is fitted to a pilot's particles, by draws that had no part in the fit.

    pilot       a cheap run of SMC: a cloud near the posterior, with a log Z of its own
    fit         q, a mixture of Student t distributions with a share of the model's reference (`rebase.py`)
    refits      draws of q with weights w = pi_0 exp(-U) / q, pooled with the cloud, for as long as q gets better
    estimate    fresh draws of the last q:  Z = E_q[w]

The draws are evenly spread, not independent: `BLOCKS` Sobol sequences, each scrambled on its own and carried to q
(`StudentMixture.from_cube`). Each block gives an unbiased estimate, and the standard error is that of their mean,

    Z = mean_b Z_b        se(log Z) = sd_b(Z_b) / (Z sqrt(BLOCKS))

which is several times smaller than that of independent draws where w is smooth, and no larger elsewhere.

The weights are looked at before they are believed: where their tail is heavier than a mean bears (Pareto k over
`LARGEST_K`), SMC goes the rest of the way from q to the posterior, on a path that is short now. What the pilot says of
log Z is a second opinion: one that contradicts the estimate is a doubt.

References:
    Cappe, Douc, Guillin, Marin and Robert (2008), Adaptive importance sampling in general mixture classes; Owen (1997),
    Scrambled net variance for integrals of smooth functions; Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto
    smoothed importance sampling.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import qmc

from ebm_ppl import parallel, smc
from ebm_ppl.logz.integral import CONTRADICTION, Integral, Opinion, check_energies, opinion_of, total_energy
from ebm_ppl.mixture import fit_mixture
from ebm_ppl.rebase import Rebased
from ebm_ppl.smc import SMC, UNSETTLED
from ebm_ppl.target import Tilted
from ebm_ppl.typing import Array, EnergyError, PRNGKey, log_mean

BLOCKS = 16
"""Scrambled sequences of an estimate: its standard error has one degree of freedom fewer."""
LARGEST_K = 0.7
"""Of Pareto's k: beyond it a mean of weights settles too slowly for an error bar to have a meaning."""
SMALL_SHARE = 0.1
"""Effective share of the draws below which a path from the fitted reference is not short."""
FEW = 100
"""Effective draws below which the error bar has no meaning either."""
GOOD_SHARE = 0.9
"""Effective share of the draws beyond which a better q is not worth its price."""
TAILS_SHARE = 0.1
"""Share of q that has heavy tails."""
WORTHWHILE = 1.1
"""Factor by which a refit must raise the effective share of the draws for another to follow."""
SMALLEST = 2.0**-33
"""Coordinate of a point of the cube, half of its resolution."""


@dataclasses.dataclass(frozen=True)
class FittedReference:
    """log Z by importance sampling, or a short path of SMC, from a reference fitted to a pilot's particles.

    Args:
        tol: standard error wanted, in nats. Without one the estimate gets as many evaluations as the search for its
            reference took.
        num_draws: draws of a refit, and fewest of the estimate: 2^4 at least, a power of two.
        max_draws: bound on the draws of the estimate.
        max_refits: bound on the fits after the first.
        defence: share of the model's own reference in the fitted one.
        pilot: the SMC whose particles are fitted.
        fallback: the SMC from the fitted reference, where importance sampling is not to be trusted.
    """

    tol: float | None = None
    num_draws: int = 4096
    max_draws: int = 2**20
    max_refits: int = 2
    defence: float = 0.01
    pilot: SMC = dataclasses.field(default_factory=lambda: SMC(num_particles=2000, target_ess=0.5, num_moves=1))
    fallback: SMC = dataclasses.field(default_factory=SMC)
    name = "fitted reference"

    def __post_init__(self):
        if self.num_draws < BLOCKS or self.num_draws & (self.num_draws - 1):
            raise EnergyError(f"num_draws is a power of two of at least {BLOCKS}; got {self.num_draws}.")
        if not 0 < self.defence < 1:
            raise EnergyError(f"defence is a share between 0 and 1, exclusive; got {self.defence}.")
        if self.tol is not None and not self.tol > 0:
            raise EnergyError(f"tol is a positive standard error in nats; got {self.tol}.")

    def integrate(self, key: PRNGKey, target: Tilted) -> Integral:
        """log Z of all energies of a target at once, from one pilot, one fitted reference and one estimate."""
        key_pilot, key_fit, key_final, key_path = jax.random.split(key, 4)
        pilot = smc.run(key_pilot, target, self.pilot, progress_bar=False)
        opinion = opinion_of(pilot)
        story = [f"pilot of {self.pilot.num_particles} particles: log Z {opinion}"]
        found = _search(key_fit, target, np.asarray(pilot.z[0]), self, story)
        search = opinion.num_evaluations + found.num_evaluations
        final = _draw(key_final, found.reference, _enough(found.seen, search, self))
        story.append(
            f"{final.num} fresh draws, {final.effective_share:.0%} effective, Pareto k {final.pareto_k:.2f}: "
            f"log Z {final.value:.3f} ± {final.std_error:.3f}"
        )
        estimate = Integral(
            value=final.value,
            std_error=final.std_error,
            num_evaluations=search + final.num,
            num_nan=opinion.num_nan + found.num_nan + final.num_nan,
            diagnostics={"branch": "importance sampling"},
        )
        if not final.pareto_k <= LARGEST_K:
            path = opinion_of(smc.run(key_path, found.reference, self.fallback, progress_bar=False))
            story.append(f"heavy tails, so SMC from the fitted reference: log Z {path}")
            estimate = Integral(
                value=path.value,
                std_error=path.std_error,
                num_evaluations=estimate.num_evaluations + path.num_evaluations,
                num_nan=estimate.num_nan + path.num_nan,
                diagnostics={"branch": "SMC", "drift": path.drift},
            )
        measured = {"pareto_k": final.pareto_k, "effective_share": final.effective_share, "pilot": opinion.value}
        return dataclasses.replace(
            estimate,
            story=tuple(story),
            doubts=tuple(_doubts(estimate, opinion, final)),
            diagnostics={**estimate.diagnostics, **measured},
        )


class Weighed(NamedTuple):
    """Evenly spread draws of a reference with their log weights, in blocks; shapes (block, draw, ...)."""

    z: np.ndarray
    log_weight: np.ndarray
    num_nan: int

    @property
    def num(self) -> int:
        return self.log_weight.size

    @property
    def relative(self) -> np.ndarray:
        """The weights over the largest."""
        return np.exp(self.log_weight - np.max(self.log_weight))

    @property
    def value(self) -> float:
        """log of the mean weight."""
        return log_mean(np.ravel(self.log_weight))

    @property
    def std_error(self) -> float:
        """Of `value`, from the spread of the blocks."""
        means = np.mean(self.relative, axis=1)
        return float(np.std(means, ddof=1) / np.mean(means) / math.sqrt(len(means)))

    @property
    def effective_share(self) -> float:
        weights = self.relative
        return float(np.mean(weights) ** 2 / np.mean(weights**2))

    @property
    def pareto_k(self) -> float:
        """Shape of the tail of the weights, by Pareto smoothed importance sampling."""
        from arviz_stats.base import array_stats

        if np.ptp(self.log_weight) < 1e-6:
            return -math.inf
        return float(array_stats.psislw(-np.ravel(self.log_weight))[1])


class Search(NamedTuple):
    """The best reference found, the draws that showed it, and what the search has cost."""

    reference: Rebased
    seen: Weighed
    num_evaluations: int
    num_nan: int


def _search(key: PRNGKey, target: Tilted, cloud: np.ndarray, method: FittedReference, story: list[str]) -> Search:
    """Fits to the cloud and to weighted draws of the fits before, for as long as they get better."""
    room = len(cloud) + method.max_refits * method.num_draws
    points, weights = np.zeros((room, target.dim), cloud.dtype), np.zeros(room, cloud.dtype)
    points[: len(cloud)], weights[: len(cloud)], filled = cloud, 0.5, len(cloud)
    best, evaluations, num_nan, components = None, 0, 0, 1
    for fit in range(method.max_refits + 1):
        key_fit, key_draw = jax.random.split(jax.random.fold_in(key, fit))
        mixture = fit_mixture(key_fit, jnp.asarray(points), jnp.asarray(weights), components)
        components = len(mixture.log_weight)
        reference = Rebased(target, mixture.with_tails(TAILS_SHARE), jnp.asarray(method.defence, cloud.dtype))
        seen = _draw(key_draw, reference, method.num_draws)
        evaluations, num_nan = evaluations + seen.num, num_nan + seen.num_nan
        share, before = seen.effective_share, best.seen.effective_share if best else 0.0
        story.append(f"fit {fit + 1}: {components} components, {share:.0%} of the draws are effective")
        if share > before:
            best = Search(reference, seen, evaluations, num_nan)
        if share >= GOOD_SHARE or share < WORTHWHILE * before or fit == method.max_refits:
            break
        here = slice(filled, filled + seen.num)
        points[here], weights[here], filled = seen.z.reshape(-1, target.dim), _truncated(seen), here.stop
    assert best is not None
    return best._replace(num_evaluations=evaluations, num_nan=num_nan)


def _enough(seen: Weighed, spent: float, method: FittedReference) -> int:
    """Draws of the estimate, a power of two, if they are as good as those seen."""
    wanted = spent if method.tol is None else seen.num * (seen.std_error / method.tol) ** 2
    wanted = min(max(wanted, method.num_draws), method.max_draws)
    return 2 ** math.ceil(math.log2(wanted))


def _draw(key: PRNGKey, reference: Rebased, num: int) -> Weighed:
    """`num` draws of a reference in blocks, with their log weights -U_q; those with a NaN energy weigh nothing."""
    key_cube, key_own = jax.random.split(key)
    per_block = num // BLOCKS
    few = math.ceil(float(reference.defence) * per_block) + 1
    own = parallel.over(_own, parallel.split(jax.random.split(key_own, BLOCKS * few)), reference.target, hurry=True)
    owns = np.split(np.concatenate(jax.device_get(own)), BLOCKS)
    seeds = np.asarray(jax.random.bits(key_cube, (BLOCKS,)))
    z = np.concatenate([_even(int(seed), reference, per_block, own) for seed, own in zip(seeds, owns, strict=True)])
    parts = parallel.over(_energy, parallel.split(jnp.asarray(z)), reference)
    energy = np.concatenate(jax.device_get(parts))
    nan = check_energies(energy, "draws of the fitted reference")
    shape = BLOCKS, per_block
    return Weighed(z.reshape(*shape, -1), np.where(np.isnan(energy), -np.inf, -energy).reshape(shape), nan)


def _even(seed: int, reference: Rebased, num: int, own: np.ndarray) -> np.ndarray:
    """`num` draws of q from one scrambled sequence, whose first coordinate also says which of them are to be its own.

    Args:
        own: draws of the target's own reference, as many as its share of q can ask for.
    """
    cube = np.clip(
        qmc.Sobol(reference.dim + 2, bits=32, rng=np.random.default_rng(seed)).random(num), SMALLEST, 1 - SMALLEST
    )
    defence = float(reference.defence)
    is_own = cube[:, 0] < defence
    cube[:, 0] = np.maximum(cube[:, 0] - defence, 0.0) / (1 - defence)
    z = reference.proposal.from_cube(cube)
    z[is_own] = own[: np.sum(is_own)]
    return z


def _own(key: PRNGKey, target: Tilted) -> Array:
    return target.sample_reference(key)


def _energy(z: Array, reference: Rebased) -> Array:
    return total_energy(reference, z)[1]


def _truncated(seen: Weighed) -> np.ndarray:
    """Weights for a fit, the largest cut, that add up to the effective number of draws (Ionides 2008)."""
    weights = np.ravel(seen.relative)
    weights = np.minimum(weights, np.mean(weights) * math.sqrt(len(weights)))
    return weights / np.sum(weights) * seen.effective_share * len(weights)


def _doubts(estimate: Integral, pilot: Opinion, final: Weighed) -> list[str]:
    doubts = []
    gap, noise = abs(estimate.value - pilot.value), math.hypot(estimate.std_error, pilot.std_error)
    if gap > CONTRADICTION * noise:
        doubts.append(
            f"The pilot's log Z ({pilot.value:.2f} ± {pilot.std_error:.2f}) contradicts that from the reference fitted "
            f"to its particles ({estimate.value:.2f} ± {estimate.std_error:.2f}): one of them is wrong, and the error "
            "bar does not say by how much. A larger pilot, or a reparametrised model, helps."
        )
    by_path = estimate.diagnostics["branch"] == "SMC"
    if by_path and final.effective_share < SMALL_SHARE:
        doubts.append(
            f"The fitted reference does not describe the posterior ({final.effective_share:.1%} of its draws are "
            f"effective, Pareto k {final.pareto_k:.2f}), and SMC from it has a long way to go: log Z may be off by far "
            "more than the stated error. A larger pilot, or a reparametrised model, helps."
        )
    if by_path and estimate.diagnostics["drift"] > UNSETTLED:
        doubts.append(
            "The weights from the fitted reference have heavy tails, and the particles of SMC lag behind their targets "
            "on the path from it: log Z may be off by far more than the stated error. A larger pilot, or a "
            "reparametrised model, helps."
        )
    if not by_path and final.num * final.effective_share < FEW:
        doubts.append(
            f"Only {final.num * final.effective_share:.0f} of {final.num} draws of the fitted reference are effective: "
            "the error bar rests on too few. A larger pilot or max_draws helps."
        )
    return doubts
