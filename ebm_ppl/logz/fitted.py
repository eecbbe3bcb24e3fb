"""log Z from a reference that is fitted to a pilot's particles, by draws that had no part in the fit.

    pilot       a cheap run of SMC, or nested sampling: a cloud near the posterior, with a log Z of its own
    search      q, fitted to the cloud and to what ascents find beside it (`search.py`)
    estimate    fresh draws of the last q:  Z = E_q[w]  (`importance.py`)

Weights are looked at before they are believed, those of the draws that showed how well q fits: where their tail is
heavier than a mean bears (Pareto k over `LARGEST_K_OF_FEW`; over `HAS_VARIANCE` where few draws count), there are no
fresh ones. SMC goes the rest of the way from q to the posterior then, on a path that is short now (from the model's own
reference, where q describes next to nothing). The draws of the estimate have next to no say in whether they are kept
(Pareto k up to `HEAVIEST`): those that look well are those without a large weight, which are too low. What the pilot
says of log Z is a second opinion: one that contradicts the estimate is a doubt, unless weights that behave have found
more than the pilot saw.

References:
    Cappe, Douc, Guillin, Marin and Robert (2008), Adaptive importance sampling in general mixture classes; Owen (1997),
    Scrambled net variance for integrals of smooth functions; Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto
    smoothed importance sampling.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from blackjax.smc.resampling import systematic

from ebm_ppl import smc
from ebm_ppl.flow import Flow
from ebm_ppl.logz.importance import BLOCKS, HEAVIEST, Weighed, weigh
from ebm_ppl.logz.integral import CONTRADICTION, FEW, Integral, Opinion, attempt, opinion_of
from ebm_ppl.logz.modes import Modes
from ebm_ppl.logz.nested import NestedSampling
from ebm_ppl.logz.search import Effort, Search, find_reference, prepare
from ebm_ppl.smc import SMC, lags
from ebm_ppl.target import Tilted
from ebm_ppl.typing import EnergyError, PRNGKey, keys_of, log_sum, with_error

IMPORTANCE = "importance sampling"
"""The branch of weights that behave."""
SHORT_PATH = "SMC from the fitted reference"
"""The branch of weights that are heavy in their far tail only, or everywhere."""
BY_PILOT = "the pilot"
"""The branch of heavy weights after a pilot of nested sampling, whose own log Z is the estimate."""
CLOUD = 2000
"""Points that are fitted of a pilot of nested sampling."""
SMALL_SHARE = 0.01
"""Effective share of the draws below which the path from the fitted reference is not the shorter one, unless their
weights have a mean."""
REMEDY = "A larger pilot, or a reparametrised model, helps."


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
        flow: settings of a normalising flow, to be trained after the mixture; it is taken for the reference, with a
            share of the mixture, where more of its draws are effective. Without them the mixture is all.
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
    flow: Flow | None = None
    pilot: SMC | NestedSampling = dataclasses.field(
        default_factory=lambda: SMC(num_particles=2000, target_ess=0.5, num_moves=1)
    )
    fallback: SMC = dataclasses.field(default_factory=lambda: SMC(num_particles=2000))
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
        return self.explore(key, target)[0]

    def explore(self, key: PRNGKey, target: Tilted, known: Modes | None = None) -> tuple[Integral, Modes]:
        """As `integrate`, with the modes that ascents have met, to which those of an earlier search may be added."""
        key_pilot, key_fit, key_final, key_path = keys_of(key, 4)
        effort = Effort(self.num_ascents, self.num_draws, self.max_refits, self.defence, self.flow)
        prepare(key, target, effort, getattr(self.pilot, "num_particles", CLOUD))
        pilot = _pilot(key_pilot, target, self.pilot)
        opinion, story = pilot.opinion, [pilot.story]
        found, modes = find_reference(key_fit, target, pilot.cloud, opinion.value, effort, story, known)
        search = opinion.num_evaluations + found.num_evaluations
        behaved = found.seen.behaves
        final = weigh(key_final, found.reference, _enough(found.seen, search, self)) if behaved else found.seen
        draws = f"{final.num} fresh draws" if behaved else "no fresh draws, but these"
        story.append(
            f"{draws}, {final.effective_share:.1%} effective, Pareto k {final.pareto_k:.2f}: "
            f"log Z {with_error(final.value, final.std_error)}"
        )
        failed: tuple[str, ...] = ()
        keeps = behaved and final.pareto_k <= HEAVIEST  # beyond it weights have no mean at all
        answer = _by_weights(final) if keeps else attempt(lambda: self._past_weights(key_path, target, pilot, found))
        if isinstance(answer, EnergyError):
            failed = (f"The draws of the fitted reference have heavy tails, and SMC failed where they do: {answer}",)
            answer = _by_weights(final)
        estimate, branch, more = answer
        if branch != IMPORTANCE:
            story.append(f"heavy tails, so {branch}: log Z {estimate}")
        answered = Integral(
            value=estimate.value,
            std_error=estimate.std_error,
            num_evaluations=search + final.num * behaved + more,
            num_nan=opinion.num_nan + found.num_nan + final.num_nan * behaved + estimate.num_nan * (more > 0),
            story=tuple(story),
            doubts=(*failed, *_doubts(estimate, branch, pilot, final, found.num_left_out)),
            diagnostics={
                "branch": branch,
                "pareto_k": final.pareto_k,
                "pareto_k_of_fit": found.seen.pareto_k,
                "effective_share": final.effective_share,
                "fit": found.seen.effective_share,
                "pilot": opinion.value,
                "drift_of_pilot": opinion.drift,
            },
        )
        return answered, modes

    def _past_weights(self, key: PRNGKey, target: Tilted, pilot: Pilot, found: Search) -> tuple[Opinion, str, float]:
        """The answer where weights give none, the branch that it comes from, and its evaluations beyond the draws."""
        if isinstance(self.pilot, NestedSampling):
            return pilot.opinion, BY_PILOT, 0.0
        seen = found.seen
        is_near = seen.effective_share >= SMALL_SHARE or seen.pareto_k <= HEAVIEST
        start = found.reference if is_near else target
        opinion = opinion_of(smc.run(key, start, self.fallback, progress_bar=False))
        return opinion, SHORT_PATH if is_near else "SMC from the own reference", opinion.num_evaluations


def _by_weights(final: Weighed) -> tuple[Opinion, str, float]:
    return Opinion(final.value, final.std_error, 0.0, 0.0, 0), IMPORTANCE, 0.0


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
    key_run, key_cloud = keys_of(key, 2)
    found, z, log_weight = method.explore(key_run, target)
    opinion = Opinion(found.value, found.std_error, 0.0, found.num_evaluations, found.num_nan)
    weights = jnp.asarray(np.exp(log_weight - log_sum(log_weight)))
    cloud = z[np.asarray(systematic(key_cloud, weights, CLOUD))]
    return Pilot(cloud.astype(weights.dtype), opinion, found.doubts, f"pilot: {found.story[-1]}")


def _enough(seen: Weighed, spent: float, method: FittedReference) -> int:
    """Draws of the estimate, a power of two, if they are as good as those seen."""
    wanted = spent if method.tol is None else seen.num * (seen.std_error / method.tol) ** 2
    wanted = min(max(wanted, method.num_draws), method.max_draws)
    return 2 ** math.ceil(math.log2(wanted))


def _doubts(estimate: Opinion, branch: str, pilot: Pilot, final: Weighed, num_left_out: int) -> list[str]:
    """What speaks against the estimate: the other opinions, and the diagnostics of its own branch."""
    by_path = branch != IMPORTANCE
    doubts = list(pilot.doubts) if by_path else []
    opinion = pilot.opinion
    others = {"the fitted reference": (final.value, final.std_error)}
    if not lags(opinion.drift):  # what lags behind is low, and says nothing of what has caught up
        others["the pilot"] = opinion.value, opinion.std_error
    for name, (value, std_error) in others.items():
        gap = (value - estimate.value) / max(math.hypot(std_error, estimate.std_error), 1e-30)
        # Weights that behave cannot make up mass, and others miss some: that they differ so is no contradiction.
        if gap > CONTRADICTION or (gap < -CONTRADICTION and by_path and name == "the pilot"):
            doubts.append(
                f"The log Z of {name} ({with_error(value, std_error)}) contradicts the estimate "
                f"({with_error(estimate.value, estimate.std_error)}): one of them is wrong, and the error bar does not "
                f"say by how much. {REMEDY}"
            )
    if by_path and lags(estimate.drift):
        doubts.append(
            "The weights of the fitted reference have heavy tails, and the particles of SMC lag behind their targets: "
            f"log Z may be off by far more than the stated error. {REMEDY}"
        )
    if num_left_out and branch in (IMPORTANCE, SHORT_PATH):
        doubts.append(
            f"{num_left_out} of the modes that ascents have met have no part in the fitted reference: their mass is "
            f"missing, and the error bar does not know it. {REMEDY}"
        )
    if not by_path and final.num * final.effective_share < FEW:
        doubts.append(
            f"Only {final.num * final.effective_share:.0f} of {final.num} draws of the fitted reference are effective: "
            f"the error bar rests on too few. {REMEDY}"
        )
    return doubts
