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

The standard error of its log Z comes from the families of walkers that descend from the same first one, as in
`weighing.py`.

References:
    Carbone, Hua, Coste and Vanden-Eijnden (2023), Efficient training of energy-based models using Jarzynski equality;
    Jarzynski (1997), Nonequilibrium equality for free energy differences; Neal (2001), Annealed importance sampling;
    Lee and Whiteley (2018), Variance estimation in the particle filter.
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
    family: Array
    """Index of the first walker from which each descends, (num,)."""
    influence: Array
    """Of each family on log Z, by resampling, (num,)."""

    @property
    def weights(self) -> Array:
        """Adding up to one, (num,)."""
        return jax.nn.softmax(self.log_weight)

    @property
    def log_mean(self) -> Array:
        """Of the weights that are not in log Z yet."""
        return logsumexp(self.log_weight) - jnp.log(len(self.log_weight))

    @property
    def ess(self) -> Array:
        """Effective share of the walkers."""
        return jnp.exp(log_ess(self.log_weight)) / len(self.log_weight)

    def influence_now(self) -> Array:
        """With that of the weights as they are."""
        return self.influence.at[self.family].add(self.weights - 1 / len(self.points))

    def std_error(self) -> Array:
        """Of log Z with the weights as they are."""
        share = jnp.zeros_like(self.influence).at[self.family].add(self.weights)
        left = jnp.maximum(1 - jnp.sum(share**2), jnp.finfo(share.dtype).tiny)
        return jnp.sqrt(jnp.sum(self.influence_now() ** 2) / left)


class State(NamedTuple):
    """Two populations, and the step size of both."""

    driver: Population
    witness: Population
    step_size: Array
    """By the acceptance of the driver alone: the witness has no say in what it moves by, so that its Z is unbiased."""


class WeightedWalkers(Objective):
    """What objectives that follow an energy with weighted walkers share: a step weighs, learns and moves.

    Args:
        num_walkers: in each of the two populations.
        resample: effective share of the walkers below which they are resampled.
        dynamics: the moves of a step; one where the kernel is `Langevin()`.
    """

    num_walkers: int = 1024
    resample: float = 0.5
    dynamics: Dynamics = Dynamics(num_moves=1)
    is_comparable = False

    def __check_init__(self):
        if self.num_walkers < 2 or not 0 <= self.resample <= 1:
            raise EnergyError(f"num_walkers is 2 at least, resample a share from 0 to 1; got {self}.")
        if isinstance(self.dynamics.kernel, Langevin) and self.dynamics.num_moves != 1:
            raise EnergyError(
                "The weights of unadjusted moves need the energies at both ends of each: give Langevin() one move a "
                f"step (got {self.dynamics.num_moves}), or an adjusted kernel."
            )

    def start(self, density: Density, points: Array, log_weight: Array, log_z: Array) -> State:
        """Before the first step, where the driver stands at the first half of the points, the witness at the rest.

        Args:
            points: shape (2 num_walkers, dim).
            log_weight: of the points, (2 num_walkers,).
            log_z: of both populations, to which the means of their weights are added, (2,).
        """
        # The first step takes off what a move would have had to leave, and there has been none.
        log_weight = log_weight + jax.vmap(self._left(density))(points, points)
        places, zeros = jnp.arange(self.num_walkers), jnp.zeros(self.num_walkers, points.dtype)

        def population(points: Array, log_weight: Array, log_z: Array) -> Population:
            return Population(points, log_weight, log_z.astype(points.dtype), points, places, zeros)

        halves = zip(jnp.split(points, 2), jnp.split(log_weight, 2), log_z, strict=True)
        driver, witness = (population(*half) for half in halves)
        return State(driver, witness, jnp.asarray(self.dynamics.step_size, points.dtype))

    def weighed(self, state: State, density: Density) -> tuple[State, Metrics]:
        """With the weights that the walkers have under another energy, and what these say."""
        driver, witness = (self._weighed(each, density) for each in (state.driver, state.witness))
        metrics = {
            "log_z": witness.log_z + witness.log_mean,
            "log_z_std_error": witness.std_error(),
            "log_z_of_driver": driver.log_z + driver.log_mean,
            "ess": witness.ess,
            "ess_of_driver": driver.ess,
        }
        return State(driver, witness, state.step_size), metrics

    def moved(self, key: PRNGKey, state: State, density: Density) -> tuple[State, Metrics]:
        """Weighted walkers after the moves of a step."""
        populations = zip(jax.random.split(key), (state.driver, state.witness), strict=True)
        (driver, accepted), (witness, _) = (
            self._moved(key, each, density, state.step_size) for key, each in populations
        )
        metrics = {"accept_rate": accepted, "step_size": state.step_size}
        return State(driver, witness, next_step_size(state.step_size, accepted, self.dynamics)), metrics

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
        ancestors = systematic(key_resample, population.weights, self.num_walkers)
        resampled = population._replace(
            points=population.points[ancestors],
            log_weight=jnp.zeros_like(population.log_weight),
            log_z=population.log_z + population.log_mean,
            family=population.family[ancestors],
            influence=population.influence_now(),
        )
        spread = population.ess < self.resample
        population = jax.tree.map(lambda new, old: jnp.where(spread, new, old), resampled, population)
        start = population.points
        points, accepted = walk(key_walk, start, density, self.dynamics, step_size)
        before = start if isinstance(self.dynamics.kernel, Langevin) else points
        log_weight = population.log_weight + jax.vmap(self._left(density))(before, points)
        return population._replace(points=points, log_weight=log_weight, before=before), accepted


class Jarzynski(WeightedWalkers):
    """Maximum likelihood by walkers with Jarzynski weights, and log Z on the way.

    The record has `log_z` and its standard error, relative to the base, by the second population (`log_z_of_driver` by
    the first), and the effective share of the walkers of both.

    Args:
        num_walkers: in each of the two populations; they start as draws of the base.
        resample: effective share of the walkers below which they are resampled.
        dynamics: the moves of a step; one where the kernel is `Langevin()`.

    Reference: Carbone, Hua, Coste and Vanden-Eijnden (2023).
    """

    name = "Jarzynski"

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        if density.base is None:
            raise EnergyError("Jarzynski starts from draws of a normalised base: pass base=... to fit.")
        points = density.draw_base(key, 2 * self.num_walkers).astype(data.dtype)
        self.dynamics.check_start(points, density.base)
        return (), self.start(density, points, -jax.vmap(density.tilt)(points), jnp.zeros(2))

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        fixed = without_gradient(density)
        state, told = self.weighed(state, fixed)
        loss, gap = energy_gap(density, batch, state.driver.points, state.driver.weights)
        log_likelihood = -jnp.mean(jax.vmap(fixed.total)(batch)) - told["log_z"]
        state, of_moves = self.moved(key, state, fixed)
        return loss, (state, {"energy_gap": gap, **of_moves, **told, "log_likelihood": log_likelihood})
