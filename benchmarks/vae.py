"""A variational autoencoder beside plain NumPyro: speed, and the bound of digits held out.

    python benchmarks/vae.py --seeds 3

The same networks with the same first weights, size of batches and optimiser, by `ebm.fit` and by NumPyro, with
Equinox's perceptrons by `eqx_module`: its `SVI.run`, with the data in a subsampled plate, and its `SVI.update`, in a
scan over epochs by hand, with the data shuffled anew for each epoch, which is as fast as its user can have it. Real
digits of 28 x 28 binary pixels, 4000 to train on and 1000 held out. Trainers take turns in one process, by the clock of
its processor. A rate is by what a whole run takes longer than one of half as many epochs, so that what a run compiles
(`SVI.run` anew each time) and checks counts for none.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from latent_prior import TRAINED, digits
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO
from records import timed

import ebm_ppl as ebm

SIDE, LATENT, BATCH = 28, 16, 128
EPOCH = TRAINED // BATCH
ADAM = optax.adam(1e-3)
"""One object, since programs are compiled anew for another."""
DRAWS = 64
"""Of the encoder for each digit held out."""


def ours(model: ebm.LatentModel, data: np.ndarray) -> Callable[[Any, int], ebm.LatentModel]:
    objective = ebm.EvidenceBound()

    def train(key: Any, epochs: int) -> ebm.LatentModel:
        how: dict[str, Any] = {"num_steps": epochs * EPOCH, "batch_size": BATCH, "progress_bar": False}
        return ebm.fit(key, model, data, objective, optimiser=ADAM, **how).energy

    return train


def places(model: ebm.LatentModel) -> tuple[Any, Any]:
    """Of encoder and decoder."""
    return model.encoder.layers[1], model.decoder


def plain_perceptrons(key: Any) -> tuple[eqx.nn.MLP, eqx.nn.MLP]:
    """Equinox's own, of the same weights as those of `ebm.vae` by that key."""
    key_encoder, key_decoder = jax.random.split(key)
    encoder = eqx.nn.MLP(SIDE**2, 2 * LATENT, 256, 2, jax.nn.silu, key=key_encoder)
    return encoder, eqx.nn.MLP(LATENT, SIDE**2, 256, 2, jax.nn.silu, key=key_decoder)


def numpyros(
    model: ebm.LatentModel, perceptrons: tuple[eqx.nn.MLP, eqx.nn.MLP], data: np.ndarray, by_hand: bool
) -> Callable[[Any, int], ebm.LatentModel]:
    """NumPyro's `SVI.run`, with the data in a subsampled plate; or its updates in a scan over epochs, by hand."""
    rows = jnp.asarray(data.reshape(len(data), -1))

    @contextlib.contextmanager
    def plate(x: jax.Array) -> Iterator[jax.Array]:
        with numpyro.plate("observation", len(x), subsample_size=None if by_hand else BATCH) as chosen:
            yield x if by_hand else x[chosen]

    def program(x: jax.Array) -> None:
        decoder: Any = eqx_module("decoder", perceptrons[1])
        with plate(x) as batch:
            z: Any = numpyro.sample("z", dist.Normal(jnp.zeros(LATENT)).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=jax.vmap(decoder)(z)).to_event(1), obs=batch)

    def guide(x: jax.Array) -> None:
        encoder: Any = eqx_module("encoder", perceptrons[0])
        with plate(x) as batch:
            mean, log_scale = jnp.split(jax.vmap(encoder)(batch), 2, axis=1)
            numpyro.sample("z", dist.Normal(mean, jnp.exp(log_scale)).to_event(1))

    svi = SVI(program, guide, ADAM, Trace_ELBO())

    def epoch(state: Any, key: Any) -> tuple[Any, jax.Array]:
        order = jax.random.permutation(key, len(rows))[: EPOCH * BATCH].reshape(EPOCH, BATCH)
        return jax.lax.scan(lambda state, chosen: svi.update(state, rows[chosen]), state, order)

    epochs_of = jax.jit(lambda state, keys: jax.lax.scan(epoch, state, keys))

    def train(key: Any, epochs: int) -> ebm.LatentModel:
        key_init, key_epochs = jax.random.split(key)
        if by_hand:
            state, losses = epochs_of(svi.init(key_init, rows[:BATCH]), jax.random.split(key_epochs, epochs))
            found = svi.get_params(state)
        else:
            found, _, losses = svi.run(key, epochs * EPOCH, rows, progress_bar=False)
        assert np.all(np.isfinite(losses))
        trained = tuple(
            eqx.combine(found[f"{name}$params"], before)
            for name, before in zip(("encoder", "decoder"), perceptrons, strict=True)
        )
        return eqx.tree_at(places, model, trained)

    return train


@eqx.filter_jit
def bound(key: Any, model: ebm.LatentModel, x: jax.Array) -> jax.Array:
    """Of log p(x), mean over the digits, in nats."""

    def of_digit(key: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(lambda key: model.log_weight(key, x))(jax.random.split(key, DRAWS)))

    return jnp.mean(jax.vmap(of_digit)(jax.random.split(key, len(x)), x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--turns", type=int, default=5, help="runs of each trainer for the median of its rate")
    options = parser.parse_args()
    images, _ = digits("bits", 0)
    data, held_out = images[:TRAINED], images[TRAINED:]
    print("| seed | trainer | steps a second | ours / its | bound of digits held out, nats |\n|---|---|---|---|---|")
    for seed in range(options.seeds):
        key_model, key_train, key_bound = jax.random.split(jax.random.key(seed), 3)
        model = ebm.vae(key_model, LATENT, ebm.BernoulliLikelihood((SIDE, SIDE)))
        perceptrons = plain_perceptrons(key_model)
        weights = (jax.tree.leaves(eqx.filter(each, eqx.is_array)) for each in (perceptrons, places(model)))
        assert all(np.array_equal(theirs, ours) for theirs, ours in zip(*weights, strict=True))
        trainers = {
            "SVI.run": numpyros(model, perceptrons, data, by_hand=False),
            "SVI.update": numpyros(model, perceptrons, data, by_hand=True),
            "ebm.fit": ours(model, data),
        }
        fitted = {name: train(key_train, options.epochs) for name, train in trainers.items()}
        rates: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(options.turns):
            for name, train in trainers.items():
                half = options.epochs // 2
                short, long = (timed(partial(train, key_train, epochs))[0] for epochs in (half, options.epochs))
                rates[name].append((options.epochs - half) * EPOCH / (long - short))
        for name in trainers:
            ratio = np.median(np.array(rates["ebm.fit"]) / rates[name])
            value = float(bound(key_bound, fitted[name], jnp.asarray(held_out)))
            print(f"| {seed} | {name} | {np.median(rates[name]):.0f} | {ratio:.2f} | {value:.2f} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
