"""Importance sampling by evenly spread draws of a reference of one's own: a set of weights, and what they say.

    w = pi_0 exp(-U) / q        log w: minus the energy U_q of a `Rebased` target
    Z = E_q[w]                  `Weighed.value`

The draws are evenly spread, not independent: `BLOCKS` Sobol sequences, each scrambled on its own and carried to q
(`StudentMixture.from_cube`). Each block gives an unbiased estimate, and the standard error is that of their mean,

    Z = mean_b Z_b        se(log Z) = sd_b(Z_b) / (Z sqrt(BLOCKS)) * t / 2

which is several times smaller than that of independent draws where w is smooth, and no larger elsewhere. t is Student's
quantile where the normal one is 2: two errors that so few blocks tell of cover as much as two that are known. Where
Pareto's k is over `HAS_VARIANCE`, the blocks do not show the weights that none of them has, one in N of which is
expected,

    E[w; w > max w] / Z = max w / ((1 - k) N Z)         added to the error, in squares

References:
    Owen (1997), Scrambled net variance for integrals of smooth functions; Hesterberg (1995), Weighted average
    importance sampling and defensive mixture distributions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np
from scipy.special import ndtr, stdtrit

from ebm_ppl import parallel
from ebm_ppl.logz.integral import check_energies, effective_share, pareto_k, relative_error, total_energy
from ebm_ppl.rebase import Rebased
from ebm_ppl.target import Tilted
from ebm_ppl.typing import Array, PRNGKey, generator, keys_of, log_mean

BLOCKS = 16
"""Scrambled sequences of an estimate: the spread of their means has one degree of freedom fewer."""
STUDENT = float(stdtrit(BLOCKS - 1, ndtr(2.0))) / 2
"""Factor of an error so that two of it cover 95.4 % in spite of so few degrees of freedom: 1.09."""
HAS_VARIANCE = 0.5
"""Of Pareto's k: below it the weights have a finite variance."""
LARGEST_K_OF_FEW = 0.85
"""The same, as draws show it by which a fit is judged: `LARGEST_K`, and a standard error of theirs."""
FAIR_SHARE = 0.1
"""Effective share of the draws below which a heavy tail may not have shown itself."""
HEAVIEST = 0.99
"""The same, up to which the mean of a tail is taken by its word."""
AT_ONCE = 2048
"""Draws that are weighed by one call, on the CPU, so that few draws and many take the same program."""
OWN_AT_ONCE = 256
"""Draws of a target's own reference."""
MOST_AT_ONCE = 2**24
"""Coordinates of draws that are weighed at a time, if a block has no more."""
SMALLEST = 2.0**-33
"""Coordinate of a point of the cube, half of its resolution."""


@dataclasses.dataclass(frozen=True)
class Weighed:
    """Log weights of evenly spread draws of a reference, in blocks, shape (block, draw)."""

    log_weight: np.ndarray
    num_nan: int

    @property
    def num(self) -> int:
        return self.log_weight.size

    @functools.cached_property
    def relative(self) -> np.ndarray:
        """The weights over the largest."""
        return np.exp(self.log_weight - np.max(self.log_weight))

    @functools.cached_property
    def value(self) -> float:
        """log of the mean weight."""
        return log_mean(np.ravel(self.log_weight))

    @functools.cached_property
    def std_error(self) -> float:
        """Of `value`, from the spread of the blocks, which without a variance of the weights is not all."""
        spread = STUDENT * relative_error(np.mean(self.relative, axis=1))
        return math.hypot(spread, self.unseen) if self.pareto_k > HAS_VARIANCE else spread

    @property
    def unseen(self) -> float:
        """What weights beyond the largest of the draws add to Z, over Z, by their Pareto tail."""
        beyond = 1 / (1 - min(max(self.pareto_k, 0.0), HEAVIEST))  # their mean, over the largest
        return float(beyond / np.sum(self.relative))

    @functools.cached_property
    def effective_share(self) -> float:
        return effective_share(self.log_weight)

    @functools.cached_property
    def pareto_k(self) -> float:
        return pareto_k(self.log_weight)

    @property
    def behaves(self) -> bool:
        """Whether the mean of such weights settles; where few of the draws count, whether they have a variance too."""
        return self.pareto_k <= (LARGEST_K_OF_FEW if self.effective_share >= FAIR_SHARE else HAS_VARIANCE)

    @property
    def fit(self) -> tuple[bool, float]:
        """By which references are compared: whether the weights behave, then how many of the draws are effective."""
        return self.behaves, self.effective_share


