"""What is asked of an estimator of log Z, and what it returns.

    log E_{pi_0}[exp(-U)]        `Estimator.integrate(key, target) -> Integral`, one run
    of a single point            `OnePoint`
    (log pi_0(z), U(z))          `total_energy`
    z ~ pi_0, U(z)               `draw_reference`, `draws_of_reference`
    how good weights are         `effective_share`, `pareto_k`
    how good chains are          `effective_size`, `disagreement`
    what a run of SMC says       `opinion_of`

An estimator sees all energies of a target at once. `ebm_ppl.log_z` asks it for the whole and, where prior energies have
a log Z of their own, for the prior, and takes the difference.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl import parallel
from ebm_ppl.target import Tilted
from ebm_ppl.typing import (
    Array,
    DegenerateParticlesError,
    Draws,
    EnergyError,
    EnergyWarning,
    NonFiniteEnergyError,
    PRNGKey,
    error_of_mean,
    log_mean,
    with_error,
)

T = TypeVar("T")

LARGEST_RHAT = 1.05
"""Of R-hat: beyond it chains have not seen the same density."""
LARGEST_K = 0.7
"""Of Pareto's k: beyond it a mean of weights settles too slowly for an error bar to have a meaning."""
FEW = 100
"""Effective draws below which the error bar has no meaning either."""
CONTRADICTION = 4.0
"""Standard errors between two opinions that make one of them wrong."""
IMPRECISE = "The standard error is "
"""How the one doubt begins that more runs settle."""


@dataclasses.dataclass(frozen=True)
class Integral:
    """One run's estimate of log E_{pi_0}[exp(-U)], in nats: what an estimator returns.

    Attributes:
        value, std_error: the estimate and its standard error.
        num_evaluations: of the log density, with or without its gradient.
        num_nan: points with a NaN energy, which were given zero mass.
        lower, upper, story, doubts: as in `LogZ`.
        diagnostics: numbers of the estimator's own.
    """

    value: float
    std_error: float
    num_evaluations: float
    num_nan: int = 0
    lower: float | None = None
    upper: float | None = None
    story: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    diagnostics: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Estimator(Protocol):
    """A small frozen settings object that names an estimator; `ebm_ppl.log_z` takes it as its method."""

    @property
    def name(self) -> str: ...

    def integrate(self, key: PRNGKey, target: Tilted) -> Integral:
        """log E_{pi_0}[exp(-U)] from one run."""
        ...


class OnePoint:
    """log Z of a model without continuous latent sites: minus its energy, whatever method was asked for."""

    name = "exact"

    def integrate(self, key: PRNGKey, target: Tilted) -> Integral:
        """log Z = -U, of which nothing is estimated."""
        energy = draws_of_reference(key, target, 1)[1]
        check_energies(energy, "the one point of a model without continuous latent sites")
        return Integral(-float(energy[0]), 0.0, 1)


def total_energy(target: Tilted, z: Array) -> tuple[Array, Array]:
    """`(log pi_0(z), U(z))` with all energies added up: what an integral over the reference is made of."""
    log_reference, stages = target.staged_terms(z)
    return log_reference, jnp.sum(stages)


def draw_reference(key: PRNGKey, target: Tilted) -> tuple[Array, Array]:
    """A draw and its energy, NaN where the draw fell off the end of floating-point numbers."""
    z = target.sample_reference(key)
    log_reference, energy = total_energy(target, z)
    return z, jnp.where(jnp.isfinite(log_reference), energy, jnp.nan)


