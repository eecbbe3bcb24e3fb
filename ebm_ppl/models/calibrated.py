"""Energy-calibrated generators: draws of a model are moved down an energy, and the model is taught to make what came.

    x_0  =  G(z)                z of the base: the mean of p(x | z) of a `LatentModel`; of a flow its draw T(u)
    x_k  =  x_k-1 - s grad[ E(x) + g_k max(|x - x_0|^2 - slack, 0) ] + sigma e         g_k = 1 - k / K falls to zero
    C    =  mean |x_K - x_0|^2                                   x_K with no gradient
    loss =  (the model's own)  +  l C  +  mean E(data) - mean E(x_K)
    l   <-  l + rate (C - tolerance), within 0 and `largest`     dual ascent: C is to be no more than the tolerance

The model's own loss, a bound of the likelihood, goes from data to latents and back; it never sees what comes of a
latent that no datum is near. The energy does: it lies low at data and high at what the moves made of the model's draws,
and C pulls those after the moves. E learns by the last two terms alone, and the model by the first two. Nothing of it
is needed once the model is trained: its draws are those of `sample`.

The moves are Langevin's at inverse temperature 2 s / sigma^2, few and short, so that x_K stays near x_0; what they draw
is conditional on x_0, and not exp(-E). An energy whose slope has a bound, `SpectralNorm(...)`, keeps them so. Draws of
an encoder are moved likewise, down -log p(x, z), for which no energy is learned, and at an inverse temperature of one,
so that a guess that is the posterior stays as it is:

    z_0 ~ q(z | x)        C = E[log q(z_0 | x) - log q(z_K | x)]        loss = (the model's own) - l E log q(z_K | x)

The authors pull z_0 after z_K by the square of their distance. That is never small, two draws of one posterior being
apart, and the pull makes q narrower than the posterior; by what q says of z_K it learns its width, too.

    y = A x + noise e             an image seen in part, at a lower resolution, or through noise: `restoration`
    z ~ prior exp(-b E(G(z)))     the energy, by `tilted`, tells which draws look like data
    E[x | z, y] =  G + t^2 A' (t^2 A A' + noise^2 I)^-1 (y - A G)         t the scale of p(x | z); A = U S V'

Where the noise goes to zero that is the decomposition of x into the range of A', which y tells, and the null space of
A, which the model fills in: A^+ y + (I - A^+ A) G(z). The authors move one z; here it has a posterior.

In the authors' code the energy is divided by a temperature of 1e-5 and the hinge is not, so that it hardly acts; here
both have the same units. There the weight is of a reconstruction with unit variance, here of the model's own bound.

References:
    Luo, Qiu, Tao, Cai and Tang (2024), Energy-calibrated VAE with test time free lunch; Xiao, Kreis, Kautz and Vahdat
    (2021), VAEBM; Nijkamp, Hill, Zhu and Wu (2019), Learning non-convergent non-persistent short-run MCMC.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from ebm_ppl.models.flow_model import FlowModel
from ebm_ppl.models.latent import LatentModel
from ebm_ppl.models.likelihood import GaussianLikelihood
from ebm_ppl.train.objective import (
    Density,
    Metrics,
    Objective,
    energy_gap,
    parameters_of,
    with_parameters,
    without_gradient,
)
from ebm_ppl.typing import Array, ArrayLike, EnergyError, EnergyShapeError, PRNGKey


class Calibration(eqx.Module):
    """How points are moved down an energy, and how much the model has to follow: see the module docstring.

    Args:
        num: K.
        step_size: s, of the energy's gradient.
        noise: sigma, in units of x.
        slack: of the hinge, in squared units of x.
        tolerance: of C, in its units: squared units of x, or nats for a `CalibratedGuess`.
        weight, rate, largest: of C in the loss: l at first, how fast it follows, and its bound.
    """

    num: int = 15
    step_size: float = 0.05
    noise: float = 1e-3
    slack: float = 0.05
    tolerance: float = 0.05
    weight: float = 10.0
    rate: float = 1e-2
    largest: float = 100.0

    def __check_init__(self):
        if self.num < 1 or not (self.step_size > 0 and self.noise >= 0 and self.slack >= 0 and self.tolerance > 0):
            raise EnergyError(f"num is 1 at least, step_size and tolerance positive, the others not negative: {self}.")
        if not (0 <= self.weight <= self.largest and self.rate > 0):
            raise EnergyError(f"weight lies from 0 to largest, and rate is positive; got {self}.")

    def moved(self, key: PRNGKey, start: Array, slope: Callable[[Array], Array]) -> Array:
        """x_K of each point, shape (num, dim), without a gradient in it.

        Args:
            slope: the gradient of a fixed energy at all points.
        """

        def hinge(x: Array) -> Array:
            return jnp.sum(jnp.maximum(jnp.sum((x - start) ** 2, axis=1) - self.slack, 0.0))

        def move(x: Array, given: tuple[PRNGKey, Array]) -> tuple[Array, None]:
            key, left = given
            noise = self.noise * jax.random.normal(key, x.shape, x.dtype)
            return x - self.step_size * (slope(x) + left * jax.grad(hinge)(x)) + noise, None

        start = jax.lax.stop_gradient(start)
        left = 1 - jnp.arange(1, self.num + 1, dtype=start.dtype) / self.num
        return jax.lax.scan(move, start, (jax.random.split(key, self.num), left))[0]

    def next_weight(self, weight: Array, distance: Array) -> tuple[Array, Metrics]:
        """l after a step, and what the record has of it."""
        distance = jax.lax.stop_gradient(distance)
        rise = self.rate * (distance - self.tolerance)
        return jnp.clip(weight + rise, 0.0, self.largest), {"distance": distance, "weight": weight}


class State(NamedTuple):
    """Of a calibration."""

    weight: Array
    """l"""
    own: Any
    """Of the model's own objective."""


