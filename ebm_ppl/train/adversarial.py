"""Maximum likelihood against a generator, whose draws are the negatives: the variational form of log Z.

    log Z >= E_q[-V(x)] + H(q)           equal where q = p; the difference is KL(q || p)
    the energy     descends              mean V(data) - mean V(x)         x ~ q with no gradient
    the generator  ascends               mean of -V(x) + h(x)             V with no gradient in its parameters

`h` is a number whose mean is the entropy of q, or a lower bound of it:

    flow           h = -log q(x)                                               exact
    implicit       x = g(z) + s e,   h = H(z) + H(x | z) + log r(z | x)          r a normal encoder; exact for the true
                                                                               posterior of z

So the record has log Z from below, `log_z_lower`, and the log-likelihood of the batch from above,
`log_likelihood_upper`: the truth lies below it, and how far nobody says, since a generator that leaves out modes of the
model has lost little of its bound. `ebm_ppl.log_z` of the result says what log Z is. The slack is not harmless: the
energy is trained against draws of q, not of p, and one that learns faster than its generator follows runs away.

References:
    Dai, Liu, Dai, He, Gretton, Song and Schuurmans (2019), Exponential family estimation via adversarial dynamics
    embedding; Grathwohl, Kelly, Hashemi, Norouzi, Swersky and Duvenaud (2021), No MCMC for me: Amortized sampling for
    fast and stable training of energy-based models; Agakov and Barber (2004), An auxiliary variational method.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from paramax import unwrap

from ebm_ppl.train.objective import (
    Density,
    Metrics,
    Objective,
    energy_gap,
    parameters_of,
    with_parameters,
    without_gradient,
)
from ebm_ppl.typing import Array, EnergyError, EnergyShapeError, PRNGKey

ENTROPY = 0.5 * math.log(2 * math.pi * math.e)
"""Of a standard normal number, in nats."""


class FlowGenerator(eqx.Module):
    """A normalising flow of flowjax, whose entropy is known.

    Draws and their log density are both taken, so that a flow is fast here whose two directions are: a coupling flow.

    Args:
        flow: a flowjax distribution of flat points, shape (dim,).

    Reference: Roeder, Wu and Duvenaud (2017), Sticking the landing, whose gradient has no noise where q is p.

    Example:
        >>> from flowjax.flows import coupling_flow
        >>> flow = coupling_flow(jax.random.key(0), base_dist=flowjax.distributions.Normal(jnp.zeros(2)), invert=False)
        >>> objective = ebm_ppl.Adversarial(ebm_ppl.FlowGenerator(flow))
    """

    flow: Any

    def draw(self, key: PRNGKey) -> tuple[Array, Array]:
        """A point, shape (dim,), and a number whose mean is the entropy."""
        x = unwrap(self.flow).sample(key)
        # The gradient in the parameters by way of log q alone has mean zero.
        return x, -unwrap(without_gradient(self.flow)).log_prob(x)


class ImplicitGenerator(eqx.Module):
    """`x = g(z) + s e` with networks g, and an encoder `r(z | x)` that bounds its entropy from below.

    Args:
        key: draws the weights.
        dim: length of a flat point.
        latent_dim: of z; that of x where None.
        width: units in each hidden layer of both networks.
        depth: number of hidden layers.
        noise: s to start with, in units of the data; trained, one for each coordinate.

    References: Grathwohl et al. (2021); Agakov and Barber (2004).
    """

    network: eqx.nn.MLP
    encoder: eqx.nn.MLP
    log_noise: Array

    def __init__(
        self,
        key: PRNGKey,
        dim: int,
        latent_dim: int | None = None,
        width: int = 64,
        depth: int = 2,
        noise: float = 0.3,
    ):
        if not noise > 0:
            raise EnergyError(f"noise is a positive standard deviation; got {noise}.")
        key_network, key_encoder = jax.random.split(key)
        latent_dim = dim if latent_dim is None else latent_dim
        self.network = eqx.nn.MLP(latent_dim, dim, width, depth, jax.nn.silu, key=key_network)
        self.encoder = eqx.nn.MLP(dim, 2 * latent_dim, width, depth, jax.nn.silu, key=key_encoder)
        self.log_noise = jnp.full(dim, math.log(noise))

    def draw(self, key: PRNGKey) -> tuple[Array, Array]:
        """A point, shape (dim,), and a number whose mean is at most the entropy."""
        key_latent, key_noise = jax.random.split(key)
        z = jax.random.normal(key_latent, (self.network.in_size,), self.log_noise.dtype)  # pyright: ignore
        e = jax.random.normal(key_noise, self.log_noise.shape, self.log_noise.dtype)
        x = self.network(z) + jnp.exp(self.log_noise) * e
        mean, log_scale = jnp.split(self.encoder(x), 2)
        of_encoder = jnp.sum(norm.logpdf(z, mean, jnp.exp(log_scale)))
        return x, ENTROPY * (len(z) + len(x)) + jnp.sum(self.log_noise) + of_encoder


class Adversarial(Objective):
    """Maximum likelihood whose negatives are draws of a generator that is trained beside the energy.

    Both take a step of the same optimiser at a time. `optax.multi_transform` gives each its own, with labels
    `("energy", "generator")`; the generator is the one to be fast.

    Args:
        generator: `FlowGenerator(...)`, `ImplicitGenerator(...)`, or a module with
            `draw(key) -> point of shape (dim,), number whose mean is at most the entropy`. Its arrays are the
            objective's own parameters, and `fit` returns those: `objective.trained(fitted.parameters)`.
        ratio: draws of the generator for each point of data.

    References: Dai et al. (2019); Grathwohl et al. (2021).
    """

    generator: Any
    ratio: int = 1
    name = "adversarial"
    is_comparable = False
    is_continuous = True

    def __check_init__(self):
        if self.ratio < 1:
            raise EnergyError(f"ratio is a number of draws, at least 1; got {self.ratio}.")

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        drawn, entropy = eqx.filter_eval_shape(self.generator.draw, key)
        if drawn.shape != data.shape[1:] or entropy.shape != ():
            raise EnergyShapeError(
                f"The generator draws a point of shape {drawn.shape} with an entropy of shape {entropy.shape}; "
                f"expected {data.shape[1:]} and one number."
            )
        return parameters_of(self.generator), ()

    def trained(self, parameters: Any) -> Any:
        """The generator with parameters that `fit` has found."""
        return with_parameters(self.generator, parameters)

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        drawn, entropies = jax.vmap(self.trained(parameters).draw)(jax.random.split(key, self.ratio * len(batch)))
        of_energy, gap = energy_gap(density, batch, drawn)
        fixed = without_gradient(density)
        entropy = jnp.mean(entropies)
        log_z_lower = entropy - jnp.mean(jax.vmap(fixed.total)(drawn))
        metrics = {
            "energy_gap": gap,
            "entropy": entropy,
            "log_z_lower": log_z_lower,
            "log_likelihood_upper": -jnp.mean(jax.vmap(fixed.total)(batch)) - log_z_lower,
        }
        return of_energy - log_z_lower, (state, metrics)
