"""A classifier read as an energy: whether its probabilities hold, and whether it knows what it was not trained on.

    calibration error       sum_b n_b / n | accuracy_b - confidence_b |      bins b of the largest probability
    area under the curve    P( score of a stranger > score of one of its own ), ties by half

The score of `JointEnergy` is the energy itself, which is high where `p(x)` is low. The calibration error of a
classifier whose probabilities hold is not zero at finitely many points, but of order sqrt(bins / n).

References:
    Guo, Pleiss, Sun and Weinberger (2017), On calibration of modern neural networks; DeLong, DeLong and Clarke-Pearson
    (1988), Comparing the areas under two or more correlated receiver operating characteristic curves; Liu, Wang, Owens
    and Li (2020), Energy-based out-of-distribution detection.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ebm_ppl.typing import ArrayLike, EnergyError, EnergyShapeError


class Calibration(NamedTuple):
    """How far probabilities are from frequencies."""

    error: float
    """The expected calibration error, from 0 to 1."""
    confidence: np.ndarray
    """Mean of the largest probability in each bin, (bin,); NaN where a bin is empty."""
    accuracy: np.ndarray
    """Share of right labels in each bin, (bin,)."""
    num: np.ndarray
    """Events in each bin, (bin,)."""


class Area(NamedTuple):
    """Under the curve of true against false alarms."""

    value: float
    std_error: float
    """By DeLong's formula, of independent events."""


def calibration(probabilities: ArrayLike, labels: ArrayLike, num_bins: int = 15) -> Calibration:
    """The expected calibration error of a classifier, and the bins for a reliability plot.

    Args:
        probabilities: of each class, shape (num, num_classes), rows adding up to one.
        labels: the classes, integers of shape (num,).
        num_bins: of equal width, of the largest probability.

    Raises:
        EnergyShapeError: where there is not one label for each event.
        EnergyError: where rows are no probabilities, or a label is no class.

    Reference: Guo et al. (2017).

    Example:
        >>> ebm_ppl.calibration(jax.nn.softmax(jax.vmap(fitted.energy.logits)(x)), labels).error
    """
    p, labels = np.asarray(probabilities, float), np.asarray(labels)
    if p.ndim != 2 or labels.shape != p.shape[:1] or not len(p):
        raise EnergyShapeError(f"probabilities have shape {p.shape}, labels {labels.shape}: (num, classes) and (num,).")
    if not np.allclose(p.sum(axis=1), 1, atol=1e-4) or np.any(p < 0):
        raise EnergyError("probabilities are not negative and add up to one in each row: softmax of the logits.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= p.shape[1]:
        raise EnergyError(f"labels are classes, integers from 0 to {p.shape[1] - 1}; got {labels.dtype}.")
    if num_bins < 1:
        raise EnergyError(f"num_bins is 1 at least; got {num_bins}.")
    largest, right = p.max(axis=1), p.argmax(axis=1) == labels
    bins = np.minimum((largest * num_bins).astype(int), num_bins - 1)
    num = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):  # empty bins
        confidence, accuracy = (np.bincount(bins, x, num_bins) / num for x in (largest, right))
    return Calibration(float(np.nansum(num / len(p) * np.abs(accuracy - confidence))), confidence, accuracy, num)


def auroc(inside: ArrayLike, outside: ArrayLike) -> Area:
    """How well a score tells strangers from what a model knows: 1 is always, 1/2 not at all.

    Args:
        inside: scores of events like those trained on, shape (num,); energies, say.
        outside: of others, which should be higher, shape (num,).

    Raises:
        EnergyError: where one has less than two scores, or a NaN.

    Reference: DeLong et al. (1988).

    Example:
        >>> ebm_ppl.auroc(jax.vmap(energy)(digits), jax.vmap(energy)(letters))
    """
    low, high = (np.ravel(np.asarray(x, float)) for x in (inside, outside))
    if min(len(low), len(high)) < 2 or np.isnan(low).any() or np.isnan(high).any():
        raise EnergyError("auroc takes two scores at least of each kind, without a NaN.")
    of_high, of_low = _share_below(low, high), 1 - _share_below(high, low)
    std_error = np.sqrt(np.var(of_high, ddof=1) / len(high) + np.var(of_low, ddof=1) / len(low))
    return Area(float(np.mean(of_high)), float(std_error))


def _share_below(scores: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Share of the scores that lie below each of others, ties by half."""
    ordered = np.sort(scores)
    return (np.searchsorted(ordered, at, "left") + np.searchsorted(ordered, at, "right")) / (2 * len(scores))
