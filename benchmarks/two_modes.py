"""The weights of two modes in fifty dimensions, between which no chain crosses: three ways to train.

    data       1/4 N(-10 e, I) + 3/4 N(6 e, I)                                    e the first unit vector
    energy     V(x) = -log( exp(-|x - a|^2 / 2) + exp(-|x - b|^2 / 2 - z) )       a = -e/2, b = e/2, z = 0 at the start
    base       N(0, I), so that U(x) = V(x) - |x|^2 / 2
    truth      weight of the first mode sigmoid(z) = 1/4; log Z = log(1 + exp(-z)) of whatever z is learned

The problem is that of Carbone, Hua, Coste and Vanden-Eijnden (2023). The table has, after training: the weight of the
first mode, log Z by the witness and by the driver less the exact one, and the Kullback-Leibler divergence of the data
from the model, by draws of the data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax

import ebm_ppl as ebm

DIM, CENTRES, WEIGHT = 50, (-10.0, 6.0), 0.25
DYNAMICS = ebm.Dynamics(ebm.Langevin(), num_moves=1, step_size=0.1)


class TwoBells(eqx.Module):
    """Two normal densities of unit variance, relative to N(0, I): their means, and the log odds of the first."""

    means: jax.Array
    log_odds: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        bells = -jnp.sum((x - self.means) ** 2, axis=1) / 2 - jnp.stack([jnp.zeros(()), self.log_odds])
        return -jax.nn.logsumexp(bells) - x @ x / 2

    @property
    def weight(self) -> float:
        """Of the first."""
        return float(jax.nn.sigmoid(self.log_odds))

    @property
    def log_z(self) -> float:
        return float(jnp.log1p(jnp.exp(-self.log_odds)))


def draws(num: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, DIM))
    x[:, 0] += np.where(rng.random(num) < WEIGHT, *CENTRES)
    return x


def divergence(energy: TwoBells, num: int = 20_000) -> float:
    """KL(data || model)."""
    x = draws(num, seed=12345)
    squares = [np.sum((x - centre * np.eye(DIM)[0]) ** 2, axis=1) for centre in CENTRES]
    parts = np.log([[WEIGHT], [1 - WEIGHT]]) - np.array(squares) / 2
    log_model = -jax.vmap(energy)(jnp.asarray(x)) - np.sum(x**2, axis=1) / 2 - energy.log_z
    return float(np.mean(np.logaddexp(*parts) - log_model))


def slowly(num_steps: int) -> optax.GradientTransformation:
    """Gradient descent whose means travel at most .003 a step, so that walkers keep up, and whose rate falls to zero,
    since what parameters follow of the walkers' noise adds up in the weights of the driver."""
    return optax.chain(optax.clip(0.5), optax.sgd(optax.cosine_decay_schedule(0.006, num_steps)))


METHODS: dict[str, Callable[[int, int], tuple[object, optax.GradientTransformation]]] = {
    "contrastive divergence, gradient descent": lambda n, t: (ebm.ContrastiveDivergence(DYNAMICS), slowly(t)),
    "contrastive divergence, Adam": lambda n, t: (ebm.ContrastiveDivergence(DYNAMICS), optax.adam(0.01)),
    "persistent": lambda n, t: (ebm.PersistentContrastiveDivergence(n, dynamics=DYNAMICS), slowly(t)),
    "persistent, at a constant rate": lambda n, t: (
        ebm.PersistentContrastiveDivergence(n, dynamics=DYNAMICS),
        optax.sgd(0.006),
    ),
    "Jarzynski": lambda n, t: (ebm.Jarzynski(n, dynamics=DYNAMICS), slowly(t)),
}


def train(method: str, num_walkers: int, num_steps: int, seed: int) -> tuple[float, ...]:
    """Weight, errors of log Z by witness and driver, and divergence."""
    objective, optimiser = METHODS[method](num_walkers, num_steps)
    start = np.zeros((2, DIM))
    start[:, 0] = [-0.5, 0.5]
    fitted = ebm.fit(
        jax.random.key(seed),
        TwoBells(jnp.asarray(start), jnp.zeros(())),
        draws(20_000, seed),
        objective,
        base=dist.Normal(0.0, 1.0).expand([DIM]).to_event(1),
        optimiser=optimiser,
        num_steps=num_steps,
        batch_size=min(num_walkers, 1000),
        every=500,
        progress_bar=False,
    )
    training = fitted.record["training"].to_dataset()
    errors = [float(training[n][-1]) - fitted.energy.log_z for n in ("log_z", "log_z_of_driver") if n in training]
    return fitted.energy.weight, *(errors or (np.nan, np.nan)), divergence(fitted.energy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walkers", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    print("| method | seed | weight of the first mode | log Z, error of the witness | of the driver | KL |")
    print("|---|---|---|---|---|---|")
    for method in options.methods:
        for seed in range(options.seeds):
            found = train(method, options.walkers, options.steps, seed)
            print(f"| {method} | {seed} | " + " | ".join(f"{x:.4f}" for x in found) + " |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
