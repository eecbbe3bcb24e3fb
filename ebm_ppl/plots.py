"""Two pictures that ArviZ does not have; each takes a DataTree and returns a matplotlib figure.

plot_smc        the path of an SMC run: temperature, effective particles, acceptance, cumulative log Z
plot_energies   each energy term, under the prior and under the posterior
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ebm_ppl.typing import EnergyError

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

_PREFIX = "energy_"


def plot_smc(data: xr.DataTree) -> Figure:
    """The path of an SMC run, stage by stage, one line for each independent run.

    Inverse temperature, effective particles, acceptance rate of the moves, and the cumulative log Z with a band of two
    standard errors so far; the prior phase is shaded.

    Args:
        data: result of `sample(key, target, SMC())`.

    Raises:
        EnergyError: where the result is not one of SMC.
    """
    import matplotlib.pyplot as plt

    if "smc" not in data.children:
        raise EnergyError("This result has no group 'smc': plot_smc draws the path of sample(key, target, SMC()).")
    path = data["smc"].to_dataset()
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), sharex=True, layout="constrained")
    panels = (
        ("beta", "inverse temperature"),
        ("ess", "effective particles"),
        ("accept_rate", "acceptance rate"),
        ("log_z", "log Z of the phase so far (nats)"),
    )
    for axis, (name, label) in zip(axes.flat, panels, strict=True):
        _plot_by_phase(axis, path, name)
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 1].set_ylim(bottom=0)
    axes[1, 0].set_ylim(0, 1)
    for axis in axes[1]:
        axis.set_xlabel("stage (prior energies shaded)" if np.any(path["role"] == 0) else "stage")
    return figure


def _plot_by_phase(axis: Any, path: xr.Dataset, name: str) -> None:
    """One line for each run and phase; log Z with a band of two standard errors."""
    stage = np.arange(1, path.sizes["stage"] + 1)
    for code in (0, 1):
        inside = path["role"].values == code
        for run in range(path.sizes["chain"]):
            values = path[name].values[run, inside]
            color = f"C{run % 10}"
            axis.plot(stage[inside], values, marker=".", lw=1, color=color)
            if name == "log_z":
                error = 2 * path["log_z_std_error"].values[run, inside]
                axis.fill_between(stage[inside], values - error, values + error, color=color, alpha=0.25, lw=0)
    prior_stages = int((path["role"].values == 0).sum())
    if prior_stages:
        axis.axvspan(0.5, prior_stages + 0.5, color="0.93", zorder=0)
    axis.set_xlim(0.5, len(stage) + 0.5)


def plot_energies(data: xr.DataTree, prior: xr.DataTree | None = None) -> Figure:
    """Distribution of each energy term under the posterior, beside that under the prior.

    An energy that the data has pushed far out of its prior distribution is a prior at odds with the data.

    Args:
        data: a result of `sample`, whose `sample_stats` hold `energy_<name>`.
        prior: result of `prior_predictive` for the same target; draws its energies too.

    Raises:
        EnergyError: where the model has no energy terms.
    """
    import matplotlib.pyplot as plt

    stats = data["sample_stats"].to_dataset()
    names = [str(name) for name in stats.data_vars if str(name).startswith(_PREFIX) and name != "energy_error"]
    if not names:
        raise EnergyError("This result has no energy terms: the model has no energy_factor and no EnergyDistribution.")
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.2), squeeze=False, layout="constrained")
    before = prior["sample_stats"].to_dataset() if prior is not None and "sample_stats" in prior.children else {}
    for axis, name in zip(axes.flat, names, strict=True):
        shown = [("posterior", stats[name].values.ravel())]
        if name in before:
            shown.insert(0, ("prior", before[name].values.ravel()))
        # Of each by itself: the larger of the two would cut off the tails of the other.
        ranges = [np.quantile(values[np.isfinite(values)], [0.002, 0.998]) for _, values in shown]
        bins = np.linspace(np.min(ranges), np.max(ranges), 50)
        for label, values in shown:
            axis.hist(values[np.isfinite(values)], bins=bins, density=True, alpha=0.6, label=label)
        axis.set_xlabel(f"energy of '{name.removeprefix(_PREFIX)}' (nats)")
        axis.set_yticks([])
        axis.legend(frameon=False)
    return figure
