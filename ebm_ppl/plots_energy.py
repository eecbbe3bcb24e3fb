"""Pictures of an energy: its landscape in two dimensions, and where data, draws and noise lie on it.

plot_landscape           the energy of the density as contours, with draws and data
plot_energy_histograms   energies of held-out data, of draws of the density (negatives) and of its base (noise)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import numpy as np
import numpyro.distributions as dist

from ebm_ppl.train.objective import Density
from ebm_ppl.typing import Array, ArrayLike, EnergyError, EnergyShapeError

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

DEPTH = 8.0
"""Nats above the lowest point that are shown; a Gaussian in the plane has .03 % of its mass beyond."""
MARGIN = 0.12
"""Of the width of all points, on each side."""
MOST = 2000
"""Points of a kind that are drawn."""
INSIDE = 0.005, 0.995
"""Quantiles between which histograms reach."""
KINDS = {"base": ("noise (base)", "0.6"), "samples": ("draws (negatives)", "C1"), "data": ("held-out data", "C0")}
"""Label and colour, from back to front."""


def plot_landscape(
    energy: Callable[[Array], Array],
    *,
    base: dist.Distribution | None = None,
    samples: ArrayLike | None = None,
    data: ArrayLike | None = None,
    extent: tuple[float, float, float, float] | None = None,
    resolution: int = 200,
) -> Figure:
    """The energy of a density in two dimensions, `U(x) - log base(x)`, above its lowest point in the picture.

    Beside each other: the landscape with draws of the density, and with data. Where draws lie and no data do, the
    density has a mode too many, and the other way round. Levels are one nat apart, up to eight.

    Args:
        energy: U, a callable on one event of shape (2,).
        base: of the density, if it has one.
        samples: draws, shape (..., 2), of any number of chains.
        data: shape (num, 2).
        extent: left, right, bottom and top; by default that of the points, and a margin.
        resolution: points of the grid on each side.

    Raises:
        EnergyShapeError: where points have no two coordinates.
        EnergyError: where there is neither a point nor an extent, or where no energy in the picture is finite.

    Example:
        >>> ebm_ppl.plot_landscape(fitted.energy, base=base, samples=tree["posterior"]["x"], data=held_out)
    """
    import matplotlib.pyplot as plt

    points = {name: _in_plane(x, name) for name, x in (("samples", samples), ("data", data)) if x is not None}
    left, right, bottom, top = _extent(list(points.values())) if extent is None else extent
    axes_of_grid = np.linspace(left, right, resolution), np.linspace(bottom, top, resolution)
    grid = np.stack(np.meshgrid(*axes_of_grid), axis=-1)
    heights = np.asarray(_on_grid(Density(energy, base, (2,)), grid.astype(jax.dtypes.canonicalize_dtype(float))))
    if not np.any(np.isfinite(heights)):
        raise EnergyError("The energy is finite nowhere in the picture: give another extent.")
    heights = np.ma.masked_invalid(heights - np.min(heights[np.isfinite(heights)]))
    panels: dict[str, Any] = points or {"": None}
    size = 1.0 + 4.0 * len(panels), 4.0 * min(max((top - bottom) / (right - left), 0.5), 1.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    filled: Any = None
    for axis, (name, shown) in zip(axes.flat, panels.items(), strict=True):
        levels = np.arange(DEPTH + 1)
        filled = axis.contourf(*axes_of_grid, heights, levels=levels, cmap="Blues_r", extend="max")
        axis.contour(*axes_of_grid, heights, levels=levels, colors="0.35", linewidths=0.4)
        if shown is not None:
            chosen = shown[np.linspace(0, len(shown) - 1, min(len(shown), MOST)).astype(int)]
            axis.scatter(*chosen.T, s=5, color="C1" if name == "samples" else "black", alpha=0.5, lw=0)
            axis.set_title(f"{KINDS[name][0]}, {len(chosen):,} of {len(shown):,}", fontsize="medium")
        axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xlabel="x[0]")
    axes[0, 0].set_ylabel("x[1]")
    figure.colorbar(filled, ax=axes, label="energy above the lowest (nats)", shrink=0.9)
    return figure


@eqx.filter_jit
def _on_grid(density: Density, grid: Any) -> Array:
    return jax.vmap(jax.vmap(density.total))(grid)


def _in_plane(points: ArrayLike, name: str) -> np.ndarray:
    found = np.asarray(points)
    if found.shape[-1:] != (2,):
        raise EnergyShapeError(f"plot_landscape draws points of two coordinates; {name} have shape {found.shape}.")
    return found.reshape(-1, 2)


def _extent(points: list[np.ndarray]) -> tuple[float, float, float, float]:
    if not points:
        raise EnergyError("plot_landscape needs samples or data, or an extent: left, right, bottom and top.")
    low, high = np.min([x.min(axis=0) for x in points], axis=0), np.max([x.max(axis=0) for x in points], axis=0)
    margin = MARGIN * np.max(high - low)
    (left, bottom), (right, top) = low - margin, high + margin
    return float(left), float(right), float(bottom), float(top)


def plot_energy_histograms(tree: xr.DataTree) -> Figure:
    """Energies U of held-out data, of draws of the density, and of its base.

    Of an energy that fits, data and draws have the same histogram, and the noise lies apart from both as far as the
    energy has learned anything. Data that lie higher than the draws are less probable than the density says that its
    own are; lower ones are what a model does that was trained too long on other data, or one whose chains lag behind.

    Args:
        tree: a result of `evaluate`.

    Raises:
        EnergyError: for any other.
    """
    import matplotlib.pyplot as plt

    groups = {name: f"energies_{name}" for name in KINDS if f"energies_{name}" in getattr(tree, "children", ())}
    if not groups:
        raise EnergyError("This result has no energies of data: plot_energy_histograms draws what evaluate returns.")
    energies = {name: np.ravel(tree[group].to_dataset()["energy"]) for name, group in groups.items()}
    energies = {name: each[np.isfinite(each)] for name, each in energies.items()}
    # Noise may lie so far above that nothing else could be seen: it is drawn as far as its middle.
    reach = [np.quantile(each, INSIDE) for name, each in energies.items() if name != "base" and len(each)]
    low, high = np.min(reach), np.max(reach)
    if len(noise := energies.get("base", ())):
        low, high = min(low, float(np.quantile(noise, INSIDE[0]))), high + 1.5 * (high - low)
    bins = np.linspace(low, high, 60)
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, each in energies.items():
        label, color = KINDS[name]
        beyond = np.mean((each < low) | (each > high)) if len(each) else 0.0
        label += f", {beyond:.0%} not shown" * bool(beyond >= 0.01)
        weights = np.full(len(each), 1 / (max(len(each), 1) * (bins[1] - bins[0])))
        style: dict[str, Any] = {"bins": bins, "weights": weights, "color": color, "label": label}
        if name == "data":
            axis.hist(each, histtype="step", lw=1.6, **style)
        else:
            axis.hist(each, alpha=0.55, **style)
    axis.set_xlabel("energy U (nats)")
    axis.set_ylabel("density")
    axis.legend(frameon=False)
    return figure
