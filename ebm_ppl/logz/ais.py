"""log Z by annealed importance sampling: the mean weight of chains from the reference (`annealing.py`).

    E_F[exp(A)] = Z         A: log weight of an annealed chain

References:
    Neal (2001), Annealed importance sampling.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from ebm_ppl.logz.annealing import (
    Annealing,
    doubts_of_pilot,
    evaluations_of,
    find_path,
    forward_chains,
    rounding_of,
    spent_on,
    told,
)
from ebm_ppl.logz.integral import FEW, LARGEST_K, Integral, effective_share, pareto_k, relative_error
from ebm_ppl.target import Tilted
from ebm_ppl.typing import PRNGKey, log_mean, with_error


@dataclasses.dataclass(frozen=True)
class AIS(Annealing):
    """log Z by annealed importance sampling: the mean weight of independent chains from the reference.

        Z = mean_i w_i,  w_i = exp(A_i)        se(log Z) = sd_i(w_i) / (Z sqrt(n))

    Z is unbiased; its logarithm is too low by about se^2 / 2, which is left as it is, so that runs can be averaged on
    the scale of Z. With n' effective chains, se^2 is below 1 / n': where `FEW` are effective the bias is below .005
    nats and a twentieth of the standard error, and where fewer are, that is a doubt.

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
        path, pilot = find_path(key_pilot, target, self)
        seen = forward_chains(key_chains, target, path, self)
        value, share, k = log_mean(seen.log_weight), effective_share(seen.log_weight), pareto_k(seen.log_weight)
        std_error = relative_error(np.exp(seen.log_weight - np.max(seen.log_weight)))
        spent = evaluations_of(path, self.num_chains, self.pilot.kernel)
        doubts = doubts_of_pilot(pilot, value, std_error)
        if not k <= LARGEST_K or self.num_chains * share < FEW:
            doubts.append(
                f"Only {self.num_chains * share:.0f} of {self.num_chains} annealed chains are effective, with Pareto k "
                f"{k:.2f}: log Z is probably too low, by more than the stated error. More num_stages or num_moves help."
            )
        return Integral(
            value=value,
            std_error=math.hypot(std_error, rounding_of(path, value)),
            num_evaluations=spent_on(pilot) + spent,
            num_nan=int(pilot.attrs["num_nan_energy"]) + seen.num_nan,
            story=(
                told(pilot),
                f"{self.num_chains} chains of {self.num_stages} stages, {share:.0%} effective, Pareto k {k:.2f}: "
                f"log Z {with_error(value, std_error)}, {spent:.0f} evaluations",
            ),
            doubts=tuple(doubts),
            diagnostics={"effective_share": share, "pareto_k": k},
        )
