"""A generator trained against a critic: a `LatentModel` by an objective that brings the critic.

    x = G(z), z ~ base                 the mean of p(x | z), without its noise; y of the data
    d(x)                               the critic, one number

    logistic       critic       E log(1 + exp(-d(y))) + E log(1 + exp(d(x)))     + penalty / 2 E |grad d(y)|^2
                   generator    E log(1 + exp(-d(x)))
    Wasserstein    critic       E d(x) - E d(y)                                  + penalty E (|grad d(w)| - 1)^2
                   generator    -E d(x)                                          w between x and y

Both are lowered at once, each in the parameters of its own player alone. The best critic of the logistic game is the
log density ratio of data to generator; that of the other measures distance, on a scale of its own. Either makes the
generator an energy-based model: `tilt.py`.

The noise of p(x | z) has no part in the game, and stays as it is: a model whose noise is small and fixed,
`GaussianLikelihood(shape, scale=.01, is_learned=False)`, is what is called a generator elsewhere.

References:
    Goodfellow, Pouget-Abadie, Mirza, Xu, Warde-Farley, Ozair, Courville and Bengio (2014), Generative adversarial nets;
    Arjovsky, Chintala and Bottou (2017), Wasserstein GAN; Gulrajani, Ahmed, Arjovsky, Dumoulin and Courville (2017),
    Improved training of Wasserstein GANs; Mescheder, Geiger and Nowozin (2018), Which training methods for GANs do
    actually converge?; Heusel, Ramsauer, Unterthiner, Nessler and Hochreiter (2017), GANs trained by a two time-scale
    update rule converge to a local Nash equilibrium.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ebm_ppl.models.latent import LatentModel
from ebm_ppl.train.objective import Density, Metrics, Objective, parameters_of, with_parameters, without_gradient
from ebm_ppl.typing import Array, EnergyError, EnergyShapeError, PRNGKey


class Game(Objective):
    """A critic and a generator: what `LogisticGAN` and `WassersteinGAN` have in common.

    Both take a step of the same optimiser at a time. `optax.multi_transform` gives each its own, with labels
    `("generator", "critic")`; momentum does them no good. `optax.MultiSteps` lets a generator wait for several steps of
    the critic, and `optax.set_to_zero` for ever, so that the critic comes to what is best against it.
    """

    critic: Callable[[Array], Array]
    penalty: float
    is_comparable = False

    def __check_init__(self):
        if not self.penalty >= 0:
            raise EnergyError(f"penalty is not negative; got {self.penalty}.")

    def preview(self, density: Density, x: Array) -> Array:
        value = jnp.asarray(self.critic(x.reshape(density.event_shape)))
        if value.shape != ():
            raise EnergyShapeError(f"The critic gives shape {value.shape} for one event; expected one number.")
        return value

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        model: Any = density.energy
        if not isinstance(model, LatentModel) or model.energy is not None or density.base is not None:
            raise EnergyError(
                f"{type(self).__name__} trains a LatentModel whose base is its own, and not tilted: "
                f"got {type(model).__name__} with base={density.base}."
            )
        if model.event_shape != density.event_shape:
            raise EnergyShapeError(f"The model makes events of {model.event_shape}, data have {density.event_shape}.")
        if not jnp.all(jnp.isfinite(_generated(key, model, data[:1]))):
            raise EnergyError(
                f"{type(model.likelihood).__name__} has no finite mean, and a generator makes the mean of p(x | z)."
            )
        return parameters_of(self.critic), ()

    def trained(self, parameters: Any) -> Any:
        """The critic with parameters that `fit` has found."""
        return with_parameters(self.critic, parameters)

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        key_latent, key_between = jax.random.split(key)
        model: Any = density.energy
        data, drawn = batch.reshape(-1, *density.event_shape), _generated(key_latent, model, batch)
        critic = self.trained(parameters)
        values = jax.vmap(critic)(jnp.concatenate([data, without_gradient(drawn)]))
        of_critic, metrics = self.of_critic(values[: len(data)], values[len(data) :])
        of_generator = self.of_generator(jax.vmap(without_gradient(critic))(drawn))
        if self.penalty:
            penalty = self.restraint(key_between, jax.grad(critic), data, without_gradient(drawn))
            of_critic, metrics = of_critic + self.penalty * penalty, metrics | {"penalty": penalty}
        return of_critic + of_generator, (state, metrics)

    def of_critic(self, of_data: Array, of_drawn: Array) -> tuple[Array, Metrics]:
        """What the critic lowers, by its values at data and at draws, without the penalty."""
        raise NotImplementedError

    def of_generator(self, of_drawn: Array) -> Array:
        """What the generator lowers."""
        raise NotImplementedError

    def restraint(self, key: PRNGKey, slope: Callable[[Array], Array], data: Array, drawn: Array) -> Array:
        """What the penalty is a multiple of, by the gradient of the critic."""
        raise NotImplementedError


class LogisticGAN(Game):
    """The game of Goodfellow et al. (2014), with their non-saturating loss of the generator.

    The record has `divergence`, the critic's lower bound of that of Jensen and Shannon in nats, from 0 to log 2, and
    `penalty`.

    Args:
        critic: d, a callable on one event that is a pytree with floating-point arrays; logits, without a sigmoid. Its
            arrays are the objective's own parameters: `objective.trained(fitted.parameters)`.
        penalty: of the critic's squared slope at the data, without which the game may go round in circles, and with
            which d is less steep than the log density ratio.

    References: Goodfellow et al. (2014); Mescheder et al. (2018).

    Example:
        >>> objective = ebm_ppl.LogisticGAN(eqx.nn.MLP(2, "scalar", 128, 2, jax.nn.silu, key=key), penalty=0.1)
        >>> rates = {"generator": optax.adam(2e-4, b1=0.0), "critic": optax.adam(1e-3, b1=0.0)}
        >>> optimiser = optax.multi_transform(rates, ("generator", "critic"))
        >>> fitted = ebm_ppl.fit(key, model, data, objective, optimiser=optimiser)
        >>> better = ebm_ppl.tilted(fitted.energy, objective.trained(fitted.parameters))
    """

    penalty: float = 0.0
    name = "logistic game"

    def of_critic(self, of_data: Array, of_drawn: Array) -> tuple[Array, Metrics]:
        value = jnp.mean(jax.nn.softplus(-of_data)) + jnp.mean(jax.nn.softplus(of_drawn))
        return value, {"divergence": math.log(2) - value / 2}

    def of_generator(self, of_drawn: Array) -> Array:
        return jnp.mean(jax.nn.softplus(-of_drawn))

    def restraint(self, key: PRNGKey, slope: Callable[[Array], Array], data: Array, drawn: Array) -> Array:
        return jnp.mean(jax.vmap(lambda x: jnp.sum(slope(x) ** 2))(data)) / 2


class WassersteinGAN(Game):
    """The game for Wasserstein's distance, whose critics have a slope of one by a penalty.

    The record has `distance`, the critic's estimate of that distance, in units of the data, and `penalty`.

    Args:
        critic: d, a callable on one event that is a pytree with floating-point arrays. Its arrays are the objective's
            own parameters: `objective.trained(fitted.parameters)`. `calibrated` makes a log density ratio of it.
        penalty: of squared deviations of the slope from one, at points between data and draws.

    References: Arjovsky et al. (2017); Gulrajani et al. (2017), who give the critic five steps for each of the
    generator's: `optax.MultiSteps(optax.adam(1e-4, b1=0.0), 5)`.
    """

    penalty: float = 10.0
    name = "Wasserstein game"

    def of_critic(self, of_data: Array, of_drawn: Array) -> tuple[Array, Metrics]:
        distance = jnp.mean(of_data) - jnp.mean(of_drawn)
        return -distance, {"distance": distance}

    def of_generator(self, of_drawn: Array) -> Array:
        return -jnp.mean(of_drawn)

    def restraint(self, key: PRNGKey, slope: Callable[[Array], Array], data: Array, drawn: Array) -> Array:
        def of_pair(share: Array, x: Array, y: Array) -> Array:
            # The norm of no slope has a gradient, too.
            return (optax.safe_norm(slope(share * x + (1 - share) * y), 1e-12) - 1) ** 2

        return jnp.mean(jax.vmap(of_pair)(jax.random.uniform(key, (len(data),), data.dtype), data, drawn))


def _generated(key: PRNGKey, model: LatentModel, batch: Array) -> Array:
    """As many draws G(z) as there are points in a batch, shape (batch, *event_shape)."""
    z: Any = model.base.sample(key, (len(batch),))
    return model.given(z).mean.astype(batch.dtype)
