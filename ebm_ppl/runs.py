"""Independent runs of an estimator, and the one `LogZ` that they make.

    of_path(draws)                     what each run of SMC says: log Z(prior), and log Z(data) given it
    of_integrals(key, ..., numbers)    what each run of another estimator says: log Z(prior), and log Z of the whole
    estimate(runs, ...)                the runs together: `LogZ`
    join(before, batch, ...)           an estimate, continued by more runs

Run number i of a key has the key `fold_in(key, i)`, so that runs made at once, in turn or later are the same ones. SMC,
whose runs go together, has one such key for a batch, by the number of runs before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.arviz import data_id, model_id
from ebm_ppl.logz.integral import CONTRADICTION, Estimator, Integral, attempt, other_doubts
from ebm_ppl.smc import lagging
from ebm_ppl.stages import final_values
from ebm_ppl.target import Target
from ebm_ppl.typing import (
    Draws,
    EnergyError,
    IncomparableError,
    LogZ,
    PRNGKey,
    log_mean,
    pooled,
)

OF_STAGE = {"prior": " (In log Z of the prior.)", "data": " (In log Z of prior and data together.)"}
"""Said after a doubt, where an estimator was asked for both."""


class Batch(NamedTuple):
    """What came of some runs."""

    runs: dict[str, np.ndarray]
    """As in `LogZ`."""
    stories: Sequence[Sequence[str]] = ()
    """Of each run."""
    doubts: Sequence[str] = ()
    diagnostics: Mapping[str, list[Any]] = {}
    """Of the estimator's own, by stage, of each run."""


def of_path(draws: Draws) -> dict[str, np.ndarray]:
    """From runs of SMC; `drift` is how far they lag, `rounding` what the precision of the numbers leaves of log Z."""
    path: Any = draws.stages
    return {
        **(draws.log_z or {}),
        "num_evaluations": np.nansum(path["num_evaluations"].astype(float), axis=1),
        "num_nan": np.nansum(path["num_nan"].astype(float), axis=1),
        "drift": final_values(path["drift"]).astype(float),
        "rounding": np.finfo(draws.z.dtype).eps * np.abs(final_values(path["mean_energy"])).astype(float),
    }


def of_integrals(key: PRNGKey, target: Target, method: Estimator, numbers: range) -> Batch:
    """From runs of an estimator that sees all energies at once; the prior has runs of its own.

    A run that ends in an error ends the batch, with a doubt; the first raises it.
    """
    stages = _stages(target)
    together: list[tuple[Integral, ...]] = []
    failed: tuple[str, ...] = ()
    for number in numbers:
        run = attempt(lambda number=number: tuple(_integrals(key, stages, method, number)))
        if isinstance(run, EnergyError):
            if not together:
                raise run
            failed = (failure(run),)
            break
        together.append(run)
    found = {stage: [run[i] for run in together] for i, stage in enumerate(stages)}
    both = len(stages) > 1
    where = [f"{stage}: " if both else "" for stage in stages]
    return Batch(
        runs=_numbers(found, len(together)),
        stories=[
            [stage + line for stage, integral in zip(where, run, strict=True) for line in integral.story]
            for run in together
        ],
        doubts=[
            doubt + OF_STAGE[stage] * both
            for stage, runs in found.items()
            for integral in runs
            for doubt in integral.doubts
        ]
        + list(failed),
        diagnostics={stage: [dict(integral.diagnostics) for integral in runs] for stage, runs in found.items()},
    )


def failure(error: EnergyError) -> str:
    """The doubt about runs of which a further one ended in an error."""
    return f"A further run ended in an error, so that these may be the lucky ones: {error}"


def _integrals(key: PRNGKey, stages: Mapping[str, Target], method: Estimator, number: int) -> Iterator[Integral]:
    """Of one run, by stage."""
    for stage, integrand in stages.items():
        of_stage = jax.random.fold_in(key, stage == "data")
        yield method.integrate(jax.random.fold_in(of_stage, number), integrand)


def _stages(target: Target) -> dict[str, Target]:
    """What an integral of all energies at once is asked for."""
    phases = dict(target.phases())
    stages: dict[str, Target] = {"prior": phases["prior"]} if "prior" in phases else {}
    return stages | ({"data": target} if set(phases) - {"prior"} else {})


