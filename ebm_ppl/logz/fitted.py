"""log Z from a reference that is fitted to a pilot's particles, by draws that had no part in the fit.

    pilot       a cheap run of SMC, or nested sampling: a cloud near the posterior, with a log Z of its own
    modes       where ascents from draws of the reference end (`modes.py`): what the pilot may have missed
    fit         q, a mixture of Student t distributions, a component for each mode that the fit to the cloud does not
                account for, and a share of the model's reference (`rebase.py`)
    refits      draws of q with weights w = pi_0 exp(-U) / q, pooled with the cloud, for as long as q gets better
    estimate    fresh draws of the last q:  Z = E_q[w]  (`importance.py`)

The weights are looked at before they are believed: where their tail is heavier than a mean bears (Pareto k over
`LARGEST_K`; over `HAS_VARIANCE` where few draws count), SMC goes the rest of the way from q to the posterior, on a path
that is short now (from the model's own reference, where q describes next to nothing). What the pilot says of log Z is a
second opinion: one that contradicts the estimate is a doubt, unless weights that behave have found more than the pilot
saw.

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
from blackjax.smc.resampling import systematic

from ebm_ppl import smc
from ebm_ppl.logz.importance import BLOCKS, Weighed, draw, draw_own
from ebm_ppl.logz.integral import CONTRADICTION, FEW, LARGEST_K, Integral, Opinion, opinion_of
from ebm_ppl.logz.modes import Modes, find_modes
from ebm_ppl.logz.nested import NestedSampling
from ebm_ppl.mixture import DEGREES, MOST_COMPONENTS, TAILS, StudentMixture, fit_mixture
from ebm_ppl.rebase import Rebased
from ebm_ppl.smc import SMC, UNSETTLED
from ebm_ppl.target import Tilted
from ebm_ppl.typing import EnergyError, PRNGKey

IMPORTANCE = "importance sampling"
"""The branch of weights that behave."""
CLOUD = 2000
"""Points that are fitted of a pilot of nested sampling."""
UNACCOUNTED = 1.5
"""Nats by which a mode is higher than the fit says, to become a component of its own."""
MASS = 0.02, 9.0
"""Least and most mass of such a component, relative to the fit's."""
BIASED = 0.05
"""Weight of a pilot's particle once it is known to have missed a mode; .5 before."""
FAIR_SHARE = 0.1
"""Effective share of the draws below which a heavy tail may not have shown itself."""
HAS_VARIANCE = 0.5
"""Of Pareto's k: below it the weights have a finite variance."""
MOST_SEARCHES = 8
SMALL_SHARE = 0.01
"""Effective share of the draws below which the path from the fitted reference is not the shorter one."""
REMEDY = "A larger pilot, or a reparametrised model, helps."
GOOD_SHARE = 0.9
"""Effective share of the draws beyond which a better q is not worth its price."""
TAILS_SHARE = 0.1
"""Share of q that has heavy tails."""
WORTHWHILE = 1.1
"""Factor by which a refit must raise the effective share of the draws for another to follow."""


@dataclasses.dataclass(frozen=True)
class FittedReference:
    """log Z by importance sampling, or a short path of SMC, from a reference fitted to a pilot's particles.

    Args:
        tol: standard error wanted, in nats. Without one the estimate gets as many evaluations as the search for its
            reference took.
        num_ascents: how often a mode is looked for, by gradient ascent from draws of the reference (a quarter of them
            from particles of the pilot). Where some of the modes have been met only once, others may not have been:
            so again, from other draws, up to eight times.
        num_draws: draws of a refit, and fewest of the estimate: 2^4 at least, a power of two.
        max_draws: bound on the draws of the estimate.
        max_refits: bound on the fits after the first.
        defence: share of the model's own reference in the fitted one.
        pilot: what is fitted: the particles of `SMC` or the points of `NestedSampling`.
        fallback: the SMC from the fitted reference, where importance sampling is not to be trusted. After a pilot of
            nested sampling it is not needed: the pilot's own log Z is the estimate then.
    """

    tol: float | None = None
    num_ascents: int = 256
    num_draws: int = 4096
    max_draws: int = 2**20
    max_refits: int = 2
    defence: float = 0.01
    pilot: SMC | NestedSampling = dataclasses.field(
        default_factory=lambda: SMC(num_particles=2000, target_ess=0.5, num_moves=1)
    )
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
        pilot = _pilot(key_pilot, target, self.pilot)
        opinion, story = pilot.opinion, [pilot.story]
        found = _search(key_fit, target, pilot.cloud, opinion.value, self, story)
        search = opinion.num_evaluations + found.num_evaluations
        final = draw(key_final, found.reference, _enough(found.seen, search, self))
        story.append(
            f"{final.num} fresh draws, {final.effective_share:.0%} effective, Pareto k {final.pareto_k:.2f}: "
            f"log Z {final.value:.3f} ± {final.std_error:.3f}"
        )
        estimate, branch, more = self._estimate(key_path, target, pilot, found.reference, final)
        if branch != IMPORTANCE:
            story.append(f"heavy tails, so {branch}: log Z {estimate}")
        return Integral(
            value=estimate.value,
            std_error=estimate.std_error,
            num_evaluations=search + final.num + more,
            num_nan=opinion.num_nan + found.num_nan + final.num_nan + estimate.num_nan * (more > 0),
            story=tuple(story),
            doubts=tuple(_doubts(estimate, branch, pilot, final)),
            diagnostics={
                "branch": branch,
                "pareto_k": final.pareto_k,
                "effective_share": final.effective_share,
                "pilot": opinion.value,
            },
        )

    def _estimate(
        self, key: PRNGKey, target: Tilted, pilot: Pilot, reference: Rebased, final: Weighed
    ) -> tuple[Opinion, str, float]:
        """The answer, the branch that it comes from, and the evaluations that it took beyond the draws."""
        if _can_be_trusted(final):
            return Opinion(final.value, final.std_error, 0.0, 0.0, 0), IMPORTANCE, 0.0
        if isinstance(self.pilot, NestedSampling):
            return pilot.opinion, "the pilot", 0.0
        near = final.effective_share >= SMALL_SHARE
        found = opinion_of(smc.run(key, reference if near else target, self.fallback, progress_bar=False))
        return found, f"SMC from the {'fitted' if near else 'own'} reference", found.num_evaluations


