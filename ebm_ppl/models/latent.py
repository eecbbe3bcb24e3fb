"""A model of data by latent variables: x = G(z), with z from a tilted base. VAE, critic and latent EBM are such.

    p(z)      =  base(z) exp(-U(z)) / Z                        `prior`; U = 0 where there is no energy
    p(x | z)  =  likelihood(decoder(z))                        `given`
    q(z | x)  =  Normal(m, s),  (m, log s) = encoder(x)        `posterior_guess`; or a flow, by a `FlowEncoder`
    E(x, z)   =  -log p(x | z) - log p(z)                      `joint_energy`
    U(x)      =  -log int exp(-E(x, z)) dz                     the free energy, -log p(x): `log_likelihood_bounds`
    w(z)      =  p(x, z) / q(z | x)                            `log_weight`;  E_q[w] = p(x),  E_q[log w] <= log p(x)
    p(z | x)  =  q(z | x) w(z) / p(x)                          `refined`, the posterior as a guess that is tilted

    VAE                   U = 0, with an encoder                                         `vae.py`
    latent EBM prior      U a network
    critic                U(z) = -d(G(z)), d a critic of what the generator makes    `critic.py`, `tilt.py`

`model` and `guide` are NumPyro programs with the sites `z` and `x` in a plate `observation`, so that such a model is
conditioned, extended, tilted by an `energy_factor` and sampled as any other. In a larger model of your own,

    z = numpyro.sample("z", vae.prior)
    image = vae.given(z).mean

Methods take events with any batch in front, but for `joint_energy` and `log_weight`, which take one.

References:
    Kingma and Welling (2014), Auto-encoding variational Bayes; Pang, Han, Nijkamp, Zhu and Wu (2020), Learning latent
    space energy-based prior model; Che, Zhang, Sohl-Dickstein, Larochelle, Paull, Cao and Bengio (2020), Your GAN is
    secretly an energy-based model and you should use discriminator driven latent sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from paramax import NonTrainable

from ebm_ppl import inference
from ebm_ppl.distribution import EnergyDistribution, energy_factor
from ebm_ppl.flow_distribution import FlowDistribution
from ebm_ppl.logz.tempering import ParallelTempering
from ebm_ppl.mcmc import Sampler
from ebm_ppl.models.likelihood import Likelihood
from ebm_ppl.smc import SMC
from ebm_ppl.target import target
from ebm_ppl.train.objective import log_prob
from ebm_ppl.typing import Array, EnergyError, EnergyShapeError, PRNGKey, as_key

PLATE = "observation"


class LatentModel(eqx.Module):
    """`p(x) = int base(z) exp(-U(z)) / Z p(x | z) dz`: see the module docstring.

    Args:
        latent_dim: of z.
        decoder: from one z, shape (latent_dim,), to the likelihood's outputs.
        likelihood: from outputs to the distribution of x: `BernoulliLikelihood(...)`, say.
        encoder: from one event to the mean and the log standard deviation of z, shape (2 * latent_dim,); needed by
            what takes a guide. Or a module with a method `guess(outputs) -> distribution of z`, which makes of its
            outputs what it likes: `FlowEncoder(network, flow)`.
        base: a NumPyro distribution of z; standard normal where None. A `FlowDistribution` is trained with the rest,
            anything else stays as it is.
        energy: U, of one z, in nats.
        log_partition: log Z of the prior, in nats, where it is known; of no meaning without an energy.

    Raises:
        EnergyShapeError: where the shapes of these do not fit together.

    References: Kingma and Welling (2014); Pang et al. (2020).
    """

    decoder: Callable[[Array], Array]
    likelihood: Likelihood
    encoder: Any
    energy: Callable[[Array], Array] | None
    log_partition: float | None
    _base: Any
    latent_dim: int = eqx.field(static=True)

    def __init__(
        self,
        latent_dim: int,
        decoder: Callable[[Array], Array],
        likelihood: Likelihood,
        *,
        encoder: Callable[[Array], Array] | None = None,
        base: dist.Distribution | None = None,
        energy: Callable[[Array], Array] | None = None,
        log_partition: float | None = None,
    ):
        given: Any = dist.Normal(jnp.zeros(latent_dim)).to_event(1) if base is None else base
        self.decoder, self.likelihood, self.encoder, self.energy = decoder, likelihood, encoder, energy
        self.log_partition, self.latent_dim = log_partition, latent_dim
        self._base = given if isinstance(given, FlowDistribution) else NonTrainable(given)
        z, x = (jax.ShapeDtypeStruct(shape, jnp.result_type(float)) for shape in ((latent_dim,), self.event_shape))
        _require_shape(given.batch_shape + given.event_shape, z.shape, "The base of z")
        _require_shape(eqx.filter_eval_shape(decoder, z).shape, (likelihood.num_outputs,), "The decoder's output")
        if encoder is not None:
            outputs = eqx.filter_eval_shape(encoder, x)
            if hasattr(encoder, "guess"):
                guess = eqx.filter_eval_shape(lambda outputs: encoder.guess(outputs).sample(jax.random.key(0)), outputs)
                _require_shape(guess.shape, z.shape, "A draw of the encoder")
            else:
                _require_shape(outputs.shape, (2 * latent_dim,), "The encoder's output")

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Of x."""
        return self.likelihood.event_shape

    @property
    def base(self) -> dist.Distribution:
        return self._base.tree if isinstance(self._base, NonTrainable) else self._base

    @property
    def prior(self) -> dist.Distribution:
        """p(z), one event of shape (latent_dim,)."""
        if self.energy is None:
            return self.base
        return EnergyDistribution(self.energy, self.base, log_partition=self.log_partition)

    def with_prior(self, energy: Callable[[Array], Array] | None, log_partition: float | None = None) -> LatentModel:
        """The same model with another tilt of its base, or none.

        Raises:
            EnergyError: where the energy refuses the model's base.
        """
        parts = (energy, log_partition)
        model = eqx.tree_at(lambda model: (model.energy, model.log_partition), self, parts, is_leaf=lambda x: x is None)
        _require_shape(model.prior.event_shape, (model.latent_dim,), "The prior of z")  # made here, or refused
        return model

    def given(self, z: Array) -> Any:
        """p(x | z), whose batch is that of z, shape (*batch, latent_dim)."""
        return self.likelihood(jnp.vectorize(self.decoder, signature="(i)->(j)")(z))

    def posterior_guess(self, x: Array) -> Any:
        """q(z | x), whose batch is that of x, shape (*batch, *event_shape)."""
        if self.encoder is None:
            raise EnergyError("This model has no encoder to guess z by: pass encoder=... to LatentModel.")
        axes = ",".join(f"e{axis}" for axis in range(len(self.event_shape)))
        outputs = jnp.vectorize(self.encoder, signature=f"({axes})->(o)")(x)
        if hasattr(self.encoder, "guess"):
            return self.encoder.guess(outputs)
        mean, log_scale = jnp.split(outputs, 2, axis=-1)
        return dist.Normal(mean, jnp.exp(log_scale)).to_event(1)

    def sample_latents(self, key: PRNGKey, num: int, sampler: SMC | ParallelTempering | Sampler | None = None) -> Array:
        """Draws of the prior, shape (num, latent_dim): exact where it has no energy, else by a sampler.

        Args:
            sampler: of a tilted prior. Where None, by the energy's own `draw_tilted(key, num)`, as `DiffusionPrior` has
                it, or else by `SMC()` with as many particles.
        """
        if self.energy is None:
            return self.base.sample(key, (num,))  # pyright: ignore
        draw: Any = getattr(self.energy, "draw_tilted", None)
        if sampler is None and draw is not None:
            return draw(key, num)
        sampler = SMC(num_particles=num + num % 2) if sampler is None else sampler
        tree = inference.sample(
            key, target(_prior_alone, self), sampler, num_chains=1, progress_bar=False, log_likelihood=False
        )
        return jnp.asarray(tree["posterior"]["z"].values[0, :num])

    def sample(self, key: PRNGKey, num: int, sampler: SMC | ParallelTempering | Sampler | None = None) -> Array:
        """Draws of x, shape (num, *event_shape)."""
        key_z, key_x = jax.random.split(as_key(key))
        return self.given(self.sample_latents(key_z, num, sampler)).sample(key_x)

    def model(self, data: Array | None = None, num: int = 1) -> Any:
        """A NumPyro program: each event of the data, shape (num, *event_shape), with a z of its own.

        Args:
            data: observed events; where None, `num` events are latent sites.
        """
        with numpyro.plate(PLATE, num if data is None else len(data)):
            z = numpyro.sample("z", self.prior)
            return numpyro.sample("x", self.given(z), obs=data)  # pyright: ignore

    def generate(self) -> Any:
        """A NumPyro program of one z of the prior and the mean of p(x | z), G(z): sites `z` and `x`, with no noise.

        Samplers see z alone: `ebm_ppl.target(LatentModel.generate, model)`.
        """
        z: Any = numpyro.sample("z", self.prior)
        return numpyro.deterministic("x", self.given(z).mean)

    def guide(self, data: Array) -> Any:
        """Its guide, for NumPyro's variational inference."""
        with numpyro.plate(PLATE, len(data)):
            return numpyro.sample("z", self.posterior_guess(data))

    def refined(self, data: Array) -> Any:
        """A NumPyro program of the posterior of each z, whose reference is the encoder's guess: q(z | x) w(z) / p(x).

        The weight is the energy factor `refinement`, so that chains can start from the guess (`init="reference"`), SMC
        tempers from it, and log Z is the sum of log p(x) over events, but for log Z of the prior where it is not known.

        Args:
            data: events, shape (num, *event_shape).

        Example:
            >>> target = ebm_ppl.target(ebm_ppl.LatentModel.refined, model, digits[:1])
            >>> data = ebm_ppl.sample(key, target, ebm_ppl.NUTS(), init="reference")
        """
        guess = self.posterior_guess(data)
        with numpyro.plate(PLATE, len(data)):
            z: Any = numpyro.sample("z", guess)
            energy_factor("refinement", guess.log_prob(z) - self.log_joint(data, z), role="loss")

    def log_joint(self, x: Array, z: Array) -> Array:
        """log p(x, z) of each event, in nats, but for log Z of the prior where it is not known."""
        return log_prob(self.given(z), x) + jnp.asarray(self.prior.log_prob(z))

    def joint_energy(self, x: Array, z: Array) -> Array:
        """E(x, z) = -log p(x, z)"""
        return -self.log_joint(x, z)

    def log_weight(self, key: PRNGKey, x: Array) -> Array:
        """log p(x, z) - log q(z | x) of one event at a draw z of the encoder's, whose mean is at most log p(x)."""
        guess = self.posterior_guess(x)
        z = guess.sample(key)
        return self.log_joint(x, z) - guess.log_prob(z)


def _prior_alone(model: LatentModel) -> None:
    numpyro.sample("z", model.prior)


def _require_shape(shape: tuple[int, ...], expected: tuple[int, ...], what: str) -> None:
    if shape != expected:
        raise EnergyShapeError(f"{what} has shape {shape}; expected {expected}.")
