"""A trained normalising flow of flowjax as a distribution of NumPyro: a base, a noise to contrast with, a prior.

    x = T(u), u ~ base of the flow        log p(x) = log p(u) - log |T'(u)|        `FlowDistribution(flow)`
    x = T(u; c)                           p(x | c), a batch of conditions c        `FlowDistribution(flow, c)`

flowjax has an adaptor of its own for models, whose distributions are no pytrees that JAX can take apart, so that they
cannot be arguments of a compiled program.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from ebm_ppl.distribution import Static
from ebm_ppl.typing import Array, EnergyError, EnergyShapeError, PRNGKey

NUM_OF_MOMENTS = 256
"""Draws that mean and variance are those of."""


class MomentsOfDraws(dist.Distribution):
    """A distribution whose mean and variance have no closed form, and are those of draws by a key of their own."""

    @property
    def mean(self) -> Array:
        return jnp.mean(self._draws(), axis=0)

    @property
    def variance(self) -> Array:
        return jnp.var(self._draws(), axis=0)

    def _draws(self) -> Array:
        return jnp.asarray(self.sample(jax.random.key(0), (NUM_OF_MOMENTS,)))


class FlowDistribution(MomentsOfDraws):
    """A flow of flowjax, or another of its distributions, as it is: its parameters are fixed, and part of the pytree.

    Args:
        flow: a `flowjax.distributions.AbstractDistribution`, such as `flowjax.train.fit_to_data` returns.
        condition: what it depends on, where it does, shape (*batch, *flow.cond_shape).

    Raises:
        EnergyError: for what is no distribution of flowjax, or depends on conditions that are not given.
        EnergyShapeError: for conditions of another shape.

    Example:
        >>> flow = flowjax.flows.coupling_flow(jax.random.key(0), base_dist=flowjax.distributions.Normal(jnp.zeros(2)))
        >>> flow, _ = flowjax.train.fit_to_data(jax.random.key(1), flow, data)
        >>> noise = ebm_ppl.FlowDistribution(flow)
        >>> ebm_ppl.fit(jax.random.key(2), energy, data, ebm_ppl.NoiseContrast(), base=noise)
    """

    pytree_data_fields = ("_arrays", "condition")
    pytree_aux_fields = ("_static",)

    def __init__(self, flow: Any, condition: Array | None = None, *, validate_args: bool | None = None):
        from flowjax.distributions import AbstractDistribution

        needed = getattr(flow, "cond_shape", None)
        if not isinstance(flow, AbstractDistribution) or (needed is None) != (condition is None):
            raise EnergyError(
                "FlowDistribution takes a distribution of flowjax without conditions, or one with them given; "
                f"got {type(flow).__name__} with cond_shape {needed}, and condition={condition}."
            )
        batch_shape = ()
        if needed is not None:
            shape: tuple[int, ...] = jnp.shape(condition)  # pyright: ignore
            batch_shape = shape[: len(shape) - len(needed)]
            if shape != batch_shape + needed:
                raise EnergyShapeError(
                    f"condition has shape {shape}; expected (*batch, {', '.join(map(str, needed))})."
                )
        self._arrays, static = eqx.partition(flow, eqx.is_array)
        self._static, self.condition = Static(static), condition
        super().__init__(batch_shape, flow.shape, validate_args=validate_args)

    @property
    def flow(self) -> Any:
        return eqx.combine(self._arrays, self._static.tree)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    def sample(self, key: PRNGKey | None, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.flow.sample(key, sample_shape, self.condition)

    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        return self.flow.log_prob(value, self.condition)