def draws_of_reference(key: PRNGKey, target: Tilted, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Independent draws, shape (num, dim), and their energies, (num,)."""
    parts = parallel.over(draw_reference, parallel.split(jax.random.split(key, num)), target, hurry=True)
    z, energy = map(np.concatenate, zip(*jax.device_get(parts), strict=True))
    return z, energy


def check_energies(energies: np.ndarray, where: str) -> int:
    """The number of NaN among energies of draws, which count as +inf: zero mass.

    Raises:
        NonFiniteEnergyError: for an energy of -inf (infinite density).
        DegenerateParticlesError: where no draw has any mass.
    """
    if np.any(energies == -np.inf):
        raise NonFiniteEnergyError(
            f"An energy is -inf (infinite density) for {np.sum(energies == -np.inf)} points at {where}: bound the "
            "energy from below."
        )
    if not np.any(energies < np.inf):
        raise DegenerateParticlesError(
            f"All {energies.size} points have zero mass (an energy of +inf or NaN) at {where}. Check the observed "
            "values against their supports, or soften a hard constraint."
        )
    return int(np.sum(np.isnan(energies)))


def effective_share(log_weight: np.ndarray) -> float:
    """Kish's share of draws that count, `mean(w)^2 / mean(w^2)`."""
    weights = np.exp(log_weight - np.max(log_weight))
    return float(np.mean(weights) ** 2 / np.mean(weights**2))


def pareto_k(log_weight: np.ndarray) -> float:
    """Shape of the tail of the weights, by Pareto smoothed importance sampling; -inf where all of them are equal."""
    from arviz_stats.base import array_stats

    log_weight = np.ravel(log_weight)
    tail = math.ceil(min(0.2 * log_weight.size, 3 * math.sqrt(log_weight.size)))
    if np.ptp(np.sort(log_weight)[-tail - 1 :]) < 1e-6:
        return -math.inf
    return float(array_stats.psislw(-log_weight)[1])


def relative_error(x: np.ndarray) -> float:
    """Standard error of the mean of independent numbers, over that mean."""
    return float(np.std(x, ddof=1) / np.mean(x) / math.sqrt(len(x)))


class Opinion(NamedTuple):
    """What runs of SMC say of log Z of all energies."""

    value: float
    std_error: float
    drift: float
    num_evaluations: float
    num_nan: int

    def __str__(self) -> str:
        return (
            f"{with_error(self.value, self.std_error)}, drift {self.drift:.1f}, {self.num_evaluations:.0f} evaluations"
        )


def opinion_of(draws: Draws) -> Opinion:
    """The log Z of runs of SMC, its phases added up."""
    runs, attrs = draws.log_z or {}, draws.attrs
    values = np.sum([runs[name] for name in ("prior_value", "data_value") if name in runs], axis=0)
    squares = np.sum([runs[name] ** 2 for name in ("prior_std_error", "data_std_error") if name in runs], axis=0)
    return Opinion(
        log_mean(values),
        error_of_mean(values, np.sqrt(squares)),
        float(attrs["largest_drift"]),
        float(attrs["num_evaluations"]),
        int(attrs["num_nan_energy"]),
    )


def warn_of(num_nan: int, doubts: Iterable[str], stacklevel: int) -> None:
    """Says aloud what speaks against a result, at the caller `stacklevel - 1` levels up."""
    if num_nan:
        message = f"The energy was NaN {num_nan} times; such points were given zero mass."
        warnings.warn(message, EnergyWarning, stacklevel=stacklevel)
    for doubt in doubts:
        warnings.warn(doubt, EnergyWarning, stacklevel=stacklevel)


def attempt(work: Callable[[], T]) -> T | EnergyError:
    """What the work returns, or the error of ours that ended it, so that what is finished beside it can be kept.

    Infinite density is raised: then there is no log Z, whatever the rest says.
    """
    try:
        return work()
    except NonFiniteEnergyError:
        raise
    except EnergyError as error:
        return error


def imprecise(std_error: float, tol: float, remedy: str = "raise budget.") -> tuple[str, ...]:
    """The doubt about an error above the one wanted, where it is known and above."""
    if not std_error > tol:
        return ()
    return (f"{IMPRECISE}{std_error:.3f}, where {tol:g} was wanted: {remedy}",)


def other_doubts(doubts: Iterable[str]) -> tuple[str, ...]:
    """Doubts that more runs do not settle; of those that differ in their numbers alone, the first."""
    kinds: dict[str, str] = {}
    for doubt in doubts:
        if not doubt.startswith(IMPRECISE):
            kinds.setdefault(re.sub(r"\d", "", doubt), doubt)
    return tuple(kinds.values())


def effective_size(values: np.ndarray) -> float:
    """How many independent draws the mean of a chain's values is worth, from values of shape (chain, draw).

    Reference:
        Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), Rank-normalization, folding, and localization.
    """
    from arviz_stats.base import array_stats

    if not np.ptp(values) > 0:
        return float(values.size)
    size: Any = array_stats.ess(values, chain_axis=0, draw_axis=1, method="mean")
    return float(size)


def disagreement(values: np.ndarray) -> float:
    """R-hat of values of shape (chain, draw): 1 where the chains agree; the same reference."""
    from arviz_stats.base import array_stats

    if not np.ptp(values) > 0:
        return 1.0
    with np.errstate(divide="ignore", invalid="ignore"):  # chains that stand still, each at another value
        rhat: Any = array_stats.rhat(values, chain_axis=0, draw_axis=1)
    return math.inf if np.isnan(rhat) else float(rhat)
