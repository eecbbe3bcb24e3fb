"""log Z by Laplace's approximation: a normal distribution at each mode, in place of the posterior.

    m, S        modes and their curvatures, by ascents from draws of the reference (`modes.py`)
    log Z       log sum_m exp( log p(m) + 1/2 log det(2 pi S_m) )          p = pi_0 exp(-U), in unconstrained space

Exact where the posterior is normal in these coordinates, and of unknown error elsewhere: it is quick, no Monte Carlo
estimate, and marked as what it is by an error bar of NaN and a doubt.

References:
    Tierney and Kadane (1986), Accurate approximations for posterior moments; Kass and Raftery (1995), Bayes factors.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ebm_ppl.logz.importance import draw_own
from ebm_ppl.logz.integral import Integral
from ebm_ppl.logz.modes import find_modes, spread_of
from ebm_ppl.target import Tilted
from ebm_ppl.typing import EnergyError, PRNGKey

UNKNOWN = (
    "Laplace's approximation puts a normal distribution at each mode that was found, and does not know its own error: "
    "FittedReference() starts from the same modes and does."
)


@dataclasses.dataclass(frozen=True)
class Laplace:
    """log Z by a normal distribution at each mode: an approximation, whose error is not known.

    Args:
        num_ascents: gradient ascents from draws of the reference, in search of modes.
    """

    num_ascents: int = 64
    name = "Laplace"

    def __post_init__(self):
        if self.num_ascents < 2:
            raise EnergyError(f"num_ascents is at least 2; got {self.num_ascents}.")

    def integrate(self, key: PRNGKey, target: Tilted) -> Integral:
        """log Z of all energies of a target at once; `std_error` is NaN.

        Raises:
            EnergyError: where no ascent ends at a mode with a negative definite Hessian.
        """
        starts = draw_own(key, target, self.num_ascents)
        modes, num_evaluations = find_modes(target, starts, spread_of(starts))
        if not len(modes.z):
            raise EnergyError(
                f"None of {self.num_ascents} ascents ended at a mode with a negative definite Hessian, so there is no "
                "normal distribution to approximate by: raise num_ascents, or use FittedReference() or SMC()."
            )
        value = float(np.logaddexp.reduce(modes.log_mass))
        story = (
            f"{np.sum(modes.hits)} of {self.num_ascents} ascents arrived: {len(modes.z)} modes, log Z about {value:.3f}"
        )
        return Integral(value, math.nan, num_evaluations, story=(story,), doubts=(UNKNOWN,))
