"""Walkers: points that a Markov kernel moves towards the model, as negatives of a step of training.

    moved, accepted = walk(key, points, density, dynamics, step_size)

Kernels are those of `kernels.py`, with a unit metric, so that data should be in units of their own spread, and of
discrete data those of `lattice/gibbs.py`. The step size of `MALA` and `HMC` follows the acceptance of all walkers,

    log h  <-  log h + (accepted - target_accept) / 10

that of the unadjusted `Langevin` stays what it is: h is the variance of its noise over two, and its bias of order h.
Kernels of discrete data have none.

References:
    Roberts and Tweedie (1996), Exponential convergence of Langevin distributions and their discrete approximations.
"""

from __future__ import annotations

from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from ebm_ppl.kernels import HMC, MALA, Kernel, Langevin, Tuning
from ebm_ppl.lattice.energy import check_states
from ebm_ppl.lattice.gibbs import BlockGibbs, Lattice
from ebm_ppl.scale import DiagonalScale
from ebm_ppl.train.objective import has_borders, without_gradient
from ebm_ppl.typing import Array, ArrayLike, EnergyError, PRNGKey

LEARNING = 0.1
"""Change of the log step size by an acceptance that is off by one."""


class Walked(Protocol):
    """What walkers move by."""

    def log_density(self, x: Array, /) -> Array: ...


class Dynamics(eqx.Module):
    """How walkers move in a step of training.

    Args:
        kernel: `Langevin()`, unadjusted, or `MALA()` or `HMC()`, adjusted; of discrete data `Gibbs()`,
            `GibbsWithGradients()` or `BlockGibbs()`.
        num_moves: of each walker.
        step_size: h of Langevin, or where the adaptation of MALA or HMC starts; of discrete data it has no meaning.
    """

    kernel: Langevin | MALA | HMC | Lattice = Langevin()
    num_moves: int = 10
    step_size: float = 0.1

    def __check_init__(self):
        if self.num_moves < 1 or not self.step_size > 0:
            raise EnergyError(f"num_moves is 1 at least and step_size positive; got {self}.")

    def kernel_for(self, density: Walked) -> Kernel:
        """The kernel that moves points towards a density: block Gibbs alone looks into its energy."""
        if isinstance(self.kernel, BlockGibbs):
            energy: Any = getattr(density, "energy", density)
            return self.kernel.kernel(energy)
        return self.kernel.kernel()

    def check_start(self, points: Array, base: dist.Distribution | None) -> None:
        """Refuses points, or a base, that the kernel would make nonsense of, where they are known."""
        if isinstance(self.kernel, Lattice):
            check_states(points, self.kernel.num_states, f"Walkers of {self.kernel.name}")
        if base is None:
            return
        if base.is_discrete != isinstance(self.kernel, Lattice):
            remedy = "Gibbs(), say" if base.is_discrete else "MALA(), say"
            raise EnergyError(
                f"The base is {'discrete' if base.is_discrete else 'continuous'}, and {self.kernel.name} moves through "
                f"{'real numbers' if base.is_discrete else 'discrete states'}: give Dynamics another kernel, {remedy}."
            )
        if has_borders(base) and isinstance(self.kernel, Langevin):
            raise EnergyError(
                "Langevin() would walk over the borders of the base's support: give Dynamics MALA() or HMC(), whose "
                "moves beyond them are rejected."
            )


def walk(
    key: PRNGKey, points: Array, density: Walked, dynamics: Dynamics, step_size: Array, unit: ArrayLike = 1.0
) -> tuple[Array, Array]:
    """The points after `num_moves` moves, shape (num, dim), and the mean acceptance rate.

    What the walkers do has no gradient in the parameters of the energy.

    Args:
        unit: of length: the moves are those of step size `step_size` in coordinates x / unit.
    """
    density = without_gradient(density)
    kernel = dynamics.kernel_for(density)
    if isinstance(dynamics.kernel, Langevin):  # whose step size is a variance, and whose metric is fixed
        step_size = step_size * jnp.square(unit)
    tuning = Tuning(step_size, DiagonalScale(jnp.full_like(points[0], unit)))
    states = jax.vmap(lambda x: kernel.init(x, density.log_density))(points)

    def move(states: Any, key: PRNGKey) -> tuple[Any, Array]:
        key_length, key_step = jax.random.split(key)
        num_steps = kernel.length(key_length, tuning, points.shape[1])
        keys = jax.random.split(key_step, len(points))
        step = jax.vmap(lambda key, state: kernel.step(key, state, density.log_density, tuning, num_steps))
        states, stats = step(keys, states)
        return states, jnp.mean(stats["acceptance_rate"])

    states, accepted = jax.lax.scan(move, states, jax.random.split(key, dynamics.num_moves))
    return states.position, jnp.mean(accepted)


def next_step_size(step_size: Array, accepted: Array, dynamics: Dynamics) -> Array:
    """Of a kernel that aims at an acceptance, nearer to it."""
    if not isinstance(dynamics.kernel, MALA | HMC):
        return step_size
    return step_size * jnp.exp(LEARNING * (accepted - dynamics.kernel.target_accept))
