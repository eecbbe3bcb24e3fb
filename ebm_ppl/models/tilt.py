"""A generator tilted by its critic: latent variables that the critic likes, and how far to trust it.

    p(z)      is proportional to   base(z) exp(d(G(z)))            `tilted`:  U(z) = -d(G(z))
    d(x)      = slope c(x) + offset                                `calibrated`: a log density ratio of any critic c
    Z         = E_base[exp(-U)],  w_i = exp(-U(z_i)), z_i ~ base   `weigh_tilt`
    ess       = (sum w)^2 / sum w^2

Where d is the log density ratio of data to generator, G(z) is then distributed as the data are, and log Z is zero: a
log Z that is far from it tells of a critic that is no log ratio. A critic moves the latent variables of a generator and
no more: data that it never makes have no z. Of the draws, 1 / (1 + chi^2) are effective, with chi^2 the divergence of
the tilted from the plain generator. Where few are left, the tilt lives on few points that the critic was trained at,
and where Pareto's k is high, on points that it hardly saw.

References:
    Azadi, Olsson, Darrell, Goodfellow and Odena (2019), Discriminator rejection sampling; Che, Zhang, Sohl-Dickstein,
    Larochelle, Paull, Cao and Bengio (2020), Your GAN is secretly an energy-based model and you should use
    discriminator driven latent sampling; Platt (1999), Probabilistic outputs for support vector machines; Vehtari,
    Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from ebm_ppl.energy import Energy
from ebm_ppl.logz.importance import BLOCKS, Weighed
from ebm_ppl.logz.integral import FEW, LARGEST_K, check_energies, warn_of
from ebm_ppl.models.latent import LatentModel
from ebm_ppl.train.objective import flat_pair
from ebm_ppl.typing import Array, ArrayLike, EnergyError, EnergyWarning, LogZ, PRNGKey, as_key

AT_ONCE = 1024
"""Points that go through networks at once."""


class CriticEnergy(Energy):
    """U(z) = -d(G(z)), with G(z) the mean of p(x | z)."""

    model: LatentModel
    critic: Callable[[Array], Array]

    def __call__(self, z: Array) -> Array:
        return -self.critic(self.model.given(z).mean)


def tilted(model: LatentModel, critic: Callable[[Array], Array]) -> LatentModel:
    """The same model with base(z) exp(d(G(z))) / Z as its prior, in the place of any tilt that it had.

    `ebm_ppl.target(LatentModel.generate, tilted(model, critic))` is discriminator-driven latent sampling for any
    sampler: SMC, which starts from all of the base, or chains of MALA from `init="reference"`.

    Args:
        critic: d, of one event, in nats: a log density ratio of data to G(z), as that of `LogisticGAN` is, or what
            `calibrated` makes of another.

    Reference: Che et al. (2020).

    Example:
        >>> better = ebm_ppl.tilted(model, ebm_ppl.calibrated(critic, held_out, generated))
        >>> data = ebm_ppl.sample(key, ebm_ppl.target(ebm_ppl.LatentModel.generate, better), ebm_ppl.SMC())
        >>> data["posterior"]["x"]
    """
    return model.with_prior(CriticEnergy(model.with_prior(None), critic))


class CalibratedCritic(eqx.Module):
    """d(x) = slope c(x) + offset"""

    critic: Callable[[Array], Array]
    slope: Array
    offset: Array

    def __call__(self, x: Array) -> Array:
        return self.slope * self.critic(x) + self.offset


def calibrated(critic: Callable[[Array], Array], data: ArrayLike, generated: ArrayLike) -> CalibratedCritic:
    """A critic scaled to be the log density ratio of data to what the generator makes, by logistic regression.

    P(data | x) = logistic(slope c(x) + offset + log(num_data / num_generated)), fitted by maximum likelihood with the
    labels that Platt moves off 0 and 1, so that there is an answer where the critic makes no mistakes. The slope is not
    negative; zero is warned of.

    Args:
        critic: c, of one event.
        data: events that the critic was not trained on, shape (num_data, *event_shape).
        generated: draws of the generator, G(z), shape (num_generated, *event_shape).

    Raises:
        EnergyError: for a critic that is not finite.
        EnergyShapeError: for events of different shapes.

    Reference: Platt (1999).
    """
    data, generated, shape = flat_pair(data, generated, ("data", "generated"))
    values = np.asarray(_values(critic, jnp.concatenate([data, generated]).reshape(-1, *shape)), np.float64)
    if not np.all(np.isfinite(values)):
        raise EnergyError(f"The critic is not finite at {np.sum(~np.isfinite(values))} of {len(values)} events.")
    nums = len(data), len(generated)
    # In units of their own, for the sake of the minimisation.
    mean, scale = np.mean(values), np.array([np.std(values) or 1.0, 1.0])
    columns = np.stack([values - mean, np.ones_like(values)], axis=1) / scale
    labels = np.repeat([(nums[0] + 1) / (nums[0] + 2), 1 / (nums[1] + 2)], nums)
    prior = math.log(nums[0] / nums[1])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = columns @ weights + prior
        slopes = (expit(logits) - labels) @ columns
        return float(np.mean(np.logaddexp(0, logits) - labels * logits)), slopes / len(values)

    bounds = [(0.0, None), (None, None)]
    slope, offset = minimize(loss, np.zeros(2), jac=True, bounds=bounds, options={"ftol": 0.0, "gtol": 1e-9}).x / scale
    if slope == 0:
        message = (
            "The critic is no higher at the data than at what the generator makes, and there is nothing to tilt by: "
            "the generator is as good as the critic can tell, or the critic has the other sign."
        )
        warnings.warn(message, EnergyWarning, stacklevel=2)
    return CalibratedCritic(critic, *jnp.asarray([slope, offset - slope * mean], data.dtype))


@eqx.filter_jit
def _values(function: Callable[[Array], Array], x: Array) -> Array:
    return jax.lax.map(function, x, batch_size=AT_ONCE)


class TiltWeights(NamedTuple):
    """Draws of a base, and what the tilt makes of them."""

    z: np.ndarray
    """Independent draws of the base, (num, latent_dim)."""
    log_weight: np.ndarray
    """-U(z), in nats, (num,)."""
    log_z: LogZ
    """log E_base[exp(-U)]; about zero where U is minus a log density ratio."""

    @property
    def effective_size(self) -> float:
        """Of the draws, by Kish's formula."""
        return self.log_z.diagnostics["effective_size"]

    @property
    def pareto_k(self) -> float:
        """Shape of the weights' tail: -inf where all of them are equal."""
        return self.log_z.diagnostics["pareto_k"]


