"""Damaged digits mended by a VAE that an energy calibrated, by the same VAE without, and by interpolation.

    python benchmarks/restoration.py --seeds 1 2 3

The VAEs are those of `calibrated_vae.py`, trained on 4000 digits of each seed; of the 1000 that were kept so many are
damaged, by three operators, each mildly and heavily, and noise:

- pixels: so many of 784, at random places, are known (with noise of .01).
- resolution: means of squares (with noise of .01).
- noise: all pixels, with normal noise of that standard deviation.

`ebm.restoration` is the posterior of the digit under each VAE, without its energy; its mean is by SMC of 250 particles.
Interpolation is linear, from nearest neighbours beyond the hull of what is known; of noisy digits it is a normal
filter, of the width that is best for 100 digits of the training. The error of a digit is the root mean square over
pixels. Differences are paired, with their standard error over digits.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import jax
import numpy as np
from calibrated_vae import objectives, trained
from latent_prior import TRAINED, digits
from scipy.interpolate import griddata
from scipy.ndimage import gaussian_filter

import ebm_ppl as ebm

SMC = ebm.SMC(250)
STEPS = 2500
GRID = np.stack(np.meshgrid(np.arange(28.0), np.arange(28.0), indexing="ij"), axis=-1).reshape(-1, 2)
WIDTHS = np.arange(0.5, 5.0, 0.25)
"""Of the filter."""


def damages() -> dict[str, tuple[np.ndarray, float]]:
    """Operators and noise, by name."""
    order = np.random.default_rng(1).permutation(784)
    known = {f"{num} pixels": (np.eye(784)[np.sort(order[:num])], 0.01) for num in (196, 39)}
    return (
        known
        | {"7 x 7": (means(7), 0.01), "4 x 4": (means(4), 0.01)}
        | {f"noise of {noise}": (np.eye(784), noise) for noise in (0.5, 1.5)}
    )


def means(num: int) -> np.ndarray:
    """Of num x num squares."""
    rows = np.kron(np.eye(num), np.full((1, 28 // num), num / 28))
    return np.kron(rows, rows)


def interpolated(matrix: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """Without a model; `width` is that of the filter, where all pixels are seen."""
    if len(matrix) == 784:
        return gaussian_filter(y.reshape(28, 28), width)
    places = (matrix @ GRID) / matrix.sum(axis=1, keepdims=True)
    found = griddata(places, y, GRID, "linear")
    return np.where(np.isnan(found), griddata(places, y, GRID, "nearest"), found).reshape(28, 28)


def best_width(images: np.ndarray, noise: float) -> float:
    noisy = images + noise * np.random.default_rng(2).normal(size=images.shape)
    errors = [np.mean((gaussian_filter(noisy, (0, width, width)) - images) ** 2) for width in WIDTHS]
    return float(WIDTHS[np.argmin(errors)])


def mended(key: Any, model: Any, operator: Any, y: Any, noise: float) -> np.ndarray:
    """The posterior mean of a digit."""
    target = ebm.target(ebm.restoration, model, operator, y, noise)
    draws = ebm.sample(key, target, SMC, progress_bar=False, log_likelihood=False)["posterior"]
    return draws["x"].values.mean(axis=(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--digits", type=int, default=40)
    parser.add_argument("--damages", nargs="+", default=list(damages()), choices=list(damages()))
    options = parser.parse_args()
    warnings.simplefilter("ignore", ebm.EnergyWarning)
    print("| seed | damage | interpolation | plain | calibrated | calibrated less plain | seconds |")
    print("|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        images = digits("shades", seed)[0]
        images, kept = images[:TRAINED], images[TRAINED : TRAINED + options.digits]
        models = {name: trained(seed, images, objective, STEPS).energy for name, objective in objectives(seed).items()}
        for name in options.damages:
            start = time.process_time()
            matrix, noise = damages()[name]
            operator, width = ebm.LinearOperator(matrix), best_width(images[:100], noise)
            rng = np.random.default_rng(seed)
            errors = []
            for index, digit in enumerate(kept):
                y = (matrix @ digit.ravel() + noise * rng.normal(size=len(matrix))).astype(np.float32)
                found = [interpolated(matrix, y, width)]
                found += [mended(jax.random.key(index), model, operator, y, noise) for model in models.values()]
                errors.append([np.sqrt(np.mean((each - digit) ** 2)) for each in found])
            errors = np.array(errors)
            told = " | ".join(f"{each:.4f}" for each in errors.mean(axis=0))
            less = errors[:, 2] - errors[:, 1]
            difference = f"{less.mean():+.4f} ± {less.std(ddof=1) / np.sqrt(len(less)):.4f}"
            print(f"| {seed} | {name} | {told} | {difference} | {time.process_time() - start:.0f} |", flush=True)


if __name__ == "__main__":
    main()
