"""A target in the space of a normalising flow: neural transport, a reparametrisation that is learned.

    z = T(u)
    log pi_0(u) = log pi_0(T(u)) + log |det T'(u)|      the reference, as normalised as it was
    U_k(u)      = U_k(T(u))                             so that log Z is what it was

Where the flow has learned the target, u is near the base of the flow, normal and independent: chains that meet funnels,
bends and correlations in z meet none in u. What the flow has not learned costs speed, and nothing else: any bijection
leaves the posterior, its sites and log Z as they are.

References:
    Parno and Marzouk (2018), Transport map accelerated Markov chain Monte Carlo; Hoffman, Sountsov, Dillon, Langmore,
    Tran and Vasudevan (2019), NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ebm_ppl.target import Target
from ebm_ppl.typing import Array, EnergyError, EnergyShapeError

LOG_DET = "_transport_log_det"
"""Among the terms of the reference, as the Jacobians of sites are."""


class Transported(Target):
    """A `Target` whose points are those of a flow's base; made by `transported`."""

    bijection: Any
    """T, one of flowjax."""

    @property
    def site_numbers(self) -> np.ndarray:
        """All the same: each coordinate of u is of every site."""
        return np.zeros(self.dim, int)

    @property
    def is_logistic(self) -> np.ndarray:
        return np.zeros(self.dim, bool)

    @property
    def is_hierarchical(self) -> bool:
        """Never, since T is what there is to learn."""
        return False

    def unravel(self, z: Array) -> dict[str, Array]:
        """The unconstrained sites of T(u)."""
        return super().unravel(self.bijection.transform(z))

    def ravel(self, sites: dict[str, Any]) -> Array:
        """The u of unconstrained sites."""
        return self.bijection.inverse(super().ravel(sites))

    def element_terms(self, z: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        references, energies = super().element_terms(z)
        return references | {LOG_DET: self._log_det(z)}, energies

    def _enumerated_terms(self, z: Array) -> tuple[Array, dict[str, Array]]:
        log_reference, energies = super()._enumerated_terms(z)
        return log_reference + self._log_det(z), energies

    def _log_det(self, z: Array) -> Array:
        return self.bijection.transform_and_log_det(z)[1]


def transported(target: Target, flow: Any) -> Transported:
    """The same target in the space of a flow, for any sampler and estimator: draws are those of the model's own sites.

    Each step takes `T` and its derivative, so that a flow is fast here that is fast in that direction: a coupling flow,
    or an autoregressive one that is made with `invert=False`. Divergences of chains come from tails that the flow has
    got wrong: a smooth flow (layers that shift and scale, where splines end somewhere), or a larger `target_accept`.

    Args:
        target: from `ebm_ppl.target`.
        flow: of flowjax, of points of shape (dim,) in unconstrained space: `fit_flow_to(key, target, ...).flow`.

    Raises:
        EnergyError: for what is no transformed distribution of flowjax, or depends on conditions.
        EnergyShapeError: where it is of other points.

    Reference: Hoffman et al. (2019).

    Example:
        >>> fitted = ebm_ppl.fit_flow_to(jax.random.key(0), target)
        >>> data = ebm_ppl.sample(jax.random.key(1), ebm_ppl.transported(target, fitted.flow))
    """
    from flowjax.distributions import AbstractTransformed
    from paramax import unwrap

    if not isinstance(flow, AbstractTransformed) or flow.cond_shape is not None:
        raise EnergyError(f"transported takes a flow of flowjax without conditions; got {type(flow).__name__}.")
    if flow.shape != (target.dim,):
        raise EnergyShapeError(
            f"The flow is of points of shape {flow.shape}; those of the target have ({target.dim},)."
        )
    if isinstance(target, Transported):
        raise EnergyError("The target is in the space of a flow already: give that of the model.")
    bijection = unwrap(flow.merge_transforms().bijection)
    parts = {name: getattr(target, name) for name in ("model", "args", "kwargs", "constants", "spec")}
    return Transported(**parts, bijection=bijection)
