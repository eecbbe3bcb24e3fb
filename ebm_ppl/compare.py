"""Models compared by their evidence.

    p(m | y)  =  p(m) exp(log p(y | m)) / sum_k p(k) exp(log p(y | k))          posterior model probability

The log evidences are estimates, `log p(y | m) ~ N(value, std_error^2)`, independent of one another. What that means for
the probabilities is found from draws of all of them at once: the normal quantiles of fixed, evenly spread points (a
scrambled Sobol sequence), so that the same evidences give the same table. The delta method would be cheaper, but where
a probability is near 0 or 1, or an error is large, it is wrong: there an interval is far from symmetric.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax

from ebm_ppl.evidence import read_log_z
from ebm_ppl.typing import EnergyError, EnergyWarning, IncomparableError, LogZ

if TYPE_CHECKING:
    import pandas as pd

NUM_DRAWS = 2**13


def compare(
    models: Mapping[str, LogZ | Any],
    prior: Mapping[str, float] | None = None,
    *,
    ci_prob: float | None = None,
) -> pd.DataFrame:
    """Compares models of the same data by their log evidence.

    As `arviz_stats.compare` does by predictive density: one row for each model, the best first.

    Args:
        models: name and `LogZ` of each model (from `log_z`), or a DataTree that `read_log_z` reads.
        prior: prior probability of each model by name; they are positive and add up to one. Default: all the same.
        ci_prob: probability inside the interval of `probability`. Default: ArviZ's `rcParams["stats.ci_prob"]`.

    Returns:
        A DataFrame with the names of the models as its index, and the columns

        - `rank`: 0 is the best, by log evidence;
        - `log_evidence`, `se`: log p(y | m) and its standard error, in nats;
        - `log_bf`, `dse`: log Bayes factor of the model over the best one (so never above 0), and its standard error;
        - `prior`: prior probability of the model;
        - `probability`, `probability_se`: its posterior probability, and the standard deviation of that over draws of
          the log evidences within their errors;
        - `eti89_lb`, `eti89_ub` (by the percentage of `ci_prob`): quantiles of the same draws. Near 0 and 1 they say
          what the standard deviation does not;
        - `warning`, `doubts`: whether and why not to trust a model's evidence.

    Raises:
        IncomparableError: where the models are of different data.
        EnergyError: for fewer than two models, log evidences or errors that are not finite, and prior probabilities
            that are not probabilities of these models.

    Example:
        >>> ebm_ppl.compare({"spatial": ebm_ppl.log_z(key_a, a), "independent": ebm_ppl.log_z(key_b, b)})
    """
    import pandas as pd
    from arviz_base import rcParams

    found = {name: model if isinstance(model, LogZ) else _read(name, model) for name, model in models.items()}
    _check(found)
    ci_prob = float(rcParams["stats.ci_prob"] if ci_prob is None else ci_prob)
    if not 0 < ci_prob < 1:
        raise EnergyError(f"ci_prob is a probability between 0 and 1, exclusive; got {ci_prob}.")
    order = sorted(found, key=lambda name: -found[name].value)
    values, errors = (np.array([getattr(found[name], part) for name in order]) for part in ("value", "std_error"))
    weights = _prior(order, prior)
    draws = np.exp(log_softmax(np.log(weights) + values + errors * _normal_points(len(order)), axis=1))
    lower, upper = np.quantile(draws, [(1 - ci_prob) / 2, (1 + ci_prob) / 2], axis=0)
    percent = int(ci_prob * 100)
    _warn(found)
    return pd.DataFrame(
        {
            "rank": np.arange(len(order)),
            "log_evidence": values,
            "se": errors,
            "log_bf": values - values[0],
            "dse": np.where(np.arange(len(order)) == 0, 0.0, np.hypot(errors, errors[0])),
            "prior": weights,
            "probability": np.exp(log_softmax(np.log(weights) + values)),
            "probability_se": np.std(draws, axis=0),
            f"eti{percent}_lb": lower,
            f"eti{percent}_ub": upper,
            "warning": [bool(found[name].doubts) for name in order],
            "doubts": [" ".join(found[name].doubts) for name in order],
        },
        index=pd.Index(order, name="model"),
    )


def _read(name: str, model: Any) -> LogZ:
    """The `LogZ` of a DataTree."""
    if not hasattr(model, "children"):
        raise EnergyError(
            f"Model '{name}' is a {type(model).__name__}: compare takes what log_z returns, or a result of "
            "sample(key, target, SMC())."
        )
    return read_log_z(model)


def _check(models: Mapping[str, LogZ]) -> None:
    """Refuses what has no meaning as a comparison."""
    if len(models) < 2:
        raise EnergyError(f"A comparison needs two models; got {list(models)}.")
    for name, model in models.items():
        if not (np.isfinite(model.value) and np.isfinite(model.std_error) and model.std_error >= 0):
            raise EnergyError(
                f"The log evidence of model '{name}' is {model.value} ± {model.std_error}: a comparison needs finite "
                "numbers. Estimate it again, or leave the model out."
            )
    data = {name: model.data_id for name, model in models.items()}
    if len(set(data.values())) > 1:
        raise IncomparableError(
            f"These evidences are of different observed data ({data}), so they do not compare the models. "
            "Condition all models on the same observed values: the same numbers, in the same shapes and precision, "
            "under the same masks and scales."
        )


def _prior(names: list[str], prior: Mapping[str, float] | None) -> np.ndarray:
    """Prior probabilities in the order of the names."""
    if prior is None:
        return np.full(len(names), 1 / len(names))
    if set(prior) != set(names):
        raise EnergyError(f"Prior probabilities are of the models {sorted(prior)}; the models are {sorted(names)}.")
    weights = np.array([float(prior[name]) for name in names])
    if not np.all(weights > 0):
        raise EnergyError(f"Prior probabilities are positive; got {dict(prior)}. Leave out what is impossible.")
    if not abs(np.sum(weights) - 1) < 1e-6:
        raise EnergyError(f"Prior probabilities add up to 1; these add up to {np.sum(weights):g}: {dict(prior)}.")
    return weights


def _normal_points(dim: int) -> np.ndarray:
    """Evenly spread draws of independent standard normals, (NUM_DRAWS, dim), always the same."""
    from scipy.stats import qmc  # which takes as long to import as the half of this package

    points: Any = qmc.MultivariateNormalQMC(np.zeros(dim), engine=qmc.Sobol(dim, rng=np.random.default_rng(0))).random(
        NUM_DRAWS
    )
    return points


def _warn(models: Mapping[str, LogZ]) -> None:
    for name, model in models.items():
        if model.doubts:
            warnings.warn(
                f"The log evidence of model '{name}' is in doubt, and with it the comparison: {' '.join(model.doubts)}",
                EnergyWarning,
                stacklevel=3,
            )
