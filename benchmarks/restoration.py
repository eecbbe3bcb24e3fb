"""Damaged digits mended by a VAE that an energy calibrated, by the same VAE without, and by interpolation.

    python benchmarks/restoration.py --seeds 1 2 3

The VAEs are those of `calibrated_vae.py`, trained on `--trained` digits of each seed; `--digits` of the 1000 that were
kept are damaged in three ways, each mildly and heavily:

- 196 or 39 pixels of 784, at random places, are known (with noise of .01).
- 7 x 7 or 4 x 4: means of squares (with noise of .01).
- noise: all pixels, with normal noise of that standard deviation.

`ebm.restoration` is the posterior of the digit under each VAE, without its energy; its mean is by SMC of 100 particles.
Interpolation is linear, from nearest neighbours beyond the hull of what is known; of noisy digits it is a normal
filter, of the width that is best for 100 digits of the training. The error of a digit is the root mean square over
pixels. Differences are paired, with their standard error over digits.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from calibrated_vae import objectives, trained
from latent_prior import TRAINED, digits
from records import as_header, as_row, timed, with_error
from scipy.interpolate import griddata
from scipy.ndimage import gaussian_filter

import ebm_ppl as ebm

SMC = ebm.SMC(100)
GRID = np.stack(np.meshgrid(np.arange(28.0), np.arange(28.0), indexing="ij"), axis=-1).reshape(-1, 2)
WIDTHS = np.arange(0.5, 5.0, 0.25)
"""Of the filter."""


def squares(num: int) -> np.ndarray:
    """The operator that takes the means of num x num of them."""
    rows = np.kron(np.eye(num), np.full((1, 28 // num), num / 28))
    return np.kron(rows, rows)


ORDER = np.random.default_rng(1).permutation(784)
DAMAGES = {
    "196 pixels": (np.eye(784)[np.sort(ORDER[:196])], 0.01),
    "39 pixels": (np.eye(784)[np.sort(ORDER[:39])], 0.01),
    "7 x 7": (squares(7), 0.01),
    "4 x 4": (squares(4), 0.01),
    "noise of 0.5": (np.eye(784), 0.5),
    "noise of 1.5": (np.eye(784), 1.5),
}
"""Operator and noise, by name."""


def interpolated(matrix: np.ndarray, y: np.ndarray) -> np.ndarray:
    """From means of pixels that lie about their places."""
    places = (matrix @ GRID) / matrix.sum(axis=1, keepdims=True)
    found = griddata(places, y, GRID, "linear")
    return np.where(np.isnan(found), griddata(places, y, GRID, "nearest"), found).reshape(28, 28)


def best_width(images: np.ndarray, noise: float) -> float:
    """Of the filter of noisy images."""
    noisy = images + noise * np.random.default_rng(2).normal(size=images.shape)
    errors = [np.mean((gaussian_filter(noisy, (0, width, width)) - images) ** 2) for width in WIDTHS]
    return float(WIDTHS[np.argmin(errors)])


def without_model(matrix: np.ndarray, noise: float, images: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What mends a digit by what is known of it alone; `images` choose the width where that is a filter."""
    if len(matrix) < 784:
        return partial(interpolated, matrix)
    width = best_width(images, noise)
    return lambda y: gaussian_filter(y.reshape(28, 28), width)


def mended(key: Any, model: Any, operator: Any, y: Any, noise: float) -> np.ndarray:
    """The posterior mean of a digit."""
    target = ebm.target(ebm.restoration, model, operator, y, noise)
    how = {"num_chains": 1, "progress_bar": False, "log_likelihood": False}
    draws = ebm.sample(key, target, SMC, **how)["posterior"]
    return draws["x"].values.mean(axis=(0, 1))


def errors(seed: int, damage: str, models: list[Any], images: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Of each kept digit, without a model and by each, shape (digit, 1 + models)."""
    matrix, noise = DAMAGES[damage]
    operator, simple = ebm.LinearOperator(matrix), without_model(matrix, noise, images[:100])
    rng, found = np.random.default_rng(seed), []
    for index, digit in enumerate(kept):
        y = (matrix @ digit.ravel() + noise * rng.normal(size=len(matrix))).astype(np.float32)
        by_models = [mended(jax.random.key(index), model, operator, y, noise) for model in models]
        found.append([np.sqrt(np.mean((each - digit) ** 2)) for each in (simple(y), *by_models)])
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--digits", type=int, default=100)
    parser.add_argument("--damages", nargs="+", default=list(DAMAGES), choices=list(DAMAGES))
    parser.add_argument("--trained", type=int, default=TRAINED, help="digits to train on, of 4000")
    parser.add_argument("--steps", type=int, default=2500)
    options = parser.parse_args()
    warnings.simplefilter("ignore", ebm.EnergyWarning)
    columns = "seed", "damage", "interpolation", "plain", "calibrated", "calibrated less plain", "processor s"
    print(as_header(*columns))
    for seed in options.seeds:
        images = digits("shades", seed)[0]
        images, kept = images[: options.trained], images[TRAINED : TRAINED + options.digits]
        models = [trained(seed, images, objective, options.steps).energy for objective in objectives(seed).values()]
        for damage in options.damages:
            seconds, found = timed(partial(errors, seed, damage, models, images, kept))
            means = (f"{each:.4f}" for each in found.mean(axis=0))
            less = with_error(found[:, 2] - found[:, 1], "+.4f")
            print(as_row(str(seed), damage, *means, less, f"{seconds:.0f}"), flush=True)


if __name__ == "__main__":
    main()
