"""A two-layer VAE of digits whose prior is a chain of energies, beside one energy and its normal prior.

    python benchmarks/hierarchical.py                            both kinds of pixels, three seeds
    python benchmarks/hierarchical.py --pixels grey --seeds 0

Digits, pixels, classifier and both measures are those of `latent_prior.py`: `hole` is the area under the curve of a
classifier of latents, of 1000 kept digits from as many of the prior; Frechet distance is that of 1000 drawn digits to
the kept ones. The VAE has 8 latents above 16, with perceptrons of 256 units, and is trained for 2500 steps. Then
energies of u, of two layers of 128 units, are trained on draws of its encoder for 4000 steps of 512:

- one energy, relative to N(0, I): by persistent chains, by Jarzynski, and by short runs from N(0, I), which is the
  original (Pang et al. 2020). It is drawn by 60 moves from N(0, I), as many as the chain makes, or by SMC;
- the chain: four levels of noise, 20 moves by MALA from each to the next, with persistent walkers at the lowest. It is
  drawn by the chain, and as the density that it is at the lowest level, by SMC;
- the same without persistent walkers.

A step of each training has about as many evaluations of the gradient, 14336. `evaluations` are those for one draw.
Holes, too, are means of three times 1000 draws, with the standard error of one; seconds are those of a training.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import numpyro
from latent_prior import (
    COPIES,
    DRAWN,
    PRIOR_STEPS,
    TRAINED,
    classifier_features,
    digits,
    encoded,
    falling,
    likelihood_of,
    trained,
)

import ebm_ppl as ebm
from ebm_ppl.train.objective import Density
from ebm_ppl.train.walkers import walk

LAYERS, LEVELS, NUM_MOVES, BATCH = (8, 16), (0.1, 0.5, 1.5, 4.0), 20, 512
DRAWING = NUM_MOVES * (len(LEVELS) - 1)
"""Moves for a draw of the chain."""
MOVES = ebm.Dynamics(ebm.MALA(), NUM_MOVES, 0.5)
WALKERS = ebm.PersistentContrastiveDivergence(1024, dynamics=ebm.Dynamics(ebm.MALA(), 8))
TRAINING = BATCH * (NUM_MOVES + 8)
"""Evaluations of the gradient in a step: of the chain's moves, and of 8 moves of 512 walkers."""

Draws = Callable[[jax.Array], tuple[Any, float]]


