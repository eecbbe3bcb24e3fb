"""log Z between two bounds: chains from the reference to the posterior, and back (`annealing.py`).

With A the log weight of a chain of either direction,

    E_F[exp(A)] = Z         so that by Jensen  E_F[A] <= log Z            the lower bound
    E_R[exp(-A)] = 1 / Z    so that by Jensen  E_R[A] >= log Z            the upper bound
    E_F[s(A - log Z)] = E_R[s(log Z - A)],  s the logistic function       both together: Bennett's acceptance ratio

References:
    Grosse, Ghahramani and Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo; Grosse,
    Ancha and Roy (2016), Measuring the reliability of MCMC inference with bidirectional Monte Carlo; Bennett (1976),
    Efficient estimation of free energy differences from Monte Carlo data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from ebm_ppl import smc
from ebm_ppl.cloud import Cloud
from ebm_ppl.logz.annealing import (
    BLOCKS,
    Annealing,
    doubts_of_pilot,
    evaluations_of,
    find_path,
    forward_chains,
    reverse_chains,
    rounding_of,
    spent_on,
    told,
)
from ebm_ppl.logz.integral import Integral, relative_error
from ebm_ppl.rebase import Joint
from ebm_ppl.target import Tilted
from ebm_ppl.typing import Array, Draws, EnergyError, PRNGKey, log_mean, with_error

BOUND_ERRORS = 2.0
"""Standard errors that a bound leaves to chance."""
LARGE_GAP = 1.0
"""Nats between the bounds beyond which they say little."""


@dataclasses.dataclass(frozen=True)
class BDMC(Annealing):
    """log Z between two bounds, by bidirectional Monte Carlo: chains from the reference, and chains back to it.

    The chains of each direction form 16 blocks, and with one estimate of log Z from each block,

        L_b = log mean_{i in b} exp(A_i)         E[L_b] <= log Z      forward
        U_b = -log mean_{i in b} exp(-A_i)       E[U_b] >= log Z      reverse, from draws of the posterior
        lower = mean_b L_b - 2 se                upper = mean_b U_b + 2 se

    where se = sd_b / sqrt(16): each bound fails with a probability of 3 % at most (Student's law of 15 degrees of
    freedom, for blocks whose estimates are about normal), and of less where it has a slack. `value` is Bennett's
    acceptance ratio of all chains of both directions, the root of

        sum_forward s(A_i - value) = sum_reverse s(value - A_j)

    with the standard error of the two means; reverse chains whose starts descend from one draw of the reference count
    as dependent.

    Where only a share a of the reference has any mass (a hard constraint), reverse chains never see the rest, and
    E_R[exp(-A)] is a / Z: the upper bound holds, with a slack of -log a that no number of stages removes.

    The upper bound is true where `exact` gives draws of the posterior, as it can for simulated data: parameters from
    the prior and data from them are a draw from the joint, and so those parameters are one from the posterior of those
    data. Without it the reverse chains start from the particles of a second run of SMC, and both bounds together are
    only heuristic: parts of the posterior that SMC does not find are missing from the upper bound, and then both may
    agree on a wrong number. `diagnostics["bounds"]` says which: "true" or "heuristic". The lower bound is always true.

    Args:
        num_chains: annealed chains in each direction, a multiple of 16.
        num_stages, num_moves, pilot: as in `AIS`; without `exact` the starts are particles of such a pilot, too.
        exact: from a key to one exact draw of the posterior, in unconstrained space, shape (dim,); a function of JAX.
            It belongs to one set of energies, so that models whose prior energies have a log Z of their own refuse it.

    Raises:
        EnergyError: for exact draws of another shape, or for a model whose evidence is a difference.
        DegenerateParticlesError: for exact draws of zero mass.

    References:
        Grosse, Ghahramani and Adams (2015); Grosse, Ancha and Roy (2016); Bennett (1976).
    """

    exact: Callable[[PRNGKey], Array] | None = None
    name = "BDMC"

    def integrate(self, key: PRNGKey, target: Tilted) -> Integral:
        """log Z of all energies of a target at once, from a pilot and chains in both directions."""
        key_pilot, key_starts, key_forward, key_reverse = jax.random.split(key, 4)
        if self.exact is not None and len(target.phases()) > 1:
            raise EnergyError(
                "The evidence of a model with prior energies is a difference of two log Z, and exact draws of one "
                "posterior cannot start the chains of both: use BDMC() without `exact`."
            )
        path, pilot = find_path(key_pilot, target, self)
        starts, families, runs = _starts(key_starts, target, self)
        runs = [pilot, *runs]
        forward = forward_chains(key_forward, target, path, self)
        reverse = reverse_chains(key_reverse, starts, target, path, self)
        value, std_error = bennett(forward.log_weight, reverse.log_weight, families)
        rounding = rounding_of(path, value)
        low, low_error = _bound(forward.log_weight)
        high, high_error = _bound(-reverse.log_weight)
        lower, upper = low - BOUND_ERRORS * low_error - rounding, -high + BOUND_ERRORS * high_error + rounding
        kind = "heuristic" if self.exact is None else "true"
        origin = "particles of another run of SMC" if self.exact is None else "exact draws of the posterior"
        spent = evaluations_of(path, self.num_chains, self.pilot.kernel)
        return Integral(
            value=value,
            std_error=math.hypot(std_error, rounding),
            num_evaluations=sum(map(spent_on, runs)) + 2 * spent,
            num_nan=sum(int(run.attrs["num_nan_energy"]) for run in runs) + forward.num_nan + reverse.num_nan,
            lower=lower,
            upper=upper,
            story=(
                told(pilot),
                f"{self.num_chains} chains of {self.num_stages} stages from the reference: log Z above {lower:.3f}",
                f"as many back from {origin}: log Z below {upper:.3f}; the bounds are {kind}",
                f"Bennett's acceptance ratio: log Z {with_error(value, std_error)}, {2 * spent:.0f} evaluations",
            ),
            doubts=tuple(doubts_of_pilot(pilot, value, std_error) + _disagreement(lower, upper, kind)),
            diagnostics={
                "bounds": kind,
                "forward": low,
                "forward_std_error": low_error,
                "reverse": -high,
                "reverse_std_error": high_error,
            },
        )


def bennett(forward: np.ndarray, reverse: np.ndarray, families: np.ndarray) -> tuple[float, float]:
    """log Z and its standard error from equally many log weights of both directions, by Bennett's acceptance ratio.

    Args:
        families: of the reverse chains, those of one of which are not independent.
    """
    both = np.concatenate([forward[np.isfinite(forward)], reverse])
    margin = (
        math.log(len(reverse)) + 2.0
    )  # here the logistic functions of one side are below 1 / n, of the other near 1

    def surplus(log_z: float) -> float:
        return float(np.sum(expit(forward - log_z)) - np.sum(expit(log_z - reverse)))

    value = float(brentq(surplus, np.min(both) - margin, np.max(both) + margin, xtol=1e-12))  # pyright: ignore
    return value, math.hypot(relative_error(expit(forward - value)), _error_by_family(expit(value - reverse), families))


def _error_by_family(x: np.ndarray, families: np.ndarray) -> float:
    """Standard error of a mean of numbers that depend on each other in families, over that mean; see `weighing.py`."""
    known = 1 - np.sum((np.bincount(families) / len(x)) ** 2)
    if known <= 0:  # a single family
        return math.inf
    sums = np.bincount(families, x - np.mean(x))
    return float(math.sqrt(np.sum(sums**2) / known) / np.sum(x))


def _bound(log_weight: np.ndarray) -> tuple[float, float]:
    """Mean and standard error, over the blocks, of the log of a block's mean weight: on average too low."""
    blocks = np.array([log_mean(block) for block in log_weight.reshape(BLOCKS, -1)])
    if not np.all(np.isfinite(blocks)):  # a block without mass bounds nothing
        return -math.inf, 0.0
    return float(np.mean(blocks)), float(np.std(blocks, ddof=1) / math.sqrt(BLOCKS))


