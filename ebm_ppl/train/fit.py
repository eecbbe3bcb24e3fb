"""The one loop of training: an energy, data and an objective in, a trained energy and its record out.

    at step k, with key fold_in(key, k):
    batch          the next points of the data, shuffled anew for each epoch
    loss, grads    of the objective (`objective.py`), in the parameters of the energy and its own
    update         by an Optax optimiser; the average of parameters follows

An energy that is a classifier, too, has labels: log p(x, y) = log p(x) + log p(y | x), of which the objective has the
first term, and the second is the classifier's cross-entropy.

Steps run in a compiled scan, `every` of them at a time; between two of them the host tells of progress, looks whether
the loss is finite, saves a checkpoint and stops early. Everything that a step changes is one pytree, `Run`, so that a
run that was killed goes on from its checkpoint as if nothing had happened, bit by bit.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from paramax import NonTrainable

from ebm_ppl import checkpoint as files
from ebm_ppl.train.checks import as_classes, check_events, check_finite, check_judgement, warn_of_doubts
from ebm_ppl.train.objective import Density, Metrics, Objective, flat, log_prob
from ebm_ppl.train.record import Record
from ebm_ppl.typing import Array, ArrayLike, EnergyError, NonFiniteEnergyError, PRNGKey, as_key

if TYPE_CHECKING:
    import xarray as xr

RATE = 1e-3
"""Of Adam, where no optimiser is given."""
INIT, STEPS, JUDGE = 0, 1, 2
"""What is folded into the key of a run for its start, its steps, and what is held out."""


class Run(NamedTuple):
    """All that a step changes."""

    step: Array
    trained: Any
    """Arrays of the energy, and the objective's own parameters."""
    average: Any
    """Of what is trained, over the steps; `()` where none is wanted, since it costs time and memory."""
    optimiser: Any
    state: Any
    """Of the objective."""


class Fitted(NamedTuple):
    """A trained energy."""

    energy: Any
    """With the parameters averaged over steps where that was asked for, and those of the best judgement where some
    points were held out."""
    record: xr.DataTree
    """Group `training` by step: loss, gradient norm and what the objective tells; `held_out` where some points were."""
    state: Any
    """Of the objective after the last step: walkers, say."""
    parameters: Any
    """The objective's own, averaged and chosen as the energy's are: the log Z that `NoiseContrast` learned, say."""


