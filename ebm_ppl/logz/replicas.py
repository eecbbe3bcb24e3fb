"""Replicas of a ladder of chains that swap their points: the moves of parallel tempering.

    pi_k(z)    proportional to  pi_0(z) exp(-b_k U(z))        0 = b_0 < ... < b_K = 1
    move       at rung 0 an independent draw of pi_0, at rung k a step of a kernel that leaves pi_k invariant
    swap       neighbours exchange their points with probability min(1, exp((b_{k+1} - b_k) (U_{k+1} - U_k))),
               those of even k after every other move, those of odd k after the rest
    r_k        the mean probability that the swap of k and k + 1 is rejected, by all moves
    L(b_k)     r_0 + ... + r_{k-1}, the communication barrier up to b_k; Lambda = L(1)

Even and odd swaps in turn make the scheme non-reversible: a point that has gone up goes on, where a coin for each swap
would let it diffuse. A walker that went from the reference to the target and back made a round trip; where moves
forget where they were, all walkers together make one in `2 + 2 sum_k r_k / (1 - r_k)` moves, at best `2 + 2 Lambda`.

Points of zero mass (an energy of +inf or NaN) occur at rung 0 alone: no chain starts from or enters one, and no swap
takes one up.

Everything is written for one replica, a ladder of its own; `pieces.py` takes it over independent ones. `rounds.py`
tunes the ladder between rounds.

References:
    Syed, Bouchard-Cote, Deligiannidis and Doucet (2022), Non-reversible parallel tempering: a scalable highly parallel
    MCMC scheme; Okabe, Kawata, Okamoto and Mikami (2001), Replica-exchange Monte Carlo method for the
    isobaric-isothermal ensemble.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.kernels import HMC, MALA, MCLMC, Tuning
from ebm_ppl.logz.integral import draw_reference, total_energy
from ebm_ppl.pieces import in_pieces, loop, written
from ebm_ppl.target import Tilted
from ebm_ppl.typing import Array, PRNGKey
from ebm_ppl.warmup import Warmup, window_warmup

Sampler = HMC | MALA | MCLMC
Numbers = Any
"""JAX's array inside a compiled function, NumPy's on the host."""
PIECE = 128
"""Most moves of one compiled call."""
LARGEST_RECORD = 2**22
"""Most numbers in the record of a replica's positions."""


class Replica(NamedTuple):
    """One ladder on its way; several along a leading axis."""

    key: Array
    """Move number i uses `fold_in(key, i)`."""
    z: Array
    """A point at each rung, (rung, dim); that of rung 0 makes room for a fresh draw."""
    walker: Array
    """The number of the walker at each rung, (rung,)."""
    learning: Any
    """The dual averaging of each rung above the reference."""


class Ladder(NamedTuple):
    """What all replicas share in a round."""

    beta: Array
    """Inverse temperatures from 0 to 1, (rung,)."""
    tuning: Tuning
    """Of each rung above the reference."""


class Record(NamedTuple):
    """What a move tells; a round has them on the host, with leading axes (replica, draw)."""

    energy: Numbers
    """Of new points before they swap, (rung,), in nats; NaN counts as +inf."""
    ends: Numbers
    """The walkers at the first and the last rung, (2,)."""
    z: Numbers
    """(rung - 1, dim); in the last round of the last rung alone."""
    gradient: Numbers
    accepted: Numbers
    """Acceptance rate, (rung - 1,)."""
    stats: dict[str, Numbers]
    """Of the last rung under ArviZ's names."""
    num_evaluations: Numbers
    num_nan: Numbers


