"""What training refuses, and what it warns of: labels, judgement, data, losses, and walkers or a base that
have lost the model."""

from __future__ import annotations

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.networks import JointEnergy
from ebm_ppl.train.objective import Density, Objective, check_base
from ebm_ppl.typing import Array, ArrayLike, EnergyError, EnergyShapeError, EnergyWarning, NonFiniteEnergyError

OF_PRIOR = "prior_"
"""What comes before the name of a metric of the objective that trains a latent prior."""
OF_MARGINAL = "marginal_"
"""The same, of the objective that trains a density beside its conditionals."""
MOST_GAP = 10.0
"""Nats for each dimension between the energies of walkers and of data, beyond which walkers are not draws of a model
that has anything to do with the data. That of a model that fits is about zero."""
LAST = 50
"""Steps over which what a doubt goes by is averaged."""
MOST_DRIFT = 3.0
"""Nats between log Z by driver and witness of weighted walkers, beyond which the driver has lost the model: of 5.5 the
shares of images were wrong, of 1.7 no energy that was looked at."""
FEWEST = 30
"""Effective draws of the base, below which the gradient of a step is off by a few per cent or more."""


def as_classes(labels: ArrayLike, density: Density, points: Array) -> Array:
    """The class of each event, as integers."""
    if not isinstance(density.energy, JointEnergy):
        raise EnergyError("labels are for a classifier that is read as an energy: wrap it as JointEnergy(classifier).")
    labels = np.asarray(labels)
    if labels.shape != (len(points),) or not np.issubdtype(labels.dtype, np.integer):
        raise EnergyShapeError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}; they are one integer for each of the "
            f"{len(points)} events of the data."
        )
    logits = jax.eval_shape(density.energy.logits, jax.ShapeDtypeStruct(density.event_shape, points.dtype))
    if len(logits.shape) != 1 or labels.min() < 0 or labels.max() >= logits.shape[0]:
        raise EnergyShapeError(
            f"labels go from {labels.min()} to {labels.max()}; the classifier's logits have shape {logits.shape}, one "
            "for each class from 0."
        )
    return jnp.asarray(labels)


def check_judgement(
    judged: tuple[int, ...] | None, event_shape: tuple[int, ...], patience: int | None, objective: Objective
) -> None:
    """Refuses events of these shapes, held out and trained on, where they are not to be compared."""
    if patience is not None and (judged is None or patience < 1):
        raise EnergyError("patience is a number of judgements, 1 at least, of points to judge: pass held_out=...")
    if judged is not None and not objective.is_comparable:
        raise EnergyError(
            f"The loss of {objective.name} of one step cannot be compared with another's, so that it judges nothing "
            "held out: leave held_out and patience away."
        )
    if judged is not None and judged != event_shape:
        raise EnergyShapeError(f"An event of held_out has shape {judged}, one of data {event_shape}.")


def check_events(density: Density, points: Array, objective: Objective) -> None:
    """The energy of one event is one number, and the base one of such events."""
    check_base(density.base, density.event_shape, "data")
    if density.is_discrete and objective.is_continuous:
        raise EnergyError(
            f"{objective.name} takes events of real numbers, and the base is discrete: PseudoLikelihood(), "
            "NoiseContrast(), or Jarzynski() with kernels of discrete states train on such."
        )
    if density.base is not None:
        inside: Any = density.base.support(points.reshape(-1, *density.event_shape))  # pyright: ignore
        if not np.all(inside):
            raise EnergyError(
                f"{np.sum(~inside)} of {len(points)} events of the data lie outside of the base's support, the first "
                f"at {np.argmin(inside)}: take a wider base."
            )
    energies = _previews(density, points[:1000], objective)
    if bad := int(np.sum(~np.isfinite(energies))):
        at = int(np.argmax(~np.isfinite(energies)))
        raise NonFiniteEnergyError(
            f"The energy is not finite at {bad} of the first {len(energies)} events of the data, first at event {at} "
            f"({float(energies[at])}), before a step was made."
        )


@eqx.filter_jit
def _previews(density: Density, points: Array, objective: Objective) -> Array:
    """A program for all runs with such an energy."""
    return jax.vmap(lambda x: objective.preview(density, x))(points)


def check_finite(metrics: dict[str, np.ndarray], before: int, objective: Objective) -> None:
    finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["gradient_norm"])
    if np.all(finite):
        return
    at = int(np.argmin(finite))
    last = f"; the step before had loss {metrics['loss'][at - 1]:.4g}" if at else ""
    raise NonFiniteEnergyError(
        f"The loss of {objective.name} is {metrics['loss'][at]}, and the norm of its gradient "
        f"{metrics['gradient_norm'][at]}, at step {before + at + 1}{last}. A smaller learning rate, "
        "optax.clip_by_global_norm before the optimiser, or a smaller step size of the walkers helps; a checkpoint "
        "holds the last steps before it."
    )


def warn_of_doubts(metrics: dict[str, np.ndarray], dim: int, objective: Objective) -> None:
    """Tells of walkers, or of a base, that have lost the model at the end of training, by the record of its steps."""
    # What is said of a latent prior, or of the density beside conditionals, is said of its own walkers.
    parts = {OF_PRIOR: {}, OF_MARGINAL: {}, "": {}}
    for name, each in metrics.items():
        prefix = next(prefix for prefix in parts if name.startswith(prefix))
        parts[prefix][name.removeprefix(prefix)] = each
    for part in parts.values():
        for doubt in (_of_gap(part, dim), _of_drift(part), _of_few_draws(part)):
            if doubt:
                warnings.warn(f"At the end of training by {objective.name} {doubt}", EnergyWarning, stacklevel=3)


def _at_end(values: np.ndarray) -> float:
    return float(np.mean(values[-LAST:]))


def _of_gap(metrics: dict[str, np.ndarray], dim: int) -> str | None:
    """Energies of walkers that have nothing to do with those of the data: an energy ran away."""
    if "energy_gap" not in metrics or abs(gap := _at_end(metrics["energy_gap"])) <= MOST_GAP * dim:
        return None
    return (
        f"the walkers lie {abs(gap):.4g} nats {'above' if gap > 0 else 'below'} the data: they are "
        "no draws of the model, and the energy is not to be trusted. It changes faster than the walkers move, or these "
        "are stuck where every move is rejected. A smaller learning rate, more moves a step, or Jarzynski(), whose "
        "stuck walkers lose their weight, helps."
    )


def _of_drift(metrics: dict[str, np.ndarray]) -> str | None:
    """A driver that the energy has learned to escape: its log Z is no longer that of the witness."""
    if "log_z_of_driver" not in metrics:
        return None
    drift = _at_end(metrics["log_z_of_driver"] - metrics["log_z"])
    if abs(drift) <= MOST_DRIFT:
        return None
    return (
        f"log Z by the driver is {abs(drift):.3g} nats {'below' if drift < 0 else 'above'} that by the witness: the "
        "energy has followed the noise of its walkers, so that the weights of its modes may be off. A smaller learning "
        "rate, an optimiser without memory (gradient descent), more moves in a step or more walkers help."
    )


def _of_few_draws(metrics: dict[str, np.ndarray]) -> str | None:
    """A base that has left the model, so that hardly any of its draws has a weight."""
    if "effective_draws" not in metrics or (effective := _at_end(metrics["effective_draws"])) >= FEWEST:
        return None
    return (
        f"only {effective:.3g} draws of the base are effective in a step: log Z is too low, and the energy learns to "
        "escape the draws. A base nearer to the data (a flow that is fitted to them), more draws, or Jarzynski(), "
        "whose walkers follow the model, helps."
    )
