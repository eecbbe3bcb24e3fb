"""What a target looks like as a density: a normalising flow, trained on a cloud of points and on the target itself.

    z = m + F T(x)      x_i ~ t_nu, independent             `FlowDensity.place`, `.sample`, `.from_cube`
    log q(z) = log t(x) - log |T'(x)| - log |F|             `FlowDensity.log_density`
    q = (1 - share) flow + share guard                      `rebase.Blend`

m and F are mean and scale of the cloud. T is trained twice, by flowjax: to make the cloud likely, and then to look like
the target p on draws of its own,

    max_T  mean_i log q(z_i)        min_T  E_q[log q(z) - log p(z)]      z = m + F T(x)

The first starts it near all that the cloud has seen; the second has gradients of p, and draws without end. Its gradient
goes through z alone (Roeder et al.), and so has no noise where q is p. That takes both directions of T at each step, as
importance sampling does: z from x, and log q at that z and at the draws of the guard. Hence coupling layers, whose two
directions cost the same, where an autoregressive layer runs its network `dim` times in one of them. Each shifts and
scales half of the coordinates, given the others. T is smooth: what fills the cube evenly fills q evenly.

The second looks for no mode that the first has not seen. What the flow misses, the guard covers: weights are no larger
than the guard's, over its share. Tails are those of a Student t distribution, since a flow of normal ones claims little
there, and the error bar cannot know of the large weights that no draw has shown yet.

References:
    Dinh, Sohl-Dickstein and Bengio (2017), Density estimation using Real NVP; Roeder, Wu and Duvenaud (2017), Sticking
    the landing; Gao, Isaacson and Krause (2020), i-flow: High-dimensional integration and sampling with normalizing
    flows; Hesterberg (1995), Weighted average importance sampling and defensive mixture distributions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.stats import t as student
from scipy.special import stdtrit

from ebm_ppl import parallel
from ebm_ppl.scale import DenseScale, location_and_scale
from ebm_ppl.target import Tilted, log_joint
from ebm_ppl.typing import Array, EnergyError, PRNGKey

DEGREES = 10.0
"""Of freedom, nu."""
BATCH = 64
"""Draws of a step, each of them an evaluation of the target."""
POINTS = 256
"""Points of a step of maximum likelihood."""
EPOCHS, PATIENCE = 30, 4
"""Passes over the points at most, and without a gain on those held out."""
RATE = 3e-3
"""Learning rate, at the start."""
LARGEST_GRADIENT = 10.0
"""Norm at which a gradient is cut off: a draw that fell off a cliff is not to end the training."""
STEEPEST = 1e6
"""At which the slope of a draw is cut off, for the same reason: the square of a larger one may overflow."""
MOST_FAULTS = 1_000_000
"""Steps without a finite gradient that are left out: all."""


@dataclasses.dataclass(frozen=True)
class Flow:
    """A normalising flow of coupling layers, as the proposal of a `FittedReference`.

    Args:
        num_layers: coupling layers; enough that each coordinate is likely to be moved given each other.
        width: of the one hidden layer of the network in each.
        num_steps: steps of training on the target, of `BATCH` evaluations of the log density and its gradient each;
            0 leaves the flow as the cloud made it.
    """

    num_layers: int = 8
    width: int = 64
    num_steps: int = 1000

    def __post_init__(self):
        if self.num_layers < 1 or self.width < 1 or self.num_steps < 0:
            raise EnergyError(f"num_layers and width are 1 at least, num_steps is not negative; got {self}.")


class FlowDensity(eqx.Module):
    """The density of a trained flow; methods take one point."""

    mean: Array
    scale: DenseScale
    bijection: Any
    """T, one of flowjax."""

    def sample(self, key: PRNGKey) -> Array:
        """One draw, shape (dim,)."""
        return self.place(jax.random.t(key, DEGREES, self.mean.shape, self.mean.dtype))

    def place(self, x: Array) -> Array:
        """z of a draw x of independent Student t distributions."""
        return self.mean + self.scale.times(self.bijection.transform(x))

    def log_density(self, z: Array) -> Array:
        """Log density at a point of shape (dim,), in nats."""
        x, log_det = self.bijection.inverse_and_log_det(self.scale.inverse @ (z - self.mean))
        log_det += jnp.sum(jnp.log(jnp.diag(self.scale.inverse)))
        log_density = log_det + jnp.sum(student.logpdf(x, DEGREES))
        # Beyond the reach of its numbers T may overflow: no draw comes from there.
        return jnp.where(jnp.isnan(log_density), -jnp.inf, log_density)

    def from_cube(self, u: np.ndarray) -> np.ndarray:
        """Points of the unit cube, shape (num, dim + 2), as draws, shape (num, dim); the first two do nothing."""
        x = jnp.asarray(stdtrit(DEGREES, u[:, 2:]), self.mean.dtype)
        return np.concatenate(jax.device_get(parallel.over(_placed, parallel.split(x), self)))


def fit_flow(
    key: PRNGKey, points: np.ndarray, weights: np.ndarray, target: Tilted, settings: Flow
) -> tuple[FlowDensity, int]:
    """The flow that best describes weighted points and a target, and the evaluations of the latter that it took.

    Args:
        points: shape (num, dim).
        weights: not negative, shape (num,).
    """
    from flowjax.train import fit_to_data, fit_to_key_based_loss
    from paramax import NonTrainable, unwrap

    key_points, key_target = jax.random.split(key)
    mean, scale = parallel.once(location_and_scale, points, weights)
    untrained = _untrained(points.shape[1], settings.num_layers, settings.width, points.dtype)
    fixed: Any = NonTrainable
    flow, _ = fit_to_data(
        key_points,
        FlowDensity(fixed(mean), fixed(scale), untrained),
        (points, weights / np.mean(weights)),
        loss_fn=_unlikeliness,
        optimizer=optimiser(0),
        max_epochs=EPOCHS,
        max_patience=PATIENCE,
        batch_size=POINTS,
        show_progress=False,
    )
    if settings.num_steps:
        (flow, _), _ = fit_to_key_based_loss(
            key_target,
            (flow, NonTrainable(target)),
            loss_fn=_divergence,
            steps=settings.num_steps,
            optimizer=optimiser(settings.num_steps),
            show_progress=False,
        )
    return unwrap(flow), settings.num_steps * BATCH


def affine_coupling_flow(dim: int, *, num_layers: int = 8, width: int = 64, largest: float = 3.0) -> Any:
    """A flow of smooth coupling layers, for `fit_flow_to` and `transported`, that moves no point before it is trained.

    Each layer permutes the coordinates, shifts half of them and scales them by exp(s), both by functions of the others,
    with |s| at most `largest`: where heavy tails take its networks a scale without a bound overflows. Chains in the
    space of a flow want it, since splines have kinks, which trajectories of NUTS pay for.

    Args:
        dim: of a point.
        num_layers: coupling layers; enough that each coordinate is likely to be moved given each other.
        width: of the one hidden layer of the network in each.
        largest: log scale of a layer.

    Returns:
        A distribution of flowjax of points of shape (dim,), with a standard normal base.

    Reference: Dinh, Sohl-Dickstein and Bengio (2017), Density estimation using Real NVP.

    Example:
        >>> flow = ebm_ppl.affine_coupling_flow(target.dim)
        >>> fitted = ebm_ppl.fit_flow_to(jax.random.key(0), target, flow)
        >>> data = ebm_ppl.sample(jax.random.key(1), ebm_ppl.transported(target, fitted.flow))
    """
    from flowjax.bijections import Affine
    from paramax import Parameterize

    if dim < 2 or num_layers < 1 or width < 1 or not largest > 0:
        raise EnergyError(
            "A coupling flow has two coordinates at least, since each is moved given others; num_layers and width are "
            f"1 at least, and largest is positive; got dim={dim}, {num_layers}, {width} and {largest}."
        )
    scale = Parameterize(lambda x: jnp.exp(largest * jnp.tanh(x / largest)), jnp.zeros(()))
    return _couplings(eqx.tree_at(lambda affine: affine.scale, Affine(), scale), dim, num_layers, width)


@functools.cache
def _untrained(dim: int, num_layers: int, width: int, dtype: np.dtype) -> Any:
    """The identity, as a bijection to train: one for all runs, so that a program compiled for one serves them all."""
    from flowjax.bijections import Affine

    return _couplings(Affine(), dim, num_layers, width, dtype).bijection


def _couplings(transformer: Any, dim: int, num_layers: int, width: int, dtype: Any = None) -> Any:
    """The identity until it is trained, by coupling layers with this bijection of a number."""
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    flow = coupling_flow(
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(dim, dtype)),
        transformer=transformer,
        flow_layers=num_layers,
        nn_width=width,
        nn_activation=jax.nn.silu,
        invert=False,
    )
    return eqx.tree_at(lambda flow: _outputs(flow.bijection), flow, replace_fn=jnp.zeros_like)


def _outputs(bijection: Any) -> tuple[Array, Array]:
    """Weight and bias of the last layer of each network, which say by how much to shift and scale."""
    layer = bijection.bijection
    coupling = layer if hasattr(layer, "conditioner") else layer[0]
    return coupling.conditioner.layers[-1].weight, coupling.conditioner.layers[-1].bias


@functools.cache
def optimiser(num_steps: int) -> optax.GradientTransformation:
    """Adam, at a rate that falls to zero over so many steps, or stays as it is where there is no telling how many."""
    rate = optax.cosine_decay_schedule(RATE, num_steps) if num_steps else RATE
    steps = optax.chain(optax.clip_by_global_norm(LARGEST_GRADIENT), optax.adam(rate))
    return optax.apply_if_finite(steps, max_consecutive_errors=MOST_FAULTS)


def _unlikeliness(params: Any, static: Any, points: Array, weights: Array, key: PRNGKey) -> Array:
    """Minus the mean log density of weighted points, as flowjax's training wants it."""
    from paramax import unwrap

    flow = unwrap(eqx.combine(params, static))
    return -jnp.mean(weights * jax.vmap(flow.log_density)(points))


