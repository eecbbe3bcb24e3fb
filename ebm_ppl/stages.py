"""The record of an SMC run, on the host: its path, its errors, and log Z of each phase.

StageInfo          diagnostics of one stage
check              errors about the numbers of a stage, naming it
as_path            diagnostics as (run, stage) arrays
final_values       of the last stage of each run
phase_estimates    value and standard error of a phase's log Z for each run
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ebm_ppl.typing import Array, DegenerateParticlesError, NonFiniteEnergyError, TemperingStalledError

SMALLEST_STEP = 1e-8


class StageInfo(NamedTuple):
    """Diagnostics of one stage of one run."""

    beta: Array
    ess: Array
    accept_rate: Array
    num_moves: Array
    correlation: Array
    log_z_increment: Array
    log_z: Array
    log_z_std_error: Array
    mean_energy: Array
    drift: Array
    step_size: Array
    temperature_step: Array
    num_evaluations: Array
    num_nan: Array
    num_zero: Array
    num_infinite: Array


def check_start(energy: np.ndarray, phase: str, example: Callable[[int], str]) -> None:
    """Raises where a run enters a phase with no particle alive, before anything large is compiled.

    Args:
        energy: (run, particle).
        example: a sentence about a particle of a run in which none is alive.
    """
    alive = np.any(energy < np.inf, axis=1)
    if not np.all(alive):
        raise _degenerate(energy.shape[1], f"stage 1 of the {phase} phase", example(int(np.argmin(alive))))


def _degenerate(num_particles: int, where: str, example: str = "") -> DegenerateParticlesError:
    return DegenerateParticlesError(
        f"All {num_particles} particles have zero mass (an energy of +inf or NaN) at {where}: no draw of the reference "
        "satisfies the model. Check the observed values against their supports, soften a hard constraint, or use more "
        f"particles. {example}".rstrip()
    )


def check(info: StageInfo, phase: str, stage: int, num_particles: int, max_stages: int) -> None:
    """Errors about the numbers of a stage, on the host."""
    where = f"stage {stage} of the {phase} phase"
    if np.nansum(info.num_infinite) > 0:
        raise NonFiniteEnergyError(
            f"An energy is -inf (infinite density) for {int(np.nansum(info.num_infinite))} particles at {where}: "
            "bound the energy from below."
        )
    if np.any(info.num_zero >= num_particles):
        raise _degenerate(num_particles, where)
    stalled = info.temperature_step < SMALLEST_STEP
    if np.any(stalled) or (stage >= max_stages and np.nanmin(info.beta) < 1.0):
        raise TemperingStalledError(
            f"Tempering stalled at {where}: inverse temperature {np.nanmin(info.beta):.3e}, step "
            f"{np.nanmin(info.temperature_step):.1e}, effective particles {np.nanmin(info.ess):.1f} of "
            f"{num_particles}, acceptance {np.nanmin(info.accept_rate):.2f}. The energies of the particles "
            "spread too far for this reference: use a reference nearer to the posterior, or more particles."
        )


def as_path(stages: list[tuple[str, StageInfo]], num_runs: int) -> dict[str, np.ndarray]:
    """Diagnostics as (chain, stage) arrays."""
    fields = StageInfo._fields
    if not stages:
        return {field: np.empty((num_runs, 0)) for field in fields}
    return {field: np.stack([getattr(info, field) for _, info in stages], axis=1) for field in fields}


def final_values(stages: np.ndarray) -> np.ndarray:
    """The value of each run's last stage, from (run, stage) with NaN where a run made no stage."""
    if stages.shape[1] == 0:
        return np.zeros(len(stages))
    last = stages.shape[1] - 1 - np.argmin(np.isnan(stages[:, ::-1]), axis=1)
    return np.take_along_axis(stages, last[:, None], axis=1)[:, 0]


def phase_estimates(phase: str, infos: list[tuple[str, StageInfo]], num_runs: int, dtype: Any) -> dict[str, np.ndarray]:
    """Value and standard error of a phase's log Z for each run; what rounding of the energies adds is included."""
    path = as_path(infos, num_runs)
    rounding = np.finfo(dtype).eps * np.abs(final_values(path["mean_energy"]))
    value = np.nansum(path["log_z_increment"].astype(float), axis=1)
    std_error = np.hypot(final_values(path["log_z_std_error"]), rounding)
    if phase == "joint":
        known = {"prior_value": np.zeros(num_runs), "prior_std_error": np.zeros(num_runs)}
        return known | {"data_value": value, "data_std_error": std_error}
    return {f"{phase}_value": value, f"{phase}_std_error": std_error}
