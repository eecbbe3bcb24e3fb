"""The log evidence: an estimate that independent runs make better, with its story and its doubts.

    log_z(key, target, SMC())       log p(y) = log Z(prior energies and data) - log Z(prior energies)
    log_z_stream(key, target, ...)  the same after one run, after two, ...: its value, error and cost at every moment
    read_log_z(data)                the same of a result on file

SMC passes the prior on its way to the data, and both stages come from one run. Every other estimator integrates all
energies at once (`logz/integral.py`): the evidence is its answer for the whole less its answer for the prior, from
independent runs. Runs are averaged on the scale of Z (`runs.py`).

Runs that go on until their error looks small favour errors that are small by chance. The larger of the runs' own errors
and of their spread leaves little of that (`log_z` has the numbers), since either alone is seldom small by itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ebm_ppl import smc
from ebm_ppl.logz.consultation import Consultation
from ebm_ppl.logz.integral import Estimator, OnePoint, attempt, imprecise, other_doubts, warn_of
from ebm_ppl.probe import check_tails
from ebm_ppl.runs import Batch, check_continues, contradiction, estimate, failure, join, of_integrals, of_path
from ebm_ppl.sharding import Mesh
from ebm_ppl.smc import SMC
from ebm_ppl.target import Target
from ebm_ppl.typing import Draws, EnergyError, EnergyWarning, LogZ, PRNGKey, as_key, with_error

if TYPE_CHECKING:
    import xarray as xr

BUDGET = 1e8
"""Evaluations, where only a standard error is asked for."""
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
    given: LogZ | None = None,
    progress_bar: bool = False,
    mesh: Mesh | None = None,
) -> LogZ:
    """The log evidence of a model (log Z of its prior where it has no data), in nats, with a standard error.

    Where a standard error or a budget is given, independent runs go on until the error is at most `tol`, or the next
    run would go beyond `budget`, which is foreseen from those before. That favours errors that are small by chance, if
    not by much: of runs of SMC with 20 to 100 particles on four targets, stopped after 3 to 40, two standard errors
    covered the truth in 92 to 100 %, and in 94 to 100 % where as many were made in any case. More runs settle noise,
    and not what is wrong with each of them.

    Args:
        key: from `jax.random.key`.
        target: from `ebm_ppl.target`.
        method: the estimator. Without one, `Consultation()`: a fitted reference, and a second opinion of another family
            where the first is not clean. Or one alone: `SMC()`, `FittedReference()`, `AIS()`, `BDMC()` (which brackets
            log Z), `Bridge()`, `MBAR()`, `SteppingStone()`, `ThermodynamicIntegration()`, `ParallelTempering()`,
            `NestedSampling()` or `Laplace()` (an approximation, with no error bar). A model without continuous latent
            sites needs none: its log evidence is exact.
        tol: standard error wanted, in nats. Without a method it is that of the `Consultation` (.05 where nothing is
            said), which has more runs only where this is all that is wrong with the first.
        budget: bound on the evaluations of all runs, those of `given` included; 1e8 where only `tol` is said. The
            first run is always made. Without a method it is that of the `Consultation`, too.
        num_runs: independent runs, or, with `tol` or `budget`, how many at once. With one, the error is the run's own;
            with more, the larger of their spread and their own errors.
        given: an earlier estimate by the same method for the same model and data, to be continued. The key may be the
            same: no run is made twice.
        mesh: of `jax.make_mesh`, for `SMC`: its devices share the particles; see `sharding.py`.

    Returns:
        `LogZ`; differences of two are log Bayes factors. Its `story` tells how it was reached, its `doubts` (which are
        warned of, too) why not to trust it, its `history` what was known after each run.

    Raises:
        NoReferenceError: for improper, masked or scaled latent sites, and densities that cannot be normalised.
        IntractablePartitionError: where the evidence lacks an unknown partition function.
        EnergyError, IncomparableError: where `given` is of another method, of another model or of other data.

    Example:
        >>> first = ebm_ppl.log_z(key, target, ebm_ppl.SMC(), budget=1e6)
        >>> more = ebm_ppl.log_z(key, target, ebm_ppl.SMC(), tol=0.02, given=first)
    """
    driven = tol is not None or budget is not None
    _check_wanted(tol, budget)
    if method is None:
        said: dict[str, Any] = {"tol": tol, "budget": budget}
        method = Consultation(**{name: number for name, number in said.items() if number is not None})
        tol, budget = method.tol, method.budget
    stream = _stream(key, target, method, num_runs, given, progress_bar, mesh)
    at_doubts = isinstance(method, Consultation)
    driven &= target.dim > 0  # else the first is exact
    found = _stop(stream, given, num_runs, tol, budget, at_doubts) if driven else next(stream)
    _warn(found, target, stacklevel=4)
    return found


def log_z_stream(
    key: PRNGKey,
    target: Target,
    method: SMC | Estimator | None = None,
    *,
    num_runs: int = 1,
    given: LogZ | None = None,
    progress_bar: bool = False,
    mesh: Mesh | None = None,
) -> Iterator[LogZ]:
    """The log evidence after `num_runs` independent runs, after twice as many, and so on without end.

    The caller stops when content. Each `LogZ` is that of all runs so far, with its `history`, and may be given to
    another stream, or to `log_z`, to be continued.

    Args:
        key, target, method, num_runs, given, mesh: as of `log_z`.

    Raises:
        As `log_z`.

    Example:
        >>> for found in ebm_ppl.log_z_stream(key, target, ebm_ppl.SMC()):
        ...     if found.std_error < 0.1:
        ...         break
    """
    method = Consultation() if method is None else method
    return _aloud(_stream(key, target, method, num_runs, given, progress_bar, mesh), target)


def _check_wanted(tol: float | None, budget: float | None) -> None:
    if tol is not None and not tol > 0:
        raise EnergyError(f"tol is a positive standard error in nats; got {tol}.")
    if budget is not None and not budget > 0:
        raise EnergyError(f"budget is a positive number of evaluations; got {budget}.")


def _stream(
    key: PRNGKey,
    target: Target,
    method: SMC | Estimator,
    num_runs: int,
    given: LogZ | None,
    progress_bar: bool,
    mesh: Mesh | None,
) -> Iterator[LogZ]:
    """Estimates, each from all runs so far; what is wrong with the arguments is said before the first."""
    key = as_key(key)
    if num_runs < 1:
        raise EnergyError(f"num_runs is a positive number of independent runs; got {num_runs}.")
    target.require_tractable()
    target.require_reference()
    target.require_known_constant()
    check_tails(target, needs_normalisation=True)
    if not target.dim:
        method, mesh = OnePoint(), None
    if mesh is not None and not isinstance(method, SMC):
        raise EnergyError(f"Only SMC shares its particles among the devices of a mesh; {method.name} does not.")
    if given is not None:
        check_continues(given, method.name, target)
    return _go_on(key, target, method, num_runs, given, {"progress_bar": progress_bar, "mesh": mesh})


def _go_on(
    key: PRNGKey, target: Target, method: SMC | Estimator, num_runs: int, given: LogZ | None, walk: dict[str, Any]
) -> Iterator[LogZ]:
    wanted = method.tol if isinstance(method, Consultation) else math.inf
    found = given
    while True:
        num_before = 0 if found is None else len(found.replicates)
        if isinstance(method, SMC):
            of_batch = jax.random.fold_in(key, num_before) if num_before else key
            batch = Batch(of_path(smc.run(of_batch, target, method, num_runs=num_runs, **walk)))
        else:
            batch = of_integrals(key, target, method, range(num_before, num_before + num_runs))
        if given is not None and found is given:
            batch = batch._replace(doubts=(*batch.doubts, *contradiction(given, batch)))
        found = join(found, batch, method.name, target)
        found = dataclasses.replace(found, doubts=found.doubts or imprecise(found.std_error, wanted))
        yield found


def _stop(
    stream: Iterator[LogZ], given: LogZ | None, num_runs: int, tol: float | None, budget: float | None, at_doubts: bool
) -> LogZ:
    """The first estimate of a stream that is precise enough, or whose successor would be beyond the budget.

    Args:
        at_doubts: whether to stop, too, where there are doubts that more runs do not settle.
    """
    wanted, most = (0.0 if tol is None else tol), (BUDGET if budget is None else budget)
    found = next(stream) if given is None else given
    while found.std_error > wanted and not (at_doubts and other_doubts(found.doubts)):
        spent = found.diagnostics["num_evaluations"]
        if spent * (1 + num_runs / len(found.replicates)) > most:
            break
        more = attempt(lambda: next(stream))
        if isinstance(more, EnergyError):
            found = dataclasses.replace(found, doubts=(*found.doubts, failure(more)))
            break
        found = more
    doubts = other_doubts(found.doubts)
    if tol is not None and not (at_doubts and doubts):
        needed = found.diagnostics["num_evaluations"] * (found.std_error / tol) ** 2
        doubts += imprecise(found.std_error, tol, f"raise budget, to about {needed:.0e} evaluations.")
    return dataclasses.replace(found, doubts=doubts)


def _aloud(stream: Iterator[LogZ], target: Target) -> Iterator[LogZ]:
    """Says what speaks against the first estimate, and then what is new."""
    before = None
    for found in stream:
        if before is None:
            _warn(found, target, stacklevel=4)
        else:
            num_nan = found.diagnostics["num_nan_energy"] - before.diagnostics["num_nan_energy"]
            warn_of(num_nan, [doubt for doubt in found.doubts if doubt not in before.doubts], stacklevel=3)
        before = found
        yield found


def weigh(key: PRNGKey, target: Target, sampler: SMC, num_runs: int, progress_bar: bool, **walk: Any) -> Draws:
    """SMC, with what its numbers say about themselves; `walk` is passed on to `smc.run`."""
    draws = smc.run(key, target, sampler, num_runs=num_runs, progress_bar=progress_bar, **walk)
    runs = of_path(draws)
    _warn(estimate(runs, sampler.name), target, stacklevel=5)
    return dataclasses.replace(draws, log_z=runs)


def read_log_z(data: xr.DataTree) -> LogZ:
    """The `LogZ` in the group `log_z` of a DataTree.

    Args:
        data: a result of `sample` by `SMC` or `ParallelTempering`, of `sequential_evidence`, or of
            `log_z_to_datatree`, which this is the way back from.

    Raises:
        EnergyError: where there is no such group, and where parallel tempering knows log Z of all energies, but the
            evidence is that less log Z of the prior.
    """
    if "log_z" not in data.children:
        raise EnergyError(
            "This result has no group 'log_z': only SMC and parallel tempering estimate it while they sample."
        )
    group = data["log_z"].to_dataset()
    facts = {**data.attrs, **group.attrs}
    method, observed = facts.get("method", facts.get("sampler", "")), facts.get("data_id")
    numbers = {str(name): np.asarray(value) for name, value in group.data_vars.items()}
    runs = {name: value for name, value in numbers.items() if value.ndim == 1}
    if "whole_value" in runs and "prior_value" not in runs:
        raise EnergyError(
            "The model has prior energies, and parallel tempering estimated log Z of all energies together: the "
            "evidence is that less log Z of the prior. Use log_z(key, target, ParallelTempering()), which estimates "
            "both."
        )
    if runs:
        found = estimate(runs, method, observed)
    else:
        lower, upper = (float(numbers[side]) if side in numbers else None for side in ("lower", "upper"))
        value, std_error = float(numbers["value"]), float(numbers["std_error"])
        found = LogZ(value, std_error, method, lower=lower, upper=upper, data_id=observed)
    story, doubts = (_lines(facts.get(name, "")) for name in ("story", "doubts"))
    own = json.loads(facts.get("diagnostics", "{}"))
    return dataclasses.replace(
        found,
        story=story,
        doubts=tuple(dict.fromkeys(found.doubts + doubts)),
        diagnostics={**found.diagnostics, **own},
    )


def _lines(text: str) -> tuple[str, ...]:
    return tuple(text.split("\n")) if text else ()


def _warn(found: LogZ, target: Target, stacklevel: int) -> None:
    """Says aloud what speaks against an estimate, at the caller `stacklevel - 2` levels up."""
    warn_of(found.diagnostics.get("num_nan_energy", 0), found.doubts, stacklevel=stacklevel)
    for message in (*_of_rounding(found), *_of_prior(found, target)):
        warnings.warn(message, EnergyWarning, stacklevel=stacklevel - 1)


def _of_rounding(found: LogZ) -> list[str]:
    """Where single precision is too coarse."""
    largest = float(np.max(found.runs.get("rounding", 0.0), initial=0.0)) / float(np.finfo(np.float32).eps)
    if not largest > LARGE_ENERGY:
        return []
    return [
        f"Energies reach {largest:.1e} nats in single precision, which resolves them to {largest * 6e-8:.1e} nats "
        "(this is part of the standard error): set jax.config.update('jax_enable_x64', True), or subtract a "
        "constant from the energy."
    ]


def _of_prior(found: LogZ, target: Target) -> list[str]:
    """Where every prior energy came with its log partition function, log Z of the prior must be zero."""
    names = {name for name, role in target.spec.roles if role == "prior"}
    if not names or not names <= target.spec.normalized or "data" in found.parts or found.method != SMC.name:
        return []
    if not abs(found.value) > UNLIKELY * found.std_error:
        return []
    return [
        f"log Z of the prior came out as {with_error(found.value, found.std_error)}, but it should be 0, since the "
        f"log_partition of {', '.join(map(repr, sorted(names)))} was given. Either that is wrong, or the particles did "
        "not mix: use more num_moves or num_particles, another parametrisation, or sampler=NUTS()."
    ]
