"""Energies of discrete data, and their log Z by a sum over all states.

    states      x_i in {0, ..., k - 1}, as floating-point numbers; k = 2 where nothing else is said
    restricted Boltzmann machine, hidden units h summed out
                U(v) = -b'v - sum_j softplus(c_j + W_j v)      `RBMEnergy`
                exp(-U(v)) = sum_h exp(b'v + c'h + h'W v)
    Boltzmann machine without hidden units
                U(x) = -b'x - sum_{i<j} J_ij x_i x_j           `BoltzmannEnergy`
    log Z = log sum_x exp(-U(x))                               `enumerate_log_z`, `RBMEnergy.log_z`

The sum over states is relative to the counting measure. Relative to a base that is uniform on d bits, as `Jarzynski`
has it, log Z is lower by d log 2.

References:
    Ackley, Hinton and Sejnowski (1985), A learning algorithm for Boltzmann machines; Smolensky (1986), Information
    processing in dynamical systems: foundations of harmony theory; Hinton (2012), A practical guide to training
    restricted Boltzmann machines.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from ebm_ppl.energy import Energy, as_energy_values
from ebm_ppl.typing import Array, EnergyError, PRNGKey

MOST_STATES = 2**24
"""That an enumeration goes through."""
CHUNK = 2**12
"""States whose energies are computed at once."""
SCALE = 0.01
"""Standard deviation of weights before training, so that hidden units differ and next to nothing else does."""


class RBMEnergy(Energy):
    """Free energy of a restricted Boltzmann machine: `U(v) = -b'v - sum_j softplus(c_j + W_j v)`.

    Its hidden units are summed out, so that it is an energy of the data alone; any objective trains it.

    Args:
        key: draws the weights, N(0, .01^2); biases start at zero.
        num_visible: numbers of an event, of any shape.
        num_hidden: binary hidden units.

    Reference: Hinton (2012).

    Example:
        >>> rbm = ebm_ppl.RBMEnergy(jax.random.key(0), num_visible=64, num_hidden=16)
        >>> base = dist.Bernoulli(0.5).expand([64]).to_event(1)
        >>> moves = ebm_ppl.Dynamics(ebm_ppl.BlockGibbs(), num_moves=1)
        >>> fitted = ebm_ppl.fit(jax.random.key(1), rbm, digits, ebm_ppl.Jarzynski(dynamics=moves), base=base)
        >>> fitted.energy.log_z()
    """

    weights: Array
    """W, (num_hidden, num_visible)"""
    visible_bias: Array
    """b"""
    hidden_bias: Array
    """c"""

    def __init__(self, key: PRNGKey, num_visible: int, num_hidden: int):
        self.weights = SCALE * jax.random.normal(key, (num_hidden, num_visible))
        self.visible_bias = jnp.zeros(num_visible)
        self.hidden_bias = jnp.zeros(num_hidden)

    def __call__(self, x: Array) -> Array:
        return -self.visible_bias @ x.ravel() - jnp.sum(jax.nn.softplus(self.hidden_logits(x)))

    def hidden_logits(self, x: Array) -> Array:
        """Log odds of each hidden unit given the visible ones, (num_hidden,)."""
        return self.hidden_bias + self.weights @ x.ravel()

    def visible_logits(self, hidden: Array) -> Array:
        """Log odds of each visible unit given the hidden ones, (num_visible,)."""
        return self.visible_bias + hidden @ self.weights

    def log_z(self) -> Array:
        """Exact log Z of binary data, by the sum over all states of the smaller layer: up to 24 units.

        Raises:
            EnergyError: where both layers are larger.
        """
        num_hidden, num_visible = self.weights.shape
        if num_visible <= num_hidden:
            return enumerate_log_z(self, num_visible)

        def of_hidden(hidden: Array) -> Array:
            return -self.hidden_bias @ hidden - jnp.sum(jax.nn.softplus(self.visible_logits(hidden)))

        return enumerate_log_z(of_hidden, num_hidden)


class BoltzmannEnergy(Energy):
    """A Boltzmann machine without hidden units: `U(x) = -b'x - sum_{i<j} J_ij x_i x_j`.

    Args:
        key: draws the couplings, N(0, .01^2); the bias starts at zero.
        dim: numbers of an event, of any shape.

    Reference: Ackley, Hinton and Sejnowski (1985).
    """

    weights: Array
    """(dim, dim), of which `couplings` sees the symmetric part without its diagonal alone."""
    bias: Array
    """b"""

    def __init__(self, key: PRNGKey, dim: int):
        self.weights = SCALE * jax.random.normal(key, (dim, dim))
        self.bias = jnp.zeros(dim)

    @property
    def couplings(self) -> Array:
        """J, symmetric, with a diagonal of zeros."""
        symmetric = (self.weights + self.weights.T) / 2
        return symmetric - jnp.diag(jnp.diag(symmetric))

    def __call__(self, x: Array) -> Array:
        x = x.ravel()
        return -self.bias @ x - x @ self.couplings @ x / 2


def enumerate_states(dim: int, num_states: int = 2) -> Array:
    """All states of `dim` numbers, each of 0..num_states - 1: shape (num_states**dim, dim), the last varies fastest.

    Raises:
        EnergyError: where they are more than 2^24.
    """
    return jax.vmap(lambda index: _state(index, dim, num_states))(jnp.arange(_count(dim, num_states)))


def enumerate_log_z(energy: Callable[[Array], Array], shape: int | tuple[int, ...], num_states: int = 2) -> Array:
    """Exact log Z of an energy of few discrete numbers, by the sum over all their states.

        log Z = log sum_x exp(-U(x))

    In chunks, so that memory is that of one number for each state; it can be differentiated.

    Args:
        energy: U, in nats, of one event. For a density with a base, give U(x) - log base(x).
        shape: of an event, or its length.
        num_states: of each number of an event.

    Raises:
        EnergyError: for more than 2^24 states.
        EnergyShapeError: where the energy of one event is not one number.

    Example:
        >>> ising = lambda x: -0.4 * jnp.sum((2 * x[1:] - 1) * (2 * x[:-1] - 1))
        >>> ebm_ppl.enumerate_log_z(ising, 10)
    """
    shape = (shape,) if isinstance(shape, int) else shape
    dim = math.prod(shape)

    @jax.checkpoint  # a gradient would else keep what every chunk has on the way
    def log_weight(index: Array) -> Array:
        return -as_energy_values(energy(_state(index, dim, num_states).reshape(shape)), (), "The energy of a state")

    return logsumexp(jax.lax.map(log_weight, jnp.arange(_count(dim, num_states)), batch_size=CHUNK))


def check_states(x: Array, num_states: int, source: str) -> None:
    """Refuses numbers that are not in 0..num_states - 1, where they are known.

    Args:
        x: shape (num, ...).
        source: what they are, for a message.

    Raises:
        EnergyError: with how many there are, and the first.
    """
    if isinstance(x, jax.core.Tracer):
        return
    values = np.asarray(x).reshape(len(x), -1)
    wrong = ~np.isin(values, np.arange(num_states)).all(axis=1)
    if np.any(wrong):
        first = int(np.argmax(wrong))
        found = values[first][~np.isin(values[first], np.arange(num_states))][0]
        raise EnergyError(
            f"{source}: {np.sum(wrong)} of {len(x)} events have numbers that are no states 0..{num_states - 1}, the "
            f"first at {first} ({found:g}). Round or bin them, or say how many states there are with num_states."
        )


def check_num_states(num_states: int) -> None:
    """Refuses what is no number of states."""
    if not isinstance(num_states, int) or num_states < 2:
        raise EnergyError(f"num_states is a whole number, 2 at least; got {num_states}.")


def _state(index: Array, dim: int, num_states: int) -> Array:
    """The state of that number: its digits."""
    place = num_states ** jnp.arange(dim)[::-1]
    return (index // place % num_states).astype(jnp.result_type(float))


def _count(dim: int, num_states: int) -> int:
    check_num_states(num_states)
    if num_states**dim > MOST_STATES:
        raise EnergyError(
            f"{num_states}^{dim} states are too many to go through, 2^24 at most. Of an RBMEnergy with few hidden "
            "units log_z() sums over those; Jarzynski() tells log Z while it trains."
        )
    return num_states**dim
