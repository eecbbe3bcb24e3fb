"""Maximum likelihood: by itself where log Z is zero, else with negatives from weighted draws, or from Markov chains.

    grad log p(data) = -E_data[grad U] + E_p[grad U]

    maximum likelihood          E_p[grad U] = 0, since the energy is normalised by construction: a flow's
    Monte Carlo likelihood      E_p by draws of the base that are weighted, w(x) ~ exp(-U(x)): as good as the base is
                                near the model, in a few dimensions or with a flow for a base
    contrastive divergence      walkers start at the data of the step: blind to what lies far from all data, and
                                content with wrong weights of modes that they do not leave
    persistent                  walkers go on from step to step, some of them restarted: they follow the model for as
                                long as it moves more slowly than they mix

Those of walkers are biased where the chains do not mix, and say nothing of it: two modes that no walker crosses between
get whatever weights the walkers happen to have. `Jarzynski` weighs its walkers for what they lag behind.

References:
    Geyer and Thompson (1992), Constrained Monte Carlo maximum likelihood for dependent data; Hinton (2002), Training
    products of experts by minimizing contrastive divergence; Tieleman (2008), Training restricted Boltzmann machines
    using approximations to the likelihood gradient; Du and Mordatch (2019), Implicit generation and modeling with
    energy-based models.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.smc.ess import log_ess
from jax.scipy.special import logsumexp

from ebm_ppl.train.objective import Density, Metrics, Objective, energy_gap
from ebm_ppl.train.walkers import Dynamics, next_step_size, walk
from ebm_ppl.typing import Array, EnergyError, PRNGKey


class MaximumLikelihood(Objective):
    """Maximum likelihood of an energy whose log Z is zero by construction, a `FlowModel`: `loss = mean U(data)`.

    An energy says that it is such by an attribute `is_normalized = True`: of any other the loss would fall for ever.

    Raises:
        EnergyError: for an energy that does not say so, and for a base, which would make log Z another one.

    Example:
        >>> fitted = ebm_ppl.fit(key, ebm_ppl.FlowModel(flow), data, ebm_ppl.MaximumLikelihood())
    """

    name = "maximum likelihood"
    is_comparable = True

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        if not getattr(density.energy, "is_normalized", False):
            raise EnergyError(
                f"MaximumLikelihood takes an energy with log Z = 0, such as FlowModel(flow), that says so by "
                f"is_normalized = True: {type(density.energy).__name__} does not. Jarzynski(), NoiseContrast() and "
                "others train an energy whose log Z is not known."
            )
        if density.base is not None:
            raise EnergyError(
                "MaximumLikelihood takes no base: log Z of the energy is zero without one. Leave base away."
            )
        return (), ()

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        return jnp.mean(jax.vmap(density.tilt)(batch)), (state, {})


class MonteCarloLikelihood(Objective):
    """Maximum likelihood with log Z by importance sampling from the base.

        loss = mean U(data) + log( 1/N sum_i exp(-U(x_i)) )         x_i of the base, new ones in each step

    The second term is an estimate of log Z, lower than it by Var(w) / 2N on average, w the weights over their mean: by
    1 / 2 ESS or so, which is the relative error of the gradient as well. The record has `log_z` and
    `effective_draws`, ESS, of each step; `fit` warns where these are few at the end.

    Args:
        num_draws: N, of the base in each step.

    Reference: Geyer and Thompson (1992).
    """

    num_draws: int = 4096
    name = "Monte Carlo likelihood"
    is_comparable = True

    def __check_init__(self):
        if self.num_draws < 2:
            raise EnergyError(f"num_draws is 2 at least; got {self.num_draws}.")

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        if density.base is None:
            raise EnergyError("MonteCarloLikelihood draws from the base: pass base=... to fit.")
        return (), ()

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        points = jnp.concatenate([batch, density.draw_base(key, self.num_draws).astype(batch.dtype)])
        energies = jax.vmap(density.tilt)(points)
        log_weights = -energies[len(batch) :]
        log_z = logsumexp(log_weights) - jnp.log(float(self.num_draws))
        metrics = {"log_z": log_z, "effective_draws": jnp.exp(log_ess(log_weights))}
        return jnp.mean(energies[: len(batch)]) + log_z, (state, metrics)


class ContrastiveDivergence(Objective):
    """CD-k: negatives are the batch itself, after k moves.

    Args:
        dynamics: the moves, k of them.

    Reference: Hinton (2002).
    """

    dynamics: Dynamics = Dynamics()
    name = "contrastive divergence"
    is_comparable = False

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        self.dynamics.check_start(data, density.base)
        return (), jnp.asarray(self.dynamics.step_size, data.dtype)

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        negatives, accepted = walk(key, batch, density, self.dynamics, state)
        loss, gap = energy_gap(density, batch, negatives)
        metrics = {"energy_gap": gap, "accept_rate": accepted, "step_size": state}
        return loss, (next_step_size(state, accepted, self.dynamics), metrics)


class Buffer(NamedTuple):
    """Walkers that persist."""

    points: Array
    """(num_walkers, dim)"""
    step_size: Array


class PersistentContrastiveDivergence(Objective):
    """PCD: negatives are walkers that go on from step to step.

    Args:
        num_walkers: in the replay buffer; each step moves as many of them as the batch has points, chosen at random.
        restart: share of the walkers of a step that starts anew, from the base, or from the batch without one.
        dynamics: the moves.

    References: Tieleman (2008); Du and Mordatch (2019).
    """

    num_walkers: int = 1024
    restart: float = 0.0
    dynamics: Dynamics = Dynamics()
    name = "persistent contrastive divergence"
    is_comparable = False

    def __check_init__(self):
        if self.num_walkers < 1 or not 0 <= self.restart <= 1:
            raise EnergyError(f"num_walkers is 1 at least, restart a share from 0 to 1; got {self}.")

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        step_size = jnp.asarray(self.dynamics.step_size, data.dtype)
        if density.base is None:
            points = data[jax.random.randint(key, (self.num_walkers,), 0, len(data))]
        else:
            points = density.draw_base(key, self.num_walkers).astype(data.dtype)
        self.dynamics.check_start(points, density.base)
        return (), Buffer(points, step_size)

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        key_choice, key_restart, key_fresh, key_walk = jax.random.split(key, 4)
        num = min(len(batch), self.num_walkers)
        # Neighbours from a random place on, since a random choice of them all sorts the buffer; never in turn, since
        # walkers that all lag behind by the same number of steps swing with the energy.
        first = jax.random.randint(key_choice, (), 0, self.num_walkers)
        chosen = (first + jnp.arange(num)) % self.num_walkers
        points = state.points[chosen]
        if self.restart > 0:
            fresh = batch[:num] if density.base is None else density.draw_base(key_fresh, num).astype(points.dtype)
            anew = jax.random.uniform(key_restart, (num, 1)) < self.restart
            points = jnp.where(anew, fresh, points)
        points, accepted = walk(key_walk, points, density, self.dynamics, state.step_size)
        loss, gap = energy_gap(density, batch, points)
        step_size = next_step_size(state.step_size, accepted, self.dynamics)
        metrics = {"energy_gap": gap, "accept_rate": accepted, "step_size": state.step_size}
        return loss, (Buffer(state.points.at[chosen].set(points), step_size), metrics)