def _numbers(found: Mapping[str, list[Integral]], num: int) -> dict[str, np.ndarray]:
    runs: dict[str, np.ndarray] = {}
    precision = float(jnp.finfo(jnp.result_type(float)).eps)
    names = {stage: "whole" if stage == "data" and len(found) > 1 else stage for stage in found}
    for stage, name in names.items():
        runs[f"{name}_value"] = np.array([each.value for each in found[stage]])
        rounding = precision * np.abs(runs[f"{name}_value"])  # energies near the target are about as large
        runs[f"{name}_std_error"] = np.hypot([each.std_error for each in found[stage]], rounding)
        runs["rounding"] = np.maximum(runs.get("rounding", 0.0), rounding)
    for name in ("num_evaluations", "num_nan"):
        each = [[float(getattr(integral, name)) for integral in of_stage] for of_stage in found.values()]
        runs[name] = np.sum(np.reshape(each, (-1, num)), axis=0)
    *before, last = found.values() if found else [[]]
    for side, other in (("lower", "upper"), ("upper", "lower")):
        if last and getattr(last[0], side) is not None:
            of_priors = [np.array([getattr(each, other) for each in prior], float) for prior in before]
            runs[side] = np.array([getattr(each, side) for each in last], float) - sum(of_priors, np.zeros(num))
    return runs


def estimate(runs: Mapping[str, np.ndarray], method: str, observed: str | None = None) -> LogZ:
    """Independent runs together, averaged on the scale of Z."""
    num = len(runs["num_evaluations"])
    value, std_error = pooled(runs)
    each = [pooled({name: x[number : number + 1] for name, x in runs.items()}) for number in range(num)]
    parts = {phase: log_mean(runs[f"{phase}_value"]) for phase in ("prior", "data") if f"{phase}_value" in runs}
    bounds = [float(np.mean(runs[side])) if side in runs else None for side in ("lower", "upper")]
    diagnostics: dict[str, Any] = {
        "num_evaluations": float(np.sum(runs["num_evaluations"])),
        "num_nan_energy": int(np.sum(runs["num_nan"])),
        "run_std_errors": [error for _, error in each],
        "log_bias": -(std_error**2) / 2,
    }
    if "drift" in runs:
        diagnostics["largest_drift"] = float(np.max(runs["drift"], initial=0.0))
    return LogZ(
        value=value,
        std_error=std_error,
        method=method,
        parts=parts | ({"data": value} if "whole_value" in runs else {}),
        replicates=np.array([value for value, _ in each]),
        lower=bounds[0],
        upper=bounds[1],
        data_id=observed,
        diagnostics=diagnostics,
        doubts=lagging(diagnostics.get("largest_drift", 0.0)),
        runs=dict(runs),
    )


def join(before: LogZ | None, batch: Batch, method: str, target: Target) -> LogZ:
    """The estimate from the runs before, if there are any, and those of a batch."""
    runs, own, doubts, story = batch.runs, dict(batch.diagnostics), tuple(batch.doubts), _told(batch.stories, 1)
    if before is not None:
        num_before = len(before.replicates)
        runs = {name: np.append(before.runs[name], each) for name, each in runs.items()}
        own = {stage: [*before.diagnostics.get(stage, ()), *each] for stage, each in own.items()}
        outdated = lagging(before.diagnostics.get("largest_drift", 0.0))
        doubts = (*(doubt for doubt in before.doubts if doubt not in outdated), *doubts)
        earlier = before.story if num_before > 1 else _told([before.story], 1)
        story = (*earlier, *_told(batch.stories, num_before + 1))
    elif len(batch.stories) == 1:
        story = tuple(batch.stories[0])
    found = estimate(runs, method, data_id(target))
    return dataclasses.replace(
        found,
        story=story,
        doubts=(*found.doubts, *other_doubts(doubts)),
        diagnostics={**found.diagnostics, "model_id": model_id(target), **own},
    )


def contradiction(before: LogZ, batch: Batch) -> tuple[str, ...]:
    """The doubt about runs that continue others and do not agree with them, where they do not."""
    value, std_error = pooled(batch.runs)
    if not abs(value - before.value) > CONTRADICTION * math.hypot(std_error, before.std_error):
        return ()
    return (
        "The runs that continued the estimate contradict those before: they are of different models, or their errors "
        "are understated.",
    )


def _told(stories: Iterable[Iterable[str]], first: int) -> tuple[str, ...]:
    """Each sentence with the number of its run."""
    return tuple(f"run {number}: {line}" for number, story in enumerate(stories, first) for line in story)


def check_continues(given: LogZ, method: str, target: Target) -> None:
    """Raises where an estimate is not one that runs of this method, model and data may continue."""
    if not given.runs:
        raise EnergyError(
            "The estimate to continue has no runs of its own: give what log_z, log_z_stream or read_log_z returned, "
            "and no sum or difference."
        )
    if given.method != method:
        raise EnergyError(f"The estimate to continue is by '{given.method}', and the method now is '{method}'.")
    if given.data_id != data_id(target):
        raise IncomparableError("The estimate to continue is of other observed data than this target.")
    if given.diagnostics.get("model_id", model_id(target)) != model_id(target):
        raise EnergyError("The estimate to continue is of another model: its sites or their roles differ.")
