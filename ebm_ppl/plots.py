"""Pictures that ArviZ does not have; each takes results and returns a matplotlib figure.

plot_smc                   the path of an SMC run: temperature, effective particles, acceptance, cumulative log Z
plot_energies              each energy term, under the prior and under the posterior
plot_compare               log evidences of several models, and their posterior probabilities
plot_sequential_evidence   the log evidence along the observations, or where a Bayes factor comes from
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ebm_ppl.typing import EnergyError, IncomparableError

if TYPE_CHECKING:
    import pandas as pd
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
        prior: result of `prior_predictive` for the same target, unless that was added to `data`; draws its energies
            too.

    Raises:
        EnergyError: where the model has no energy terms.
    """
    import matplotlib.pyplot as plt

    stats = data["sample_stats"].to_dataset()
    names = [str(name) for name in stats.data_vars if str(name).startswith(_PREFIX) and name != "energy_error"]
    if not names:
        raise EnergyError("This result has no energy terms: the model has no energy_factor and no EnergyDistribution.")
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.2), squeeze=False, layout="constrained")
    prior = data if prior is None else prior
    before = prior["sample_stats_prior"].to_dataset() if "sample_stats_prior" in prior.children else {}
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


def plot_compare(table: pd.DataFrame) -> Figure:
    """Models by their evidence: log evidences with bars of two standard errors, and posterior probabilities.

    The best model is on top, and the line is its log evidence. The bars of the probabilities are the interval in the
    table, the crosses the prior probabilities. Models in doubt are hollow.

    Args:
        table: result of `compare`.

    Raises:
        EnergyError: for any other table.
    """
    import matplotlib.pyplot as plt

    lower, upper = ([name for name in table.columns if str(name).endswith(end)] for end in ("_lb", "_ub"))
    if "log_bf" not in table.columns or len(lower) != 1 or len(upper) != 1:
        raise EnergyError("plot_compare draws the table of ebm_ppl.compare.")
    height = 1.6 + 0.4 * len(table)
    figure, axes = plt.subplots(1, 2, figsize=(9, height), sharey=True, layout="constrained")
    place = -np.arange(len(table))
    panels = (
        ("log_evidence", table["log_evidence"] - 2 * table["se"], table["log_evidence"] + 2 * table["se"]),
        ("probability", table[lower[0]], table[upper[0]]),
    )
    for axis, (name, low, high) in zip(axes, panels, strict=True):
        axis.hlines(place, low, high, color="C0")
        fill = np.where(table["warning"], "white", "C0")
        axis.scatter(table[name], place, c=fill, edgecolors="C0", zorder=3)
    axes[0].axvline(table["log_evidence"].iloc[0], color="C1", ls="--", lw=1, zorder=0)
    axes[0].set_xlabel("log evidence (nats), ± 2 standard errors")
    axes[0].set_yticks(place, [str(name) for name in table.index])
    axes[0].set_ylim(place[-1] - 0.6, 0.6)
    axes[1].scatter(table["prior"], place, marker="x", color="0.5", s=25, label="prior", zorder=2)
    axes[1].set_xlim(-0.03, 1.03)
    percent = str(lower[0]).removeprefix("eti").removesuffix("_lb")
    axes[1].set_xlabel(f"posterior model probability, {percent} % interval of its error")
    axes[1].legend(frameon=False, loc="lower right")
    figure.suptitle("Model comparison, higher is better", fontsize="medium")
    return figure


def plot_sequential_evidence(results: xr.DataTree | Mapping[str, xr.DataTree]) -> Figure:
    """The log evidence along the observations; of several models, where their Bayes factors come from.

    One model: `log p(y_1:t)`, and the log predictive density of each block of observations given those before. More:
    the log Bayes factor so far of each over the first, and what each block adds to it. Bars and bands are of two
    standard errors.

    Args:
        results: of `sequential_evidence`, by the names of the models if there are several.

    Raises:
        EnergyError: for other results.
        IncomparableError: where the models are of different data, or took them in at other times.
    """
    import matplotlib.pyplot as plt

    named = dict(results) if isinstance(results, Mapping) and not hasattr(results, "attrs") else {"": results}
    walks = {name: _walk_of(name, tree) for name, tree in named.items()}
    (first, base), *others = walks.items()
    for name, walk in others:
        if walk.attrs["data_id"] != base.attrs["data_id"] or not np.array_equal(walk["time"], base["time"]):
            raise IncomparableError(f"'{name}' and '{first}' are of different data, or took them in at other times.")
    what = f"log Bayes factor\nover {first}," if others else "log evidence"
    shown = {f"{name} over {first}": _minus(walk, base) for name, walk in others} or {"": base}
    figure, axes = plt.subplots(2, 1, figsize=(8, 5.5), sharex=True, layout="constrained")
    for number, (name, walk) in enumerate(shown.items()):
        time, color = walk["time"].values, f"C{number % 10}"
        value, error = walk["log_evidence"].values, 2 * walk["log_evidence_se"].values
        axes[0].plot(time, value, marker=".", lw=1, color=color, label=name)
        axes[0].fill_between(time, value - error, value + error, color=color, alpha=0.25, lw=0)
        axes[1].errorbar(time, walk["elpd"], 2 * walk["elpd_se"], fmt=".", lw=1, color=color)
    for axis in axes[: 2 if others else 0]:
        axis.axhline(0.0, color="0.7", lw=1, zorder=0)
    axes[0].set_ylabel(f"{what} so far (nats)")
    axes[1].set_ylabel("what each block adds (nats)" if others else "log predictive density (nats)")
    axes[1].set_xlabel("time")
    if others:
        axes[0].legend(frameon=False)
    return figure


def _walk_of(name: str, tree: Any) -> xr.Dataset:
    if "sequential" not in getattr(tree, "children", ()):
        raise EnergyError(
            f"The result {name!r} has no group 'sequential': this draws what sequential_evidence returns."
        )
    return tree["sequential"].to_dataset().assign_attrs(data_id=tree.attrs.get("data_id"))


def _minus(walk: xr.Dataset, other: xr.Dataset) -> xr.Dataset:
    """The log evidence of one model less that of another, from independent runs."""
    parts = {name: walk[name] - other[name] for name in ("log_evidence", "elpd")}
    errors = {f"{name}_se": np.hypot(walk[f"{name}_se"], other[f"{name}_se"]) for name in parts}
    return walk[[]].assign(parts | errors)
