"""An energy of discrete data by its differences between neighbours: no sampling, and Z plays no part.

    neighbours          x_is: coordinate i of x is another state, x_i + s mod k, s = 1..k-1
    D_is                V(x) - V(x_is) = log p(x_is) / p(x)
    conditionals        p(x_i = x_i + s | all others) = softmax(0, D_i1, ..., D_i,k-1)_s

    pseudo-likelihood          E sum_i [ log(1 + sum_s exp D_is) ]              = -E sum_i log p(x_i | all others)
    ratio matching             E sum_i [ (1 - p_i0)^2 + sum_s p_is^2 ] / 2      the Brier score of the conditionals
                               E sum_i (1 - p(x_i | all others))^2              for two states
    concrete score matching    E sum_is [ exp(2 D_is) - 2 exp(-D_is) ]          the ratios themselves, by least squares

Each is least, over all densities, at that of the data, where it is positive: the ratios of neighbours make up all
others. The first two are proper scoring rules of each conditional. The third is, up to a constant,

    E_q sum_is ( p(x_is) / p(x) - q(x_is) / q(x) )^2

of the data's density q: the cross term is sum_x,is q(x_is) p(x_is) / p(x), and as x and x_is are neighbours of each
other, that is E_q sum_is p(x) / p(x_is), which data alone tell.

Two modes that no chain of likely states joins are as apart here as they are for score matching: conditionals say next
to nothing of their weights.

References:
    Besag (1975), Statistical analysis of non-lattice data; Hyvarinen (2007), Some extensions of score matching; Meng,
    Choi, Song and Ermon (2022), Concrete score matching: generalized score matching for discrete data; Gneiting and
    Raftery (2007), Strictly proper scoring rules, prediction, and estimation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ebm_ppl.lattice.energy import check_num_states, check_states
from ebm_ppl.lattice.gibbs import changes
from ebm_ppl.train.objective import Density, Metrics, Objective
from ebm_ppl.typing import Array, EnergyError, PRNGKey


class _Neighbours(Objective):
    """A sum over coordinates of what the differences D of one say, or an unbiased estimate from some of them.

    A point costs d (k - 1) + 1 evaluations of the energy, or with `num_coordinates` as many for those in place of d.
    """

    num_states: int = 2
    num_coordinates: int | None = None
    is_comparable = True

    def __check_init__(self):
        check_num_states(self.num_states)
        if self.num_coordinates is not None and self.num_coordinates < 1:
            raise EnergyError(f"num_coordinates is 1 at least, or None for all; got {self.num_coordinates}.")

    def check(self, data: Array) -> None:
        check_states(data, self.num_states, f"Data of {self.name}")
        if self.num_coordinates is not None and self.num_coordinates > data.shape[1]:
            raise EnergyError(f"num_coordinates is {self.num_coordinates}, of events of {data.shape[1]} numbers.")

    def of_coordinate(self, differences: Array) -> Array:
        """Of D_i1, ..., D_i,k-1."""
        raise NotImplementedError

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        num, dim = batch.shape

        def of_point(key: PRNGKey, x: Array) -> Array:
            here = density.total(x)

            def at(i: Array) -> Array:
                return self.of_coordinate(here - jax.vmap(density.total)(changes(x, i, self.num_states)))

            chosen = jnp.arange(dim)
            if self.num_coordinates is not None:
                chosen = jax.random.choice(key, dim, (self.num_coordinates,), replace=False)
            return dim * jnp.mean(jax.vmap(at)(chosen))

        return jnp.mean(jax.vmap(of_point)(jax.random.split(key, num), batch)), (state, {})


class PseudoLikelihood(_Neighbours):
    """Pseudo-likelihood: the log probability of each coordinate given all others.

    Args:
        num_states: k, of each coordinate: 0..k-1.
        num_coordinates: of each point, drawn anew in each step; all, exactly, where None.

    Raises:
        EnergyError: for data that are not in these states.

    Reference: Besag (1975).
    """

    name = "pseudo-likelihood"

    def of_coordinate(self, differences: Array) -> Array:
        return -_log_conditional(differences)[0]


class RatioMatching(_Neighbours):
    """Ratio matching: the squared error of each coordinate's probabilities given all others.

    For two states it is Hyvarinen's objective over two, without its constant; for more it is the Brier score in the
    same way. What is nearly impossible costs no more than 1, where its log probability has no bound.

    Args:
        num_states: k, of each coordinate: 0..k-1.
        num_coordinates: of each point, drawn anew in each step; all, exactly, where None.

    Raises:
        EnergyError: for data that are not in these states.

    Reference: Hyvarinen (2007).
    """

    name = "ratio matching"

    def of_coordinate(self, differences: Array) -> Array:
        probabilities = jnp.exp(_log_conditional(differences))
        return jnp.sum((probabilities.at[0].add(-1)) ** 2) / 2


class ConcreteScoreMatching(_Neighbours):
    """Concrete score matching: the ratios p(x_is) / p(x) of neighbours, by least squares.

    Neighbours differ in one coordinate, by any of its other states. The loss has no bound below at finitely many points
    of data that some neighbour is not among: an energy that is flexible enough lifts that neighbour to infinity. It is
    meant for energies of few parameters, or data that cover their states; `PseudoLikelihood` has no such fault.

    Args:
        num_states: k, of each coordinate: 0..k-1.
        num_coordinates: of each point, drawn anew in each step; all, exactly, where None.

    Raises:
        EnergyError: for data that are not in these states.

    Reference: Meng et al. (2022).
    """

    name = "concrete score matching"

    def of_coordinate(self, differences: Array) -> Array:
        return jnp.sum(jnp.exp(2 * differences) - 2 * jnp.exp(-differences))


def _log_conditional(differences: Array) -> Array:
    """Of a coordinate's states given all others, its own first, (num_states,)."""
    return jax.nn.log_softmax(jnp.append(jnp.zeros_like(differences[:1]), differences))