def fit(
    key: PRNGKey,
    energy: Callable[[Array], Array],
    data: ArrayLike,
    objective: Objective,
    *,
    base: dist.Distribution | None = None,
    labels: ArrayLike | None = None,
    optimiser: optax.GradientTransformation | None = None,
    num_steps: int = 2000,
    batch_size: int = 128,
    averaging: float = 0.0,
    held_out: ArrayLike | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress_bar: bool = True,
) -> Fitted:
    """Trains an energy on data: `p(x) = base(x) exp(-U(x)) / Z`, with the parameters of U moved.

    Args:
        energy: U, a callable on one event that is a pytree with floating-point arrays: an `equinox.Module`. What is
            in a `paramax.NonTrainable` stays as it is.
        data: observed events, shape (num, *event_shape).
        objective: `ScoreMatching()`, `NoiseContrast()`, `ContrastiveDivergence()`, `Jarzynski()`, ...
        base: a normalised distribution of events, whose parameters stay as they are; without one the density is
            `exp(-U(x))` alone.
        labels: the class of each event, integers of shape (num,), for a `JointEnergy`: adds the cross-entropy
            `-log p(y | x)` to the loss, and `cross_entropy` and `accuracy` to the record.
        optimiser: of Optax, schedules included; Adam at a rate of .001 by default.
        num_steps: of the optimiser.
        batch_size: points of a step.
        averaging: decay of an exponential average of all that is trained over steps, which the result has then; .999,
            say.
        held_out: events that are not trained on, at which the objective's loss (without that of labels) is judged
            every `every` steps. For objectives whose losses can be compared.
        patience: judgements without a gain after which training stops.
        checkpoint: a file that the run is saved to every `every` steps. Where it is there, the run goes on from it.
        every: steps in a compiled program.
        progress_bar: whether to show progress.

    Raises:
        EnergyError: for data that are not finite, an energy without parameters, or settings out of range.
        EnergyShapeError: where the energy of one event is not one number.
        NonFiniteEnergyError: where the loss or its gradient is not finite, with the step.
        CheckpointError: where the file is damaged, or that of another run.

    Example:
        >>> energy = ebm_ppl.MLPEnergy(jax.random.key(0), dim=2)
        >>> base = dist.Normal(0, 3).expand([2]).to_event(1)
        >>> fitted = ebm_ppl.fit(jax.random.key(1), energy, data, ebm_ppl.ScoreMatching(), base=base)
    """
    key, (points, event_shape) = as_key(key), flat(data, "data")
    judged, judged_shape = (None, None) if held_out is None else flat(held_out, "held_out")
    for name, number in {"num_steps": num_steps, "batch_size": batch_size, "every": every}.items():
        if number < 1:
            raise EnergyError(f"{name} is 1 at least; got {number}.")
    if not 0 <= averaging < 1:
        raise EnergyError(f"averaging is a decay from 0 to 1, exclusive; got {averaging}.")
    check_judgement(judged_shape, event_shape, patience, objective)
    density = Density(energy, base, event_shape)
    classes = None if labels is None else as_classes(labels, density, points)
    trainable, fixed = eqx.partition(energy, eqx.is_inexact_array, is_leaf=lambda x: isinstance(x, NonTrainable))
    if not jax.tree.leaves(trainable):
        raise EnergyError("The energy has no floating-point arrays to train: it is a pytree of them, MLPEnergy, say.")
    check_events(density, points, objective)
    for each in (points,) if judged is None else (points, judged):
        objective.check(each)
    parameters, state = objective.init(jax.random.fold_in(key, INIT), density, points)
    given = Given(
        key=key,
        data=points,
        labels=classes,
        fixed=fixed,
        base=base,
        event_shape=event_shape,
        objective=objective,
        optimiser=adam() if optimiser is None else optimiser,
        batch_size=min(batch_size, len(points)),
        averaging=averaging,
    )
    trained = trainable, parameters
    average = trained if averaging else ()
    run = Run(jnp.zeros((), int), trained, average, given.optimiser.init(trained), state)
    done = Done(run, trained, Record({}, np.zeros(0)))
    settings = {} if checkpoint is None else _settings(given, judged, every)
    if checkpoint is not None and Path(checkpoint).exists():
        done = _read(checkpoint, done, given, settings)
    with _bar(num_steps, int(done.run.step), objective.name, progress_bar) as bar:
        while (step := int(done.run.step)) < num_steps and not (patience and done.record.waited >= patience):
            done = _go_on(done, given, min(every, num_steps - step), judged)
            if checkpoint is not None:
                files.save(checkpoint, done, settings | done.record.lengths)
            bar.update(int(done.run.step) - bar.n)
            bar.set_postfix_str(f"loss {done.record.metrics['loss'][-1]:.4g}")
    warn_of_doubts(done.record.metrics, points.shape[1], objective)
    attrs = {"objective": objective.name, "batch_size": given.batch_size, "settings": _written(objective)}
    record = done.record.as_datatree(every, attrs)
    trainable, parameters = done.best
    return Fitted(eqx.combine(trainable, fixed), record, done.run.state, parameters)


class Given(eqx.Module):
    """All that steps share."""

    key: PRNGKey
    """Of the run."""
    data: Array
    """(num, dim)"""
    labels: Array | None
    """(num,)"""
    fixed: Any
    """The energy without its arrays."""
    base: dist.Distribution | None
    event_shape: tuple[int, ...] = eqx.field(static=True)
    objective: Objective
    optimiser: optax.GradientTransformation = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    averaging: float = eqx.field(static=True)

    def density(self, trainable: Any) -> Density:
        return Density(eqx.combine(trainable, self.fixed), self.base, self.event_shape)

    def result(self, run: Run) -> Any:
        """What is trained, as it would be used."""
        return run.average if self.averaging else run.trained


@functools.cache
def adam(rate: float = RATE) -> optax.GradientTransformation:
    """One for all runs, so that a program compiled for one serves them all."""
    return optax.adam(rate)


def _go_on(done: Done, given: Given, num: int, judged: Array | None) -> Done:
    """So many steps more, and a judgement where there are points to judge."""
    step = int(done.run.step)
    run, metrics = _steps(done.run, given, _batches(given, step, num))
    metrics = jax.device_get(metrics)
    check_finite(metrics, step, given.objective)
    record = done.record.with_steps(metrics)
    if judged is None:
        return Done(run, given.result(run), record)
    loss = float(_judge(run, given, judged))
    if not np.isfinite(loss):
        raise NonFiniteEnergyError(f"The loss at the points held out is {loss} after step {int(run.step)}.")
    record = record.with_judgement(loss)
    return Done(run, given.result(run) if record.waited == 0 else done.best, record)


def _batches(given: Given, step: int, num: int) -> Array:
    """Which points so many steps take, (num, batch_size): the data shuffled anew for each epoch.

    NumPy's shuffle takes a fraction of the time of a sort by random numbers, which is what JAX has.
    """
    size, seed = given.batch_size, np.asarray(jax.random.key_data(given.key)).tolist()
    per_epoch = len(given.data) // size

    def epoch(number: int) -> np.ndarray:
        order = np.random.default_rng([*seed, number]).permutation(len(given.data)).astype(np.int32)
        return order[: per_epoch * size].reshape(per_epoch, size)

    first, place = divmod(step, per_epoch)
    last = (step + num - 1) // per_epoch
    return jnp.asarray(np.concatenate([epoch(number) for number in range(first, last + 1)])[place : place + num])


