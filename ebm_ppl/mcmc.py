"""Markov chains: starting points, warm-up and draws, in jitted chunks driven by a host loop.

    start        z_c with finite log p and gradient, a bounded number of tries
    warm-up      phases FAST, SLOW, WINDOW_END of `warmup.window_warmup`
    draws        phase FROZEN of the same compiled function

One compiled function serves warm-up and sampling, so that a run compiles the model's gradient inside a kernel once.
The host loop between chunks is the one place for progress and for errors about the numbers.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl import kernels
from ebm_ppl.kernels import HMC, MALA, MCLMC, NUTS, Kernel, Tuning, hmc_state
from ebm_ppl.target import Target
from ebm_ppl.typing import Array, Draws, EnergyError, EnergyWarning, NonFiniteEnergyError, PRNGKey
from ebm_ppl.warmup import FROZEN, Warmup, schedule, window_warmup

Sampler = NUTS | HMC | MALA | MCLMC
START_TRIES = 100
START_RADIUS = 2.0


class ChainState(NamedTuple):
    """All that continues a run: pass it to `ebm.sample(..., state=state)`."""

    kernel: Any
    """States of the chains, with a leading chain axis."""
    warmup: Any
    """What the warm-up learned."""
    keys: Array
    """One key for each chain; step number i uses `fold_in(key, i)`."""
    step: Array
    """Number of steps made so far."""


def run(
    key: PRNGKey,
    target: Target,
    sampler: Sampler,
    *,
    num_chains: int,
    num_warmup: int,
    num_samples: int,
    thin: int = 1,
    init: str | dict[str, Any] = "uniform",
    state: ChainState | None = None,
    progress_bar: bool = True,
) -> tuple[Draws, ChainState]:
    """Draws from a target by a Markov chain sampler; see `ebm.sample`."""
    target.require_tractable()
    if target.dim == 0:
        raise ValueError("The model has no continuous latent site to sample.")
    if state is None:
        state = _start(key, target, sampler, num_chains, num_warmup, init)
    else:
        num_warmup = 0
    warmup_steps = 0 if _is_unadjusted(sampler) else num_warmup
    phases = np.concatenate([schedule(warmup_steps), np.full(num_samples * thin, FROZEN)])
    records = []
    with _progress(sampler.name, len(phases), progress_bar) as bar:
        for chunk in _chunks(warmup_steps, num_samples * thin):
            state, record = _advance(target, sampler, state, jnp.asarray(phases[chunk]))
            if chunk.start >= warmup_steps:
                records.append(jax.device_get(record))
                _check_finite(records[-1])
            bar.update(chunk.stop - chunk.start)
            bar.set_postfix_str(_summary(record), refresh=False)
    z, stats = jax.tree.map(lambda *parts: np.concatenate(parts).swapaxes(0, 1), *records)
    attrs = {
        "inference_library": "ebm_ppl",
        "sampler": sampler.name,
        "sampler_settings": repr(sampler),
        "adjusted": int(not _is_unadjusted(sampler)),
        "num_warmup": num_warmup,
        "thin": thin,
        "num_divergent": int(stats["diverging"].sum()),
        "num_nan_energy": int(stats["nan_energy"].sum()),
    }
    _warn(attrs, z.shape[0] * z.shape[1])
    return Draws(z[:, thin - 1 :: thin], jax.tree.map(lambda x: x[:, thin - 1 :: thin], stats), attrs), state


def _is_unadjusted(sampler: Sampler) -> bool:
    return isinstance(sampler, MCLMC) and not sampler.adjusted


def _kernel(sampler: Sampler) -> Kernel:
    return kernels.unadjusted_mclmc() if _is_unadjusted(sampler) else sampler.kernel()


def _warmup(sampler: Sampler, dim: int) -> Warmup:
    return window_warmup(sampler.target_accept, sampler.metric, dim)


def _start(
    key: PRNGKey,
    target: Target,
    sampler: Sampler,
    num_chains: int,
    num_warmup: int,
    init: str | dict[str, Any],
) -> ChainState:
    start: Any = None
    if isinstance(init, dict):
        start = _given_point(target, init)
    elif init == "reference":
        target.require_reference()
        start = target.sample_reference
    elif init != "uniform":
        raise EnergyError(f"init is 'uniform', 'reference' or a dictionary of values by site; got {init!r}.")
    state, finite = _first_finite(key, target, sampler, num_chains, num_warmup, start)
    if not bool(jnp.all(finite)):
        chain = int(jnp.argmin(finite))
        raise NonFiniteEnergyError(
            f"No starting point with finite log density and gradient in {START_TRIES} tries. "
            + _explain(target, state.kernel.position[chain])
        )
    return state


def _jit_quickly(function: Callable) -> Callable:
    """Compiles without optimisation: for what runs once, compiling fast matters more than running fast."""
    options = {"xla_backend_optimization_level": 0}
    return eqx.filter_jit(function, compiler_options=options)  # pyright: ignore[reportCallIssue]


def _given_point(target: Target, values: dict[str, Any]) -> Array:
    missing = [name for name in target.latent_names if name not in values]
    if missing:
        raise EnergyError(f"init gives no value for the latent sites {', '.join(map(repr, missing))}.")
    return target.unconstrain(values)


@_jit_quickly
def _first_finite(
    key: PRNGKey,
    target: Target,
    sampler: Sampler,
    num_chains: int,
    num_warmup: int,
    start: Any,
) -> tuple[ChainState, Array]:
    """States of all chains at points where log density and gradient are finite, after a bounded number of tries.

    The points are uniform on (-2, 2) in unconstrained space, draws of the reference, or the one given.
    """

    def propose(key: PRNGKey) -> Any:
        if start is None:
            return jax.random.uniform(key, (target.dim,), minval=-START_RADIUS, maxval=START_RADIUS)
        return start(key) if callable(start) else start

    def is_finite(state: Any) -> Array:
        return jnp.isfinite(state.logdensity) & jnp.all(jnp.isfinite(state.logdensity_grad))

    def attempt(key: PRNGKey, tries: Array) -> Any:
        return hmc_state(propose(jax.random.fold_in(key, tries)), target.log_density)

    def one(key: PRNGKey) -> tuple[Any, Array]:
        def again(carry: tuple[Array, Any]) -> Array:
            return ~is_finite(carry[1]) & (carry[0] < START_TRIES)

        def retry(carry: tuple[Array, Any]) -> tuple[Array, Any]:
            return carry[0] + 1, attempt(key, carry[0])

        _, state = jax.lax.while_loop(again, retry, (jnp.ones((), int), attempt(key, jnp.zeros((), int))))
        return state, is_finite(state)

    key_start, key_tune, key_chains = jax.random.split(key, 3)
    states, finite = jax.vmap(one)(jax.random.split(key_start, num_chains))
    if _is_unadjusted(sampler):
        tune = functools.partial(kernels.tune_unadjusted_mclmc, num_steps=max(num_warmup, 60))
        keys = jax.random.split(key_tune, num_chains)
        states, learned = jax.vmap(lambda key, z: tune(key, z, target.log_density))(keys, states.position)
    else:
        learned = _warmup(sampler, target.dim).init(target.dim)
    # Weak types in the first state would cost a second compilation.
    state = ChainState(states, learned, jax.random.split(key_chains, num_chains), jnp.zeros((), int))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state), finite


def _explain(target: Target, z: Array) -> str:
    """Which site is not finite at a point, as a sentence."""
    constrained = {name: np.asarray(value).tolist() for name, value in target.constrain(z).items()}
    if target.spec.discrete:
        log_reference, energies = target.terms(z)
        references = {"the reference": log_reference}
    else:
        references, energies = target.site_terms(z)
    bad = [f"'{name}' (log density {value})" for name, value in references.items() if not jnp.isfinite(value)]
    bad += [f"'{name}' (energy {value})" for name, value in energies.items() if not jnp.isfinite(value)]
    what = ", ".join(bad) if bad else "the gradient of the log density (all values are finite)"
    return (
        f"Not finite: {what}. Example point: {constrained}. "
        "Check these sites there, or pass init= with values at which they are finite."
    )


@eqx.filter_jit
def _advance(
    target: Target, sampler: Sampler, state: ChainState, phases: Array
) -> tuple[ChainState, tuple[Array, dict[str, Array]]]:
    """All chains through one chunk of steps; the record has a leading step axis."""
    kernel = _kernel(sampler)
    warmup = _warmup(sampler, target.dim)
    per_chain = _is_unadjusted(sampler)

    def step(state: ChainState, phase: Array) -> tuple[ChainState, tuple[Array, dict[str, Array]]]:
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
        tuning = state.warmup if per_chain else warmup.tuning(state.warmup, phase)
        num_steps = kernel.length(jax.random.fold_in(keys[0], 1), tuning, target.dim)

        def move(key: PRNGKey, chain: Any, tuning: Tuning) -> tuple[Any, dict[str, Array]]:
            chain, stats = kernel.step(key, chain, target.log_density, tuning, num_steps)
            return chain, stats | {"lp": chain.logdensity, "step_size": tuning.step_size}

        chains, stats = jax.vmap(move, (0, 0, 0 if per_chain else None))(keys, state.kernel, tuning)
        learned = state.warmup
        if not per_chain:
            learned = warmup.update(learned, phase, chains.position, chains.logdensity_grad, stats["acceptance_rate"])
        return ChainState(chains, learned, state.keys, state.step + 1), (chains.position, stats)

    return jax.lax.scan(step, state, phases)


def _chunks(num_warmup: int, num_samples: int) -> Iterator[slice]:
    """Slices of equal length where possible, so that one compilation serves all; never across the end of warm-up."""
    length = _chunk_length(num_warmup, num_samples)
    for start, stop in ((0, num_warmup), (num_warmup, num_warmup + num_samples)):
        for begin in range(start, stop, length):
            yield slice(begin, min(begin + length, stop))


def _chunk_length(num_warmup: int, num_samples: int) -> int:
    divisor = int(np.gcd(num_warmup, num_samples))
    fitting = [length for length in range(100, 501) if divisor % length == 0]
    return fitting[0] if fitting else max(min(num_samples, 500), 1)


def _check_finite(record: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    """Raises where a chain or one of its proposals met infinite density; the record keeps no trace of the check."""
    z, stats = record
    infinite = np.argwhere((stats["lp"] == np.inf) | stats.pop("infinite_density"))
    if infinite.size:
        step, chain = infinite[0]
        raise NonFiniteEnergyError(
            "The log density is +inf (an energy of -inf, infinite density) at or near the unconstrained point "
            f"{z[step, chain].tolist()}: a chain never leaves such a point. Bound the energy from below."
        )


def _warn(attrs: dict[str, Any], num_draws: int) -> None:
    if attrs["num_nan_energy"]:
        warnings.warn(
            f"The energy was NaN in {attrs['num_nan_energy']} of {num_draws} trajectories; such points were rejected, "
            "as if they had zero density. sample_stats['nan_energy'] marks them.",
            EnergyWarning,
            stacklevel=4,
        )
    if not attrs["adjusted"]:
        warnings.warn(
            "Unadjusted MCLMC is biased by its step size: use these draws for exploration, or adjusted=True.",
            EnergyWarning,
            stacklevel=4,
        )


def _summary(record: tuple[Array, dict[str, Array]]) -> str:
    stats = record[1]
    step_size = float(np.mean(stats["step_size"][-1]))
    return f"step size {step_size:.2e}, {float(np.mean(stats['n_steps'])):.1f} leapfrogs a draw"


def _progress(name: str, total: int, enabled: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=name, disable=not enabled, unit="step", mininterval=0.2)
