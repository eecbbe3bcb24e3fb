"""Shared vocabulary: array aliases, the `LogZ` result, errors and warnings.

Everything is measured in nats. An energy `U` is low where probability is high, a log density is `-beta * U`, and the
partition function of energies `U_k` under a normalised reference `pi_0` is

    Z = E_{pi_0}[ exp(-sum_k beta_k U_k) ]            log Z: `LogZ.value`
    independent runs together                         `pooled`: averages on the scale of Z
    a value and its error, for people                 `with_error`
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Array = jax.Array
ArrayLike = jax.typing.ArrayLike
PRNGKey = jax.Array
Role = Literal["prior", "loss", "data"]
"""What an energy stands for: a reshaped prior, a declared misfit to data, or an observed sample site."""


class EnergyWarning(UserWarning):
    """A number that is probably not what the modeller wanted; the run goes on."""


class EnergyError(ValueError):
    """Base of the errors that this package raises about a model or a run."""


class EnergyShapeError(EnergyError):
    """An energy has another shape than the one number per event that it must return."""


class NonFiniteEnergyError(EnergyError):
    """An energy is NaN where a finite value is needed, or -inf (infinite density) anywhere."""


class IntractablePartitionError(EnergyError):
    """Z(theta) of an `EnergyDistribution` depends on latent sites and is not known.

    The joint density of the model then lacks a factor `1 / Z(theta)`, and any ordinary sampler would return a wrong
    posterior without a word.
    """


class NoReferenceError(EnergyError):
    """The latent sites do not form a normalised measure, so there is no partition function to speak of."""


class DegenerateParticlesError(EnergyError):
    """Every particle has zero weight."""


class TemperingStalledError(EnergyError):
    """The inverse temperature stopped growing before it reached one."""


class OutOfMemoryError(EnergyError):
    """A compiled program needs more memory than its device has."""


class CheckpointError(EnergyError):
    """A file holds no checkpoint, a damaged one, or that of another run."""


class IncomparableError(EnergyError):
    """Two evidences of different data were compared."""


@dataclasses.dataclass(frozen=True)
class LogZ:
    """An estimate of a log partition function, in nats, with its standard error.

    For a model with observed sites or losses, `value` is the **log evidence**

        log p(y) = log Z(prior energies and data) - log Z(prior energies),

    so that differences of two `LogZ` are log Bayes factors whether or not the models have prior energies. For a model
    without data it is `log Z(prior energies)`. The two stages are kept in `parts`.

    Subtraction and addition propagate the errors of independent estimates, `sqrt(se_a^2 + se_b^2)`: give each a key of
    its own.

    Attributes:
        value: the estimate, in nats.
        std_error: its standard error, in nats.
        method: the estimator, for example `"SMC"`.
        parts: log Z increment of each role on the path, in the order passed: `{"prior": ..., "data": ...}`.
        replicates: one estimate for each independent run, shape (num_runs,).
        lower, upper: bounds where the method brackets log Z, else None.
        data_id: fingerprint of the observed values, their masks and scales; None where there are none (losses and
            factors do not say what is data in them). Of a sum there are several, and those taken off have a minus sign.
        diagnostics: what says whether to trust the number. `log_bias` is what the logarithm costs: where the estimate
            of Z is unbiased, its log is too low by std_error^2 / 2 on average, which is small beside std_error.
        story: how the estimate was reached, a sentence for each step.
        doubts: why not to trust it, a sentence for each reason; empty where nothing speaks against it.
        runs: what each independent run says, each of shape (num_runs,): `<phase>_value` and `<phase>_std_error` (the
            phases are `prior`, `data` given it, and for what integrates both at once `whole`), `num_evaluations` of the
            log density, `num_nan`, ... Empty for sums and differences.
        history: after each run, the estimate from all so far: a DataFrame.

    Raises:
        IncomparableError: on subtracting estimates of different data, or adding minus one of them.
    """

    value: float
    std_error: float
    method: str = ""
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    replicates: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0), repr=False, compare=False)
    lower: float | None = None
    upper: float | None = None
    data_id: str | None = None
    diagnostics: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    story: tuple[str, ...] = dataclasses.field(default=(), repr=False, compare=False)
    doubts: tuple[str, ...] = ()
    runs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def history(self) -> pd.DataFrame:
        """The estimate after each run: evaluations so far, and value and standard error of the runs so far, in nats."""
        import pandas as pd

        num = len(self.runs.get("num_evaluations", ()))
        so_far = [pooled({name: each[:stop] for name, each in self.runs.items()}) for stop in range(1, num + 1)]
        table = pd.DataFrame(so_far, columns=["value", "std_error"], index=pd.RangeIndex(1, num + 1, name="run"))
        table.insert(0, "num_evaluations", np.cumsum(self.runs.get("num_evaluations", ())))
        return table

    def __sub__(self, other: LogZ | float) -> LogZ:
        return self._combine(other, -1.0)

    def __add__(self, other: LogZ | float) -> LogZ:
        return self._combine(other, 1.0)

    __radd__ = __add__

    def __rsub__(self, other: float) -> LogZ:
        return -self + other

    def __neg__(self) -> LogZ:
        return dataclasses.replace(
            self,
            value=-self.value,
            lower=None if self.upper is None else -self.upper,
            upper=None if self.lower is None else -self.lower,
            parts={name: -part for name, part in self.parts.items()},
            replicates=-self.replicates,
            data_id=_negated(self.data_id),
            runs={},
        )

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return with_error(self.value, self.std_error) + " (in doubt: see its doubts)" * bool(self.doubts)

    def _combine(self, other: LogZ | float, sign: float) -> LogZ:
        if not isinstance(other, LogZ):
            shift = sign * float(other)
            return dataclasses.replace(
                self,
                value=self.value + shift,
                replicates=self.replicates + shift,
                lower=None if self.lower is None else self.lower + shift,
                upper=None if self.upper is None else self.upper + shift,
                runs={},
            )
        observed = _joined(self.data_id, other.data_id if sign > 0 else _negated(other.data_id))
        taken_off = [each.startswith("-") for each in _parts_of(observed)]
        if 0 < sum(taken_off) < len(taken_off) or (sign < 0 and observed):
            raise IncomparableError(
                "These evidences are of different observed data, so their difference is not a log Bayes factor. "
                "Condition both models on the same observed values: the same numbers, in the same shapes and "
                "precision, under the same masks and scales."
            )
        low, high = (other.lower, other.upper) if sign > 0 else (other.upper, other.lower)
        return LogZ(
            value=self.value + sign * other.value,
            std_error=math.hypot(self.std_error, other.std_error),
            method=self.method if self.method == other.method else f"{self.method}, {other.method}",
            lower=None if self.lower is None or low is None else self.lower + sign * low,
            upper=None if self.upper is None or high is None else self.upper + sign * high,
            data_id=observed,
            doubts=tuple(dict.fromkeys(self.doubts + other.doubts)),
        )


SEPARATOR = " + "
"""Between the fingerprints of a sum."""


def _parts_of(data_id: str | None) -> list[str]:
    return data_id.split(SEPARATOR) if data_id else []


def _negated(data_id: str | None) -> str | None:
    """Of minus an estimate."""
    return data_id and SEPARATOR.join(each[1:] if each.startswith("-") else f"-{each}" for each in _parts_of(data_id))


def _joined(first: str | None, second: str | None) -> str | None:
    """Of the sum of two estimates, where what one adds and the other takes off is gone."""
    left = _parts_of(first)
    for each in _parts_of(second):
        opposite = _negated(each)
        left.remove(opposite) if opposite in left else left.append(each)
    return SEPARATOR.join(sorted(left)) or None


@dataclasses.dataclass(frozen=True)
class Draws:
    """What a sampler hands to `arviz.to_datatree`.

    Attributes:
        z: unconstrained draws, shape (chain, draw, dim).
        stats: statistics of each draw under ArviZ's names, shape (chain, draw, ...).
        attrs: facts about the run, for the attributes of the result.
        particles: weighted originals: `z` of shape (chain, particle, dim) and `log_weight` (chain, particle).
        stages: the path of a tempered run, each of shape (chain, stage) padded with NaN.
        log_z: per-run estimates, each of shape (chain,).
        tempering: the ladder of parallel tempering, each of shape (rung,).
    """

    z: Array
    stats: dict[str, Array]
    attrs: dict[str, Any]
    particles: dict[str, Array] | None = None
    stages: dict[str, np.ndarray] | None = None
    log_z: dict[str, np.ndarray] | None = None
    tempering: dict[str, np.ndarray] | None = None


def with_error(value: float, std_error: float) -> str:
    """As in "1.235 ± 0.021": three decimals, or two digits of an error below .01."""
    decimals = 3
    if 0 < std_error < 0.01:  # down to what double precision leaves of log Z
        decimals = min(1 - math.floor(math.log10(std_error)), 6)
    return f"{value:.{decimals}f} ± {std_error:.{decimals}f}"


def log_sum(log_values: np.ndarray) -> float:
    """log of the sum of numbers given by their logs, whatever their precision.

    In double precision: added one after the other in single precision, numbers below the last digit of the sum so far
    are lost, and a hundred thousand equal ones have a sum that is nats too low.
    """
    return float(np.logaddexp.reduce(np.asarray(log_values, np.float64)))


def log_mean(log_values: np.ndarray) -> float:
    """log of the mean of numbers given by their logs: what estimates of one Z are averaged by."""
    return log_sum(log_values) - math.log(len(log_values))


def error_of_mean(values: np.ndarray, errors: np.ndarray) -> float:
    """Standard error of a mean of independent runs: from their own errors or from their spread, whichever is larger."""
    num = len(values)
    spread = float(np.std(values, ddof=1)) if num > 1 else 0.0
    return max(math.sqrt(float(np.mean(errors**2))), spread) / math.sqrt(num)


def pooled(runs: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Value and standard error of independent runs together, which are those of `LogZ.runs`."""
    found = {
        phase: (log_mean(runs[f"{phase}_value"]), error_of_mean(runs[f"{phase}_value"], runs[f"{phase}_std_error"]))
        for phase in ("prior", "data", "whole")
        if f"{phase}_value" in runs
    }
    if "whole" in found:
        (prior, prior_error), (whole, whole_error) = found["prior"], found["whole"]
        return whole - prior, math.hypot(prior_error, whole_error)
    return list(found.values())[-1] if found else (0.0, 0.0)


def keys_of(key: PRNGKey, num: int) -> list[PRNGKey]:
    """Several keys made of one, on the host; `jax.random.split` would compile a program for each number of them."""
    return [jax.random.fold_in(key, i) for i in range(num)]


def generator(key: PRNGKey) -> np.random.Generator:
    """Random numbers on the host."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def as_key(key: Any) -> PRNGKey:
    """A typed key; keys of the older kind (two integers) are taken too."""
    if jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        return key
    if jnp.shape(key) == (2,):
        return jax.random.wrap_key_data(jnp.asarray(key, jnp.uint32))
    raise EnergyError(f"The first argument is a key, jax.random.key(seed); got {key!r}.")