@eqx.filter_jit
def _steps(run: Run, given: Given, batches: Array) -> tuple[Run, Metrics]:
    """A step for each batch, and the metrics of each."""
    return jax.lax.scan(lambda run, chosen: _step(run, given, chosen), run, batches)


def _step(run: Run, given: Given, chosen: Array) -> tuple[Run, Metrics]:
    key = jax.random.fold_in(jax.random.fold_in(given.key, STEPS), run.step)
    batch = given.data[chosen]

    def loss(trained: Any) -> tuple[Array, tuple[Any, Metrics]]:
        trainable, parameters = trained
        density = given.density(trainable)
        value, (state, metrics) = given.objective.loss(key, density, parameters, run.state, batch)
        if given.labels is None:
            return value, (state, metrics)
        cross_entropy, of_classes = _cross_entropy(density, batch, given.labels[chosen])
        return value + cross_entropy, (state, metrics | of_classes)

    (value, (state, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(run.trained)
    # While the gradient is at hand: behind the update the compiler makes an array of its squares first.
    norm = jnp.sqrt(optax.tree.vdot(gradient, gradient))
    gradient, norm = jax.lax.optimization_barrier((gradient, norm))
    updates, optimiser = given.optimiser.update(gradient, run.optimiser, run.trained)
    trained: Any = optax.apply_updates(run.trained, updates)
    average = run.average
    if given.averaging:
        # The first steps are averaged evenly: their average would else lean on the start for long.
        decay = jnp.minimum(given.averaging, run.step / (run.step + 1)).astype(value.dtype)
        average = optax.incremental_update(trained, average, 1 - decay)
    metrics = {"loss": value, "gradient_norm": norm, **metrics}
    return Run(run.step + 1, trained, average, optimiser, state), metrics


def _cross_entropy(density: Density, batch: Array, labels: Array) -> tuple[Array, Metrics]:
    """Of the classifier that the energy is."""
    logits = jax.vmap(lambda x: density.energy.logits(x.reshape(density.event_shape)))(batch)
    value = jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))
    accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels, dtype=batch.dtype)
    return value, {"cross_entropy": value, "accuracy": accuracy}


@eqx.filter_jit
def _judge(run: Run, given: Given, points: Array) -> Array:
    """The loss at points that are not trained on, always by the same key."""
    key, (trainable, parameters) = jax.random.fold_in(given.key, JUDGE), given.result(run)
    return given.objective.loss(key, given.density(trainable), parameters, run.state, points)[0]


# What a checkpoint holds


class Done(NamedTuple):
    """What a checkpoint holds."""

    run: Run
    best: Any
    """What is trained, as the result will have it."""
    record: Record


def _record_like(run: Run, given: Given, num_steps: int, num_judgements: int) -> Record:
    """A record of so many steps, whose numbers mean nothing."""
    chosen = jax.ShapeDtypeStruct((given.batch_size,), np.int32)
    _, metrics = eqx.filter_eval_shape(_step, run, given, chosen)
    return Record({name: np.zeros(num_steps, x.dtype) for name, x in metrics.items()}, np.zeros(num_judgements))


def _read(path: str | Path, done: Done, given: Given, settings: dict[str, Any]) -> Done:
    """What another process had done."""

    def like(told: dict[str, Any]) -> Done:
        return done._replace(record=_record_like(done.run, given, told.get("steps", 0), told.get("judgements", 0)))

    return files.load(path, like, settings)


def _settings(given: Given, judged: Array | None, every: int) -> dict[str, Any]:
    """What a run must have in common with one that it goes on from."""
    # By what it says of an event, since the leaves of a NumPyro distribution are in another order in each process.
    event = given.data[0].reshape(given.event_shape)
    base = None if given.base is None else f"log density {float(log_prob(given.base, event)):.4g} of the first event"
    return {
        "objective": _written(given.objective),
        "key": np.asarray(jax.random.key_data(given.key)).tolist(),
        "data": _digest(given.data),
        "labels": _digest(given.labels),
        "held_out": _digest(judged),
        "base": base,
        "batch_size": given.batch_size,
        "averaging": given.averaging,
        "every": every,
    }


def _written(objective: Objective) -> str:
    """Its settings, without where in memory the parts are: a process that goes on has them elsewhere."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(objective))


def _digest(array: Array | None) -> str | None:
    return None if array is None else hashlib.sha256(np.asarray(array).tobytes()).hexdigest()[:16]


def _bar(num_steps: int, initial: int, name: str, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=num_steps, initial=initial, desc=name, disable=not shown)
