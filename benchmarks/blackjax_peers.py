"""BlackJAX's estimators of log Z, in unconstrained space (`estimate.py` has the terms).

Both SMC samplers get what a user gives them at best: HMC moves with the covariance of the particles as inverse mass
matrix, and a step size that follows the acceptance rate. Nested slice sampling runs as in BlackJAX's examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
from blackjax.ns.utils import finalise, log_weights
from blackjax.smc import extend_params
from blackjax.smc.resampling import systematic
from blackjax.smc.tuning.from_kernel_info import update_scale_from_acceptance_rate
from blackjax.smc.tuning.from_particles import particles_covariance_matrix
from estimate import Estimate, Run, draws, log_likelihood

import ebm_ppl as ebm

PARTICLES = 1000
MOVES = 5
LEAPFROGS = 8
ACCEPTANCE = 0.8
TEMPERED_ESS = 0.5
PERSISTENT_ESS = 3.0
"""The default; the effective size of all particles so far, in units of those of a stage."""
MOST_STAGES = 100
"""Of persistent sampling, which keeps all of them, and weighs all at every step of a search for the temperature."""
LIVE, DELETED = 500, 50
REMAINING = -3.0
"""log of the live points' evidence over that of the dead at which a nested run ends."""


def blackjax_tempered(target: ebm.Target) -> Run:
    """Adaptive tempered SMC."""

    def initial(particles: jax.Array) -> Any:
        return blackjax.adaptive_tempered_smc.init(particles)

    return _blackjax_smc(target, blackjax.adaptive_tempered_smc, initial, TEMPERED_ESS, math.inf)


def blackjax_persistent(target: ebm.Target) -> Run:
    """Adaptive persistent sampling: the particles of all stages are kept and weighted together."""

    def initial(particles: jax.Array) -> Any:
        return blackjax.adaptive_persistent_sampling_smc.init(particles, log_likelihood(target), MOST_STAGES)

    return _blackjax_smc(target, blackjax.adaptive_persistent_sampling_smc, initial, PERSISTENT_ESS, MOST_STAGES)


def _blackjax_smc(target: ebm.Target, algorithm: Any, initial: Callable, target_ess: float, most_stages: float) -> Run:
    """HMC moves with the covariance of the particles as inverse mass matrix, a step size that follows the acceptance.

    A stage costs each particle its leapfrog steps, the start of its moves, and its weight. (The solver for the
    temperature of tempered SMC evaluates it once more, which is not counted.)
    """
    hmc = blackjax.hmc.build_kernel()

    def move(key: jax.Array, state: Any, log_density: Callable, **settings: jax.Array) -> tuple:
        return hmc(key, state, log_density, num_integration_steps=LEAPFROGS, **settings)

    kernel = algorithm.build_kernel(
        target.log_reference, log_likelihood(target), move, blackjax.hmc.init, systematic, target_ess=target_ess
    )

    def stage(carry: tuple, key: jax.Array) -> tuple:
        state, step_size, log_z, count = carry
        parameters = {"inverse_mass_matrix": particles_covariance_matrix(state.particles), "step_size": step_size}
        state, info = kernel(jax.random.fold_in(key, count), state, MOVES, extend_params(parameters))
        accepted = jnp.mean(info.update_info.acceptance_rate)
        step_size = update_scale_from_acceptance_rate(step_size[None], accepted[None], ACCEPTANCE)[0]
        log_z = state.log_Z if hasattr(state, "log_Z") else log_z + info.log_likelihood_increment
        return state, step_size, log_z, count + 1

    @jax.jit
    def run_all(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        key_prior, key_run = jax.random.split(key)
        state = initial(draws(key_prior, target, PARTICLES))
        start = state, jnp.asarray(target.dim**-0.25), jnp.zeros(()), jnp.zeros((), int)
        state, _, log_z, count = jax.lax.while_loop(
            lambda carry: (carry[0].tempering_param < 1.0) & (carry[3] < most_stages),
            lambda carry: stage(carry, key_run),
            jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), start),
        )
        return state.tempering_param, log_z, count

    def run(seed: int) -> Estimate:
        temperature, log_z, count = jax.device_get(run_all(jax.random.key(seed)))
        if temperature < 1.0:
            raise RuntimeError(f"at inverse temperature {temperature:.3g} after {count} stages")
        return Estimate(float(log_z), None, PARTICLES * (1 + float(count) * (MOVES * LEAPFROGS + 2)))

    return run


def blackjax_nested(target: ebm.Target) -> Run:
    """Nested slice sampling, with the advised number of slices."""
    algorithm = blackjax.nss(
        target.log_reference, log_likelihood(target), num_inner_steps=max(5, 2 * target.dim), num_delete=DELETED
    )
    init, step = jax.jit(algorithm.init), jax.jit(algorithm.step)

    def run(seed: int) -> Estimate:
        key_prior, key_run, key_volume = jax.random.split(jax.random.key(seed), 3)
        state, dead, evaluations = init(draws(key_prior, target, LIVE)), [], float(LIVE)
        while not state.integrator.logZ_live - state.integrator.logZ < REMAINING:
            state, info = step(jax.random.fold_in(key_run, len(dead)), state)
            slices = info.update_info
            # Both ends of a slice are looked at before it expands.
            evaluations += float(jnp.sum(2.0 + slices.num_expansions + slices.num_shrink))
            dead.append(info)
        weights = log_weights(key_volume, finalise(state, dead, update_info=False))
        values = jax.scipy.special.logsumexp(weights, axis=0)
        return Estimate(float(jnp.mean(values)), float(jnp.std(values)), evaluations)

    return run
