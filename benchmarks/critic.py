"""Twenty-five modes by a generator, and by the same generator tilted by its critic.

    python benchmarks/critic.py                         both games, two seeds
    python benchmarks/critic.py --games logistic --seeds 0 1 2 3 4 --steps 20000

The problem is that of the literature: five by five normal distributions of standard deviation .05, two apart; a
generator and a critic of two hidden layers of 128 units. The generator is trained by its game, then the critic alone
against it by logistic regression, and scaled at points held out. Then the generator is drawn from in four ways: from
its base, and from the tilted prior by weights, by SMC, and by chains of MALA.

A sample is good within four standard deviations of a mode, which 99.97 % of the data are; a mode is covered by one good
sample or more of four thousand.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from densities import normal_mixture

import ebm_ppl as ebm

SIDE, SCALE, GOOD = 2.0 * np.arange(-2, 3), 0.05, 4.0
CENTRES = np.stack(np.meshgrid(SIDE, SIDE), axis=-1).reshape(-1, 2)
SPREAD = 2.8
"""Of the data, which both networks are given in units of."""
WIDTH, DEPTH, LATENT = 128, 2, 2
TRAINED, HELD_OUT, DRAWN, WEIGHED = 50_000, 10_000, 4000, 2**16
CHAINS, CHUNK = 40, 500


class Scaled(eqx.Module):
    """A network of points, or to points, in other units."""

    network: Callable[[jax.Array], jax.Array]
    before: float = 1.0
    after: float = 1.0

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.after * self.network(x * self.before)


def generator(key: jax.Array) -> ebm.LatentModel:
    network = eqx.nn.MLP(LATENT, 2, WIDTH, DEPTH, jax.nn.relu, key=key)
    noise = ebm.GaussianLikelihood((2,), scale=0.01, is_learned=False)
    return ebm.LatentModel(LATENT, Scaled(network, after=SPREAD), noise)


def critic(key: jax.Array) -> Scaled:
    return Scaled(eqx.nn.MLP(2, "scalar", WIDTH, DEPTH, jax.nn.relu, key=key), before=1 / SPREAD)


def adam(rate: float, num_steps: int) -> optax.GradientTransformation:
    """Without momentum, at a rate that falls to a tenth."""
    return optax.adam(optax.cosine_decay_schedule(rate, num_steps, 0.1), b1=0.0, b2=0.9)


GAMES: dict[str, tuple[Callable[[Scaled], ebm.LogisticGAN | ebm.WassersteinGAN], int]] = {
    "logistic": (lambda critic: ebm.LogisticGAN(critic, penalty=0.05), 1),
    "Wasserstein": (lambda critic: ebm.WassersteinGAN(critic, penalty=0.1), 5),
}
"""The objective, and steps of the critic for one of the generator. The penalties are those of the plane in the
literature; images take larger ones."""
RATES = {"logistic": (2e-4, 1e-3), "Wasserstein": (1e-3, 1e-3)}
"""Of the generator and of the critic."""


def train(game: str, data: np.ndarray, seed: int, num_steps: int) -> tuple[ebm.LatentModel, Scaled]:
    """A generator by its game, and a critic that was then trained alone."""
    keys = jax.random.split(jax.random.key(seed), 4)
    make, turns = GAMES[game]
    of_generator, of_critic = RATES[game]
    slow = adam(of_generator, num_steps // turns)
    players = {"generator": optax.MultiSteps(slow, turns), "critic": adam(of_critic, num_steps)}
    settings = {"every": CHUNK, "progress_bar": False}

    def optimiser(players: dict) -> optax.GradientTransformation:
        return optax.multi_transform(players, ("generator", "critic"))

    objective = make(critic(keys[1]))
    fitted = ebm.fit(
        keys[2],
        generator(keys[0]),
        data,
        objective,
        optimiser=optimiser(players),
        num_steps=num_steps,
        averaging=0.999,
        **settings,
    )
    alone = ebm.LogisticGAN(objective.trained(fitted.parameters))
    players = {
        "generator": optax.set_to_zero(),
        "critic": optax.adam(optax.cosine_decay_schedule(1e-3, num_steps // 2)),
    }
    after = ebm.fit(
        keys[3],
        fitted.energy,
        data,
        alone,
        optimiser=optimiser(players),
        num_steps=num_steps // 2,
        batch_size=256,
        **settings,
    )
    return fitted.energy, alone.trained(after.parameters)


@eqx.filter_jit
def generated(key: jax.Array, model: ebm.LatentModel, num: int) -> jax.Array:
    return model.given(model.base.sample(key, (num,))).mean


def quality(points: np.ndarray) -> tuple[float, int]:
    """Share of good samples, and modes covered."""
    weight = ebm.mode_weights(points, CENTRES, within=GOOD * SCALE).weight
    return float(np.sum(weight)), int(np.sum(weight > 0))


def measured(game: str, seed: int, num_steps: int) -> tuple[dict[str, tuple[float, int]], ebm.LogZ]:
    """Quality by way of drawing, and what the weights say of the tilt."""
    density = normal_mixture(CENTRES, SCALE, np.full(25, 1 / 25))
    data, held_out = (
        density.sample(np.random.default_rng([seed, part]), num).astype(np.float32)
        for part, num in enumerate((TRAINED, HELD_OUT))
    )
    model, log_ratio = train(game, data, seed, num_steps)
    keys = jax.random.split(jax.random.key(1000 + seed), 6)
    log_ratio = ebm.calibrated(log_ratio, held_out, generated(keys[0], model, HELD_OUT))
    tilted = ebm.tilted(model, log_ratio)
    target = ebm.target(ebm.LatentModel.generate, tilted)
    weighed = ebm.weigh_tilt(keys[1], tilted, WEIGHED)
    chosen = jax.random.choice(keys[2], WEIGHED, (DRAWN,), p=jax.nn.softmax(jnp.asarray(weighed.log_weight)))
    particles = ebm.sample(keys[3], target, ebm.SMC(num_particles=DRAWN), num_chains=1, progress_bar=False)
    chains = ebm.sample(
        keys[4],
        target,
        ebm.MALA(),
        num_chains=CHAINS,
        num_warmup=200,
        num_samples=DRAWN // CHAINS,
        thin=5,
        init="reference",
        progress_bar=False,
    )
    points = {
        "bare": generated(keys[5], model, DRAWN),
        "weights": model.given(weighed.z[chosen]).mean,
        "SMC": particles["posterior"]["x"].values.reshape(-1, 2),
        "MALA": chains["posterior"]["x"].values.reshape(-1, 2),
    }
    return {way: quality(np.asarray(x)) for way, x in points.items()}, weighed.log_z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", default=list(GAMES), choices=list(GAMES))
    parser.add_argument("--steps", type=int, default=5000, help="of the game; half as many of the critic alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    ways: Sequence[str] = ("bare", "weights", "SMC", "MALA")
    print("| game | seed | " + " | ".join(ways) + " | SMC / bare | effective | Pareto's k | log Z | processor s |")
    print("|" + "---|" * (7 + len(ways)))
    for game in options.games:
        for seed in options.seeds:
            start = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ebm.EnergyWarning)  # the table says it
                found, log_z = measured(game, seed, options.steps)
            cells = [f"{share:.3f}, {modes} modes" for share, modes in map(found.get, ways)]
            cells.append(f"{found['SMC'][0] / found['bare'][0]:.2f}")
            cells.append(f"{log_z.diagnostics['effective_size'] / WEIGHED:.1%}")
            cells.append(f"{log_z.diagnostics['pareto_k']:.2f}")
            cells.append(f"{log_z.value:.3f} ± {log_z.std_error:.3f}")
            print(f"| {game} | {seed} | " + " | ".join(cells) + f" | {time.process_time() - start:.0f} |", flush=True)


if __name__ == "__main__":
    main()
