"""Markov kernels of discrete states, with the signature of `kernels.py`; each leaves `exp(-V)` invariant.

    Gibbs                   x_i ~ p(x_i | all others), one coordinate after another        any number of states
    GibbsWithGradients      flip bit i ~ softmax(d(x) / 2), and Metropolis-Hastings        two states
                            d_i(x) = (2 x_i - 1) dV/dx_i, about V(x) - V(x with bit i flipped)
    BlockGibbs              h ~ p(h | v), v' ~ p(v | h) of a restricted Boltzmann machine  two states

None has a step size or a scale: `tuning` plays no part. States are numbers 0..k-1, as floating-point, so that an energy
may be a network with a gradient.

References:
    Geman and Geman (1984), Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images;
    Grathwohl, Swersky, Hashemi, Duvenaud and Maddison (2021), Oops I took a gradient: scalable sampling for discrete
    distributions; Smolensky (1986), Information processing in dynamical systems; He, De Sa, Mitliagkas and Re (2016),
    Scan order in Gibbs sampling: models in which it matters and bounds on how much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebm_ppl.kernels import Kernel, LogDensity, Stats
from ebm_ppl.lattice.energy import RBMEnergy, check_num_states
from ebm_ppl.typing import Array, EnergyError, PRNGKey


class LatticeState(NamedTuple):
    """Of a chain."""

    position: Array
    """(dim,)"""
    logdensity: Array
    logdensity_grad: Any = None
    """Of the kernels that go by it."""


def changes(x: Array, at: Array, num_states: int) -> Array:
    """The states that differ from x in one coordinate: shape (num_states - 1, dim), that with `x_at + s` mod k in row
    s - 1."""
    shifted = (x[at] + jnp.arange(1, num_states, dtype=x.dtype)) % num_states
    return jax.vmap(x.at[at].set)(shifted)


@dataclasses.dataclass(frozen=True)
class Gibbs:
    """Gibbs sampling of single sites: a move draws every coordinate anew, given all others.

    A sweep in a fixed order leaves the density invariant, since each of its draws does; it is not reversible, and no
    slower than a random order but for models made for it. All walkers are then at the same coordinate, which vectorises
    better. A sweep of d coordinates has d (k - 1) evaluations of the energy.

    Args:
        num_states: k, of each coordinate: 0..k-1.

    References: Geman and Geman (1984); He et al. (2016).
    """

    num_states: int = 2
    name = "Gibbs"

    def __post_init__(self):
        check_num_states(self.num_states)

    def kernel(self) -> Kernel:
        def step(
            key: PRNGKey, state: LatticeState, log_density: LogDensity, tuning: Any, num_steps: Array
        ) -> tuple[LatticeState, Stats]:
            def draw(state: LatticeState, given: tuple[Array, Array]) -> tuple[LatticeState, None]:
                at, noise = given
                there = changes(state.position, at, self.num_states)
                positions = jnp.concatenate([state.position[None], there])
                log_densities = jnp.append(state.logdensity, jax.vmap(log_density)(there))
                # The largest of log weights with Gumbel noise is at a draw of their softmax; a NaN is the largest, so
                # that it shows.
                drawn = jnp.argmax(log_densities + noise)
                return LatticeState(positions[drawn], log_densities[drawn]), None

            dim = state.position.size
            noise = jax.random.gumbel(key, (dim, self.num_states), state.logdensity.dtype)
            state, _ = jax.lax.scan(draw, state, (jnp.arange(dim), noise))
            return state, _stats(jnp.ones_like(state.logdensity), state)

        return Kernel(_at, step)


@dataclasses.dataclass(frozen=True)
class GibbsWithGradients:
    """Gibbs with gradients: a move proposes to flip one bit, where the gradient says that it will be welcome.

        q(i | x) = softmax(d(x) / 2)_i      accepted with probability min(1, p(x') q(i | x') / ( p(x) q(i | x) ))

    A move has one evaluation of the energy and its gradient, whatever the dimension, and goes where there is something
    to change; exact where the gradient is a poor guide, but then slow. Give it about as many moves as bits that should
    change.

    Reference: Grathwohl et al. (2021).
    """

    num_states = 2
    name = "Gibbs with gradients"

    def kernel(self) -> Kernel:
        def init(x: Array, log_density: LogDensity) -> LatticeState:
            return LatticeState(x, *jax.value_and_grad(log_density)(x))

        def log_proposal(state: LatticeState) -> Array:
            """Of the flip of each bit, (dim,)."""
            return jax.nn.log_softmax((1 - 2 * state.position) * state.logdensity_grad / 2)

        def step(
            key: PRNGKey, state: LatticeState, log_density: LogDensity, tuning: Any, num_steps: Array
        ) -> tuple[LatticeState, Stats]:
            key_flip, key_accept = jax.random.split(key)
            forward = log_proposal(state)
            at = jax.random.categorical(key_flip, forward)
            there = init(state.position.at[at].set(1 - state.position[at]), log_density)
            log_ratio = there.logdensity - state.logdensity + log_proposal(there)[at] - forward[at]
            return _metropolis(key_accept, state, there, log_ratio)

        return Kernel(init, step)


@dataclasses.dataclass(frozen=True)
class BlockGibbs:
    """Block Gibbs sampling of a restricted Boltzmann machine: all hidden units, then all visible ones.

    U is an `RBMEnergy`, and s the slope of the base's log density at zero. A proposal is reversible with respect to
    exp(s'v - U(v)), whose visible biases are b + s, and accepted with probability

        min(1, r(v') / r(v))        r(v) = base(v) exp(-s'v)

    so that base(v) exp(-U(v)) is left invariant. Of a base of independent bits r is constant, and every proposal is
    accepted. A move is as dear as a few evaluations of U, where a sweep of single sites has one for each.

    Reference: Smolensky (1986).
    """

    num_states = 2
    name = "block Gibbs"

    def kernel(self, energy: Callable[[Array], Array]) -> Kernel:
        """The kernel that proposes by that energy.

        Raises:
            EnergyError: where it is no `RBMEnergy`.
        """
        if not isinstance(energy, RBMEnergy):
            raise EnergyError(
                f"BlockGibbs draws the hidden units of an RBMEnergy; got a {type(energy).__name__}. Gibbs() moves any "
                "energy of discrete states."
            )
        rbm = energy

        def step(
            key: PRNGKey, state: LatticeState, log_density: LogDensity, tuning: Any, num_steps: Array
        ) -> tuple[LatticeState, Stats]:
            def log_base(x: Array) -> Array:
                return log_density(x) + rbm(x)

            key_hidden, key_visible, key_accept = jax.random.split(key, 3)
            x = state.position
            slope = jax.grad(log_base)(jnp.zeros_like(x))
            hidden = jax.random.bernoulli(key_hidden, jax.nn.sigmoid(rbm.hidden_logits(x))).astype(x.dtype)
            logits = rbm.visible_logits(hidden) + slope
            visible = jax.random.bernoulli(key_visible, jax.nn.sigmoid(logits)).astype(x.dtype)
            there = _at(visible, log_density)
            log_ratio = there.logdensity + rbm(visible) - state.logdensity - rbm(x) - slope @ (visible - x)
            return _metropolis(key_accept, state, there, log_ratio)

        return Kernel(_at, step)


Lattice = Gibbs | GibbsWithGradients | BlockGibbs
"""Kernels of discrete states, `num_states` of each coordinate."""


def _at(x: Array, log_density: LogDensity) -> LatticeState:
    return LatticeState(x, log_density(x))


def _metropolis(key: PRNGKey, here: LatticeState, there: LatticeState, log_ratio: Array) -> tuple[LatticeState, Stats]:
    """There with probability min(1, exp(log_ratio)), else here; one whose density is no number is refused, and the rate
    shows it."""
    rate = jnp.exp(jnp.minimum(log_ratio, 0.0))
    accepted = jax.random.uniform(key, dtype=rate.dtype) < rate
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), there, here), _stats(rate, there)


def _stats(rate: Array, proposed: LatticeState) -> Stats:
    return {"acceptance_rate": rate, "nan_energy": jnp.isnan(proposed.logdensity)}
