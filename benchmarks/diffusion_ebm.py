"""Energies on the plane by adversarial diffusion, beside its parents: adversarial training and recovery likelihood.

    python benchmarks/diffusion_ebm.py                                        all methods, all densities, three seeds
    python benchmarks/diffusion_ebm.py --densities pinwheel --seeds 1 2 --methods "adversarial diffusion"

The 25 Gaussians are those of the literature: five by five of standard deviation .05, two apart, in units of 2.8; the
pinwheel and the swiss roll those of `densities.py`. 50 000 points are trained on. All methods have the same network of
the energy, conditional on the same levels of noise (without diffusion at the smallest alone): three layers, two of 128
units, with a periodic activation, batches of 128, as many steps, Adam without momentum at rates that fall to 2 % along
a cosine, and averages of the parameters. Generators have the same width, but that of `Adversarial` has SiLU units,
where ours has periodic ones. Settings were chosen on seeds 0 and 100, by the 25 Gaussians: those of adversarial
diffusion by some twenty runs, the rates of `Adversarial` of four pairs, levels and rate of recovery of three and two.

- modes: of 25 that have a draw, of 10 000, within four standard deviations (the 25 Gaussians alone).
- within: share of draws within four standard deviations of a mode; of the other two, where the true density is above
  that of all but a thousandth of the data.
- KL: of the truth to exp(-U(x, sigma_0)) / Z, with log Z by quadrature in nested squares, the mean over 10 000 points
  held out; and that of the uniform density on the square of half-width 4, in nats; and their ratio.

Draws of the energy and generator are those of the generator alone, and ("moved") with 20 moves of MALA at each level by
the energy; of adversarial training by its generator; of recovery by its chain, with as many moves.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import critic
import jax
import jax.numpy as jnp
import numpy as np
import optax
from densities import DENSITIES, HALF_WIDTH, Density, UnboundedError, log_partition, normal_mixture

import ebm_ppl as ebm

SPREAD = 2.8
CENTRES, SCALE = critic.CENTRES / SPREAD, critic.SCALE / SPREAD
MODES = "25 Gaussians"
STEPS = {MODES: 16_000, "pinwheel": 4000, "swiss roll": 4000}
LEVELS = 0.07, 0.078, 0.095, 0.13, 0.2, 0.32, 0.6, 1.2, 2.5
"""Many small ones: what is drawn at one step is a little wider than the y from which the next one was learned."""
WIDTH, DEPTH, BATCH, TRAINED, HELD_OUT, DRAWN = 128, 2, 128, 50_000, 10_000, 10_000
RATES = {"energy": 1.5e-4, "generator": 1.5e-3}
RECOVERY_RATE = 1e-3
"""Of an energy that has no generator to wait for."""
PENALTY, FORWARD = 0.005, 1.0
RECOVERY = ebm.Dynamics(ebm.MALA(), 10, 0.3)
FROM = "reference"
MOVES = ebm.Dynamics(ebm.MALA(), 20, 0.3)


def density_of(name: str) -> Density:
    return normal_mixture(CENTRES, SCALE, np.full(25, 1 / 25)) if name == MODES else DENSITIES[name]()


def wave(x: jax.Array) -> jax.Array:
    """About sin(4 x), of arcs of parabolas: XLA takes several times as long for a sine.

    Periodic units see narrow modes at once, where those that rise once need many times the steps; and since they are
    bounded, an energy has the tails of the normal distribution that it corrects.
    """
    x = 4 / np.pi * x
    x = x - 2 * jnp.round(x / 2)
    return 4 * x * (1 - jnp.abs(x))


def falling(rate: float, num_steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, num_steps, 0.02), b1=0.0, b2=0.99)


def trained(method: str, data: np.ndarray, seed: int, num_steps: int) -> tuple[Any, dict[str, np.ndarray]]:
    """An energy, and draws by name of how they are drawn."""
    keys, scale = jax.random.split(jax.random.key(seed), 4), float(data.std())
    energy = ebm.NoiseConditionalEnergy(keys[0], 2, LEVELS, scale, WIDTH, DEPTH, wave)
    rates = {name: falling(rate, num_steps) for name, rate in RATES.items()}
    optimiser = optax.multi_transform(rates, ("energy", "generator"))
    if method == "adversarial diffusion":
        generator = ebm.DenoisingGenerator(keys[1], 2, LEVELS, None, scale, WIDTH, DEPTH, wave)
        objective: Any = ebm.AdversarialDiffusion(generator, PENALTY, FORWARD)
    elif method == "adversarial":
        objective = ebm.Adversarial(ebm.ImplicitGenerator(keys[1], 2, width=WIDTH, depth=DEPTH))
    else:
        objective, optimiser = ebm.RecoveryLikelihood(LEVELS, RECOVERY, FROM), falling(RECOVERY_RATE, num_steps)
    how: dict[str, Any] = {"num_steps": num_steps, "batch_size": BATCH, "averaging": 0.999, "every": 500}
    fitted = ebm.fit(keys[2], energy, data, objective, optimiser=optimiser, progress_bar=False, **how)
    if method == "adversarial diffusion":
        generator = objective.trained(fitted.parameters)
        ways = {"": {}, ", moved": {"energy": fitted.energy, "dynamics": MOVES}}
        trees = {way: ebm.denoise(keys[3], generator, num=DRAWN, **given) for way, given in ways.items()}
        return fitted.energy, {way: tree["posterior"]["x"].values[0] for way, tree in trees.items()}
    if method == "adversarial":
        draws = jax.vmap(objective.trained(fitted.parameters).draw)(jax.random.split(keys[3], DRAWN))[0]
    else:
        start = energy.reference(LEVELS[-1])
        draws = ebm.recover(keys[3], fitted.energy, LEVELS, start, num=DRAWN, dynamics=MOVES, moves_from=FROM)
    return fitted.energy, {"": np.asarray(draws)}


def quality(name: str, density: Density, x: np.ndarray) -> str:
    """Modes and share within, as cells."""
    if name == MODES:
        weight = ebm.mode_weights(x, CENTRES, within=critic.GOOD * SCALE).weight
        return f"{np.sum(weight > 0)} | {np.sum(weight):.3f}"
    data = density.sample(np.random.default_rng(10**6 + 1), 100_000)
    least = np.quantile(density.log_density(data), 1e-3)
    return f" | {np.mean(density.log_density(x.astype(float)) > least):.3f}"


def divergences(density: Density, energy: Callable[[Any], Any]) -> str:
    """KL, that of the uniform density, and their ratio, as cells."""
    held_out = density.sample(np.random.default_rng(10**6), HELD_OUT)
    of_truth, compiled = np.mean(density.log_density(held_out)), jax.jit(jax.vmap(energy))
    of_uniform = of_truth + 2 * np.log(2 * HALF_WIDTH)
    try:
        found = of_truth + np.mean(compiled(held_out.astype(np.float32))) + log_partition(compiled)
    except UnboundedError:
        return f"unbounded | {of_uniform:.2f} | "
    return f"{found:.2f} | {of_uniform:.2f} | {found / of_uniform:.3f}"


def main() -> None:
    methods = "adversarial diffusion", "adversarial", "recovery"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    print("| density | method | seed | modes | within | KL | KL of uniform | ratio | processor s |")
    print("|" + "---|" * 9)
    for method in options.methods:
        for name in options.densities:
            for seed in options.seeds:
                density, start = density_of(name), time.process_time()
                data = density.sample(np.random.default_rng(seed), TRAINED).astype(np.float32)
                head = f"| {name} | {method}"
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", ebm.EnergyWarning)  # the table says it
                        energy, draws = trained(method, data, seed, STEPS[name])
                except ebm.NonFiniteEnergyError:
                    print(f"{head} | {seed} | | | not finite | | | |", flush=True)
                    continue
                seconds, of_energy = time.process_time() - start, divergences(density, energy)
                for way, x in draws.items():
                    cells = f"{seed} | {quality(name, density, x)} | {of_energy} | {seconds:.0f}"
                    print(f"{head}{way} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
