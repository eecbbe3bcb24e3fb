"""Maximum likelihood with weighted walkers: their weights make up for what they lag behind, and carry log Z.

    X_0 ~ base, A_0 = -U_0(X_0)                                 log Z_0 from them, too
    A <- A + V_k(X) - V_k+1(X)                                  the energy changes under the walkers    (an adjusted
    X <- a move that leaves exp(-V_k+1) invariant               and they move by it                      kernel)
    E_p[f] = E[e^A f(X)] / E[e^A]        log Z = log E[e^A]     at every step, however far the walkers are from p

For the unadjusted kernel the weights make up for its bias as well, with the ratio of forward and backward moves,

    A <- A - a_k+1(X', X) + a_k(X, X')         a_k(x, y) = V_k(x) + (y - x)' grad V_k(x) / 2 + h |grad V_k(x)|^2 / 4

Weights spread; where their effective number falls below a share of the walkers these are resampled. A population that
drives the training has a log Z with a bias of order 1/N, since parameters follow the noise of its weights. A second
one, which moves by the same energies with keys of its own and has no say in them, has E[e^A] = Z exactly.

References:
    Carbone, Hua, Coste and Vanden-Eijnden (2023), Efficient training of energy-based models using Jarzynski equality;
    Jarzynski (1997), Nonequilibrium equality for free energy differences; Neal (2001), Annealed importance sampling.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.smc.ess import log_ess
from blackjax.smc.resampling import systematic
from jax.scipy.special import logsumexp

from ebm_ppl.kernels import Langevin
from ebm_ppl.train.objective import Density, Metrics, Objective, energy_gap, without_gradient
from ebm_ppl.train.walkers import Dynamics, next_step_size, walk
from ebm_ppl.typing import Array, EnergyError, PRNGKey


class Population(NamedTuple):
    """Weighted walkers."""

    points: Array
    """X, (num, dim)"""
    log_weight: Array
    """A without what the next energy takes from it, (num,)."""
    log_z: Array
    """Of the means of weights that resampling has set to one."""
    before: Array
    """Where the last move of the unadjusted kernel began, (num, dim)."""


class State(NamedTuple):
    """Two populations, and the step size of both."""

    driver: Population
    witness: Population
    step_size: Array
    """By the acceptance of the driver alone: the witness has no say in what it moves by, so that its Z is unbiased."""


class Jarzynski(Objective):
    """Maximum likelihood by walkers with Jarzynski weights, and log Z on the way.

    The record has `log_z`, relative to the base, by the second population (`log_z_of_driver` by the first), and the
    effective share of the walkers of both.

    Args:
        num_walkers: in each of the two populations; they start as draws of the base.
        resample: effective share of the walkers below which they are resampled.
        dynamics: the moves of a step; one where the kernel is `Langevin()`.

    Reference: Carbone, Hua, Coste and Vanden-Eijnden (2023).
    """

    num_walkers: int = 1024
    resample: float = 0.5
    dynamics: Dynamics = Dynamics(num_moves=1)
    name = "Jarzynski"
    is_comparable = False

    def __check_init__(self):
        if self.num_walkers < 2 or not 0 <= self.resample <= 1:
            raise EnergyError(f"num_walkers is 2 at least, resample a share from 0 to 1; got {self}.")
        if isinstance(self.dynamics.kernel, Langevin) and self.dynamics.num_moves != 1:
            raise EnergyError(
                "The weights of unadjusted moves need the energies at both ends of each: give Langevin() one move a "
                f"step (got {self.dynamics.num_moves}), or an adjusted kernel."
            )

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        if density.base is None:
            raise EnergyError("Jarzynski starts from draws of a normalised base: pass base=... to fit.")

        def population(key: PRNGKey) -> Population:
            points = density.draw_base(key, self.num_walkers).astype(data.dtype)
            self.dynamics.check_start(points)
            tilted = -jax.vmap(density.tilt)(points)
            # The first step takes off what a move would have had to leave, and there has been none.
            log_weight = tilted + jax.vmap(self._left(density))(points, points)
            return Population(points, log_weight, jnp.zeros((), data.dtype), points)

        driver, witness = map(population, jax.random.split(key))
        return (), State(driver, witness, jnp.asarray(self.dynamics.step_size, data.dtype))

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        fixed = without_gradient(density)
        driver, witness = (self._weighed(population, fixed) for population in (state.driver, state.witness))
        loss, gap = energy_gap(density, batch, driver.points, jax.nn.softmax(driver.log_weight))
        log_z = [each.log_z + logsumexp(each.log_weight) - jnp.log(self.num_walkers) for each in (driver, witness)]
        ess = [jnp.exp(log_ess(each.log_weight)) / self.num_walkers for each in (driver, witness)]
        keys = jax.random.split(key)
        (driver, accepted), (witness, _) = (
            self._moved(key, each, fixed, state.step_size) for key, each in zip(keys, (driver, witness), strict=True)
        )
        metrics = {
            "energy_gap": gap,
            "accept_rate": accepted,
            "step_size": state.step_size,
            "log_z": log_z[1],
            "log_z_of_driver": log_z[0],
            "ess": ess[1],
            "ess_of_driver": ess[0],
            "log_likelihood": -jnp.mean(jax.vmap(fixed.total)(batch)) - log_z[1],
        }
        return loss, (State(driver, witness, next_step_size(state.step_size, accepted, self.dynamics)), metrics)

    def _left(self, density: Density) -> Any:
        """`a(x, y)`: what a move from x to y leaves in the weights, where the energy is that of the density."""

        def left(x: Array, y: Array) -> Array:
            if not isinstance(self.dynamics.kernel, Langevin):
                return density.total(x)
            value, slope = jax.value_and_grad(density.total)(x)
            return value + (y - x) @ slope / 2 + self.dynamics.step_size * slope @ slope / 4

        return left

    def _weighed(self, population: Population, density: Density) -> Population:
        """With the weights that the points have under another energy."""
        taken = jax.vmap(self._left(density))(population.points, population.before)
        return population._replace(log_weight=population.log_weight - taken)

    def _moved(
        self, key: PRNGKey, population: Population, density: Density, step_size: Array
    ) -> tuple[Population, Array]:
        """Resampled where the weights have spread, moved, with the weights that the moves leave."""
        key_resample, key_walk = jax.random.split(key)
        num, log_weight = self.num_walkers, population.log_weight
        spread = jnp.exp(log_ess(log_weight)) < self.resample * num
        ancestors = systematic(key_resample, jax.nn.softmax(log_weight), num)
        start = jnp.where(spread, population.points[ancestors], population.points)
        increment = jnp.where(spread, logsumexp(log_weight) - jnp.log(num), 0.0)
        log_weight = jnp.where(spread, jnp.zeros_like(log_weight), log_weight)
        points, accepted = walk(key_walk, start, density, self.dynamics, step_size)
        before = start if isinstance(self.dynamics.kernel, Langevin) else points
        left = jax.vmap(self._left(density))(before, points)
        return Population(points, log_weight + left, population.log_z + increment, before), accepted
