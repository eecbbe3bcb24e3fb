"""Adversarial energies by diffusion: at each step of a chain of noise, an energy and a generator that inverts the step.

    x_k = x + sqrt(sigma_k^2 - sigma_0^2) e          levels sigma_0 < ... < sigma_T, the last as wide as the data
    y   = x_k + d_k e'                               d_k^2 = sigma_k+1^2 - sigma_k^2
    p(x_k | y) = exp(-V(x_k, sigma_k) - |y - x_k|^2 / 2 d_k^2) / Z(y)             as in `train/recovery.py`
    g(x_k | y) = int N(z; 0, I) N(x_k; m(z, y), s^2) dz                           the generator, for all of y, z and k
    r(z | x_k, y)                                                                 its encoder, a normal distribution

    the energy     descends   V(x_k) - sum_i w_i V(x'_i) + gamma_k / 2 |grad V(x_k)|^2            x'_i ~ g(. | y)
                              w_i = softmax(h(x'_i) - V(x'_i) - |y - x'_i|^2 / 2 d_k^2)
    the generator  descends   forward  E_q[KL(r || N(0, I)) - E_r log N(x_k; m, s^2)]  - H(q)  >=  KL(q || g)
                            + reverse  E_g[V(x') + |y - x'|^2 / 2 d_k^2 - h(x')] + log Z(y)    >=  KL(g || p)
                              h(x') = log r(z | x', y) - log N(z) - log N(x'; m, s^2)          mean at most H(g)

with q the density of real x_k given y; H(q) and log Z(y) have nothing of the generator in them and are left out. Both
bounds are tight where the encoder is the posterior of z. Where q = p their sum is the divergence of Jeffreys; forward
alone covers all modes and blurs, reverse alone is sharp and leaves modes out. Rest is at p = g = q and nowhere else, if
gamma is zero. `energy(x)`, at sigma_0, is that of the data: an ordinary `NoiseConditionalEnergy`, for
`EnergyDistribution`, `log_z` and `anneal`.

What is left open is what recovery leaves open: where modes lie further apart than d_0 no y comes from both, and the
energy at the smallest level has their weights only by what it shares with the wider levels. Draws have them.

With one draw for each y the weight is one, as in the authors': the energy then learns to tell data from draws of g, and
where g lags behind it, as every generator does, it grows too steep, and nobody tells it. With several, exp(h) weighs
them without bias for p(. | y), whatever g is, and what is left is the slack of a bound of log Z(y) by importance.

What is followed. Of Geng et al. (2024) the abstract and the authors' public code for the plane, which is all that was
read: what the paper itself says beyond them is not claimed. The variance explodes here, as that of the energies does,
rather than being preserved, which is the same up to a scale of each level. That code is not followed where
  - its noise ends at a variance of .05 for data of variance one, while draws start at N(0, I). Here a chain that does
    not end in noise is refused;
  - it counts log r a tenth. Here all of h counts, or reverse would be no bound;
  - m alone is drawn at the last step (s = 0), and its likelihood has s = .1 put in. Here s is a learned noise of the
    generator's guess of x, carried through the forward process' own q(x_k | x, y), in both;
  - it penalises the slope of V(x) + |y - x|^2 / 2 d^2. The mean over y of that square is |grad V|^2 and a constant, so
    the former is taken: the same penalty with less noise;
  - its gamma is .02 at every level. The penalty moves the rest to q - gamma div(q grad V), which to first order is q
    with normal noise of variance 2 gamma: a standard deviation of .2 has nothing left of twenty-five modes of .02.
    Here gamma_k is in units of sigma_k^2.

References:
    Geng, Han, Jiang, Zhang, Chen, Hauberg and Li (2024), Improving adversarial energy-based model via diffusion
    process; Xiao, Kreis and Vahdat (2022), Tackling the generative learning trilemma with denoising diffusion GANs;
    Gao, Song, Poole, Wu and Kingma (2021), Learning energy-based models by diffusion recovery likelihood; Karras,
    Aittala, Aila and Laine (2022), Elucidating the design space of diffusion-based generative models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.stats import norm

from ebm_ppl.energy import quickened
from ebm_ppl.kernels import MALA
from ebm_ppl.noise import check_chain, variance_between
from ebm_ppl.train.objective import (
    Density,
    Metrics,
    Objective,
    density_from_start,
    parameters_of,
    require_levels,
    with_parameters,
    without_gradient,
)
from ebm_ppl.train.recovery import recovered, warn_of_bad
from ebm_ppl.train.walkers import Dynamics
from ebm_ppl.typing import Array, EnergyError, EnergyShapeError, PRNGKey, as_key

if TYPE_CHECKING:
    import xarray as xr

MOVES = Dynamics(MALA(), 5, 0.3)
"""At each level, of what a generator has drawn."""


class DenoisingGenerator(eqx.Module):
    """`g(x_k | y)`: the point before a step of noise, from the point y after it and a latent variable z.

        x^ = c y + t F(y, z, k) + t tau_k e                    a guess of the data, c = s^2 / (s^2 + v), t^2 = c v
        x_k = x^ + (v_k / v_k+1) (y - x^) + noise              as the forward process has it, given x^ and y

    with v_k = sigma_k^2 - sigma_0^2 the variance of the noise at level k, v that at y, and s the standard deviation of
    the data. Without F and with tau = 1, as it nearly starts, it is exact for normal data.

    Args:
        key: draws the weights.
        dim: length of a flat point.
        levels: sigma_0, ..., sigma_T in units of the data, smallest first, as the energy has them. What g draws at one
            step is a little wider than the y from which it learned the next: a last step of little noise loses least.
        latent_dim: of z; that of x where None.
        scale: s; the data should have mean zero, up to a fraction of it.
        width: units in each hidden layer of both networks, F and the encoder.
        depth: number of hidden layers.
        activation: smooth function.

    Raises:
        EnergyError: for levels that do not grow or fewer than two, or a scale that is not positive.

    References: Geng et al. (2024); Xiao, Kreis and Vahdat (2022).
    """

    network: eqx.nn.MLP
    encoder: eqx.nn.MLP
    log_noise: Array
    """log tau, (T, dim)"""
    levels: tuple[float, ...] = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKey,
        dim: int,
        levels: Sequence[float],
        latent_dim: int | None = None,
        scale: float = 1.0,
        width: int = 64,
        depth: int = 2,
        activation: Callable[[Array], Array] = jax.nn.silu,
    ):
        check_chain(levels)
        if not scale > 0:
            raise EnergyError(f"scale is the data's standard deviation, positive; got {scale}.")
        key_network, key_encoder = jax.random.split(key)
        latent_dim = dim if latent_dim is None else latent_dim
        network = eqx.nn.MLP(dim + latent_dim + 1, dim, width, depth, activation, key=key_network)
        encoder = eqx.nn.MLP(2 * dim + 1, 2 * latent_dim, width, depth, activation, key=key_encoder)
        self.network, self.encoder = quickened(network), quickened(encoder)
        self.levels, self.scale = tuple(map(float, levels)), float(scale)
        self.log_noise = jnp.zeros((len(levels) - 1, dim))

    @property
    def latent_dim(self) -> int:
        return int(self.encoder.out_size) // 2

    @property
    def reference(self) -> dist.Distribution:
        """N(0, s^2 + v_T): about what data are at the widest level, where draws start."""
        width = np.sqrt(self.scale**2 + self.levels[-1] ** 2 - self.levels[0] ** 2)
        return dist.Normal(0.0, width).expand([self.log_noise.shape[1]]).to_event(1)

    def given(self, z: Array, y: Array, level: Array) -> tuple[Array, Array]:
        """`(m, s)` of x_k given z and y, each of shape (dim,), at level k."""
        shrinkage, spread, _ = self._moments(level)
        guess = shrinkage * y + spread * self.network(jnp.concatenate([self._seen(y, level), z]))
        return self._stepped(guess, spread * jnp.exp(self.log_noise[level]), y, level)

    def posterior_guess(self, x: Array, y: Array, level: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of r(z | x, y), each of shape (latent_dim,)."""
        shrinkage, spread, _ = self._moments(level)
        mean, width = self._stepped(shrinkage * y, spread, y, level)  # of normal data: x in units of what is not known
        mean, log_scale = jnp.split(self.encoder(jnp.concatenate([(x - mean) / width, self._seen(y, level)])), 2)
        return mean, jnp.exp(log_scale)

    def draw(self, key: PRNGKey, y: Array, level: Array) -> tuple[Array, Array]:
        """A point x_k, shape (dim,), and a number whose mean is at most the entropy of g(. | y): h, -log g if r is the
        posterior of z, and if not, what makes exp(h) weigh the draw without bias."""
        key_latent, key_noise = jax.random.split(key)
        z = jax.random.normal(key_latent, (self.latent_dim,), y.dtype)
        mean, scale = self.given(z, y, level)
        e = jax.random.normal(key_noise, y.shape, y.dtype)
        x = mean + scale * e
        of_draw = jnp.sum(norm.logpdf(z)) + jnp.sum(norm.logpdf(e)) - jnp.sum(jnp.log(scale))
        return x, jnp.sum(norm.logpdf(z, *self.posterior_guess(x, y, level))) - of_draw

    def log_density_bound(self, key: PRNGKey, x: Array, y: Array, level: Array) -> Array:
        """A number whose mean is at most log g(x | y)."""
        mean, scale = self.posterior_guess(x, y, level)
        z = mean + scale * jax.random.normal(key, mean.shape, mean.dtype)
        rate = jnp.sum(mean**2 + scale**2 - 1) / 2 - jnp.sum(jnp.log(scale))
        return jnp.sum(norm.logpdf(x, *self.given(z, y, level))) - rate

    def _moments(self, level: Array) -> tuple[Array, Array, Array]:
        """c and t at y, and the share of y's noise that x_k has."""
        levels = jnp.asarray(self.levels, self.log_noise.dtype)
        here, there = (variance_between(levels[0], levels[k]) for k in (level, level + 1))
        shrinkage = self.scale**2 / (self.scale**2 + there)
        return shrinkage, jnp.sqrt(shrinkage * there), here / there

    def _stepped(self, guess: Array, noise: Array, y: Array, level: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of x_k, by those of a guess of the data."""
        levels, (_, _, share) = jnp.asarray(self.levels, y.dtype), self._moments(level)
        variance = (1 - share) ** 2 * noise**2 + (1 - share) * variance_between(levels[0], levels[level])
        return guess + share * (y - guess), jnp.broadcast_to(jnp.sqrt(variance), y.shape)

    def _seen(self, y: Array, level: Array) -> Array:
        """What the networks see of y, of unit variance, and of its level, from -1 to 1."""
        if y.shape != self.log_noise.shape[1:]:
            raise EnergyShapeError(
                f"A point has shape {y.shape}; the generator draws points of shape {self.log_noise.shape[1:]}."
            )
        levels = jnp.asarray(self.levels, y.dtype)
        width = jnp.sqrt(self.scale**2 + variance_between(levels[0], levels[level + 1]))
        return jnp.append(y / width, 2 * level / max(len(self.levels) - 2, 1) - 1)


class AdversarialDiffusion(Objective):
    """A noise-conditional energy and a generator that inverts each step of noise, trained against each other.

    Both take a step of the same optimiser at a time. `optax.multi_transform` gives each its own, with labels
    `("energy", "generator")`; the generator is the one to be fast, and momentum does them no good. Each point of a
    batch has a level of its own in each step.

    The record has `energy_gap`, of draws less data; `forward`, the cross entropy of q to g in nats from above;
    `reverse`, minus a lower bound of log Z(y); `ess`, the effective share of a point's draws of g under the energy, one
    where they agree; and `penalty`, the mean of sigma_k^2 |grad V|^2.

    Args:
        generator: `DenoisingGenerator(...)`, whose arrays are the objective's own parameters: trained, it is
            `objective.trained(fitted.parameters)`.
        penalty: gamma in units of sigma_k^2, of the energy's squared slope at the data. What is learned has about 1 +
            2 penalty times the variance of the noise of its level.
        forward: weight of the forward divergence; without it a generator leaves modes out.
        num_draws: of the generator for each point of a batch; one is the authors'.

    Raises:
        EnergyError: for an energy of other levels, or a chain that does not end in noise.
        EnergyShapeError: for a generator of other points.

    Reference: Geng et al. (2024).

    Example:
        >>> levels = 0.05, 0.3, 1.0, 3.0
        >>> energy = ebm_ppl.NoiseConditionalEnergy(jax.random.key(0), 2, levels)
        >>> objective = ebm_ppl.AdversarialDiffusion(ebm_ppl.DenoisingGenerator(jax.random.key(1), 2, levels))
        >>> rates = {"energy": optax.adam(5e-4, b1=0.0), "generator": optax.adam(1e-3, b1=0.0)}
        >>> optimiser = optax.multi_transform(rates, ("energy", "generator"))
        >>> fitted = ebm_ppl.fit(jax.random.key(2), energy, data, objective, optimiser=optimiser)
        >>> draws = ebm_ppl.denoise(jax.random.key(3), objective.trained(fitted.parameters), fitted.energy)
    """

    generator: DenoisingGenerator
    penalty: float = 0.02
    forward: float = 1.0
    num_draws: int = 4
    name = "adversarial diffusion"
    is_comparable = False
    is_continuous = True

    def __check_init__(self):
        if not self.penalty >= 0 or not self.forward >= 0:
            raise EnergyError(f"penalty and forward are not negative; got {self.penalty, self.forward}.")
        if self.num_draws < 1:
            raise EnergyError(f"num_draws is 1 at least; got {self.num_draws}.")

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        levels = self.generator.levels
        require_levels(density, levels, data)
        widest = float(jnp.max(jnp.std(data, axis=0)))
        if not levels[-1] >= widest:
            raise EnergyError(
                f"The levels of noise end at {levels[-1]:.3g}, and the data have a standard deviation of {widest:.3g}: "
                "what draws start from, noise, would not be what the chain ends in. Give the energy and the generator "
                "a last level as wide as the data."
            )
        eqx.filter_eval_shape(self.generator.draw, key, data[0], jnp.zeros((), int))  # refuses other points
        return parameters_of(self.generator), ()

    def trained(self, parameters: Any) -> Any:
        """The generator with parameters that `fit` has found."""
        return with_parameters(self.generator, parameters)

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        generator, fixed = self.trained(parameters), without_gradient(density)
        levels = jnp.asarray(self.generator.levels, batch.dtype)
        key_level, *keys = jax.random.split(key, 5)
        level = jax.random.randint(key_level, (len(batch),), 0, len(levels) - 1)
        here, there, of_draw, of_bound = (jax.random.split(key, len(batch)) for key in keys)

        def one(level: Array, x: Array, here: PRNGKey, there: PRNGKey, of_draw: PRNGKey, of_bound: PRNGKey) -> Any:
            sigma = levels[level]
            step = variance_between(sigma, levels[level + 1])
            added = jnp.sqrt(variance_between(levels[0], sigma))
            x = x + added * jax.random.normal(here, x.shape, x.dtype)
            y = x + jnp.sqrt(step) * jax.random.normal(there, x.shape, x.dtype)
            total = density.at(sigma).total

            def draw(key: PRNGKey) -> tuple[Array, Array]:
                drawn, h = generator.draw(key, y, level)
                return drawn, h - fixed.at(sigma).total(drawn) - jnp.sum((y - drawn) ** 2) / (2 * step)

            drawn, log_weights = jax.vmap(draw)(jax.random.split(of_draw, self.num_draws))
            weights, negatives = jax.lax.stop_gradient((jax.nn.softmax(log_weights), drawn))
            value, slope = jax.value_and_grad(total)(x)
            return {
                "energy_gap": weights @ jax.vmap(total)(negatives) - value,
                "penalty": sigma**2 * jnp.sum(slope**2),
                "forward": -generator.log_density_bound(of_bound, x, y, level),
                "reverse": -jnp.mean(log_weights),
                "ess": 1 / (self.num_draws * jnp.sum(weights**2)),
            }

        metrics = jax.tree.map(jnp.mean, jax.vmap(one)(level, batch, here, there, of_draw, of_bound))
        of_energy = self.penalty / 2 * metrics["penalty"] - metrics["energy_gap"]
        return of_energy + self.forward * metrics["forward"] + metrics["reverse"], (state, metrics)


def denoise(
    key: PRNGKey,
    generator: DenoisingGenerator,
    energy: Callable[[Array], Array] | None = None,
    *,
    start: dist.Distribution | None = None,
    num: int = 1024,
    base: dist.Distribution | None = None,
    dynamics: Dynamics = MOVES,
) -> xr.DataTree:
    """Draws by walking the chain of noise down: x_k from g(. | x_k+1), for each k.

    Args:
        generator: trained, `objective.trained(fitted.parameters)`.
        energy: noise-conditional, of the same levels. Where it is given, what the generator has drawn is moved towards
            p(x_k | x_k+1) at each level: draws are then those of the energies as far as the moves go.
        start: a distribution of events at the widest level; `generator.reference` where None.
        num: of draws.
        base: of the energy, as in `fit`.
        dynamics: the moves, with a step size in units of d_k, which stays as it is, and of d_k^2 for `Langevin()`.

    Returns:
        Group `posterior` with `x`, shape (chain=1, draw, *event_shape), and where there is an energy `sample_stats`
        with that of each draw at the smallest level, `energy`, in nats. Draws that are not finite, or have no finite
        energy, are warned of.

    Raises:
        EnergyError: for no draws, or an energy without levels of noise.
        EnergyShapeError: where start and base are not of the same single events, or not those of the generator.
    """
    from arviz_base import from_dict

    start = generator.reference if start is None else start
    density = density_from_start(energy if energy is not None else _flat, base, start, num)
    drawn, energies = _denoise(as_key(key), generator, density, start, num, dynamics, energy is not None)
    warn_of_bad(np.column_stack([np.asarray(drawn).reshape(num, -1), energies]), "the generator or the energy is not")
    groups = {"posterior": {"x": np.asarray(drawn)[None]}}
    if energy is not None:
        groups["sample_stats"] = {"energy": np.asarray(energies)[None]}
    tree = from_dict(groups)
    tree.attrs["inference_library"] = "ebm_ppl"
    return tree


@eqx.filter_jit
def _denoise(
    key: PRNGKey,
    generator: DenoisingGenerator,
    density: Density,
    start: Any,
    num: int,
    dynamics: Dynamics,
    is_moved: bool,
) -> tuple[Array, Array]:
    key_start, key_levels = jax.random.split(key)
    points = start.sample(key_start, (num,)).reshape(num, -1)
    levels = jnp.asarray(generator.levels, points.dtype)
    step_size = jnp.asarray(dynamics.step_size, points.dtype)

    def one(key: PRNGKey, y: Array, level: Array) -> Array:
        key_draw, key_moves = jax.random.split(key)
        x, _ = generator.draw(key_draw, y, level)
        if not is_moved:
            return x
        spread = jnp.sqrt(variance_between(levels[level], levels[level + 1]))
        return recovered(key_moves, density, levels[level], x, y, spread, dynamics, step_size)[0]

    def down(points: Array, given: Any) -> tuple[Array, None]:
        key, level = given
        return jax.vmap(one, (0, 0, None))(jax.random.split(key, num), points, level), None

    num_steps = len(generator.levels) - 1
    given = jax.random.split(key_levels, num_steps), jnp.arange(num_steps)
    points, _ = jax.lax.scan(down, points, given, reverse=True)
    return points.reshape(num, *density.event_shape), jax.vmap(density.total)(points)


def _flat(x: Array) -> Array:
    """Of no energy."""
    return jnp.zeros((), x.dtype)
