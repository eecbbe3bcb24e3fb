"""log Z as an expert would find it: one opinion, and a second of another family where the first is not clean.

    first       a fitted reference, whose pilot run of SMC must agree with it (`fitted.py`)
    clean       by weights that behave, or by a short path from a reference that fits but for its far tail (in more than
                `MOST_COORDINATES` dimensions, from any, where the pilot came the long way and its particles kept up);
                with no doubts, and a standard error of at most `tol`: that is the answer
    second      in up to `MOST_COORDINATES` dimensions nested sampling, which needs no path of temperatures and no
                gradients, and a reference fitted to its points and to all modes known by then; beyond, a large run of
                SMC from the model's own reference. Where the error is above `tol` it runs again, as much larger as
                that wants, if the budget allows
    answer      the second opinion where that is clean and the first lies below it or agrees (an estimate can miss mass,
                but weights and SMC cannot make it up). Nested sampling by itself, whose points no reference fits, can:
                of both the sharper one, if they agree, with an error bar that reaches from one to the other. In doubt
                otherwise, with such an error bar

References:
    Skilling (2006), Nested sampling for general Bayesian computation; Del Moral, Doucet and Jasra (2006), Sequential
    Monte Carlo samplers; Hesterberg (1995), Weighted average importance sampling and defensive mixture distributions.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from ebm_ppl.logz.fitted import BY_PILOT, IMPORTANCE, SHORT_PATH, FittedReference
from ebm_ppl.logz.integral import CONTRADICTION, Integral, attempt, imprecise, opinion_of
from ebm_ppl.logz.modes import Modes
from ebm_ppl.logz.nested import NestedSampling
from ebm_ppl.logz.search import GOOD_ENOUGH
from ebm_ppl.rebase import Joint
from ebm_ppl.smc import SMC, lagging, lags, run
from ebm_ppl.target import Tilted
from ebm_ppl.typing import EnergyError, PRNGKey, keys_of, with_error

MOST_COORDINATES = 40
"""Of a target for nested sampling, each of whose births costs some slices along every coordinate."""
MARGIN = 1.2
"""Room for the error of an error."""
MOST_LARGER = 64.0
"""Factor by which a second opinion may grow at once."""


@dataclasses.dataclass(frozen=True)
class Consultation:
    """log Z by a fitted reference and, where that is not clean, by another family too: the default of `ebm.log_z`.

    Args:
        tol: standard error wanted, in nats.
        budget: bound on all evaluations, as far as they can be foreseen; the first opinion is always heard.
        first: settings of the fitted reference.
        nested: the pilot of the second opinion in few dimensions.
        tempered: the second opinion in many.
    """

    tol: float = 0.05
    budget: float = 1e8
    first: FittedReference = dataclasses.field(default_factory=FittedReference)
    nested: NestedSampling = dataclasses.field(default_factory=NestedSampling)
    tempered: SMC = dataclasses.field(default_factory=lambda: SMC(num_particles=2000, target_ess=0.8))
    name = "consultation"

    def __post_init__(self):
        if not self.tol > 0:
            raise EnergyError(f"tol is a positive standard error in nats; got {self.tol}.")
        if not self.budget > 0:
            raise EnergyError(f"budget is a positive number of evaluations; got {self.budget}.")

    def integrate(self, key: PRNGKey, target: Tilted) -> Integral:
        """log Z of all energies of a target at once, with the story of how it was reached."""
        key_first, key_second = keys_of(key, 2)
        heard = attempt(lambda: self.first.explore(key_first, target))
        if isinstance(heard, EnergyError):
            return self._alone(key_second, target, heard)
        first, modes = _doubted(heard[0], target.dim), heard[1]
        if not first.doubts and first.std_error <= self.tol:
            return dataclasses.replace(first, story=(*first.story, "clean: no second opinion is needed"))
        story = (*first.story, *(f"not clean: {doubt}" for doubt in first.doubts))
        if first.doubts:
            second = attempt(lambda: self._second(key_second, target, self.budget - first.num_evaluations, modes))
        else:
            second = attempt(lambda: self._again(key_second, target, first, modes))
        if isinstance(second, EnergyError):
            doubt = f"There is no second opinion to settle the doubts about the first: {second}"
            told = f"no second opinion (what it took until it failed, if anything, is not counted: {second})"
            doubts = (*first.doubts, doubt) if first.doubts else imprecise(first.std_error, self.tol)
            return dataclasses.replace(first, story=(*story, told), doubts=doubts)
        answer, why = _answer(first, second)
        answer = dataclasses.replace(answer, doubts=answer.doubts or imprecise(answer.std_error, self.tol))
        told = {"first": first.value, "second": second.value}
        return dataclasses.replace(
            answer,
            num_evaluations=first.num_evaluations + second.num_evaluations,
            num_nan=first.num_nan + second.num_nan,
            story=(*story, *second.story, why),
            diagnostics={**first.diagnostics, **second.diagnostics, **answer.diagnostics, **told},
        )

    def _alone(self, key: PRNGKey, target: Tilted, error: EnergyError) -> Integral:
        """The second opinion, where the first ended in an error: raised again if there is no second either."""
        second = attempt(lambda: self._second(key, target, self.budget, None))
        if isinstance(second, EnergyError):
            raise error from second
        told = f"no first opinion (what it took until it failed is not counted: {error})"
        alone = ("Nothing confirms what nested sampling says: no reference fits its points, and SMC failed.",)
        doubts = second.doubts + alone * _is_by_points(second) or imprecise(second.std_error, self.tol)
        return dataclasses.replace(second, story=(told, *second.story), doubts=doubts)

    def _again(self, key: PRNGKey, target: Tilted, first: Integral, modes: Modes) -> Integral:
        """The first opinion once more, to the error wanted, as near to it as the budget allows."""
        room = self.budget - 2 * first.num_evaluations  # the search is made once more, too
        if room < self.first.num_draws:
            raise EnergyError(f"the budget of {self.budget:g} evaluations is used up.")
        most = min(self.first.max_draws, 2 ** math.floor(math.log2(room)))
        return dataclasses.replace(self.first, tol=self.tol, max_draws=most).explore(key, target, modes)[0]

    def _second(self, key: PRNGKey, target: Tilted, budget: float, modes: Modes | None) -> Integral:
        """The opinion of another family; larger, once, where its error is above the one wanted.

        Args:
            modes: what the first has met, which is no opinion: a mode that the second does not meet is there all the
                same, and its weights would not miss it.
        """
        if budget <= 0:
            raise EnergyError(f"the budget of {self.budget:g} evaluations is used up.")
        by_nested = functools.partial(self._by_nested, modes=modes)
        ask = by_nested if target.dim <= MOST_COORDINATES else self._by_tempering
        key, key_again = keys_of(key, 2)
        second = ask(key, target, 1.0)
        larger = min((second.std_error / self.tol) ** 2 * MARGIN, MOST_LARGER)
        if second.doubts or second.std_error <= self.tol or not second.num_evaluations * (1 + larger) <= budget:
            return second
        again = attempt(lambda: ask(key_again, target, larger))
        if isinstance(again, EnergyError):
            told = f"{larger:.1f} times larger for the error wanted it failed, at a cost that is not counted: {again}"
            return dataclasses.replace(second, story=(*second.story, told))
        return dataclasses.replace(
            again,
            num_evaluations=second.num_evaluations + again.num_evaluations,
            num_nan=second.num_nan + again.num_nan,
            story=(*second.story, f"{larger:.1f} times larger for the error wanted", *again.story),
        )

    def _by_nested(self, key: PRNGKey, target: Tilted, larger: float, modes: Modes | None) -> Integral:
        live, delete = (math.ceil(num * larger) for num in (self.nested.num_live, self.nested.num_delete))
        pilot = dataclasses.replace(self.nested, num_live=live, num_delete=delete)
        return dataclasses.replace(self.first, pilot=pilot).explore(key, target, modes)[0]

    def _by_tempering(self, key: PRNGKey, target: Tilted, larger: float) -> Integral:
        num = 2 * math.ceil(self.tempered.num_particles * larger / 2)
        found = opinion_of(
            run(key, Joint(target), dataclasses.replace(self.tempered, num_particles=num), progress_bar=False)
        )
        return Integral(
            value=found.value,
            std_error=found.std_error,
            num_evaluations=found.num_evaluations,
            num_nan=found.num_nan,
            story=(f"SMC of {num} particles from the own reference: log Z {found}",),
            doubts=lagging(found.drift),
        )


def _doubted(first: Integral, dim: int) -> Integral:
    """A fitted reference that does not fit leaves the answer to SMC, whose error bar cannot know what it never met.

    Where it fits but for its far tail, the short path from it is as good as weights. In many dimensions nothing fits
    many of the draws, and there is no other family to ask: the pilot, which went another path, is the second opinion.
    """
    branch, fit = first.diagnostics.get("branch"), first.diagnostics.get("fit", 0.0)
    told_twice = dim > MOST_COORDINATES and not lags(first.diagnostics.get("drift_of_pilot", math.nan))
    if branch == IMPORTANCE or (branch == SHORT_PATH and (fit >= GOOD_ENOUGH or told_twice)):
        return first
    doubt = "The fitted reference does not fit: the weights of its draws have heavy tails."
    return dataclasses.replace(first, doubts=(doubt, *first.doubts))


def _is_by_points(second: Integral) -> bool:
    """Whether it is what nested sampling says by itself, as no reference fits its points."""
    return second.diagnostics.get("branch") == BY_PILOT


def _answer(first: Integral, second: Integral) -> tuple[Integral, str]:
    """What two opinions, of which the first is not clean, come to."""
    gap = second.value - first.value
    noise = math.hypot(first.std_error, second.std_error)
    compared = f"{with_error(first.value, first.std_error)} and {with_error(second.value, second.std_error)}"
    if not (first.doubts or second.doubts) and abs(gap) <= CONTRADICTION * noise:
        return min(first, second, key=lambda opinion: opinion.std_error), f"{compared}: both are clean, and agree"
    if first.doubts and not second.doubts:
        by_points, agree = _is_by_points(second), abs(gap) <= CONTRADICTION * noise
        if not by_points and (agree or gap > 0):
            return second, f"{compared}: the second is clean, and what the first may have missed is in it"
        if by_points and agree:
            sharper = min(first, second, key=lambda opinion: opinion.std_error)
            widened = dataclasses.replace(sharper, std_error=math.hypot(sharper.std_error, gap), doubts=())
            return widened, f"{compared}: the second is not by weights, and the error bar reaches from one to the other"
    doubt = (
        f"Two estimates of log Z are {compared}, and not both are to be trusted: the error bar reaches from one to the "
        "other, and the truth may lie beyond. A reparametrised model helps."
    )
    upper = max(first, second, key=lambda opinion: opinion.value)
    widened = dataclasses.replace(
        upper, std_error=math.hypot(upper.std_error, gap), doubts=(doubt, *first.doubts, *second.doubts)
    )
    return widened, f"{compared}: no answer to rely upon"
