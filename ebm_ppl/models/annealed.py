"""Annealed chains of many events at a time, forward and reverse, on a path from a guess to the latents' posterior.

The path of an event x goes from q(z), the encoder's guess, or the base of a model without one, to p(x, z),

    f_t(z) = q(z)^(1 - beta_t) p(x, z)^beta_t            0 = beta_0 < ... < beta_T = 1, along a logistic curve
    A      = sum_t (beta_t - beta_t-1) log( p(x, z_t-1) / q(z_t-1) )

    forward   z_0 ~ q, z_t by moves that leave f_t invariant          E[exp(A)] = p(x)
    reverse   z_T ~ p(z | x), back by the same moves                  E[exp(-A)] = 1 / p(x)

as in `logz/annealing.py`, where one target has a thousand chains; here a thousand events have a few chains each, all in
one batch. Step sizes are those of a pilot at a few events, one for each stage, in units of the guess.

References:
    Neal (2001), Annealed importance sampling; Wu, Burda, Salakhutdinov and Grosse (2017), On the quantitative analysis
    of decoder-based generative models.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from ebm_ppl import parallel
from ebm_ppl.kernels import HMC, MALA, Kernel, Tuning
from ebm_ppl.models.latent import LatentModel
from ebm_ppl.scale import DiagonalScale
from ebm_ppl.typing import Array, EnergyError, PRNGKey

SLOPE = 4.0
"""Of the logistic curve along which the inverse temperature goes: it is slow at both ends."""
FIRST_STEP = 0.5
"""Step size before the pilot has seen anything, in units of the guess."""
LEARNING = 0.1
"""Change of the log step size by an acceptance that is off by one."""
PILOTS = 16
"""Events at which the step sizes are learned."""
PILOT, FORWARD, REVERSE, STARTS = range(4)
"""What is folded into the key for each part."""


@dataclasses.dataclass(frozen=True)
class Annealed:
    """How the chains of each event go.

    Args:
        num_chains: for each event and direction.
        num_stages: temperatures, T.
        kernel: `HMC()` or `MALA()`.
    """

    num_chains: int = 16
    num_stages: int = 200
    kernel: HMC | MALA = dataclasses.field(default_factory=HMC)

    def __post_init__(self):
        if self.num_chains < 2 or self.num_stages < 1:
            raise EnergyError(f"num_chains is 2 at least, num_stages 1; got {self}.")


class Path(NamedTuple):
    """The stages of all chains; one of them without the leading axis."""

    beta: Array
    """(stage,)"""
    step: Array
    """From the inverse temperature before, (stage,)."""
    step_size: Array
    """(stage,)"""
    num_steps: Array
    """Of the integrator, (stage,): the same for all chains, which are independent given these."""
    number: Array
    """(stage,)"""


class Bounds(NamedTuple):
    """Of log p(x) of each event, (event,), in nats, up to log Z of the prior where that is not known."""

    lower: np.ndarray
    upper: np.ndarray
    effective: np.ndarray
    """Forward chains, of so many."""
    rank: np.ndarray
    """Share of the posterior, by forward chains, whose joint energy is below that of where a reverse one starts."""


class Course(NamedTuple):
    """The path of one event."""

    model: LatentModel
    x: Array
    guess: Any
    """q"""
    scale: DiagonalScale
    """Units of its moves."""

    @classmethod
    def of(cls, model: LatentModel, x: Array) -> Course:
        if model.encoder is None:
            return cls(model, x, model.base, DiagonalScale(jnp.ones(model.latent_dim)))
        guess = model.posterior_guess(x)
        return cls(model, x, guess, DiagonalScale(jnp.sqrt(guess.variance)))

    def log_ratio(self, z: Array) -> Array:
        """log p(x, z) - log q(z)"""
        joint = self.model.log_joint(self.x, z)
        return jnp.where(jnp.isnan(joint), -jnp.inf, joint) - self.guess.log_prob(z)

    def move(self, key: PRNGKey, z: Array, at: Path, kernel: Kernel) -> tuple[Array, Array]:
        """z after a move that leaves f_t invariant, and its acceptance."""

        def log_density(z: Array) -> Array:
            return self.guess.log_prob(z) + at.beta * self.log_ratio(z)

        state = kernel.init(z, log_density)
        state, stats = kernel.step(key, state, log_density, Tuning(at.step_size, self.scale), at.num_steps)
        return state.position, stats["acceptance_rate"]


def find_path(key: PRNGKey, model: LatentModel, data: Array, settings: Annealed) -> Path:
    """Temperatures and moves, by a pilot at the first few events."""
    return parallel.once(_pilot, jax.random.fold_in(key, PILOT), data[:PILOTS], model, settings)


def bracket(
    key: PRNGKey, model: LatentModel, data: Array, path: Path, settings: Annealed, latents: Array | None
) -> Bounds:
    """Both bounds of each event.

    Args:
        data: shape (event, *event_shape).
        latents: draws of the posterior at which reverse chains start, shape (event, latent_dim); where forward ones
            have ended, as their weights go, where None.
    """
    num = len(data)
    keys = [jax.random.split(jax.random.fold_in(key, part), num) for part in (FORWARD, REVERSE, STARTS)]
    members = parallel.split((keys[0], data))
    log_weight, ends = _gathered(parallel.over(_forward, members, path, model, settings))
    if latents is None:
        starts = parallel.once(_chosen, keys[2], log_weight, ends)
    else:
        starts = jnp.broadcast_to(latents[:, None], ends.shape)
    members = parallel.split((keys[1], data, starts))
    reverse, _ = _gathered(parallel.over(_reverse, members, path, model, settings))
    rank = parallel.once(_ranks, data, log_weight, ends, starts[:, 0], model)
    log_weight, reverse, log_num = log_weight.astype(float), reverse.astype(float), math.log(settings.num_chains)
    shares = np.exp(log_weight - logsumexp(log_weight, axis=1, keepdims=True))
    return Bounds(
        lower=logsumexp(log_weight, axis=1) - log_num,
        upper=log_num - logsumexp(-reverse, axis=1),
        effective=1 / np.sum(shares**2, axis=1),
        rank=np.asarray(rank, float),
    )


def _gathered(parts: list[Any]) -> list[np.ndarray]:
    return [np.concatenate(each) for each in zip(*jax.device_get(parts), strict=True)]


def _pilot(key: PRNGKey, data: Array, model: LatentModel, settings: Annealed) -> Path:
    """Chains at a few events that all move by the same step size, which follows the acceptance of all."""
    kernel = settings.kernel.kernel()
    curve = jax.nn.sigmoid(SLOPE * jnp.linspace(-1.0, 1.0, settings.num_stages + 1))
    beta = (curve - curve[0]) / (curve[-1] - curve[0])
    key_start, key_moves, key_lengths = jax.random.split(key, 3)

    def start(key: PRNGKey, x: Array) -> Array:
        return Course.of(model, x).guess.sample(key, (settings.num_chains,))

    def stage(carry: tuple[Array, Array], at: Path) -> tuple[tuple[Array, Array], Path]:
        z, step_size = carry
        unit = Tuning(step_size, DiagonalScale(jnp.ones(model.latent_dim)))
        num_steps = kernel.length(jax.random.fold_in(key_lengths, at.number), unit, model.latent_dim)
        at = at._replace(step_size=step_size, num_steps=num_steps)

        def of_event(keys: Array, x: Array, z: Array) -> tuple[Array, Array]:
            course = Course.of(model, x)
            return jax.vmap(lambda key, z: course.move(key, z, at, kernel))(keys, z)

        keys = jax.random.split(jax.random.fold_in(key_moves, at.number), z.shape[:2])
        z, accepted = jax.vmap(of_event)(keys, data, z)
        change = LEARNING * (jnp.mean(accepted) - settings.kernel.target_accept)
        return (z, step_size * jnp.exp(change)), at

    z = jax.vmap(start)(jax.random.split(key_start, len(data)), data)
    numbers = jnp.arange(settings.num_stages)
    stages = Path(beta[1:], jnp.diff(beta), jnp.zeros_like(beta[1:]), numbers, numbers)
    return jax.lax.scan(stage, (z, jnp.asarray(FIRST_STEP, beta.dtype)), stages)[1]


def _forward(member: tuple[PRNGKey, Array], path: Path, model: LatentModel, settings: Annealed) -> tuple[Array, Array]:
    """Log weights of the forward chains of an event, (chain,), and where they end, (chain, latent_dim)."""
    key, x = member
    course, kernel = Course.of(model, x), settings.kernel.kernel()

    def chain(key: PRNGKey) -> tuple[Array, Array]:
        key_start, key_moves = jax.random.split(key)

        def stage(carry: tuple[Array, Array], at: Path) -> tuple[tuple[Array, Array], None]:
            log_weight, z = carry
            moved, _ = course.move(jax.random.fold_in(key_moves, at.number), z, at, kernel)
            return (log_weight + at.step * course.log_ratio(z), moved), None

        start = jnp.zeros((), path.beta.dtype), course.guess.sample(key_start)
        return jax.lax.scan(stage, start, path)[0]

    return jax.vmap(chain)(jax.random.split(key, settings.num_chains))


def _reverse(
    member: tuple[PRNGKey, Array, Array], path: Path, model: LatentModel, settings: Annealed
) -> tuple[Array, Array]:
    """The same of reverse chains, from such starts."""
    key, x, starts = member
    course, kernel = Course.of(model, x), settings.kernel.kernel()

    def chain(key: PRNGKey, z: Array) -> tuple[Array, Array]:
        def stage(carry: tuple[Array, Array], at: Path) -> tuple[tuple[Array, Array], None]:
            log_weight, z = carry
            moved, _ = course.move(jax.random.fold_in(key, at.number), z, at, kernel)
            return (log_weight + at.step * course.log_ratio(moved), moved), None

        return jax.lax.scan(stage, (jnp.zeros((), path.beta.dtype), z), path, reverse=True)[0]

    return jax.vmap(chain)(jax.random.split(key, settings.num_chains), starts)


def _chosen(keys: Array, log_weight: Array, ends: Array) -> Array:
    """As many ends of each event as it has, by their weights."""
    chosen = jax.vmap(lambda key, weights: jax.random.categorical(key, weights, shape=weights.shape))(keys, log_weight)
    return jnp.take_along_axis(ends, chosen[..., None], axis=1)


def _ranks(data: Array, log_weight: Array, ends: Array, starts: Array, model: LatentModel) -> Array:
    """Weighted share of the forward ends of each event whose joint energy is below that of a start."""

    def of_event(x: Array, log_weight: Array, ends: Array, start: Array) -> Array:
        below = jax.vmap(lambda z: model.joint_energy(x, z))(ends) < model.joint_energy(x, start)
        return jax.nn.softmax(log_weight) @ below.astype(log_weight.dtype)

    return jax.vmap(of_event)(data, log_weight, ends, starts)
