"""Chains at every rung of a ladder of inverse temperatures, and their energies.

    pi_k(z)  proportional to  pi_0(z) exp(-b_k U(z))        0 = b_0 < ... < b_K = 1

    ladder      a pilot run of SMC chooses the rungs, and leaves a cloud of particles at each
    rung 0      independent draws of the reference
    rung k      chains from particles of its cloud, with its scale and step size; their first steps are thrown away
    energies    U[k, c, d], of draw d of chain c at rung k: all that an estimator sees (`Rungs`)

Points of zero mass (an energy of +inf or NaN) occur at rung 0 alone, since no chain enters them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl import parallel, smc
from ebm_ppl.centring import Centring, alike
from ebm_ppl.cloud import Cloud
from ebm_ppl.crosswise import tuning_of
from ebm_ppl.independence import Mover
from ebm_ppl.kernels import Kernel
from ebm_ppl.logz.integral import (
    CONTRADICTION,
    LARGEST_RHAT,
    Opinion,
    check_energies,
    disagreement,
    opinion_of,
    total_energy,
)
from ebm_ppl.rebase import Joint
from ebm_ppl.smc import SMC, lags
from ebm_ppl.target import Tilted
from ebm_ppl.typing import Array, PRNGKey, with_error

LOW_ACCEPTANCE = 0.3


class Rungs(NamedTuple):
    """The energies of a ladder of chains."""

    beta: np.ndarray
    """Inverse temperatures from 0 to 1, shape (rung,)."""
    energy: np.ndarray
    """Of the draws, in nats, shape (rung, chain, draw); +inf for zero mass."""


class Ladder(NamedTuple):
    """A ladder's energies, and what speaks for and against them."""

    rungs: Rungs
    opinion: Opinion
    """The pilot's."""
    largest_rhat: float
    """Of the energies of a rung."""
    least_acceptance: float
    num_evaluations: float
    num_nan: int


class Rung(NamedTuple):
    """Where the chains of a rung start from; several along a leading axis."""

    key: Array
    beta: Array
    z: Array
    """The pilot's particles, shape (particle, dim)."""
    step_size: Array
    centring: Centring | None
    """Coordinates in which the pilot moved them."""


def climb(key: PRNGKey, target: Tilted, pilot: SMC, num_chains: int, num_warmup: int, num_draws: int) -> Ladder:
    """The pilot, draws of the reference, and chains at every rung after it."""
    key_pilot, key_reference, key_chains = jax.random.split(key, 3)
    clouds: list[Cloud] = []
    run = smc.run(
        key_pilot,
        Joint(target),
        pilot,
        progress_bar=False,
        visit=lambda stage: clouds.append(jax.tree.map(lambda x: x[0], stage[0])),
    )
    opinion = opinion_of(run)

    keys = parallel.split(jax.random.split(key_reference, num_chains * num_draws))
    at_zero = np.concatenate(jax.device_get(parallel.over(_energy_of_reference, keys, target, hurry=True)))
    num_nan = check_energies(at_zero, "draws of the reference")

    keys = jax.random.split(key_chains, len(clouds))
    centrings = alike([cloud.centring for cloud in clouds])
    parts = zip(keys, clouds, centrings, strict=True)
    starts = [Rung(key, c.beta, c.z, c.step_size, centring) for key, c, centring in parts]
    rungs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    # One rung to a part, so that their number, which the pilot chooses, is no part of the compiled shapes.
    parts = parallel.split(rungs, most=len(clouds))
    records = jax.device_get(parallel.over(_chains, parts, target, pilot.kernel, num_chains, num_warmup, num_draws))
    record = {name: np.concatenate([part[name] for part in records]) for name in records[0]}
    above = np.asarray(record["energy"], float)
    check_energies(above, "chains of the ladder")

    energy = np.concatenate([at_zero.reshape(1, num_chains, num_draws).astype(float), above])
    energy = np.where(np.isnan(energy), np.inf, energy)
    return Ladder(
        rungs=Rungs(np.array([0.0, *(float(cloud.beta) for cloud in clouds)]), energy),
        opinion=opinion,
        largest_rhat=max(disagreement(each) for each in above),
        least_acceptance=float(np.min(record["accepted"])),
        num_evaluations=opinion.num_evaluations + at_zero.size + float(np.sum(record["num_evaluations"])),
        num_nan=opinion.num_nan + num_nan + int(np.sum(record["num_nan"])),
    )


