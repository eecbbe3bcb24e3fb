"""The moves of a cloud of particles at one temperature, as many as it takes to forget where they were.

    round         `num_moves` moves of every particle, in each of them all by the same number of steps
    rho_j         correlation over the cloud of coordinate j with itself before the moves
    enough        max_j |rho_j| <= `DECORRELATED`, or a round no longer lowers it

The step size is learned on the way, from the acceptance of the whole cloud; the metric, and coordinates that it is a
metric of, are given (`smc.py` says which).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebm_ppl.centring import Centring
from ebm_ppl.independence import Mover
from ebm_ppl.kernels import Tuning
from ebm_ppl.scale import DenseScale
from ebm_ppl.sharding import Layout
from ebm_ppl.typing import Array, PRNGKey

FAIR_ACCEPTANCE = 0.3
DECORRELATED = 0.3
STILL_FALLING = 0.98
MAX_ROUNDS = 20
UNFAIR_ROUNDS = 5


class Moved(NamedTuple):
    """Particles on their way through the moves of a stage; states have leading axes (half, particle)."""

    states: Any
    step_size: Array
    moves: Array
    accepted: Array
    leapfrogs: Array
    num_nan: Array
    correlation: Array
    """With the particles before the moves, in the coordinate that remembers best."""
    previous: Array
    """The same a round of moves ago."""


def move(
    key: PRNGKey,
    z: Array,
    log_density: Callable[[Array], Array],
    sampler: Mover,
    num_moves: int,
    step_size: Array,
    coordinates: tuple[DenseScale, Centring | None, Array],
    layout: Layout,
    chain_length: int = 1,
) -> tuple[Moved, Array]:
    """Moves all particles, of shape (2, N/2, dim), in the coordinates of their half, and collects where they have been.

    With a `chain_length` of more than 1 each particle is the first state of a chain that is so long, a round of moves
    from one state to the next, and all of them are collected, (2, N/2, chain_length, dim). Otherwise only the last.

    Rounds of moves go on until no coordinate remembers where it was (correlation at most .3), or until a round no
    longer helps: between separate modes, say, no number of moves would.

    The step size follows the acceptance of the whole cloud from move to move. Each particle shortens it by a factor of
    its own, so that some suit a mode narrower than the cloud.
    """
    kernel = sampler.kernel()
    dim = z.shape[-1]
    layout = layout.halved()

    def again(moved: Moved) -> Array:
        falling = moved.correlation < STILL_FALLING * moved.previous
        remembers = (moved.correlation > DECORRELATED) & falling & (moved.moves < MAX_ROUNDS * num_moves)
        unfair = (moved.accepted < FAIR_ACCEPTANCE) & (moved.moves < UNFAIR_ROUNDS * num_moves)
        return any_alive & ((moved.moves == 0) | remembers | unfair)

    def one_round(moved: Moved) -> Moved:
        moved = jax.lax.fori_loop(0, num_moves, once, moved)
        return moved._replace(previous=moved.correlation, correlation=_correlation(z, moved.states.position))

    def once(_: Array, moved: Moved) -> Moved:
        key_length, key_step, key_jitter = jax.random.split(jax.random.fold_in(key, moved.moves), 3)
        num_steps = kernel.length(key_length, Tuning(moved.step_size, *coordinates), dim)
        shorter = jnp.exp(-jax.random.uniform(key_jitter, z.shape[:2], z.dtype))

        def of_half(states: Any, keys: PRNGKey, factors: Array, own: Any) -> tuple[Any, dict[str, Array]]:
            def step(state: Any, key: PRNGKey, factor: Array) -> tuple[Any, dict[str, Array]]:
                return kernel.step(key, state, log_density, Tuning(moved.step_size * factor, *own), num_steps)

            return layout.renewing(step)(states, keys, factors)

        keys = jax.random.split(key_step, z.shape[:2])
        states, stats = jax.vmap(of_half)(moved.states, keys, shorter, coordinates)
        accepted = jnp.mean(stats["acceptance_rate"])
        return moved._replace(
            states=states,
            step_size=moved.step_size * jnp.exp(accepted - sampler.target_accept),
            moves=moved.moves + 1,
            accepted=accepted,
            leapfrogs=moved.leapfrogs + num_steps + kernel.jumps,
            num_nan=moved.num_nan + jnp.sum(stats["nan_energy"]),
        )

    states = jax.vmap(layout.over(lambda z: kernel.init(z, log_density)))(z)
    any_alive = jnp.any(jnp.isfinite(states.logdensity))
    count, one = jnp.zeros((), int), jnp.ones((), z.dtype)
    start = Moved(states, step_size, count, jnp.zeros_like(one), count, count, one, 2 * one)
    if chain_length == 1:
        moved = jax.lax.while_loop(again, one_round, start)
        return moved, moved.states.position[:, :, None]

    def one_state(moved: Moved, _: None) -> tuple[Moved, Array]:
        moved = one_round(moved)
        return moved, moved.states.position

    moved, rest = jax.lax.scan(one_state, start, length=chain_length - 1)
    return moved, jnp.moveaxis(jnp.concatenate([z[None], rest]), 0, 2)


def _correlation(before: Array, after: Array) -> Array:
    """The largest correlation over the cloud of a coordinate with itself before the moves."""
    axes = (0, 1)
    before, after = before - jnp.mean(before, axes), after - jnp.mean(after, axes)
    spread = jnp.sqrt(jnp.mean(before**2, axes) * jnp.mean(after**2, axes))
    return jnp.max(jnp.abs(jnp.mean(before * after, axes)) / jnp.maximum(spread, jnp.finfo(before.dtype).tiny))
