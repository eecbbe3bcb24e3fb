"""log Z from a reference that is fitted to a pilot's particles, by draws that had no part in the fit.

    pilot       a cheap run of SMC: a cloud near the posterior, whatever its own log Z
    fit         q, a mixture of Student t distributions with a share of the model's reference (`rebase.py`)
    refits      draws of q with weights w = pi_0 exp(-U) / q, pooled with the cloud, for as long as q gets better
    estimate    fresh draws of the last q:  Z = E_q[w],   se(log Z) = sd(w) / (mean(w) sqrt(n))

The weights are looked at before they are believed: where their tail is heavier than the variance bears (Pareto k over
`LARGEST_K`), SMC goes the rest of the way from q to the posterior, on a path that is short now.

References:
    Cappe, Douc, Guillin, Marin and Robert (2008), Adaptive importance sampling in general mixture classes; Vehtari,
    Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl import parallel, smc
from ebm_ppl.mixture import fit_mixture
from ebm_ppl.rebase import Rebased
from ebm_ppl.smc import SMC
from ebm_ppl.target import Target
from ebm_ppl.typing import Array, EnergyError, PRNGKey, log_mean

LARGEST_K = 0.5
"""Of Pareto's k: beyond it the weights have no variance, and the error bar no meaning."""
GOOD_SHARE = 0.9
"""Effective share of the draws beyond which a better q is not worth its price."""
WORTHWHILE = 1.1
"""Factor by which a refit must raise the effective share of the draws for another to follow."""


@dataclasses.dataclass(frozen=True)
class FittedReference:
    """log Z by importance sampling, or a short path of SMC, from a reference fitted to a pilot's particles.

    Args:
        tol: standard error wanted, in nats. Without one the estimate gets as many evaluations as the search for its
            reference took, which is at most a factor sqrt(2) from the least error for the sum of both.
        num_draws: draws of a refit, a multiple of 16.
        max_draws: bound on the draws of the estimate.
        max_refits: bound on the fits after the first.
        defence: share of the model's own reference in the fitted one.
        pilot: the SMC whose particles are fitted.
        fallback: the SMC from the fitted reference, where importance sampling is not to be trusted.
    """

    tol: float | None = None
    num_draws: int = 4096
    max_draws: int = 1_000_000
    max_refits: int = 4
    defence: float = 0.01
    pilot: SMC = dataclasses.field(default_factory=lambda: SMC(num_particles=2000, target_ess=0.5, num_moves=1))
    fallback: SMC = dataclasses.field(default_factory=SMC)
    name = "fitted reference"

    def __post_init__(self):
        if self.num_draws < 16 or self.num_draws % 16:
            raise EnergyError(f"num_draws is a positive multiple of 16; got {self.num_draws}.")
        if not 0 < self.defence < 1:
            raise EnergyError(f"defence is a share between 0 and 1, exclusive; got {self.defence}.")
        if self.tol is not None and not self.tol > 0:
            raise EnergyError(f"tol is a positive standard error in nats; got {self.tol}.")


class Integral(NamedTuple):
    """An estimate of log E_{pi_0}[exp(-U)], with what says whether to trust it."""

    value: float
    std_error: float
    branch: str
    """`"importance sampling"` or `"SMC"`."""
    pareto_k: float
    """Of the weights; below .5 they have a variance."""
    effective_share: float
    num_evaluations: float
    num_nan: int
    largest_drift: float
    """As in `smc.py`; zero without a path."""
    story: tuple[str, ...]


class Weighed(NamedTuple):
    """Draws of a reference with their log weights, and the sums that matter."""

    z: np.ndarray
    log_weight: np.ndarray
    num_nan: int

    @property
    def value(self) -> float:
        """log of the mean weight."""
        return log_mean(self.log_weight)

    @property
    def effective_share(self) -> float:
        weights = self.relative
        return float(np.sum(weights) ** 2 / np.sum(weights**2) / len(weights)) if np.any(weights > 0) else 0.0

    @property
    def std_error(self) -> float:
        """Of `value`: the relative standard error of the mean weight."""
        share = self.effective_share
        return math.sqrt((1 / share - 1) / len(self.z)) if share else math.inf

    @property
    def pareto_k(self) -> float:
        """Shape of the tail of the weights, by Pareto smoothed importance sampling."""
        from arviz_stats.base import array_stats

        if np.ptp(self.log_weight) < 1e-6:
            return -math.inf
        return float(array_stats.psislw(-self.log_weight)[1])

    @property
    def relative(self) -> np.ndarray:
        """The weights over the largest."""
        top = np.max(self.log_weight)
        return np.exp(self.log_weight - top) if np.isfinite(top) else np.zeros_like(self.log_weight)