def _energy_of_reference(key: PRNGKey, target: Tilted) -> Array:
    return total_energy(target, target.sample_reference(key))[1]


def _chains(
    rung: Rung, target: Tilted, sampler: Mover, num_chains: int, num_warmup: int, num_draws: int
) -> dict[str, Array]:
    """The chains of a rung: energies of their draws, of shape (chain, draw), and how they fared."""
    kernel: Kernel = sampler.kernel()
    num, dim = rung.z.shape
    key_start, key_steps = jax.random.split(rung.key)
    # The particles that a chain starts from have a share in the scale that moves it; the warm-up forgets that.
    tuning = tuning_of(rung.z, rung.step_size, rung.centring, num)
    start = jax.random.choice(key_start, rung.z, (num_chains,), replace=False)

    def log_density(z: Array) -> Array:
        log_reference, energy = total_energy(target, z)
        return log_reference - rung.beta * energy

    def step(states: Any, number: Array) -> tuple[Any, dict[str, Array]]:
        key_length, key_jitter, key_step = jax.random.split(jax.random.fold_in(key_steps, number), 3)
        num_steps = kernel.length(key_length, tuning, dim)
        # As in SMC, which has found the step size for steps that are shortened so.
        shorter = jnp.exp(-jax.random.uniform(key_jitter, (num_chains,), start.dtype))

        def one(key: PRNGKey, state: Any, factor: Array) -> tuple[Any, dict[str, Array]]:
            shortened = tuning._replace(step_size=tuning.step_size * factor)
            return kernel.step(key, state, log_density, shortened, num_steps)

        states, stats = jax.vmap(one)(jax.random.split(key_step, num_chains), states, shorter)
        energy = jax.vmap(lambda z: total_energy(target, z)[1])(states.position)
        return states, {
            "energy": jnp.where(stats["infinite_density"], -jnp.inf, energy),
            "accepted": jnp.mean(stats["acceptance_rate"]),
            "num_evaluations": num_chains * (num_steps + kernel.jumps + 1),
            "num_nan": jnp.sum(stats["nan_energy"]),
        }

    states = jax.vmap(lambda z: kernel.init(z, log_density))(start)
    _, record = jax.lax.scan(step, states, jnp.arange(num_warmup + num_draws))
    return {
        "energy": record["energy"][num_warmup:].T,
        "accepted": jnp.mean(record["accepted"]),
        "num_evaluations": num_chains + jnp.sum(record["num_evaluations"]),
        "num_nan": jnp.sum(record["num_nan"]),
    }


def doubts_of(ladder: Ladder, value: float, std_error: float) -> list[str]:
    """What speaks against a log Z from a ladder."""
    doubts = []
    opinion = ladder.opinion
    if not ladder.largest_rhat <= LARGEST_RHAT:
        doubts.append(
            f"The chains of a rung disagree on its energies (R-hat {ladder.largest_rhat:.2f}): log Z may be off by "
            "more than the stated error. More steps (num_warmup, num_draws), a larger pilot or a reparametrised model "
            "help."
        )
    if not ladder.least_acceptance >= LOW_ACCEPTANCE:
        doubts.append(
            f"The chains of a rung accept {ladder.least_acceptance:.0%} of their steps: they hardly move. A pilot of "
            "more moves (num_moves), or a reparametrised model, helps."
        )
    if lags(opinion.drift):
        doubts.append(
            f"The pilot's particles lag behind their targets (drift {opinion.drift:.1f}), so that the chains start "
            "where they should not: log Z may be off by far more than the stated error. A pilot of more moves "
            "(num_moves), a longer warm-up (num_warmup) or a reparametrised model help."
        )
    elif abs(value - opinion.value) > CONTRADICTION * math.hypot(std_error, opinion.std_error):
        doubts.append(
            f"The pilot's log Z ({with_error(opinion.value, opinion.std_error)}) contradicts that of the ladder "
            f"({with_error(value, std_error)}): one of them is wrong, and the error bar does not say by how "
            "much. More steps (num_warmup, num_draws), a larger pilot or a reparametrised model help."
        )
    return doubts
