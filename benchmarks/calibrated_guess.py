"""A VAE of digits whose encoder follows its draws to where Langevin moves take them, beside the same VAE without.

    python benchmarks/calibrated_guess.py --seeds 0 1 2

The VAE is that of `latent_prior.py` for bits: 16 latents, perceptrons of two layers of 256 units, 2500 steps of 128 of
4000 digits, from the same first weights and batches by `ebm.EvidenceBound()` and by
`ebm.CalibratedGuess(ebm.EvidenceBound())` as it comes. Of 1000 digits that were kept, in nats: the bound of log p(x), a
mean over 200 draws of the encoder, and log p(x) by the weights of 2000 draws, itself a bound, but a close one.
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
from latent_prior import LATENT, TRAINED, VAE_STEPS, digits
from records import as_header, as_row, timed, with_error

import ebm_ppl as ebm

BOUND_DRAWS, DRAWS, AT_ONCE = 200, 2000, 10
OBJECTIVES = {"plain": ebm.EvidenceBound(), "calibrated": ebm.CalibratedGuess(ebm.EvidenceBound())}


def trained(seed: int, images: np.ndarray, objective: Any, num_steps: int) -> Any:
    model = ebm.vae(jax.random.key(seed), LATENT, ebm.BernoulliLikelihood((28, 28)))
    how: dict[str, Any] = {"num_steps": num_steps, "averaging": 0.99, "progress_bar": False}
    return ebm.fit(jax.random.key(seed + 1), model, images, objective, optimiser=optax.adam(1e-3), **how)


@eqx.filter_jit
def likelihoods(key: Any, model: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bound and log p(x) of each digit."""

    def of_digit(given: Any) -> tuple[jax.Array, jax.Array]:
        key, x = given
        weights = jax.vmap(lambda key: model.log_weight(key, x))(jax.random.split(key, DRAWS))
        return jnp.mean(weights[:BOUND_DRAWS]), jax.nn.logsumexp(weights) - np.log(DRAWS)

    return jax.lax.map(of_digit, (jax.random.split(key, len(x)), x), batch_size=AT_ONCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=VAE_STEPS)
    options = parser.parse_args()
    columns = "seed", "VAE", "bound", "log p(x)", "log p(x) less plain's", "distance C", "its weight", "processor s"
    print(as_header(*columns))
    for seed in options.seeds:
        images, _ = digits("bits", seed)
        images, kept = images[:TRAINED], jnp.asarray(images[TRAINED:])
        found: dict[str, np.ndarray] = {}
        for name, objective in OBJECTIVES.items():
            spent, fitted = timed(partial(trained, seed, images, objective, options.steps))
            bound, log_p = (np.asarray(each, float) for each in likelihoods(jax.random.key(0), fitted.energy, kept))
            found[name], told = log_p, ("", "", "")
            if name == "calibrated":
                record = fitted.record["training"]
                weight, distance = record["weight"].values, float(record["distance"][-200:].mean())
                less = with_error(log_p - found["plain"], "+.2f")
                told = less, f"{distance:.2f}", f"{weight.min():.1f} to {weight.max():.1f}"
            print(
                as_row(str(seed), name, f"{bound.mean():.2f}", f"{log_p.mean():.2f}", *told, f"{spent:.0f}"), flush=True
            )


if __name__ == "__main__":
    main()
