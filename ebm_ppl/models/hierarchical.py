"""Layers of latents, each given those above it, and a prior of them all as a chain of energies.

    z_L = u_L,   z_l = m_l(z_>l) + s_l(z_>l) u_l       u ~ N(0, I)            `LayeredDecoder.latents`
    p(x | u) = likelihood(decoder(z_L, ..., z_1))                             a `LatentModel` of u
    q(u | x) = prod_l N(u_l; m(h, u_>l), s(h, u_>l)),  h = network(x)         `LayeredEncoder`, from the top down

In z the prior of a layer has another scale wherever those above it lie; in u, which is z in other coordinates, it is
standard normal throughout, and that is the space where the rest is done. `hierarchical_vae` is trained first, as any
VAE is. Draws of its encoder, which leave holes in N(0, I), are then what a noise-conditional energy is trained on,

    u_k = u + noise,   p(u_k | u_k+1) ~ exp(-V(u_k, sigma_k)) N(u_k+1; u_k, d_k^2)       `RecoveryLikelihood`
    p(u) = N(u; 0, I) exp(-U(u)) / Z,   U(u) = V(u, sigma_0) - |u|^2 / 2                 `DiffusionPrior`

each conditional density by a few Langevin moves. They start from what it would be if the prior were N(0, I)
(`moves_from="reference"`), which is near, so that steps may be wide and few: all of u in one step would be a latent EBM
prior that is learned by short runs. They are adjusted, MALA: with unadjusted ones the energy learns to make up for
their bias, and what it is then is no density of the latents.

`DiffusionPrior.draw_tilted` walks the chain down. `DiffusionPrior` itself is the energy of u, of which NumPyro, SMC and
`log_z` make what they make of any. Both are the same as far as training has made them so. Training of conditionals
alone does not, see `train/recovery.py`: `marginal=PersistentContrastiveDivergence(...)` belongs with it here.

What is followed: of Cui and Han (2024) the abstract, the introduction and summaries of the method were at hand, of
their code nothing. Theirs preserves the variance of the noise, which is the same up to a scale of each level, sees z
where the network here sees u, moves without adjustment, and is not said to start elsewhere than at the noisy point, or
to train its energy as a density by itself.

References:
    Cui and Han (2024), Learning latent space hierarchical EBM diffusion models; Cui, Wu and Han (2023), Learning joint
    latent space EBM prior model for multi-layer generator; Pang, Han, Nijkamp, Zhu and Wu (2020), Learning latent space
    energy-based prior model; Sonderby, Raiko, Maaloe, Sonderby and Winther (2016), Ladder variational autoencoders;
    Gao, Song, Poole, Wu and Kingma (2021), Learning energy-based models by diffusion recovery likelihood.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.stats import norm
from numpyro.distributions import constraints

from ebm_ppl.distribution import WRAPPERS, Static
from ebm_ppl.energy import Energy
from ebm_ppl.flow_distribution import MomentsOfDraws
from ebm_ppl.kernels import MALA
from ebm_ppl.models.latent import LatentModel
from ebm_ppl.models.likelihood import Likelihood
from ebm_ppl.noise import NoiseConditionalEnergy
from ebm_ppl.train.recovery import recover
from ebm_ppl.train.walkers import Dynamics
from ebm_ppl.typing import Array, EnergyError, PRNGKey

MOVES = Dynamics(MALA(), 20, 0.5)
"""At each level."""


def hierarchical_vae(
    key: PRNGKey,
    latent_dims: Sequence[int],
    likelihood: Likelihood,
    *,
    width: int = 256,
    depth: int = 2,
    activation: Callable[[Array], Array] = jax.nn.silu,
) -> LatentModel:
    """A variational autoencoder of several layers of latents, not trained yet.

    Args:
        key: draws the weights.
        latent_dims: of each layer, from the top down; their coordinates u stand in this order, in one vector.
        likelihood: `BernoulliLikelihood(event_shape)`, `GaussianLikelihood(...)` or `CategoricalLikelihood(...)`.
        width, depth: of the hidden layers of the encoder's network and of the decoder; what is between layers of
            latents has one, of half the width.
        activation: smooth function.

    Raises:
        EnergyError: for no layers, or one without latents, or no depth.

    References: Sonderby et al. (2016); Cui and Han (2024).

    Example:
        >>> model = ebm_ppl.hierarchical_vae(jax.random.key(0), (8, 16), ebm_ppl.BernoulliLikelihood((28, 28)))
        >>> model = ebm_ppl.fit(jax.random.key(1), model, digits, ebm_ppl.EvidenceBound()).energy
        >>> top, bottom = model.decoder.latents(model.base.sample(jax.random.key(2)))
    """
    if not latent_dims or min(latent_dims) < 1 or depth < 1:
        raise EnergyError(
            f"latent_dims has a positive number for each layer, from the top down, and depth is 1 at least; got "
            f"{latent_dims} and {depth}."
        )
    total, above = sum(latent_dims), [0, *itertools.accumulate(latent_dims)][:-1]
    key_decoder, key_encoder, key_steps, key_heads = jax.random.split(key, 4)

    def between(key: PRNGKey, num_seen: Sequence[int]) -> tuple[eqx.nn.MLP, ...]:
        """From what is seen of an event and of the layers above to the mean and the scale of a layer."""
        keys = jax.random.split(key, len(num_seen))
        sizes = zip(keys, num_seen, latent_dims[-len(num_seen) :], strict=True)
        return tuple(eqx.nn.MLP(seen, 2 * dim, width // 2, 1, activation, key=key) for key, seen, dim in sizes)

    steps = between(key_steps, above[1:]) if len(above) > 1 else ()
    decoder = LayeredDecoder(
        steps, eqx.nn.MLP(total, likelihood.num_outputs, width, depth, activation, key=key_decoder)
    )
    network = eqx.nn.MLP(
        math.prod(likelihood.event_shape), width, width, depth - 1, activation, activation, key=key_encoder
    )
    encoder = LayeredEncoder(network, between(key_heads, [width + num for num in above]))
    return LatentModel(total, decoder, likelihood, encoder=encoder)


class LayeredDecoder(eqx.Module):
    """What a point u, shape (latent_dim,), says of an event: see the module docstring.

    Args:
        steps: for each layer but the top one, from all above it to its mean and, before softplus, its scale.
        network: from all layers to the likelihood's outputs.
    """

    steps: tuple[eqx.nn.MLP, ...]
    network: eqx.nn.MLP

    def latents(self, u: Array) -> tuple[Array, ...]:
        """z_L, ..., z_1: the latents of each layer, from the top down."""
        layers = [u[: len(u) - sum(_size(step) for step in self.steps)]]
        for step in self.steps:
            above = jnp.concatenate(layers)
            mean, scale = _moments(step, above)
            layers.append(mean + scale * u[len(above) : len(above) + len(mean)])
        return tuple(layers)

    def __call__(self, u: Array) -> Array:
        return self.network(jnp.concatenate(self.latents(u)))


class LayeredEncoder(eqx.Module):
    """Guesses of u from an event, each layer given those above it.

    Args:
        network: from a flat event to what all layers are guessed by, h.
        heads: for each layer, from h and the layers of u above to its mean and, before softplus, its scale.
    """

    network: eqx.nn.MLP
    heads: tuple[eqx.nn.MLP, ...]

    def __call__(self, x: Array) -> Array:
        """h of one event."""
        return self.network(jnp.ravel(x))

    def guess(self, outputs: Array) -> LayeredGuess:
        """q(u | x), whose batch is that of h."""
        return LayeredGuess(self.heads, outputs)


class LayeredGuess(MomentsOfDraws):
    """Normal distributions of layers of latents, each given those above it.

    Its mean and variance, of which diagnostics and starts make use, are of 256 draws.

    Args:
        heads: for each layer, from h and the layers above to its mean and, before softplus, its scale.
        features: h, shape (*batch, width).
    """

    pytree_data_fields = ("_arrays", "features")
    pytree_aux_fields = ("_static",)

    def __init__(self, heads: tuple[eqx.nn.MLP, ...], features: Array, *, validate_args: bool | None = None):
        self._arrays, static = eqx.partition(heads, eqx.is_array)
        self._static, self.features = Static(static), features
        super().__init__(jnp.shape(features)[:-1], (sum(map(_size, heads)),), validate_args=validate_args)

    @property
    def support(self) -> Any:
        return constraints.real_vector

    @property
    def heads(self) -> tuple[eqx.nn.MLP, ...]:
        return eqx.combine(self._arrays, self._static.tree)

    def sample(self, key: PRNGKey | None, sample_shape: tuple[int, ...] = ()) -> Array:
        assert key is not None
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)

        def one(h: Array, noise: Array) -> Array:
            u = noise[:0]
            for head in self.heads:
                mean, scale = _moments(head, h, u)
                u = jnp.append(u, mean + scale * noise[len(u) : len(u) + len(mean)])
            return u

        noise = jax.random.normal(key, shape, self.features.dtype)
        return jnp.vectorize(one, signature="(h),(u)->(u)")(self.features, noise)

    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        def one(h: Array, u: Array) -> Array:
            starts = [0, *itertools.accumulate(map(_size, self.heads))][:-1]
            layers = [_moments(head, h, u[:start]) for head, start in zip(self.heads, starts, strict=True)]
            mean, scale = (jnp.concatenate(each) for each in zip(*layers, strict=True))
            return jnp.sum(norm.logpdf(u, mean, scale))

        return jnp.vectorize(one, signature="(h),(u)->()")(self.features, value)


def _size(layer: eqx.nn.MLP) -> int:
    """Latents of the layer whose mean and scale a network makes."""
    return int(layer.out_size) // 2


def _moments(layer: eqx.nn.MLP, *seen: Array) -> tuple[Array, Array]:
    """Mean and scale of a layer. Scales grow no faster than what a network makes: walkers may come from far away."""
    mean, raw = jnp.split(layer(jnp.concatenate(seen)), 2)
    return mean, jax.nn.softplus(raw + math.log(math.e - 1))  # one at zero


class DiffusionPrior(Energy):
    """An energy of latents, relative to N(0, I), with the chain of noise by which they are drawn.

    `model.with_prior(DiffusionPrior(...))` has it as its prior: a density to SMC and to Markov chains, and drawn by the
    chain of noise in `sample`, in `sample_latents`, and where NumPyro draws from the prior itself. Draws are as good as
    the moves and the training: `latent_diagnostics` tells.

    Args:
        conditional: noise-conditional, as `fit` returns it from `RecoveryLikelihood(...)`.
        dynamics, moves_from: of each step, as it was trained, with the step size that it came to.

    Reference: Cui and Han (2024).

    Example:
        >>> z = model.posterior_guess(digits).sample(jax.random.key(0))
        >>> levels = 0.1, 0.5, 1.5, 4.0
        >>> energy = ebm_ppl.NoiseConditionalEnergy(jax.random.key(1), model.latent_dim, levels, width=128)
        >>> moves, walk = ebm_ppl.Dynamics(ebm_ppl.MALA(), 20, 0.5), ebm_ppl.Dynamics(ebm_ppl.MALA(), 8)
        >>> walkers = ebm_ppl.PersistentContrastiveDivergence(dynamics=walk)
        >>> objective = ebm_ppl.RecoveryLikelihood(levels, moves, moves_from="reference", marginal=walkers)
        >>> fitted = ebm_ppl.fit(jax.random.key(2), energy, z, objective)
        >>> moves = dataclasses.replace(moves, step_size=float(fitted.state.step_size))
        >>> model = model.with_prior(ebm_ppl.DiffusionPrior(fitted.energy, moves))
        >>> digits = model.sample(jax.random.key(3), 100)
    """

    conditional: NoiseConditionalEnergy
    dynamics: Dynamics = MOVES
    moves_from: Literal["noisy", "reference"] = eqx.field(static=True, default="reference")

    def __call__(self, x: Array) -> Array:
        return self.conditional(x) - x @ x / 2

    def check_base(self, base: Any) -> None:
        """Refuses a base that is not N(0, I), where its parameters are known."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(base)):
            return
        kind: Any = base
        while isinstance(kind, WRAPPERS):
            kind = kind.base_dist
        # By NumPy: inside a trace JAX would trace the comparison of what is known, too.
        is_normal = isinstance(kind, dist.Normal)
        if not (is_normal and np.all(np.asarray(kind.loc) == 0) and np.all(np.asarray(kind.scale) == 1)):
            raise EnergyError(
                f"DiffusionPrior is an energy relative to N(0, I), and the base here is {base}: use "
                "EnergyDistribution(energy, base) with an energy that was trained with that base."
            )

    def draw_tilted(self, key: PRNGKey, num: int) -> Array:
        """Draws of the chain walked down, shape (num, dim)."""
        energy = self.conditional
        start, how = energy.reference(energy.levels[-1]), {"dynamics": self.dynamics, "moves_from": self.moves_from}
        return recover(key, energy, energy.levels, start, num=num, **how)