def _divergence(params: Any, static: Any, key: PRNGKey) -> Array:
    """E_q[log q - log p] by draws of q, as flowjax's training wants it."""
    from paramax import unwrap

    flow, fixed = (unwrap(eqx.combine(x, static)[0]) for x in (params, jax.lax.stop_gradient(params)))
    target = static[1].tree
    z = jax.vmap(flow.sample)(jax.random.split(key, BATCH))
    return reverse_divergence(z, lambda z: fixed.log_density(z) - log_joint(target, z))


def reverse_divergence(z: Array, log_ratio: Callable[[Array], Array]) -> Array:
    """E_q[log q - log p] by draws z of q, (num, dim), whose gradient is that by way of the draws alone.

    A draw where p is zero or not a number has no gradient to follow, and counts for nothing. Slopes have a limit.

    Args:
        log_ratio: log q - log p at one point, without a gradient in the parameters of q.
    """
    values, slopes = jax.vmap(jax.value_and_grad(log_ratio))(jax.lax.stop_gradient(z))
    counts = jnp.isfinite(values) & jnp.all(jnp.isfinite(slopes), axis=1)
    slopes = jnp.clip(slopes, -STEEPEST, STEEPEST)
    along = jnp.sum(jnp.where(counts[:, None], slopes, 0.0) * z)
    mean = jnp.sum(jnp.where(counts, values, 0.0)) / jnp.maximum(jnp.sum(counts), 1)
    return mean + (along - jax.lax.stop_gradient(along)) / len(z)


def _placed(x: Array, flow: FlowDensity) -> Array:
    return flow.place(x)