def rejections(beta: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Probability that each swap of neighbours is rejected, for energies whose last axis is the rung."""
    return -np.expm1(np.minimum(0.0, np.diff(beta) * np.diff(energy)))


def round_trips(ends: np.ndarray) -> np.ndarray:
    """Ways of walkers from the first rung to the last and back, of each replica, from `Record.ends`."""
    trips = np.zeros(len(ends), int)
    for replica, walkers in enumerate(ends):
        risen, rising = set(), set()
        for bottom, top in walkers.tolist():
            trips[replica] += bottom in risen
            risen.discard(bottom)
            rising.add(bottom)
            if top in rising:
                rising.discard(top)
                risen.add(top)
    return trips


def warmup_of(sampler: Sampler, dim: int) -> Warmup:
    """What adapts step sizes and learns metrics for a sampler."""
    return window_warmup(sampler.target_accept, sampler.metric, dim)


def make_round(
    replicas: list[Replica], target: Tilted, sampler: Sampler, ladder: Ladder, first: int, length: int, learning: bool
) -> tuple[list[Replica], Record]:
    """`length` moves from number `first` on, in pieces, and their record; step sizes adapt while `learning`."""
    replicas = list(replicas)
    whole: Any = None
    shared, capacity = (target, sampler, ladder, np.array(learning)), _capacity(len(ladder.beta), target.dim)
    for piece in in_pieces(_advance, replicas, first, length, capacity, *shared, mesh=None):
        replicas[piece.index], record = piece.part, piece.record
        if not learning:  # the other points were for that
            record = record._replace(z=record.z[:, :, -1:], gradient=record.gradient[:, :, -1:])
        whole = written(whole, piece._replace(record=record), len(replicas), length)
    return replicas, whole


def _capacity(num_rungs: int, dim: int) -> int:
    return int(np.clip(LARGEST_RECORD // (num_rungs * dim), 1, PIECE))


def _advance(
    replica: Replica, target: Tilted, sampler: Sampler, ladder: Ladder, learning: Array, limits: Array
) -> tuple[Replica, Record]:
    """One replica through `count` moves and swaps from number `first` on, and a record with room for more."""
    adapt = jax.vmap(warmup_of(sampler, target.dim).adapt)

    def step(replica: Replica, number: Array) -> tuple[Replica, Record]:
        key_move, key_swap = jax.random.split(jax.random.fold_in(replica.key, number))
        current = jnp.where(learning, jnp.exp(replica.learning.log_step_size), ladder.tuning.step_size)
        tuning = ladder.tuning._replace(step_size=current)
        z, energy, record = _move(key_move, replica.z, target, sampler, ladder.beta, tuning)
        adapted = adapt(replica.learning, record.accepted)
        adapted = jax.tree.map(lambda new, old: jnp.where(learning, new, old), adapted, replica.learning)
        order = _swapped(key_swap, ladder.beta, energy, number)
        record = record._replace(ends=replica.walker[jnp.array([0, -1])])
        return Replica(replica.key, z[order], replica.walker[order], adapted), record

    return loop(step, replica, limits, _capacity(len(ladder.beta), target.dim))


def _move(
    key: PRNGKey, z: Array, target: Tilted, sampler: Sampler, beta: Array, tuning: Tuning
) -> tuple[Array, Array, Record]:
    """New points at all rungs and their energies, before they swap."""
    kernel = sampler.kernel()
    key_reference, key_length, key_step = jax.random.split(key, 3)
    fresh, energy_of_fresh = draw_reference(key_reference, target)
    # One key for all rungs: a batch takes as long as its longest trajectory.
    num_steps = jax.vmap(lambda tuning: kernel.length(key_length, tuning, target.dim))(tuning)

    def of_rung(key: PRNGKey, z: Array, beta: Array, tuning: Tuning, num_steps: Array) -> tuple[Any, Any, Array]:
        def log_density(z: Array) -> Array:
            log_reference, energy = total_energy(target, z)
            return log_reference - beta * energy

        state, stats = kernel.step(key, kernel.init(z, log_density), log_density, tuning, num_steps)
        energy = total_energy(target, state.position)[1]
        return state, stats, jnp.where(stats.pop("infinite_density"), -jnp.inf, energy)

    keys = jax.random.split(key_step, len(z) - 1)
    states, stats, energy = jax.vmap(of_rung)(keys, z[1:], beta[1:], tuning, num_steps)
    energy = jnp.append(energy_of_fresh, energy)
    record = Record(
        energy=energy,
        ends=jnp.zeros(2, int),
        z=states.position,
        gradient=states.logdensity_grad,
        accepted=stats["acceptance_rate"],
        stats={name: x[-1] for name, x in stats.items()} | {"lp": states.logdensity[-1]},
        num_evaluations=1 + jnp.sum(num_steps + 2),
        num_nan=jnp.sum(stats["nan_energy"]) + jnp.isnan(energy_of_fresh),
    )
    return jnp.concatenate([fresh[None], states.position]), energy, record


def _swapped(key: PRNGKey, beta: Array, energy: Array, number: Array) -> Array:
    """The rung from which each rung takes its point, after the swaps of move number `number`."""
    energy = jnp.where(jnp.isnan(energy), jnp.inf, energy)
    log_ratio = jnp.diff(beta) * jnp.diff(energy)
    lower = jnp.arange(len(beta) - 1)
    accepted = jnp.log(jax.random.uniform(key, lower.shape, energy.dtype)) < log_ratio
    swaps = accepted & (lower % 2 == number % 2)
    none = jnp.zeros(1, bool)
    return jnp.arange(len(beta)) + jnp.append(swaps, none) - jnp.append(none, swaps)