def draw(key: PRNGKey, reference: Rebased, num: int) -> tuple[np.ndarray, Weighed]:
    """`num` draws of a reference, shape (num, dim), and what they weigh."""
    groups = list(_groups(key, reference, num))
    return np.concatenate([z for z, _ in groups]), weighed([energy for _, energy in groups])


def weigh(key: PRNGKey, reference: Rebased, num: int) -> Weighed:
    """What `num` draws of a reference weigh, of which no more are held than are weighed at a time."""
    return weighed([energy for _, energy in _groups(key, reference, num)])


def weighed(energies: list[np.ndarray]) -> Weighed:
    """What draws weigh by their energies relative to q, in `BLOCKS`; those with a NaN energy weigh nothing."""
    energy = np.concatenate(energies)
    nan = check_energies(energy, "draws of the fitted reference")
    return Weighed(np.where(np.isnan(energy), -np.inf, -energy).reshape(BLOCKS, -1), nan)


def _groups(key: PRNGKey, reference: Rebased, num: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draws and their energies relative to q, some of the blocks at a time."""
    key_cube, key_own = keys_of(key, 2)
    per_block = num // BLOCKS
    few = math.ceil(float(reference.defence) * per_block) + 1
    owns = np.split(draw_own(key_own, reference.target, BLOCKS * few), BLOCKS)
    rngs = generator(key_cube).spawn(BLOCKS)
    size = BLOCKS
    while size > 1 and size * per_block * reference.dim > MOST_AT_ONCE:
        size //= 2
    for start in range(0, BLOCKS, size):
        blocks = zip(rngs[start : start + size], owns[start : start + size], strict=True)
        z = np.concatenate([_even(rng, reference, per_block, own) for rng, own in blocks])
        parts = parallel.over(_energy, parallel.split(z, most=max(len(z) // AT_ONCE, 1)), reference)
        yield z, np.concatenate(jax.device_get(parts))


def _even(rng: np.random.Generator, reference: Rebased, num: int, own: np.ndarray) -> np.ndarray:
    """`num` draws of q from one scrambled sequence, whose first coordinate also says which of them are to be its own.

    Args:
        own: draws of the target's own reference, as many as its share of q can ask for.
    """
    from scipy.stats import qmc  # which takes as long to import as the half of this package

    cube = np.clip(qmc.Sobol(reference.dim + 2, bits=32, rng=rng).random(num), SMALLEST, 1 - SMALLEST)
    defence = float(reference.defence)
    is_own = cube[:, 0] < defence
    cube[:, 0] = np.maximum(cube[:, 0] - defence, 0.0) / (1 - defence)
    z = reference.proposal.from_cube(cube)
    z[is_own] = own[: np.sum(is_own)]
    return z


def draw_own(key: PRNGKey, target: Tilted, num: int) -> np.ndarray:
    """Independent draws of a target's own reference, shape (num, dim), by one program for any number of them."""
    parts = np.arange(math.ceil(num / OWN_AT_ONCE) * OWN_AT_ONCE).reshape(-1, OWN_AT_ONCE)
    return np.concatenate(jax.device_get(parallel.over(_own, list(parts), key, target, hurry=True)))[:num]


def prepare_own(key: PRNGKey, target: Tilted) -> None:
    """Starts to compile what `draw_own` needs."""
    parallel.prepare_over(_own, np.arange(OWN_AT_ONCE), key, target, hurry=True)


def _own(index: Array, key: PRNGKey, target: Tilted) -> Array:
    return target.sample_reference(jax.random.fold_in(key, index))


def _energy(z: Array, reference: Rebased) -> Array:
    return total_energy(reference, z)[1]
