"""Our samplers as a `numpyro.infer.MCMCKernel`, for `numpyro.infer.MCMC`, its chain methods and its Gibbs kernel.

state.z                 {site: unconstrained value}, as NumPyro's own HMC has it
state.potential_energy  -log p(z)
state.adapt_state       the warm-up of this one chain, with `step_size`
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.mcmc.hmc import HMCState
from numpyro.handlers import seed
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import initialize_model
from numpyro.util import is_prng_key

from ebm_ppl.independence import require_chains
from ebm_ppl.kernels import HMC, MALA, MCLMC, NUTS
from ebm_ppl.probe import check_tails
from ebm_ppl.target import Target, target
from ebm_ppl.typing import Array, EnergyError, PRNGKey
from ebm_ppl.warmup import FAST, FROZEN, WINDOW_END, Warmup, WarmupState, schedule, window_warmup


class AdaptState(NamedTuple):
    step_size: Array
    warmup: WarmupState


class KernelState(NamedTuple):
    """State of one chain, under the names that NumPyro and `arviz_base.from_numpyro` look for."""

    i: Array
    z: dict[str, Array]
    z_grad: dict[str, Array]
    potential_energy: Array
    energy: Array
    num_steps: Array
    accept_prob: Array
    diverging: Array
    nan_energy: Array
    """Whether the trajectory met an energy of NaN, which was rejected as if it had zero density."""
    infinite_density: Array
    """Whether it met one of -inf, which was rejected, too."""
    adapt_state: AdaptState
    rng_key: Array


def as_numpyro_kernel(sampler: NUTS | HMC | MALA | MCLMC, model: Callable) -> NumPyroKernel:
    """A NumPyro kernel that draws from `model` by one of our samplers.

    Args:
        sampler: `NUTS()`, `HMC()`, `MALA()` or the adjusted `MCLMC()`.
        model: a NumPyro model; its arguments are passed to `MCMC.run`.

    Returns:
        An `MCMCKernel`; each chain warms up by itself, in `num_warmup` steps of `MCMC`, and learns a metric but no
        non-centred coordinates, which take the draws of a whole window. What `ebm_ppl.sample` raises or warns of on its
        way NumPyro's loop cannot: proposals of infinite density are rejected and count as divergences, and
        `extra_fields=("nan_energy", "infinite_density")` of `MCMC.run` has what was met.

    Raises:
        EnergyError: for unadjusted MCLMC, whose tuning is no sequence of kernel steps, and for `Independence`.
        IntractablePartitionError: at `init`, before the first draw.

    Example:
        >>> mcmc = numpyro.infer.MCMC(as_numpyro_kernel(NUTS(), model), num_warmup=500, num_samples=1000)
        >>> mcmc.run(jax.random.key(0), y=y)
    """
    require_chains(sampler, "a chain")
    if isinstance(sampler, MCLMC) and not sampler.adjusted:
        raise EnergyError("Unadjusted MCLMC has no NumPyro kernel: use adjusted=True, or `ebm_ppl.sample`.")
    return NumPyroKernel(sampler, model)


class NumPyroKernel(MCMCKernel):
    """See `as_numpyro_kernel`."""

    def __init__(self, sampler: NUTS | HMC | MALA | MCLMC, model: Callable):
        self.sampler = sampler
        self.model = model
        self._prototype: Target | None = None
        self._num_warmup = 0

    @property
    def sample_field(self) -> str:
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z", "diverging")

    def get_diagnostics_str(self, state: KernelState) -> str:
        return f"{state.num_steps} steps of size {state.adapt_state.step_size:.2e}. acc. prob={state.accept_prob:.2f}"

    def init(self, rng_key, num_warmup, init_params=None, model_args=(), model_kwargs=None):
        self._num_warmup = num_warmup
        model_kwargs = {} if model_kwargs is None else model_kwargs
        self._prototype = target(self.model, *model_args, **model_kwargs)
        self._prototype.require_tractable()
        check_tails(self._prototype, needs_normalisation=False)
        chain_axis = not is_prng_key(rng_key)
        keys = jax.vmap(jax.random.split)(rng_key) if chain_axis else jax.random.split(rng_key)
        key_start, key_chain = (keys[:, 0], keys[:, 1]) if chain_axis else (keys[0], keys[1])
        if init_params is None:
            start = initialize_model(key_start, self.model, model_args=model_args, model_kwargs=model_kwargs)
            init_params = start.param_info.z

        def one(key: PRNGKey, z: dict[str, Array]) -> KernelState:
            return self._init_one(key, z, model_args, model_kwargs)

        return jax.vmap(one)(key_chain, init_params) if chain_axis else one(key_chain, init_params)

    def sample(self, state, model_args, model_kwargs):
        phases = jnp.append(jnp.asarray(schedule(self._num_warmup), int), FROZEN)
        # One phase for all chains: of a phase for each, a batch would compute all that any phase does, at every step.
        phase = phases[jnp.minimum(jnp.ravel(state.i)[0], self._num_warmup)]

        def one(state: KernelState) -> KernelState:
            return self._sample_one(state, phase, model_args, model_kwargs)

        return one(state) if is_prng_key(state.rng_key) else jax.vmap(one)(state)

    def refresh(self, state, model_args, model_kwargs):
        """Recomputes the cached density and gradient for other model arguments."""
        at = self._target(model_args, model_kwargs)
        value, gradient = jax.value_and_grad(at.log_density)(at.ravel(state.z))
        return state._replace(potential_energy=-value, z_grad=at.unravel(gradient))

    def wrap_model(self, wrapper):
        """A copy of this kernel on `wrapper(model)`."""
        kernel = copy.copy(self)
        kernel.model, kernel._prototype = wrapper(self.model), None
        return kernel

    def postprocess_fn(self, model_args, model_kwargs):
        """From unconstrained values to those of latent and deterministic sites."""
        at = self._target(model_args, model_kwargs)
        return lambda z: at.constrain(at.ravel(z))

    def get_constrain_fn(self, model_args, model_kwargs):
        """Values of this kernel's own sites, for the siblings of a Gibbs kernel to be conditioned on.

        Sites of other blocks may be unknown here; they are drawn with a dummy key, and only their shapes matter.
        """
        at = self._target(model_args, model_kwargs)
        at = dataclasses.replace(at, model=seed(at.model, jax.random.key(0)))
        own = at.latent_names
        return lambda z: {name: value for name, value in at.constrain(at.ravel(z)).items() if name in own}

    def _target(self, model_args: tuple, model_kwargs: dict[str, Any] | None) -> Target:
        """The target of these arguments, by the analysis made at `init`."""
        if self._prototype is None:
            raise EnergyError("This kernel is not initialised: call `init` first.")
        prototype = self._prototype
        if prototype.model is not self.model:  # its arguments are frozen into the model
            return prototype
        return Target(self.model, model_args, model_kwargs or {}, prototype.constants, prototype.spec)

    def _warmup(self, dim: int):
        return window_warmup(self.sampler.target_accept, self.sampler.metric, dim)

    def _init_one(self, key: PRNGKey, z: dict[str, Array], args: tuple, kwargs: dict[str, Any]) -> KernelState:
        at = self._target(args, kwargs)
        state = self.sampler.kernel().init(at.ravel(z), at.log_density)
        learned = self._warmup(at.dim).init(at.dim)
        adapt_state = AdaptState(jnp.ones_like(state.logdensity), learned)
        zero, count, never = jnp.zeros_like(state.logdensity), jnp.zeros((), int), jnp.zeros((), bool)
        return KernelState(
            count,
            at.unravel(state.position),
            at.unravel(state.logdensity_grad),
            -state.logdensity,
            -state.logdensity,
            count,
            zero,
            never,
            never,
            never,
            adapt_state,
            key,
        )

    def _sample_one(self, state: KernelState, phase: Array, args: tuple, kwargs: dict[str, Any] | None) -> KernelState:
        at, kernel = self._target(args, kwargs), self.sampler.kernel()
        warmup = self._warmup(at.dim)
        key, key_length, key_step = jax.random.split(state.rng_key, 3)
        learned = state.adapt_state.warmup
        current = jnp.exp(learned.step_size.log_step_size)
        frozen = warmup.tuning(learned)
        tuning = frozen._replace(step_size=jnp.where(phase == FROZEN, frozen.step_size, current))
        chain: Any = HMCState(at.ravel(state.z), -state.potential_energy, at.ravel(state.z_grad))  # pyright: ignore
        num_steps = kernel.length(key_length, tuning, at.dim)
        moved, stats = kernel.step(key_step, chain, at.log_density, tuning, num_steps)
        # Inside NumPyro's loop nothing can be raised, and no chain would leave such a point.
        infinite = stats["infinite_density"]
        chain = jax.tree.map(lambda new, old: jnp.where(infinite, old, new), moved, chain)
        learned = jax.lax.cond(
            phase == FROZEN,
            lambda learned, *_: learned,
            _learn(warmup, phase),
            learned,
            chain,
            stats["acceptance_rate"],
        )
        return KernelState(
            state.i + 1,
            at.unravel(chain.position),
            at.unravel(chain.logdensity_grad),
            -chain.logdensity,
            stats["energy"],
            jnp.asarray(stats["n_steps"], int),
            stats["acceptance_rate"],
            stats["diverging"] | infinite,
            stats["nan_energy"],
            infinite,
            AdaptState(tuning.step_size, learned),
            key,
        )


def _learn(warmup: Warmup, phase: Array) -> Callable[[WarmupState, Any, Array], WarmupState]:
    """What one step of the chain teaches, in a phase of the warm-up."""

    def learn(learned: WarmupState, chain: Any, acceptance: Array) -> WarmupState:
        step_size = warmup.adapt(learned.step_size, acceptance)
        metric = jax.lax.cond(
            phase == FAST,
            lambda metric, *_: metric,
            warmup.add,
            learned.metric,
            chain.position[None],
            chain.logdensity_grad[None],
        )
        learned = WarmupState(step_size, metric, learned.scale)
        return jax.lax.cond(phase == WINDOW_END, warmup.close, lambda learned: learned, learned)

    return learn