def weigh_tilt(key: PRNGKey, model: LatentModel, num: int = 16_384) -> TiltWeights:
    """How far a tilted prior is from its base, by weights of draws of the base: whether a critic can be trusted.

    Warns where less than a hundred draws are effective, or the weights have a heavy tail, since points that decide then
    are not among those that the critic was trained at.

    Args:
        model: with an energy: `tilted(model, critic)`.
        num: of draws; rounded up to a multiple of 16.

    Raises:
        EnergyError: for a model without an energy.
        NonFiniteEnergyError: for an energy of -inf.

    Reference: Vehtari et al. (2024).

    Example:
        >>> found = ebm_ppl.weigh_tilt(key, ebm_ppl.tilted(model, critic))
        >>> found.effective_size, found.log_z
    """
    if model.energy is None or num < 1:
        raise EnergyError(
            "A model without an energy has no tilt to weigh by: tilted(model, critic); num is 1 at least."
        )
    num = BLOCKS * math.ceil(num / BLOCKS)
    base: Any = model.base
    z = base.sample(as_key(key), (num,))
    energy = np.asarray(_values(model.energy, z))
    num_nan = check_energies(energy, "draws of the base")
    log_weight = np.where(np.isnan(energy), -np.inf, -energy)
    weighed = Weighed(log_weight.reshape(BLOCKS, -1), num_nan)
    size, k = weighed.num * weighed.effective_share, weighed.pareto_k
    doubts = ()
    if size < FEW or k > LARGEST_K:
        doubts = (
            f"The tilt leaves {size:.3g} of {num} draws of the base effective, with Pareto's k = {k:.2f} (fair up to "
            f"{LARGEST_K}): what it prefers the generator hardly makes, and the critic hardly saw. Train the generator "
            "for longer, calibrate the critic, or restrain its slope by a penalty.",
        )
    warn_of(num_nan, doubts, stacklevel=3)
    diagnostics = {"effective_size": size, "pareto_k": k}
    log_z = LogZ(weighed.value, weighed.std_error, "importance", diagnostics=diagnostics, doubts=doubts)
    return TiltWeights(np.asarray(z), log_weight, log_z)