def one_energies() -> dict[str, Any]:
    """Objectives of one energy, each with as many evaluations in a step as the chain has."""
    moves = TRAINING // BATCH
    return {
        "persistent": ebm.PersistentContrastiveDivergence(1024, dynamics=ebm.Dynamics(ebm.MALA(), moves)),
        "Jarzynski": ebm.Jarzynski(1024, dynamics=ebm.Dynamics(ebm.MALA(), TRAINING // 2048)),  # it has two populations
        "short runs": ebm.PersistentContrastiveDivergence(
            TRAINING // DRAWING, restart=1.0, dynamics=ebm.Dynamics(ebm.Langevin(), DRAWING, 0.02)
        ),
    }


def prior_of(model: ebm.LatentModel) -> None:
    numpyro.sample("u", model.prior)


def by_smc(model: ebm.LatentModel) -> Draws:
    """Draws by SMC from N(0, I) on, every second of twice as many particles, and evaluations for each."""

    def draws(key: jax.Array) -> tuple[Any, float]:
        how: dict[str, Any] = {"num_chains": 1, "log_likelihood": False, "progress_bar": False}
        tree = ebm.sample(key, ebm.target(prior_of, model), ebm.SMC(num_particles=2 * DRAWN), **how)
        return tree["posterior"]["u"].values[0, ::2], float(tree["smc"]["num_evaluations"].sum()) / DRAWN

    return draws


def by_moves(model: ebm.LatentModel, kernel: Any, step_size: jax.Array) -> Draws:
    """Draws by as many moves from N(0, I) as the chain makes."""
    density, dynamics = Density(model.energy, model.base, (model.latent_dim,)), ebm.Dynamics(kernel, DRAWING)  # pyright: ignore

    @jax.jit
    def moved(key: jax.Array) -> jax.Array:
        key_start, key_moves = jax.random.split(key)
        return walk(key_moves, density.draw_base(key_start, DRAWN), density, dynamics, step_size)[0]

    return lambda key: (moved(key), DRAWING)


def by_chain(model: ebm.LatentModel) -> Draws:
    return lambda key: (model.sample_latents(key, DRAWN), 0 if model.energy is None else DRAWING)


def priors(model: ebm.LatentModel, z: jax.Array, seed: int) -> Iterator[tuple[str, str, Draws, float]]:
    """Name, how it is drawn, its draws, and seconds of processor time of its training."""
    yield "N(0, I)", "exact", by_chain(model), 0.0
    how: dict[str, Any] = {"num_steps": PRIOR_STEPS, "batch_size": BATCH, "averaging": 0.99, "progress_bar": False}
    how["optimiser"] = falling(1e-3, PRIOR_STEPS)
    for name, objective in one_energies().items():
        start, energy = time.process_time(), ebm.MLPEnergy(jax.random.key(seed + 3), model.latent_dim, 128, 2)
        fitted = ebm.fit(jax.random.key(seed + 4), energy, z, objective, base=model.base, **how)
        seconds, tilted = time.process_time() - start, model.with_prior(fitted.energy)
        moves = by_moves(tilted, objective.dynamics.kernel, fitted.state.step_size)
        yield f"one energy, {name}", "moves", moves, seconds
        yield f"one energy, {name}", "SMC", by_smc(tilted), seconds
    for name, marginal in {"chain": WALKERS, "chain, conditionals alone": None}.items():
        start = time.process_time()
        energy = ebm.NoiseConditionalEnergy(jax.random.key(seed + 3), model.latent_dim, LEVELS, width=128)
        objective = ebm.RecoveryLikelihood(LEVELS, MOVES, "reference", marginal)
        fitted = ebm.fit(jax.random.key(seed + 4), energy, z, objective, **how)
        moves = ebm.Dynamics(MOVES.kernel, NUM_MOVES, float(fitted.state.step_size))
        seconds, tilted = time.process_time() - start, model.with_prior(ebm.DiffusionPrior(fitted.energy, moves))
        yield name, "chain", by_chain(tilted), seconds
        yield name, "SMC", by_smc(tilted), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", nargs="+", default=["grey", "bits"], choices=["bits", "grey"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    warnings.simplefilter("ignore", ebm.EnergyWarning)
    print("| pixels | seed | prior | drawn by | evaluations | hole | Frechet distance | processor s |")
    print("|---|---|---|---|---|---|---|---|")
    for pixels in options.pixels:
        for seed in options.seeds:
            images, labels = digits(pixels, seed)
            images, kept = images[:TRAINED], images[TRAINED:]
            features = classifier_features(images, labels[:TRAINED])
            untrained = ebm.hierarchical_vae(jax.random.key(seed), LAYERS, likelihood_of(pixels, 0.2))
            model = trained(untrained, images, seed)
            z = encoded(jax.random.key(seed + 2), model, images, COPIES)
            of_kept = encoded(jax.random.key(seed + 5), model, kept)
            for name, drawn_by, draws, seconds in priors(model, z, seed):
                drawn, evaluations = zip(*(draws(jax.random.key(draw)) for draw in range(3)), strict=True)
                areas = [ebm.classifier_auc(jax.random.key(draw), each, of_kept) for draw, each in enumerate(drawn)]
                made = [model.given(u).sample(jax.random.key(9)) for u in drawn]
                distance = np.mean([ebm.frechet_distance(features(each), features(kept)) for each in made])
                hole = f"{np.mean([area.value for area in areas]):.3f} ± {areas[0].std_error:.3f}"
                print(
                    f"| {pixels} | {seed} | {name} | {drawn_by} | {np.mean(evaluations):.0f} | {hole} | {distance:.1f} "
                    f"| {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
