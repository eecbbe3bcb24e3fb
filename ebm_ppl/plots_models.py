"""Pictures of what a model of images makes: sheets of draws, and where its latents lead.

plot_images       images in rows
plot_traversal    the mean image along each latent, one row for each
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from ebm_ppl.models.latent import LatentModel
from ebm_ppl.typing import Array, ArrayLike, EnergyError, EnergyShapeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, LETTER = 0.7, 0.1
"""Of an image, and of what is written beside it, in inches."""


def plot_images(images: ArrayLike, *, num_columns: int = 10, rows: Sequence[str] | None = None) -> Figure:
    """A sheet of images.

    Args:
        images: shape (num, height, width), or (num, channels, height, width) with one or three channels; a row after
            the other.
        num_columns: of the sheet.
        rows: what to call each row.

    Raises:
        EnergyShapeError: for what is no array of images, or names of other rows.

    Example:
        >>> ebm_ppl.plot_images(model.sample(jax.random.key(0), 40))
    """
    import matplotlib.pyplot as plt

    shown = np.asarray(images, float)
    if shown.ndim == 4:
        shown = np.moveaxis(shown, 1, -1)
    if shown.ndim not in (3, 4) or (shown.ndim == 4 and shown.shape[-1] not in (1, 3)) or not len(shown):
        raise EnergyShapeError(
            f"images have shape {np.shape(images)}; expected (num, height, width), or (num, channels, height, width) "
            "with one or three channels."
        )
    num_rows = -(-len(shown) // num_columns)
    if rows is not None and len(rows) != num_rows:
        raise EnergyShapeError(f"There are {len(rows)} names for {num_rows} rows.")
    num_columns = min(num_columns, len(shown))
    size = SIDE * num_columns + LETTER * max(map(len, rows or [""])), SIDE * num_rows
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
    bottom, top = np.nanmin(shown), np.nanmax(shown)
    # Of all images alike; an image that is the same everywhere is no reason to divide by zero.
    scaled = (shown - bottom) / max(top - bottom, np.finfo(float).tiny)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    for axis, image in zip(axes.flat, scaled, strict=False):
        axis.imshow(np.squeeze(image), cmap="gray_r", vmin=0, vmax=1)
    for axis, name in zip(axes[:, 0], rows or (), strict=False):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)  # pyright: ignore
    return figure


def plot_traversal(
    model: LatentModel,
    origin: ArrayLike | None = None,
    *,
    latents: Sequence[int] | None = None,
    reach: float = 3.0,
    num: int = 9,
) -> Figure:
    """Mean images along some latents, one row for each, with the others held where they are.

    Args:
        model: of images.
        origin: z to start from, shape (latent_dim,); zero by default.
        latents: which to move, by number; all by default.
        reach: how far on either side, in units of z.
        num: images of a row.

    Raises:
        EnergyShapeError: for an origin of another shape, or a model of something else than images.
        EnergyError: for a latent that is not there.

    Example:
        >>> ebm_ppl.plot_traversal(model, model.posterior_guess(digits[0]).mean)
    """
    chosen = list(range(model.latent_dim)) if latents is None else list(latents)
    if not chosen or min(chosen) < 0 or max(chosen) >= model.latent_dim:
        raise EnergyError(f"latents are numbers from 0 to {model.latent_dim - 1}; got {chosen}.")
    start = jnp.zeros(model.latent_dim) if origin is None else jnp.asarray(origin)
    if start.shape != (model.latent_dim,):
        raise EnergyShapeError(f"origin has shape {start.shape}; expected ({model.latent_dim},).")
    z = jnp.stack([start.at[i].set(start[i] + by) for i in chosen for by in np.linspace(-reach, reach, num)])
    images: Any = model.given(z).mean
    return plot_images(_as_images(images), num_columns=num, rows=[f"z[{i}]" for i in chosen])


def _as_images(means: Array) -> Array:
    if means.ndim not in (3, 4):
        raise EnergyShapeError(f"The events of the model have shape {means.shape[1:]}, which is none of an image.")
    return means
