"""The log evidence: one `LogZ` from the runs of an estimator, with its story and its doubts.

    log_z(key, target, SMC())       log p(y) = log Z(prior energies and data) - log Z(prior energies)

SMC passes the prior on its way to the data, and both stages come from one run. Every other estimator integrates all
energies at once (`logz/integral.py`): the evidence is its answer for the whole less its answer for the prior, from
independent runs. Several runs are averaged on the scale of Z.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl import smc
from ebm_ppl.arviz import data_id
from ebm_ppl.logz.consultation import Consultation
from ebm_ppl.logz.integral import Estimator, Integral, error_of_mean, warn_of
from ebm_ppl.probe import check_tails
from ebm_ppl.sharding import Mesh
from ebm_ppl.smc import SMC, lagging
from ebm_ppl.target import Target
from ebm_ppl.typing import Draws, EnergyError, EnergyWarning, LogZ, PRNGKey, as_key, log_mean

if TYPE_CHECKING:
    import xarray as xr

LARGE_ENERGY = 1e6
UNLIKELY = 5.0
"""Standard errors from its known value at which an estimate is called wrong."""


def log_z(
    key: PRNGKey,
    target: Target,
    method: SMC | Estimator | None = None,
    *,
    tol: float | None = None,
    budget: float | None = None,
    num_runs: int = 1,
    progress_bar: bool = False,
    mesh: Mesh | None = None,
) -> LogZ:
    """The log evidence of a model (log Z of its prior where it has no data), in nats, with a standard error.

    Args:
        key: from `jax.random.key`.
        target: from `ebm_ppl.target`.
        method: the estimator. Without one, `Consultation()`: a fitted reference, and a second opinion of another family
            where the first is not clean. Or one alone: `SMC()`, `FittedReference()`, `AIS()`, `BDMC()` (which brackets
            log Z), `Bridge()`, `MBAR()`, `SteppingStone()`, `ThermodynamicIntegration()`, `ParallelTempering()`,
            `NestedSampling()` or `Laplace()` (an approximation, with no error bar).
        tol: standard error wanted, in nats, of the default (.05 where nothing is said).
        budget: bound on the evaluations of its second opinion.
        num_runs: independent runs. With one, the error is the run's own; with more, the larger of their spread and
            their own errors.
        mesh: of `jax.make_mesh`, for `SMC`: its devices share the particles; see `sharding.py`.

    Returns:
        `LogZ`; differences of two are log Bayes factors. Its `story` tells how it was reached, its `doubts` (which are
        warned of, too) why not to trust it.

    Raises:
        NoReferenceError: for improper, masked or scaled latent sites, and densities that cannot be normalised.
        IntractablePartitionError: where the evidence lacks an unknown partition function.
    """
    key = as_key(key)
    if method is None:
        method = _default(tol, budget)
    elif (tol, budget) != (None, None):
        raise EnergyError(f"tol and budget are those of the default method; {method.name} has settings of its own.")
    target.require_tractable()
    target.require_reference()
    target.require_known_constant()
    check_tails(target, needs_normalisation=True)
    if isinstance(method, SMC):
        return _of_path(weigh(key, target, method, num_runs, progress_bar, mesh=mesh), data_id(target))
    if mesh is not None:
        raise EnergyError(f"Only SMC shares its particles among the devices of a mesh; {method.name} does not.")
    found = _of_integrals(key, target, method, num_runs)
    warn_of(found.diagnostics["num_nan_energy"], found.doubts, stacklevel=3)
    return found


def _default(tol: float | None, budget: float | None) -> Consultation:
    default = Consultation()
    return Consultation(tol=default.tol if tol is None else tol, budget=default.budget if budget is None else budget)


def weigh(key: PRNGKey, target: Target, sampler: SMC, num_runs: int, progress_bar: bool, **walk: Any) -> Draws:
    """SMC, with what its numbers say about themselves; `walk` is passed on to `smc.run`."""
    draws = smc.run(key, target, sampler, num_runs=num_runs, progress_bar=progress_bar, **walk)
    _check_particles(draws)
    _check_prior(draws, target)
    return draws


def read_log_z(data: xr.DataTree) -> LogZ:
    """The `LogZ` of a result of `sample(key, target, SMC())`, from its group `log_z`."""
    if "log_z" not in data.children:
        raise EnergyError("This result has no group 'log_z': only SMC estimates it while it samples.")
    estimates = {str(name): np.asarray(value) for name, value in data["log_z"].data_vars.items()}
    draws = Draws(jnp.empty(0), {}, {str(name): value for name, value in data.attrs.items()}, log_z=estimates)
    return _of_path(draws, data.attrs.get("data_id"))


_DIAGNOSTICS = "num_evaluations", "num_nan_energy", "largest_drift"


def _of_path(draws: Draws, fingerprint: str | None) -> LogZ:
    """From runs of SMC, whose path keeps the phases apart."""
    runs = draws.log_z or {}
    phases = [phase for phase in ("prior", "data") if f"{phase}_value" in runs]
    parts = {phase: log_mean(runs[f"{phase}_value"]) for phase in phases}
    if not phases:
        return LogZ(0.0, 0.0, method="SMC", data_id=fingerprint)
    last = phases[-1]
    values, errors = runs[f"{last}_value"], runs[f"{last}_std_error"]
    diagnostics = {name: draws.attrs[name] for name in _DIAGNOSTICS if name in draws.attrs}
    return LogZ(
        value=parts[last],
        std_error=error_of_mean(values, errors),
        method="SMC",
        parts=parts,
        replicates=values,
        data_id=fingerprint,
        diagnostics=diagnostics | {"run_std_errors": errors.tolist()},
        doubts=lagging(float(draws.attrs.get("largest_drift", 0.0))),
    )


def _of_integrals(key: PRNGKey, target: Target, method: Estimator, num_runs: int) -> LogZ:
    """From runs of an estimator that sees all energies at once."""
    phases, fingerprint = dict(target.phases()), data_id(target)
    stages = {"prior": phases["prior"]} if "prior" in phases else {}
    if set(phases) - {"prior"}:
        stages["data"] = target
    if not stages:
        return LogZ(0.0, 0.0, method=method.name, data_id=fingerprint)

    def integrals(stage: str) -> list[Integral]:
        keys = jax.random.split(jax.random.fold_in(key, stage == "data"), num_runs)
        return [method.integrate(key, stages[stage]) for key in keys]

    runs = {stage: integrals(stage) for stage in stages}
    means = {stage: _mean(found) for stage, found in runs.items()}
    *before, last = means.values()
    total = means["data"] - means["prior"] if before else last
    parts = {stage: mean.value for stage, mean in means.items()} | {list(means)[-1]: total.value}
    each = list(runs.values())
    return dataclasses.replace(
        total,
        method=method.name,
        parts=parts,
        replicates=last.replicates - sum(mean.replicates for mean in before),
        data_id=fingerprint,
        diagnostics={
            "num_evaluations": sum(run.num_evaluations for found in each for run in found),
            "num_nan_energy": sum(run.num_nan for found in each for run in found),
            "run_std_errors": [
                math.hypot(*(run.std_error for run in together)) for together in zip(*each, strict=True)
            ],
            **{stage: [dict(run.diagnostics) for run in found] for stage, found in runs.items()},
        },
        story=tuple(_told(runs)),
    )


def _mean(runs: list[Integral]) -> LogZ:
    """Of independent runs, on the scale of Z."""
    values, errors = np.array([run.value for run in runs]), np.array([run.std_error for run in runs])
    lower = [run.lower for run in runs if run.lower is not None]
    upper = [run.upper for run in runs if run.upper is not None]
    return LogZ(
        value=log_mean(values),
        std_error=error_of_mean(values, errors),
        replicates=values,
        lower=float(np.mean(lower)) if lower else None,
        upper=float(np.mean(upper)) if upper else None,
        doubts=tuple(dict.fromkeys(doubt for run in runs for doubt in run.doubts)),
    )


def _told(runs: Mapping[str, list[Integral]]) -> list[str]:
    """The stories of all runs, each sentence with the stage and the run that it belongs to where there are several."""
    lines = []
    for stage, found in runs.items():
        for number, run in enumerate(found, start=1):
            where = [stage] * (len(runs) > 1) + [f"run {number}"] * (len(found) > 1)
            lines += [f"{', '.join(where)}: {line}" if where else line for line in run.story]
    return lines


def _check_particles(draws: Draws) -> None:
    """Counts NaN energies aloud, and says where the particles lag behind or single precision is too coarse."""
    if draws.attrs.get("num_nan_energy"):
        warnings.warn(
            f"The energy was NaN {draws.attrs['num_nan_energy']} times; such points were given zero mass, and are "
            "counted in smc['num_nan'].",
            EnergyWarning,
            stacklevel=4,
        )
    for doubt in lagging(float(draws.attrs.get("largest_drift", 0.0))):
        warnings.warn(doubt, EnergyWarning, stacklevel=4)
    largest = float(draws.attrs.get("largest_mean_energy", 0.0))
    if largest > LARGE_ENERGY and draws.z.dtype == jnp.float32:
        warnings.warn(
            f"Energies reach {largest:.1e} nats in single precision, which resolves them to {largest * 6e-8:.1e} nats "
            "(this is part of the standard error): set jax.config.update('jax_enable_x64', True), or subtract a "
            "constant from the energy.",
            EnergyWarning,
            stacklevel=4,
        )


def _check_prior(draws: Draws, target: Target) -> None:
    """Where every prior energy came with its log partition function, log Z of the prior must be zero."""
    names = {name for name, role in target.spec.roles if role == "prior"}
    runs = draws.log_z or {}
    if not names or not names <= target.spec.normalized or "data_value" in runs:
        return
    value, error = log_mean(runs["prior_value"]), error_of_mean(runs["prior_value"], runs["prior_std_error"])
    if abs(value) > UNLIKELY * error:
        warnings.warn(
            f"log Z of the prior came out as {value:.2f} ± {error:.2f}, but it should be 0, since the log_partition of "
            f"{', '.join(map(repr, sorted(names)))} was given. Either that is wrong, or the particles did not mix: use "
            "more num_moves or num_particles, another parametrisation, or sampler=NUTS().",
            EnergyWarning,
            stacklevel=4,
        )