def integrate(key: PRNGKey, target: Target, method: FittedReference) -> Integral:
    """log Z of all energies of a target at once, from one pilot, one fitted reference and one estimate."""
    key_pilot, key_fit, key_draw, key_path = jax.random.split(key, 4)
    pilot = smc.run(key_pilot, target, method.pilot, progress_bar=False)
    evaluations = float(pilot.attrs["num_evaluations"])
    cloud = np.asarray(pilot.z[0])
    story = [f"pilot: {len(cloud)} particles, {evaluations:.0f} evaluations"]

    room = len(cloud) + (method.max_refits + 1) * method.num_draws
    points, weights = np.zeros((room, target.dim), cloud.dtype), np.zeros(room, cloud.dtype)
    points[: len(cloud)], weights[: len(cloud)], filled = cloud, 0.5, len(cloud)
    best, best_share, num_nan = None, -1.0, int(pilot.attrs["num_nan_energy"])
    for fit in range(method.max_refits + 1):
        mixture = fit_mixture(jax.random.fold_in(key_fit, fit), jnp.asarray(points), jnp.asarray(weights))
        rebased = Rebased(target, mixture, jnp.asarray(method.defence, cloud.dtype))
        seen = _draw(jax.random.fold_in(key_draw, fit), rebased, method.num_draws, method.num_draws)
        evaluations += method.num_draws
        num_nan += seen.num_nan
        share, before = seen.effective_share, best_share
        story.append(f"fit {fit + 1}: {len(mixture.log_weight)} components, {share:.0%} of the draws are effective")
        if share > best_share:
            best, best_share = rebased, share
        if share >= GOOD_SHARE or share < WORTHWHILE * before:
            break
        here = slice(filled, filled + method.num_draws)
        points[here], weights[here], filled = seen.z, _truncated(seen), here.stop

    assert best is not None
    num_final = _enough(best_share, evaluations, method)
    final = _draw(jax.random.fold_in(key_draw, method.max_refits + 1), best, num_final, method.num_draws)
    evaluations += len(final.z)
    num_nan += final.num_nan
    value, std_error, k, branch, drift = final.value, final.std_error, final.pareto_k, "importance sampling", 0.0
    story.append(f"{len(final.z)} fresh draws: log Z {value:.3f} ± {std_error:.3f}, Pareto k {k:.2f}")
    if not k <= LARGEST_K:
        path = smc.run(key_path, best, method.fallback, progress_bar=False)
        found: Any = path.log_z
        value, std_error, branch = float(found["data_value"][0]), float(found["data_std_error"][0]), "SMC"
        evaluations += float(path.attrs["num_evaluations"])
        num_nan += int(path.attrs["num_nan_energy"])
        drift = float(path.attrs["largest_drift"])
        story.append(f"heavy tails, so SMC from the fitted reference: log Z {value:.3f} ± {std_error:.3f}")
    return Integral(value, std_error, branch, k, final.effective_share, evaluations, num_nan, drift, tuple(story))


def _enough(share: float, spent: float, method: FittedReference) -> int:
    """Draws of the estimate, if they are as effective as those seen."""
    wanted = spent if method.tol is None else (1 / max(share, 1e-6) - 1) / method.tol**2
    return math.ceil(min(max(wanted, method.num_draws), method.max_draws))


def _draw(key: PRNGKey, rebased: Rebased, num: int, block: int) -> Weighed:
    """At least `num` draws of a reference, with their log weights -U_q; those with a NaN energy weigh nothing."""
    results = []
    for i in range(math.ceil(num / block)):
        keys = parallel.split(jax.random.split(jax.random.fold_in(key, i), block))
        results += jax.device_get(parallel.over(_weigh, keys, rebased))
    z, log_weight, nan = jax.tree.map(lambda *parts: np.concatenate(parts), *results)
    if np.any(log_weight == np.inf):
        raise EnergyError("An energy is -inf (infinite density) at a draw of the reference: bound it from below.")
    return Weighed(z, log_weight, int(np.sum(nan)))


def _weigh(key: PRNGKey, rebased: Rebased) -> tuple[Array, Array, Array]:
    z = rebased.sample_reference(key)
    _, (_, energy) = rebased.staged_terms(z)
    nan = jnp.isnan(energy)
    return z, jnp.where(nan, -jnp.inf, -energy), nan


def _truncated(seen: Weighed) -> np.ndarray:
    """Weights for a fit, the largest cut, that add up to the effective number of draws (Ionides 2008)."""
    weights = seen.relative
    weights = np.minimum(weights, np.mean(weights) * math.sqrt(len(weights)))
    return weights / max(np.sum(weights), 1e-30) * seen.effective_share * len(weights)
