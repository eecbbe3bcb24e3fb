"""A normalising flow as a model of data: a density that is exact, with log Z = 0, and its energy.

    x = T(u),   u ~ base of the flow           `sample`
    p(x)  =  base(T^-1(x)) |det T^-1'(x)|      `distribution`
    U(x)  =  -log p(x),   log Z = 0            `energy`
    q(z | x)  =  p(z | c),   c = network(x)    `FlowEncoder`, of a flow with conditions: a guide for a `LatentModel`

It is an energy that `fit` trains by `MaximumLikelihood`, and whatever takes an energy takes it. As density, prior, base
of an `EnergyDistribution` or of a `LatentModel` it is its `distribution`, whose parameters are as they are (those of a
`LatentModel`'s base are trained with it).

References:
    Rezende and Mohamed (2015), Variational inference with normalizing flows; Durkan, Bekasov, Murray and Papamakarios
    (2019), Neural spline flows; Papamakarios, Pavlakou and Murray (2017), Masked autoregressive flow for density
    estimation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import numpyro

from ebm_ppl.energy import Energy
from ebm_ppl.flow_distribution import FlowDistribution
from ebm_ppl.models.latent import PLATE
from ebm_ppl.typing import Array, EnergyError, PRNGKey


class FlowModel(Energy):
    """`p(x)` of a flow of flowjax, or another of its distributions: see the module docstring.

    Args:
        flow: a `flowjax.distributions.AbstractDistribution` without conditions, of events of any shape.

    Raises:
        EnergyError: for what is no distribution of flowjax, or depends on conditions.

    Example:
        >>> flow = flowjax.flows.masked_autoregressive_flow(key, base_dist=flowjax.distributions.Normal(jnp.zeros(2)))
        >>> fitted = ebm_ppl.fit(key, ebm_ppl.FlowModel(flow), data, ebm_ppl.MaximumLikelihood())
        >>> fitted.energy.sample(key, 100), fitted.energy.model(data)     # events, a NumPyro program
    """

    flow: Any
    is_normalized: ClassVar[bool] = True

    def __check_init__(self):
        FlowDistribution(self.flow)

    @property
    def distribution(self) -> FlowDistribution:
        """p(x) for NumPyro."""
        return FlowDistribution(self.flow)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Of x."""
        return self.flow.shape

    def model(self, data: Array | None = None, num: int = 1) -> Any:
        """A NumPyro program: each event of the data, shape (num, *event_shape).

        Args:
            data: observed events; where None, `num` events are latent sites.
        """
        with numpyro.plate(PLATE, num if data is None else len(data)):
            return numpyro.sample("x", self.distribution, obs=data)

    def sample(self, key: PRNGKey, num: int) -> Array:
        """Events, shape (num, *event_shape)."""
        return self.flow.sample(key, (num,))

    def energy(self, x: Array) -> Array:
        """U(x) = -log p(x) of one event, in nats."""
        return -self.flow.log_prob(x)

    def __call__(self, x: Array) -> Array:
        return self.energy(x)


class FlowEncoder(eqx.Module):
    """`q(z | x)` by a flow whose conditions a network makes of an event: an encoder for a `LatentModel`.

    Bends and correlations that a normal guide cannot have come for the price of a flow in both directions, so that
    coupling flows are the fast ones. Its mean and variance, of which diagnostics and starts make use, are of 256 draws.

    Args:
        network: from one event to conditions, of shape `flow.cond_shape`.
        flow: of flowjax, of points of shape (latent_dim,), made with `cond_dim`.

    Raises:
        EnergyError: for a flow without conditions.

    References: Rezende and Mohamed (2015); Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), Improved
    variational inference with inverse autoregressive flow.

    Example:
        >>> network = eqx.nn.MLP(4, 16, 64, 2, key=key)
        >>> base = flowjax.distributions.Normal(jnp.zeros(2))
        >>> flow = flowjax.flows.coupling_flow(key, base_dist=base, cond_dim=16, invert=False)
        >>> model = ebm_ppl.LatentModel(2, decoder, likelihood, encoder=ebm_ppl.FlowEncoder(network, flow))
    """

    network: Callable[[Array], Array]
    flow: Any

    def __check_init__(self):
        if getattr(self.flow, "cond_shape", None) is None:
            raise EnergyError("FlowEncoder takes a flow with conditions: make it with cond_dim=...")

    def __call__(self, x: Array) -> Array:
        """Conditions of one event."""
        return self.network(x)

    def guess(self, outputs: Array) -> FlowDistribution:
        """q(z | x), whose batch is that of the conditions."""
        return FlowDistribution(self.flow, outputs)
