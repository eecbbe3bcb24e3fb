"""log Z from a reference that is fitted to a pilot's particles, by draws that had no part in the fit.

    pilot       a cheap run of SMC: a cloud near the posterior, with a log Z of its own
    modes       where ascents from draws of the reference end (`modes.py`): what the pilot may have missed
    fit         q, a mixture of Student t distributions, a component for each mode that the fit to the cloud does not
                account for, and a share of the model's reference (`rebase.py`)
    refits      draws of q with weights w = pi_0 exp(-U) / q, pooled with the cloud, for as long as q gets better
    estimate    fresh draws of the last q:  Z = E_q[w]

The draws are evenly spread, not independent: `BLOCKS` Sobol sequences, each scrambled on its own and carried to q
(`StudentMixture.from_cube`). Each block gives an unbiased estimate, and the standard error is that of their mean,

    Z = mean_b Z_b        se(log Z) = sd_b(Z_b) / (Z sqrt(BLOCKS))

which is several times smaller than that of independent draws where w is smooth, and no larger elsewhere.

The weights are looked at before they are believed: where their tail is heavier than a mean bears (Pareto k over
`LARGEST_K`), SMC goes the rest of the way from q to the posterior, on a path that is short now (from the model's own
reference, where q describes next to nothing). What the pilot says of log Z is a second opinion: one that contradicts
the estimate is a doubt, unless weights that behave have found more than the pilot saw.

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
from ebm_ppl.logz.integral import (
    CONTRADICTION,
    FEW,
    LARGEST_K,
    Integral,
    Opinion,
    check_energies,
    effective_share,
    opinion_of,
    pareto_k,
    relative_error,
    total_energy,
)
from ebm_ppl.logz.modes import Modes, find_modes
from ebm_ppl.mixture import DEGREES, MOST_COMPONENTS, TAILS, StudentMixture, fit_mixture
from ebm_ppl.rebase import Rebased
from ebm_ppl.smc import SMC, UNSETTLED
from ebm_ppl.target import Tilted
from ebm_ppl.typing import Array, EnergyError, PRNGKey, log_mean

BLOCKS = 16
"""Scrambled sequences of an estimate: its standard error has one degree of freedom fewer."""
UNACCOUNTED = 1.5
"""Nats by which a mode is higher than the fit says, to become a component of its own."""
MASS = 0.02, 9.0
"""Least and most mass of such a component, relative to the fit's."""
BIASED = 0.05
"""Weight of a pilot's particle once it is known to have missed a mode; .5 before."""
SMALL_SHARE = 0.01
"""Effective share of the draws below which the path from the fitted reference is not the shorter one."""
REMEDY = "A larger pilot, or a reparametrised model, helps."
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
        num_ascents: how often a mode is looked for, by gradient ascent from draws of the reference (a quarter of them
            from particles of the pilot).
        num_draws: draws of a refit, and fewest of the estimate: 2^4 at least, a power of two.
        max_draws: bound on the draws of the estimate.
        max_refits: bound on the fits after the first.
        defence: share of the model's own reference in the fitted one.
        pilot: the SMC whose particles are fitted.
        fallback: the SMC from the fitted reference, where importance sampling is not to be trusted.
    """

    tol: float | None = None
    num_ascents: int = 256
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
        found = _search(key_fit, target, np.asarray(pilot.z[0]), opinion.value, self, story)
        search = opinion.num_evaluations + found.num_evaluations
        final = _draw(key_final, found.reference, _enough(found.seen, search, self))
        story.append(
            f"{final.num} fresh draws, {final.effective_share:.0%} effective, Pareto k {final.pareto_k:.2f}: "
            f"log Z {final.value:.3f} ± {final.std_error:.3f}"
        )
        by_path = not final.pareto_k <= LARGEST_K
        estimate = Opinion(final.value, final.std_error, 0.0, 0.0, 0)
        if by_path:
            near = final.effective_share >= SMALL_SHARE
            start = found.reference if near else target
            estimate = opinion_of(smc.run(key_path, start, self.fallback, progress_bar=False))
            story.append(f"heavy tails, so SMC from the {'fitted' if near else 'own'} reference: log Z {estimate}")
        return Integral(
            value=estimate.value,
            std_error=estimate.std_error,
            num_evaluations=search + final.num + estimate.num_evaluations,
            num_nan=opinion.num_nan + found.num_nan + final.num_nan + estimate.num_nan,
            story=tuple(story),
            doubts=tuple(_doubts(estimate, by_path, opinion, final)),
            diagnostics={
                "branch": "SMC" if by_path else "importance sampling",
                "pareto_k": final.pareto_k,
                "effective_share": final.effective_share,
                "pilot": opinion.value,
            },
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
        return relative_error(np.mean(self.relative, axis=1))

    @property
    def effective_share(self) -> float:
        return effective_share(self.log_weight)

    @property
    def pareto_k(self) -> float:
        return pareto_k(self.log_weight)


class Search(NamedTuple):
    """The best reference found, the draws that showed it, and what the search has cost."""

    reference: Rebased
    seen: Weighed
    num_evaluations: int
    num_nan: int


def _search(
    key: PRNGKey, target: Tilted, cloud: np.ndarray, log_z: float, method: FittedReference, story: list[str]
) -> Search:
    """Fits to the cloud and to weighted draws of the fits before, for as long as they get better."""
    modes, evaluations = _modes(jax.random.fold_in(key, method.max_refits + 1), target, cloud, method.num_ascents)
    story.append(f"{method.num_ascents} ascents: {len(modes.z)} modes")
    room = len(cloud) + method.max_refits * method.num_draws
    points, weights = np.zeros((room, target.dim), cloud.dtype), np.zeros(room, cloud.dtype)
    points[: len(cloud)], weights[: len(cloud)], filled = cloud, 0.5, len(cloud)
    best, mixture, num_nan = None, None, 0
    for fit in range(method.max_refits + 1):
        key_fit, key_draw = jax.random.split(jax.random.fold_in(key, fit))
        mixture = fit_mixture(key_fit, jnp.asarray(points), jnp.asarray(weights), mixture)
        if fit == 0 and np.any(missed := _unaccounted(modes, mixture, log_z)):
            story.append(f"{np.sum(missed)} modes that the pilot missed: a component for each")
            mixture = _with_modes(mixture, jax.tree.map(lambda x: x[missed], modes), log_z)
            weights[: len(cloud)] = BIASED
        reference = Rebased(target, mixture.with_tails(TAILS_SHARE), jnp.asarray(method.defence, cloud.dtype))
        seen = _draw(key_draw, reference, method.num_draws)
        evaluations, num_nan = evaluations + seen.num, num_nan + seen.num_nan
        share, before = seen.effective_share, best.seen.effective_share if best else 0.0
        story.append(f"fit {fit + 1}: {len(mixture.log_weight)} components, {share:.0%} of the draws are effective")
        if share > before:
            best = Search(reference, seen, evaluations, num_nan)
        if share >= GOOD_SHARE or share < WORTHWHILE * before or fit == method.max_refits:
            break
        here = slice(filled, filled + seen.num)
        points[here], weights[here], filled = seen.z.reshape(-1, target.dim), _truncated(seen), here.stop
    assert best is not None
    return best._replace(num_evaluations=evaluations, num_nan=num_nan)


def _modes(key: PRNGKey, target: Tilted, cloud: np.ndarray, num: int) -> tuple[Modes, int]:
    """Modes by ascents from draws of the reference, and a few from the cloud."""
    few = num // 4
    own = parallel.over(_own, parallel.split(jax.random.split(key, num - few)), target, hurry=True)
    starts = np.concatenate([*jax.device_get(own), cloud[:few]])
    return find_modes(target, starts, np.std(starts, axis=0))


def _unaccounted(modes: Modes, mixture: StudentMixture, log_z: float) -> np.ndarray:
    """Which modes the mixture gives far less density than they have."""
    if not len(modes.z):
        return np.zeros(0, bool)
    described = np.asarray(jax.vmap(mixture.log_density)(jnp.asarray(modes.z)))
    return modes.log_density - log_z - described > UNACCOUNTED


def _with_modes(mixture: StudentMixture, modes: Modes, log_z: float) -> StudentMixture:
    """A light and a heavy component for each mode, both with its curvature; what it is worth only the weights can tell.

    The curvature of a Student t at its mode is that of a normal distribution with (nu + dim) / nu times its precision.
    """
    mass = np.clip(np.exp(np.clip(modes.log_mass - log_z, -20, 20)), *MASS)[: MOST_COMPONENTS // 2]
    num, dim = len(mass), modes.z.shape[1]
    log_weight = jnp.log(jnp.asarray(mass / mass.sum(), mixture.mean.dtype))
    mean, factor, inverse = (jnp.asarray(x[:num]) for x in (modes.z, modes.scale.factor, modes.scale.inverse))
    wider = math.sqrt((TAILS + dim) / TAILS)
    light = StudentMixture(log_weight, mean, factor, inverse, jnp.full(num, DEGREES[-1], mean.dtype))
    heavy = StudentMixture(log_weight, mean, factor * wider, inverse / wider, jnp.full(num, TAILS, mean.dtype))
    total = min(mass.sum(), MASS[1])
    half, share = jnp.asarray(0.5, mean.dtype), jnp.asarray(total / (1 + total), mean.dtype)
    return mixture.joined(light.joined(heavy, half), share)


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


def _doubts(estimate: Opinion, by_path: bool, pilot: Opinion, final: Weighed) -> list[str]:
    """What speaks against the estimate: the other opinions, and the diagnostics of its own branch."""
    doubts = []
    others = {"the pilot": (pilot.value, pilot.std_error), "the fitted reference": (final.value, final.std_error)}
    for name, (value, std_error) in others.items():
        gap = (value - estimate.value) / max(math.hypot(std_error, estimate.std_error), 1e-30)
        # Weights that behave cannot make up mass, and others miss some: that they differ so is no contradiction.
        if gap > CONTRADICTION or (gap < -CONTRADICTION and by_path and name == "the pilot"):
            doubts.append(
                f"The log Z of {name} ({value:.2f} ± {std_error:.2f}) contradicts the estimate ({estimate.value:.2f} ± "
                f"{estimate.std_error:.2f}): one of them is wrong, and the error bar does not say by how much. {REMEDY}"
            )
    if by_path and max(pilot.drift, estimate.drift) > UNSETTLED:
        doubts.append(
            "The weights of the fitted reference have heavy tails, and the particles of SMC lag behind their targets: "
            f"log Z may be off by far more than the stated error. {REMEDY}"
        )
    if not by_path and final.num * final.effective_share < FEW:
        doubts.append(
            f"Only {final.num * final.effective_share:.0f} of {final.num} draws of the fitted reference are effective: "
            f"the error bar rests on too few. {REMEDY}"
        )
    return doubts
