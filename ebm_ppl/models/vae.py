"""Variational autoencoders: a `LatentModel` trained with its encoder, by a bound of the likelihood.

    log w(z) = log p(x | z) + beta ( log p(z) - log q(z | x) )          z ~ q(z | x)
    loss     = -E log( 1/K sum_k w(z_k) )         K = 1 the evidence bound, K > 1 the importance-weighted one

A prior that is tilted by an energy U has a log Z that falls out of no bound, but

    E_q[-log p(z)] = E_q[-log base(z) + U(z)] + log Z,      grad log Z = -E_p(z)[grad U]

is what objectives of sampling train an energy by, with draws of the encoder as data. So one of them does that here,
`of_prior`: latent walkers, say, that are persistent, or weighted.

References:
    Kingma and Welling (2014), Auto-encoding variational Bayes; Higgins, Matthey, Pal, Burgess, Glorot, Botvinick,
    Mohamed and Lerchner (2017), beta-VAE; Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders;
    Pang, Han, Nijkamp, Zhu and Wu (2020), Learning latent space energy-based prior model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import logsumexp

from ebm_ppl.energy import quickened
from ebm_ppl.models.latent import LatentModel
from ebm_ppl.models.likelihood import Likelihood
from ebm_ppl.networks import ConvNetwork, DeconvNetwork
from ebm_ppl.train.checks import OF_PRIOR
from ebm_ppl.train.objective import Density, Metrics, Objective, log_prob
from ebm_ppl.typing import Array, EnergyError, PRNGKey


def vae(
    key: PRNGKey,
    latent_dim: int,
    likelihood: Likelihood,
    *,
    width: int = 256,
    depth: int = 2,
    channels: tuple[int, ...] | None = None,
    activation: Callable[[Array], Array] = jax.nn.silu,
    base: dist.Distribution | None = None,
    energy: Callable[[Array], Array] | None = None,
) -> LatentModel:
    """A variational autoencoder, not trained yet.

    Args:
        key: draws the weights.
        latent_dim: of z.
        likelihood: `BernoulliLikelihood(event_shape)`, `GaussianLikelihood(...)` or `CategoricalLikelihood(...)`.
        width, depth: of the hidden layers of both perceptrons; of none where there are channels.
        channels: of the encoder's convolutions, which the decoder's undo, for images whose sides are multiples of 2
            to the power of their number: (16, 32), say.
        activation: smooth function.
        base, energy: of the prior: standard normal by default; a flow; a network that tilts it. See `LatentModel`.

    References: Kingma and Welling (2014); Pang et al. (2020).

    Example:
        >>> model = ebm_ppl.vae(jax.random.key(0), 8, ebm_ppl.BernoulliLikelihood((28, 28)))
        >>> fitted = ebm_ppl.fit(jax.random.key(1), model, digits, ebm_ppl.EvidenceBound())
        >>> fitted.energy.model(digits[:5])     # a NumPyro program
    """
    key_encoder, key_decoder = jax.random.split(key)
    shape, num_outputs = likelihood.event_shape, likelihood.num_outputs
    if channels is None:
        perceptron = eqx.nn.MLP(math.prod(shape), 2 * latent_dim, width, depth, activation, key=key_encoder)
        encoder = eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), quickened(perceptron)])
        decoder: Any = quickened(eqx.nn.MLP(latent_dim, num_outputs, width, depth, activation, key=key_decoder))
    else:
        each = num_outputs // math.prod(shape)
        encoder = ConvNetwork(key_encoder, shape, channels, 2 * latent_dim, activation)
        decoder = DeconvNetwork(key_decoder, latent_dim, shape, channels[::-1], each, activation)
    return LatentModel(latent_dim, decoder, likelihood, encoder=encoder, base=base, energy=energy)


class EvidenceBound(Objective):
    """Maximum of a lower bound of the likelihood, for a `LatentModel` with an encoder: `fit(key, vae(...), data, ...)`.

    The record has, as means over the batch, `bound` (of log p(x), without log Z of a tilted prior), `reconstruction`,
    E_q[log p(x | z)], and `rate`, E_q[log q(z | x) - log p(z)], both in nats.

    Args:
        num_draws: K, of the encoder for each event.
        beta: of the rate; another than 1 is no bound of the likelihood any more, and goes with one draw.
        of_prior: an objective by which the energy of the prior is trained, on draws of the encoder:
            `PersistentContrastiveDivergence()`, `Jarzynski()` or `MonteCarloLikelihood()`; what it tells is in the
            record as `prior_...`. For priors with an energy, and only for those.

    Raises:
        EnergyError: for a model without an encoder, a prior with an energy and no `of_prior`, or the reverse.

    References: Kingma and Welling (2014); Burda et al. (2016); Higgins et al. (2017); Pang et al. (2020).
    """

    num_draws: int = 1
    beta: float = 1.0
    of_prior: Objective | None = None
    name = "evidence bound"
    is_comparable = True

    def __check_init__(self):
        if self.num_draws < 1 or not self.beta >= 0 or (self.num_draws > 1 and self.beta != 1):
            raise EnergyError(
                f"num_draws is 1 at least, beta not negative, and 1 where there are more draws; got {self}."
            )

    def preview(self, density: Density, x: Array) -> Array:
        model, x = self._model(density), x.reshape(density.event_shape)
        return model.joint_energy(x, model.posterior_guess(x).mean)

    def _model(self, density: Density) -> LatentModel:
        model: Any = density.energy
        if not isinstance(model, LatentModel) or model.encoder is None or density.base is not None:
            raise EnergyError(
                "EvidenceBound trains a LatentModel that has an encoder, vae(...), say, whose base is its own: "
                f"got {type(model).__name__} with base={density.base}."
            )
        if (model.energy is None) != (self.of_prior is None):
            raise EnergyError(
                "A prior with an energy has a log Z, which EvidenceBound(of_prior=Jarzynski(), say) follows; one "
                "without has none."
            )
        return model

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        model = self._model(density)
        if self.of_prior is None:
            return (), ()
        z = model.posterior_guess(data.reshape(-1, *density.event_shape)).mean
        return self.of_prior.init(key, _of_latents(model), z)

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        model = self._model(density)
        key_draws, key_prior = jax.random.split(key)

        x = batch.reshape(-1, *density.event_shape)
        guess = model.posterior_guess(x)
        z = guess.sample(key_draws, (self.num_draws,))
        # All at once, shape (num_draws, batch): one product of matrices takes less time than a vmap of a vmap of them.
        reconstruction, rate = log_prob(model.given(z), x), guess.log_prob(z) - model.prior.log_prob(z)
        log_weights = reconstruction - self.beta * rate
        bound = jnp.mean(logsumexp(log_weights, axis=0)) - jnp.log(float(self.num_draws))
        metrics = {"bound": bound, "reconstruction": jnp.mean(reconstruction), "rate": jnp.mean(rate)}
        if self.of_prior is None:
            return -bound, (state, metrics)
        latents, of_latents = z[0], _of_latents(model)
        value, (state, told) = self.of_prior.loss(key_prior, of_latents, parameters, state, latents)
        # Its term of the data is in the bound already.
        log_z = value - jnp.mean(jax.vmap(of_latents.tilt)(latents))
        return self.beta * log_z - bound, (state, metrics | {f"{OF_PRIOR}{name}": each for name, each in told.items()})


def _of_latents(model: LatentModel) -> Density:
    """The prior of one z, as objectives of sampling want it."""
    assert model.energy is not None
    return Density(model.energy, model.base, (model.latent_dim,))