class _Calibrating(Objective):
    """What a calibration adds to an objective of the model's own."""

    objective: Objective
    is_comparable = False

    def check(self, data: Array) -> None:
        self.objective.check(data)

    def preview(self, density: Density, x: Array) -> Array:
        return self.objective.preview(density, x)


class Calibrated(_Calibrating):
    """A generator trained by an objective of its own, and calibrated by an energy that is trained beside it.

    The record has `distance`, C, its `weight`, and the `energy_gap`. A flow had better be one of splines, which hold
    its draws: those of affine couplings may run down the energy faster than that learns to rise before them.

    Args:
        objective: of the model: `EvidenceBound()` of a `vae`, `MaximumLikelihood()` of a `FlowModel`.
        energy: E, of one event of the data: `SpectralNorm(MLPEnergy(...))`, say. Its arrays are the objective's own
            parameters, and `fit` returns those: `objective.trained(fitted.parameters)`.
        calibration: of its draws.

    Reference: Luo et al. (2024).

    Example:
        >>> energy = ebm_ppl.SpectralNorm(ebm_ppl.ConvEnergy(jax.random.key(0), (28, 28)))
        >>> objective = ebm_ppl.Calibrated(ebm_ppl.EvidenceBound(), energy)
        >>> fitted = ebm_ppl.fit(jax.random.key(1), ebm_ppl.vae(key, 16, likelihood), digits, objective)
        >>> fitted.energy.sample(jax.random.key(2), 100), objective.trained(fitted.parameters)
    """

    energy: Any
    calibration: Calibration = Calibration()
    name = "calibrated"
    is_continuous = True

    def preview(self, density: Density, x: Array) -> Array:
        return super().preview(density, x) + self.energy(x.reshape(density.event_shape))

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        own, state = self.objective.init(key, density, data)
        return (own, parameters_of(self.energy)), State(jnp.asarray(self.calibration.weight, data.dtype), state)

    def trained(self, parameters: Any) -> Any:
        """The energy with parameters that `fit` has found."""
        return with_parameters(self.energy, parameters[1])

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        key_own, key_draws, key_moves = jax.random.split(key, 3)
        of_model, (own, told) = self.objective.loss(key_own, density, parameters[0], state.own, batch)
        energy = Density(self.trained(parameters), None, density.event_shape)
        fixed = without_gradient(energy)
        made = _made(density.energy, key_draws, len(batch)).reshape(len(batch), -1)
        slope = jax.vmap(jax.grad(fixed.tilt))
        moved = self.calibration.moved(key_moves, made, slope)
        distance = jnp.mean(jnp.sum((made - moved) ** 2, axis=1))
        weight, of_moves = self.calibration.next_weight(state.weight, distance)
        of_energy, gap = energy_gap(energy, batch, moved)
        total = of_model + state.weight * distance + of_energy
        return total, (State(weight, own), told | of_moves | {"energy_gap": gap})


def _made(model: Any, key: PRNGKey, num: int) -> Array:
    """What the model makes of draws of its base, as a function of its parameters."""
    if isinstance(model, FlowModel):
        return model.sample(key, num)
    if not isinstance(model, LatentModel) or model.energy is not None:
        raise EnergyError(
            "Calibrated trains a LatentModel whose prior has no energy, vae(...), say, or a FlowModel: "
            f"got {type(model).__name__}."
        )
    return model.given(model.base.sample(key, (num,))).mean  # pyright: ignore


