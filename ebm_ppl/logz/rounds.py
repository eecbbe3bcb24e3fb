"""Parallel tempering in rounds: between them the ladder is tuned, in the last one all is fixed.

    round      a number of moves with one ladder, twice as many as in the round before
    L(b_k)     r_0 + ... + r_{k-1} by the rejections of a round: the communication barrier, a monotone function of b
    rungs      at equal steps of L, so that all swaps are rejected at one rate; where their number is not given it is
               about 2 Lambda + 1, and that rate about a half
    tuning     step size and metric of each rung by `warmup.py`, from all replicas; new rungs have those of the old one
               that is nearest in L, and its points

Draws of zero mass are rejected whatever b_1 is, so that the rungs are placed by the others. Replicas share nothing in
the last round but what was tuned before it.

References:
    Syed, Bouchard-Cote, Deligiannidis and Doucet (2022), Non-reversible parallel tempering: a scalable highly parallel
    MCMC scheme.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import PchipInterpolator

from ebm_ppl import parallel
from ebm_ppl.kernels import Tuning
from ebm_ppl.logz.integral import check_energies, draws_of_reference
from ebm_ppl.logz.replicas import Ladder, Record, Replica, Sampler, make_round, rejections, warmup_of
from ebm_ppl.target import Tilted
from ebm_ppl.typing import Array, PRNGKey
from ebm_ppl.warmup import WarmupState, pooled

STARTS = 256
"""Draws of the reference from which a replica takes its first points."""
FIRST_RUNGS = 13
"""Of the first round, where their number is not given."""
GROWTH = 4
"""The number of rungs grows by so many, so that few shapes are compiled."""
MOST_RUNGS = 129
SMALLEST = 1e-6
"""Rejection that neighbours have at least, so that the barrier grows with every rung."""


class Run(NamedTuple):
    """The last round, and what all of them cost."""

    beta: np.ndarray
    step_size: np.ndarray
    """Of each rung above the reference."""
    last: Record
    num_evaluations: float
    num_nan: int
    barriers: tuple[float, ...]
    """Lambda by each round."""


def run(
    key: PRNGKey,
    target: Tilted,
    sampler: Sampler,
    *,
    num_replicas: int,
    num_rungs: int | None,
    num_rounds: int,
    num_draws: int,
    progress_bar: bool = False,
) -> Run:
    """Rounds of tuning, the first of `num_draws / 2**num_rounds` moves, and one of `num_draws` with all fixed.

    Args:
        num_rungs: as many as given in all rounds, or else about 2 Lambda + 1.

    Raises:
        NonFiniteEnergyError: for an energy of -inf.
        DegenerateParticlesError: where no draw of the reference has any mass.
    """
    from tqdm.auto import tqdm

    ladder, replicas, num_evaluations, num_nan = _start(key, target, sampler, num_replicas, num_rungs or FIRST_RUNGS)
    lengths = [num_draws >> halvings for halvings in range(num_rounds, -1, -1)]
    barriers, first = [], 0
    with tqdm(total=sum(lengths), desc="parallel tempering", disable=not progress_bar) as bar:
        for number, length in enumerate(lengths):
            tuning_goes_on = number < num_rounds
            replicas, record = make_round(replicas, target, sampler, ladder, first, length, tuning_goes_on)
            check_energies(record.energy, f"round {number + 1} of parallel tempering")
            num_evaluations += float(np.sum(record.num_evaluations))
            num_nan += int(np.sum(record.num_nan))
            steps = steps_of_barrier(np.asarray(ladder.beta, float), record.energy)
            barriers.append(float(np.sum(steps)))
            if tuning_goes_on:
                is_last = number == num_rounds - 1
                learned = _learned(replicas, sampler, ladder, record, room=lengths[-2], is_last=is_last)
                replicas, ladder = _climbed(replicas, ladder, learned, steps, num_rungs)
            first += length
            bar.update(length)
            bar.set_postfix_str(f"barrier {barriers[-1]:.1f}")
    energy = np.where(np.isnan(record.energy), np.inf, record.energy).astype(float)
    return Run(
        beta=np.asarray(ladder.beta, float),
        step_size=np.asarray(ladder.tuning.step_size),
        last=record._replace(energy=energy),
        num_evaluations=num_evaluations,
        num_nan=num_nan,
        barriers=tuple(barriers),
    )


def _start(
    key: PRNGKey, target: Tilted, sampler: Sampler, num_replicas: int, num_rungs: int
) -> tuple[Ladder, list[Replica], float, int]:
    """A geometric ladder, and points drawn from the reference with the weights that they have at each rung."""
    key_draws, key_choice, key_replicas = jax.random.split(key, 3)
    z, energy = draws_of_reference(key_draws, target, num_replicas * STARTS)
    num_nan, num_drawn = check_energies(energy, "draws of the reference"), len(energy)
    z, energy = z[energy < np.inf], energy[energy < np.inf]

    low, high = np.quantile(energy, [0.25, 0.75])
    beta = np.append(0.0, np.geomspace(1 / max(high - low, num_rungs), 1.0, num_rungs - 1))
    beta[-1] = 1.0
    rng, points = np.random.default_rng(int(jax.random.bits(key_choice))), []
    for replica in range(num_replicas):
        own = slice(replica % len(z), None, num_replicas)
        log_weight = -beta[:, None] * energy[own]
        points.append(z[own][np.argmax(log_weight + rng.gumbel(size=log_weight.shape), axis=1)])

    unlearned = warmup_of(sampler, target.dim).init(target.dim)
    unlearned = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_rungs - 1, *jnp.shape(x))), unlearned)
    tuning = Tuning(jnp.exp(unlearned.step_size.log_step_size), unlearned.scale)
    batch = Replica(
        key=jax.random.split(key_replicas, num_replicas),
        z=jnp.asarray(np.stack(points)),
        walker=jnp.broadcast_to(jnp.arange(num_rungs), (num_replicas, num_rungs)),
        learning=jax.tree.map(lambda x: jnp.broadcast_to(x, (num_replicas, *x.shape)), unlearned.step_size),
    )
    replicas = parallel.split(batch, most=num_replicas)
    return Ladder(jnp.asarray(beta, z.dtype), tuning), replicas, float(num_drawn), num_nan


def steps_of_barrier(beta: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """The barrier between neighbours, (rung - 1,): rejections of points that have mass."""
    with np.errstate(invalid="ignore"):  # +inf minus +inf
        rejected = rejections(beta, np.where(np.isfinite(energy), energy, np.nan))
    return np.maximum(np.nanmean(rejected, axis=(0, 1)), SMALLEST)


def _learned(
    replicas: list[Replica], sampler: Sampler, ladder: Ladder, record: Record, *, room: int, is_last: bool
) -> tuple[Any, Tuning]:
    """Dual averaging to start again from and tuning of each rung, by all replicas together.

    The last round of tuning leaves the metric alone, whose step size it has found.
    """
    step_sizes = pooled([replica.learning for replica in replicas])
    if is_last:
        return step_sizes, Tuning(jnp.exp(step_sizes.log_step_size_avg), ladder.tuning.scale)

    def of_rungs(x: np.ndarray) -> np.ndarray:
        padding = [(0, 0), (0, 0), (0, room - x.shape[1]), (0, 0)]
        return np.pad(np.moveaxis(x, 2, 0), padding)

    batch = step_sizes, of_rungs(record.z), of_rungs(record.gradient)
    parts = parallel.split(batch, most=len(ladder.beta))
    found = parallel.over(_learn, parts, sampler, np.array(record.z.shape[1]), hurry=True)
    learning, tuning = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
    return learning, tuning


def _learn(rung: tuple[Any, Array, Array], sampler: Sampler, count: Array) -> tuple[Any, Tuning]:
    step_size, positions, gradients = rung
    warmup = warmup_of(sampler, positions.shape[-1])
    empty = warmup.init(positions.shape[-1])
    metric = jax.lax.fori_loop(
        0, count, lambda i, metric: warmup.add(metric, positions[:, i], gradients[:, i]), empty.metric
    )
    closed = warmup.close(WarmupState(step_size, metric, empty.scale))
    return closed.step_size, Tuning(jnp.exp(closed.step_size.log_step_size), closed.scale)


def spread_out(beta: np.ndarray, steps: np.ndarray, num_rungs: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverse temperatures at equal steps of the barrier, and which step of the old ladder ends nearest to each.

    Args:
        beta: of the old ladder, from 0 to 1.
        steps: of the barrier between its rungs, one fewer.
    """
    barrier = np.append(0.0, np.cumsum(steps))
    places = np.linspace(0.0, barrier[-1], num_rungs)
    new = np.asarray(PchipInterpolator(barrier, beta)(places))
    new[0], new[-1] = 0.0, 1.0
    return new, np.argmin(np.abs(places[1:, None] - barrier[1:]), axis=1)


def _climbed(
    replicas: list[Replica], ladder: Ladder, learned: tuple[Any, Tuning], steps: np.ndarray, num_rungs: int | None
) -> tuple[list[Replica], Ladder]:
    """The replicas on a ladder whose rungs are at equal steps of the barrier."""
    wanted = 1 + GROWTH * max(1, math.ceil(2 * float(np.sum(steps)) / GROWTH))
    num_rungs = num_rungs or min(wanted, MOST_RUNGS)
    beta, nearest = spread_out(np.asarray(ladder.beta, float), steps, num_rungs)
    learning, tuning = jax.tree.map(lambda x: x[nearest], learned)
    moved = [
        Replica(
            part.key,
            part.z[:, np.append(0, nearest + 1)],
            jnp.broadcast_to(jnp.arange(num_rungs), (len(part.z), num_rungs)),
            jax.tree.map(lambda x, part=part: jnp.broadcast_to(x, (len(part.z), *x.shape)), learning),
        )
        for part in replicas
    ]
    return moved, Ladder(jnp.asarray(beta, ladder.beta.dtype), tuning)