def _disagreement(lower: float, upper: float, kind: str) -> list[str]:
    if lower > upper:
        cause = (
            "`exact` does not draw from this posterior"
            if kind == "true"
            else "the reverse chains start from particles that are no draws of the posterior (more num_particles or "
            "num_moves of the pilot help)"
        )
        return [
            f"The lower bound ({lower:.3f}) lies above the upper one ({upper:.3f}), which is chance in less than one "
            f"run of a hundred: else {cause}."
        ]
    if upper - lower > LARGE_GAP:
        return [
            f"The bounds are {upper - lower:.1f} nats apart ({lower:.2f} and {upper:.2f}): the chains lag behind the "
            "path, and log Z may be anywhere between. More num_stages or num_moves help."
        ]
    return []


def _starts(key: PRNGKey, target: Tilted, method: BDMC) -> tuple[Array, np.ndarray, list[Draws]]:
    """Where the reverse chains start, the family of each, and the run that they come from unless they are exact.

    Particles that descend from one draw of the reference are a family, and go into the same block as far as they can.
    """
    key_run, key_which = jax.random.split(key)
    if method.exact is not None:
        starts = jax.vmap(method.exact)(jax.random.split(key_run, method.num_chains))
        if starts.shape != (method.num_chains, target.dim):
            raise EnergyError(f"exact returns a point of shape ({target.dim},); got {starts.shape[1:]}.")
        return starts, np.arange(method.num_chains), []
    # Not the pilot's own particles: a metric of the very points that it moves favours the directions of their spread.
    eve = np.arange(method.pilot.num_particles)

    def look(clouds: list[Cloud]) -> None:
        eve[:] = clouds[0].eve[0]

    run = smc.run(key_run, Joint(target), method.pilot, progress_bar=False, visit=look)
    order = np.asarray(jax.random.permutation(key_which, len(eve)))
    which = np.resize(order, method.num_chains)
    which = which[np.argsort(eve[which], kind="stable")]
    return run.z[0][which], eve[which], [run]