class CalibratedGuess(_Calibrating):
    """A VAE whose encoder follows its draws to where Langevin moves take them, nearer to the posterior of the latents.

    The record has `distance`, C in nats, which is zero where the encoder's guess is the posterior, and its `weight`.

    Args:
        objective: of the model: `EvidenceBound()`.
        calibration: of the latents: lengths in their units, the tolerance in nats. With noise sqrt(2 step_size) and no
            hinge, which is slack without end, the moves are Langevin's own at an inverse temperature of one.

    Reference: Luo et al. (2024), but for the pull: see the module docstring.

    Example:
        >>> objective = ebm_ppl.CalibratedGuess(ebm_ppl.EvidenceBound())
        >>> fitted = ebm_ppl.fit(jax.random.key(1), ebm_ppl.vae(key, 16, likelihood), digits, objective)
    """

    calibration: Calibration = Calibration(
        step_size=0.003, noise=0.006**0.5, slack=float("inf"), tolerance=0.5, weight=1.0
    )
    name = "calibrated guess"

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        own, state = self.objective.init(key, density, data)
        return own, State(jnp.asarray(self.calibration.weight, data.dtype), state)

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        key_own, key_draws, key_moves = jax.random.split(key, 3)
        of_model, (own, told) = self.objective.loss(key_own, density, parameters, state.own, batch)
        model: Any = density.energy
        fixed, x = without_gradient(model), batch.reshape(-1, *density.event_shape)
        guess = model.posterior_guess(x)
        start = jax.lax.stop_gradient(guess.sample(key_draws))
        moved = self.calibration.moved(key_moves, start, jax.grad(lambda z: jnp.sum(fixed.joint_energy(x, z))))
        after = jnp.mean(guess.log_prob(jax.lax.stop_gradient(moved)))
        distance = jnp.mean(guess.log_prob(start)) - after
        weight, of_moves = self.calibration.next_weight(state.weight, distance)
        return of_model - state.weight * after, (State(weight, own), told | of_moves)


class LinearOperator(eqx.Module):
    """`A x` of a flat event x, by the singular values of A, which are found once.

    Args:
        matrix: A, shape (num, dim), with no more rows than columns: rows of the identity for what is seen of an image,
            rows of means for a lower resolution, the identity for noise alone.

    Raises:
        EnergyShapeError: for another shape.
    """

    left: Array
    """(num, num)"""
    values: Array
    """(num,)"""
    right: Array
    """(num, dim)"""

    def __init__(self, matrix: ArrayLike):
        matrix = np.asarray(matrix, jnp.result_type(float))
        if matrix.ndim != 2 or len(matrix) > matrix.shape[1]:
            raise EnergyShapeError(
                f"The operator's matrix has shape {matrix.shape}; expected (num, dim) with no more rows than columns."
            )
        self.left, self.values, self.right = map(jnp.asarray, np.linalg.svd(matrix, full_matrices=False))

    def __call__(self, x: Array) -> Array:
        return self.left @ (self.values * (self.right @ x.ravel()))


def restoration(model: LatentModel, operator: LinearOperator, observed: Array, noise: float) -> None:
    """A NumPyro program of an event of which `observed = A x + noise e` is known; sites `z`, `x`, and U' y as `y`.

    Nothing is trained for the operator. Under `ebm_ppl.sample` the posterior of `x` is that of the restored event: its
    mean for each draw of z, so that what the noise of p(x | z) adds to its spread is left out.

    Args:
        model: with a `GaussianLikelihood` of one scale. With `tilted(model, lambda x: -beta * energy(x))` in its place
            the energy of `Calibrated`, `objective.trained(fitted.parameters)`, has its say.
        operator: A.
        observed: y, shape (num,).
        noise: standard deviation, in units of y; small for what is known exactly.

    Raises:
        EnergyError: for a model with another likelihood, or a noise that is not positive.
        EnergyShapeError: where operator, observed and events do not fit together.

    References: Luo et al. (2024); Wang, Yu and Zhang (2023), Zero-shot image restoration using denoising diffusion
    null-space model.

    Example:
        >>> upper_half = ebm_ppl.LinearOperator(jnp.eye(784)[:392])
        >>> target = ebm_ppl.target(ebm_ppl.restoration, model, upper_half, upper_half(digit), 0.01)
        >>> restored = ebm_ppl.sample(key, target)["posterior"]["x"].mean(("chain", "draw"))
    """
    likelihood = model.likelihood
    if not isinstance(likelihood, GaussianLikelihood) or likelihood.scale.shape or not noise > 0:
        raise EnergyError(
            "restoration takes a model with a GaussianLikelihood of one scale, and a positive noise; got "
            f"{type(likelihood).__name__} and {noise}."
        )
    shape = len(operator.values), likelihood.num_outputs
    if operator.right.shape != shape or observed.shape != shape[:1]:
        raise EnergyShapeError(
            f"The operator takes {operator.right.shape[1]} numbers to {shape[0]}, observed has shape {observed.shape}, "
            f"and events have shape {model.event_shape}."
        )
    z: Any = numpyro.sample("z", model.prior)
    mean, variance = model.given(z).mean.ravel(), likelihood.scale**2
    along, turned = operator.values * (operator.right @ mean), operator.left.T @ observed
    spread = variance * operator.values**2 + noise**2
    numpyro.sample("y", dist.Normal(along, jnp.sqrt(spread)).to_event(1), obs=turned)
    x = mean + operator.right.T @ (variance * operator.values / spread * (turned - along))
    numpyro.deterministic("x", x.reshape(model.event_shape))
