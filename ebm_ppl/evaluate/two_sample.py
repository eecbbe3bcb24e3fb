"""Two samples, one distribution? By mean embeddings, and by a classifier that tries to tell them apart.

    mmd_test          MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), over pairs of different points     unbiased
                      p-value by permutation of the labels                                              exact
    classifier_test   accuracy at points that were not trained on, against that of a coin
                      p-value of the binomial distribution                                              not too small

With a the labels (one for x, zero for y), K the kernel matrix without its diagonal and r its row sums, all that a
permutation changes is in two numbers,

    sum over pairs of x = a'Ka        of x and y = r'a - a'Ka        of y = sum(r) - 2 r'a + a'Ka

so that K is gone through once, for all permutations together.

Points must be independent, or at least exchangeable: thin chains to their effective size first (`thinned`).

References:
    Gretton, Borgwardt, Rasch, Schoelkopf and Smola (2012), A kernel two-sample test; Lopez-Paz and Oquab (2017),
    Revisiting classifier two-sample tests.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import bdtrc

from ebm_ppl.evaluate.classification import Area, auroc
from ebm_ppl.evaluate.significance import (
    Significance,
    check_scale,
    check_simulations,
    median_distance,
    over_pairs,
    simulated_p_value,
    squared_distance,
)
from ebm_ppl.train.objective import flat_pair
from ebm_ppl.typing import Array, ArrayLike, EnergyError, PRNGKey, as_key

Kernel = Literal["gaussian", "imq"]
KERNELS = {
    "gaussian": lambda square: jnp.exp(-square / 2),
    "imq": lambda square: (1 + square) ** -0.5,
}
"""Of the squared distance in units of the scale."""
FEWEST = 10
"""Points of either sample that a test can be made of."""
RATE, DECAY = 1e-2, 1e-2
"""Of Adam, where no optimiser is given."""


def mmd_test(
    key: PRNGKey,
    x: ArrayLike,
    y: ArrayLike,
    *,
    kernel: Kernel = "gaussian",
    scale: float | None = None,
    num_permutations: int = 1000,
) -> Significance:
    """Tests whether two samples are of one distribution, by their maximum mean discrepancy.

    Args:
        x, y: independent events, shapes (num_x, *event_shape) and (num_y, *event_shape).
        kernel: `"gaussian"`, exp(-d^2 / 2 l^2), or `"imq"`, (1 + d^2 / l^2)^(-1/2), of points d apart.
        scale: l; the median distance of a thousand of all points by default.
        num_permutations: of the labels.

    Returns:
        `Significance`: `statistic` is an unbiased estimate of MMD^2; `num_points` counts both samples.

    Raises:
        EnergyError: for an unknown kernel, too few points, or points that are not finite or all the same.
        EnergyShapeError: for events of different shapes.

    Reference: Gretton et al. (2012).

    Example:
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 500, 3))
        >>> ebm_ppl.mmd_test(jax.random.key(1), x, y).p_value
    """
    check_simulations(num_permutations, "num_permutations")
    if kernel not in KERNELS:
        raise EnergyError(f"kernel is one of {', '.join(map(repr, KERNELS))}; got {kernel!r}.")
    x, y = _samples(x, y)
    key_scale, key_labels = jax.random.split(as_key(key))
    both = jnp.concatenate([x, y])
    found = check_scale(median_distance(key_scale, both) if scale is None else scale)
    statistic, p_value = permuted(key_labels, both, len(x), jnp.asarray(found, both.dtype), kernel, num_permutations)
    return Significance(float(statistic), float(p_value), len(both), found)


@eqx.filter_jit
def permuted(
    key: PRNGKey, both: Array, num_x: int, scale: Array, kernel: Kernel, num_permutations: int
) -> tuple[Array, Array]:
    """MMD^2 and its p-value of points of which the first `num_x` are those of x."""
    num_y = len(both) - num_x
    labels = (jnp.arange(len(both)) < num_x).astype(both.dtype)
    keys = jax.random.split(key, num_permutations)
    shuffled = jax.vmap(lambda key: jax.random.permutation(key, labels), out_axes=1)(keys)
    labels = jnp.concatenate([labels[:, None], shuffled], axis=1)
    centred = both - jnp.mean(both, axis=0)  # so that distances keep their digits
    sums = over_pairs(lambda x, y: KERNELS[kernel](squared_distance(x, y) / scale**2), centred, _with_one(labels))
    rows, sums = sums[:, 0], sums[:, 1:]
    of_x, all_of_x = jnp.sum(labels * sums, axis=0), rows @ labels
    of_y, between = jnp.sum(rows) - 2 * all_of_x + of_x, all_of_x - of_x
    statistics = of_x / (num_x * (num_x - 1)) + of_y / (num_y * (num_y - 1)) - 2 * between / (num_x * num_y)
    return statistics[0], simulated_p_value(statistics[0], statistics[1:])


def _with_one(columns: Array) -> Array:
    """A column of ones before the others."""
    return jnp.concatenate([jnp.ones_like(columns[:, :1]), columns], axis=1)


def classifier_test(
    key: PRNGKey,
    x: ArrayLike,
    y: ArrayLike,
    *,
    width: int = 32,
    depth: int = 2,
    num_steps: int = 500,
    batch_size: int = 128,
    optimiser: optax.GradientTransformation | None = None,
) -> Significance:
    """Tests whether two samples are of one distribution, by a small network that learns to tell them apart.

    It is trained on a half of each, in units of their spread, and judged at the other half. Of the larger sample as
    many points are taken as the smaller one has, so that a guess is right half of the time.

    Args:
        x, y: independent events, shapes (num_x, *event_shape) and (num_y, *event_shape).
        width, depth: of the hidden layers of a multilayer perceptron; a depth of 0 is logistic regression.
        num_steps, batch_size: of its training.
        optimiser: of Optax; Adam with decaying weights by default.

    Returns:
        `Significance`: `statistic` is the accuracy at the `num_points` points that were not trained on. Its p-value is
        that of as many tosses of a coin, which vary as much as any classifier that has learned nothing, or more.

    Raises:
        EnergyError: for too few points, points that are not finite, or a classifier that is not.
        EnergyShapeError: for events of different shapes.

    Reference: Lopez-Paz and Oquab (2017).

    Example:
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 500, 3))
        >>> ebm_ppl.classifier_test(jax.random.key(1), x, y).statistic  # about .5
    """
    of_x, of_y = _scores(key, x, y, width, depth, num_steps, batch_size, optimiser)
    right, num = int(np.sum(of_x > 0) + np.sum(of_y < 0)), len(of_x) + len(of_y)
    return Significance(right / num, float(bdtrc(right - 1, num, 0.5)), num)


def classifier_auc(
    key: PRNGKey,
    x: ArrayLike,
    y: ArrayLike,
    *,
    width: int = 32,
    depth: int = 2,
    num_steps: int = 500,
    batch_size: int = 128,
    optimiser: optax.GradientTransformation | None = None,
) -> Area:
    """How well a small network tells two samples apart: the area under its curve, 1/2 for samples of one distribution.

    The network is that of `classifier_test`, and so are the arguments. Of draws of a prior and of what an encoder makes
    of data it tells whether the prior has holes, where no data come from.

    Example:
        >>> ebm_ppl.classifier_auc(key, model.sample_latents(key, 1000), model.posterior_guess(data).sample(key)).value
    """
    of_x, of_y = _scores(key, x, y, width, depth, num_steps, batch_size, optimiser)
    return auroc(of_y, of_x)


def _scores(
    key: PRNGKey,
    x: ArrayLike,
    y: ArrayLike,
    width: int,
    depth: int,
    num_steps: int,
    batch_size: int,
    optimiser: optax.GradientTransformation | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Of the points that a network was not trained on, higher for those of x."""
    for name, number in {"num_steps": num_steps, "batch_size": batch_size}.items():
        if number < 1:
            raise EnergyError(f"{name} is 1 at least; got {number}.")
    x, y = _samples(x, y)
    key_x, key_y, key_train = jax.random.split(as_key(key), 3)
    num = 2 * (min(len(x), len(y)) // 2)
    x, y = jax.random.permutation(key_x, x)[:num], jax.random.permutation(key_y, y)[:num]
    optimiser = _adam() if optimiser is None else optimiser
    scores = np.asarray(_trained_scores(key_train, x, y, width, depth, num_steps, batch_size, optimiser))
    if not np.all(np.isfinite(scores)):
        raise EnergyError("The classifier is not finite: points are too large for their squares, or its rate is.")
    return scores[: num // 2], scores[num // 2 :]


@functools.cache
def _adam() -> optax.GradientTransformation:
    """One for all tests, so that they share their compiled programs."""
    return optax.adamw(RATE, weight_decay=DECAY)


@eqx.filter_jit
def _trained_scores(
    key: PRNGKey,
    x: Array,
    y: Array,
    width: int,
    depth: int,
    num_steps: int,
    batch_size: int,
    optimiser: optax.GradientTransformation,
) -> Array:
    """What a network trained on the first halves says of the second ones, those of x first."""
    half = len(x) // 2
    train, test = (jnp.concatenate([x[part], y[part]]) for part in (slice(None, half), slice(half, None)))
    mean, spread = jnp.mean(train, axis=0), jnp.std(train, axis=0)
    train, test = ((points - mean) / jnp.where(spread > 0, spread, 1.0) for points in (train, test))
    signs = jnp.where(jnp.arange(2 * half) < half, 1.0, -1.0).astype(train.dtype)
    key_network, key_steps = jax.random.split(key)
    network = eqx.nn.MLP(x.shape[1], "scalar", width, depth, jax.nn.silu, key=key_network, dtype=x.dtype)
    arrays, rest = eqx.partition(network, eqx.is_inexact_array)

    def margins(arrays, points: Array, signs: Array) -> Array:
        return signs * jax.vmap(eqx.combine(arrays, rest))(points)

    def step(state, key: PRNGKey):
        arrays, memory = state
        batch = jax.random.randint(key, (min(batch_size, 2 * half),), 0, 2 * half)
        gradient = jax.grad(lambda arrays: -jnp.mean(jax.nn.log_sigmoid(margins(arrays, train[batch], signs[batch]))))
        updates, memory = optimiser.update(gradient(arrays), memory, arrays)
        return (optax.apply_updates(arrays, updates), memory), None

    (arrays, _), _ = jax.lax.scan(step, (arrays, optimiser.init(arrays)), jax.random.split(key_steps, num_steps))
    trained: Any = eqx.combine(arrays, rest)
    return jax.vmap(trained)(test)


def _samples(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    """Two samples as rows."""
    x, y, _ = flat_pair(x, y)
    if min(len(x), len(y)) < FEWEST:
        raise EnergyError(f"A test takes {FEWEST} points of each sample at least; got {len(x)} and {len(y)}.")
    return x, y