def _can_be_trusted(final: Weighed) -> bool:
    """Whether the mean of the weights has settled; where few of the draws count, whether they have a variance too."""
    return final.pareto_k <= (LARGEST_K if final.effective_share >= FAIR_SHARE else HAS_VARIANCE)


class Pilot(NamedTuple):
    """What the fit starts from."""

    cloud: np.ndarray
    """Equally weighted points, (point, dim)."""
    opinion: Opinion
    doubts: tuple[str, ...]
    story: str


def _pilot(key: PRNGKey, target: Tilted, method: SMC | NestedSampling) -> Pilot:
    """A cloud near the posterior, with a log Z of its own."""
    if isinstance(method, SMC):
        draws = smc.run(key, target, method, progress_bar=False)
        opinion = opinion_of(draws)
        return Pilot(np.asarray(draws.z[0]), opinion, (), f"pilot of {method.num_particles} particles: log Z {opinion}")
    key_run, key_cloud = jax.random.split(key)
    found, z, log_weight = method.explore(key_run, target)
    opinion = Opinion(found.value, found.std_error, 0.0, found.num_evaluations, found.num_nan)
    weights = jnp.asarray(np.exp(log_weight - np.logaddexp.reduce(log_weight)))
    cloud = z[np.asarray(systematic(key_cloud, weights, CLOUD))]
    return Pilot(cloud.astype(weights.dtype), opinion, found.doubts, f"pilot: {found.story[-1]}")


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
    story.append(f"{np.sum(modes.hits)} ascents arrived: {len(modes.z)} modes, {modes.num_once} of them met once")
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
        seen = draw(key_draw, reference, method.num_draws)
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
    """Modes by ascents from draws of the reference, and a few from the cloud, until none has been met only once."""
    few = num // 4
    starts = np.concatenate([draw_own(key, target, num - few), cloud[:few]])
    deviation = np.std(starts, axis=0)
    modes, evaluations = find_modes(target, starts, deviation)
    for again in range(1, MOST_SEARCHES):
        # Where most have been met only once they are beyond counting, and no search would end.
        if not 0 < modes.num_once < len(modes.z) / 2:
            break
        starts = draw_own(jax.random.fold_in(key, again), target, num)
        modes, more = find_modes(target, starts, deviation, modes)
        evaluations += more
    return modes, evaluations


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


def _truncated(seen: Weighed) -> np.ndarray:
    """Weights for a fit, the largest cut, that add up to the effective number of draws (Ionides 2008)."""
    weights = np.ravel(seen.relative)
    weights = np.minimum(weights, np.mean(weights) * math.sqrt(len(weights)))
    return weights / np.sum(weights) * seen.effective_share * len(weights)


def _doubts(estimate: Opinion, branch: str, pilot: Pilot, final: Weighed) -> list[str]:
    """What speaks against the estimate: the other opinions, and the diagnostics of its own branch."""
    by_path = branch != IMPORTANCE
    doubts = list(pilot.doubts) if by_path else []
    opinion = pilot.opinion
    others = {"the pilot": (opinion.value, opinion.std_error), "the fitted reference": (final.value, final.std_error)}
    for name, (value, std_error) in others.items():
        gap = (value - estimate.value) / max(math.hypot(std_error, estimate.std_error), 1e-30)
        # Weights that behave cannot make up mass, and others miss some: that they differ so is no contradiction.
        if gap > CONTRADICTION or (gap < -CONTRADICTION and by_path and name == "the pilot"):
            doubts.append(
                f"The log Z of {name} ({value:.2f} ± {std_error:.2f}) contradicts the estimate ({estimate.value:.2f} ± "
                f"{estimate.std_error:.2f}): one of them is wrong, and the error bar does not say by how much. {REMEDY}"
            )
    if by_path and max(opinion.drift, estimate.drift) > UNSETTLED:
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
