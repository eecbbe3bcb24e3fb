"""A trained normalising flow of flowjax as a distribution of NumPyro: a base, a noise to contrast with, a prior.

    x = T(u), u ~ base of the flow        log p(x) = log p(u) - log |T'(u)|        `FlowDistribution(flow)`

flowjax has an adaptor of its own for models, whose distributions are no pytrees that JAX can take apart, so that they
cannot be arguments of a compiled program.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import numpyro.distributions as dist
from numpyro.distributions import constraints

from ebm_ppl.distribution import Static
from ebm_ppl.typing import Array, EnergyError, PRNGKey


class FlowDistribution(dist.Distribution):
    """A flow of flowjax, or another of its distributions, as it is: its parameters are fixed, and part of the pytree.

    Args:
        flow: a `flowjax.distributions.AbstractDistribution` without conditions, such as `flowjax.train.fit_to_data`
            returns.

    Raises:
        EnergyError: for what is no distribution of flowjax, or depends on conditions.

    Example:
        >>> flow = flowjax.flows.coupling_flow(jax.random.key(0), base_dist=flowjax.distributions.Normal(jnp.zeros(2)))
        >>> flow, _ = flowjax.train.fit_to_data(jax.random.key(1), flow, data)
        >>> noise = ebm_ppl.FlowDistribution(flow)
        >>> ebm_ppl.fit(jax.random.key(2), energy, data, ebm_ppl.NoiseContrast(), base=noise)
    """

    pytree_data_fields = ("_arrays",)
    pytree_aux_fields = ("_static",)

    def __init__(self, flow: Any, *, validate_args: bool | None = None):
        from flowjax.distributions import AbstractDistribution

        if not isinstance(flow, AbstractDistribution) or flow.cond_shape is not None:
            raise EnergyError(
                "FlowDistribution takes a distribution of flowjax without conditions; got "
                f"{type(flow).__name__} with cond_shape {getattr(flow, 'cond_shape', None)}."
            )
        self._arrays, static = eqx.partition(flow, eqx.is_array)
        self._static = Static(static)
        super().__init__((), flow.shape, validate_args=validate_args)

    @property
    def flow(self) -> Any:
        return eqx.combine(self._arrays, self._static.tree)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    def sample(self, key: PRNGKey | None, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.flow.sample(key, sample_shape)

    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        return self.flow.log_prob(value)
