"""Diffusion recovery likelihood: its gradient against quadrature, and the chain of noise walked down."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from limits import t_limit
from train_problems import best_log_likelihood, log_likelihood, two_modes

import ebm_ppl as ebm
from ebm_ppl.train.objective import Density
from ebm_ppl.train.recovery import State
from ebm_ppl.train.walkers import Dynamics

LEVELS = (0.2, 1.0, 1.4)
LINE = dist.Uniform(-15.0, 15.0).expand([1]).to_event(1)


class Quartic(eqx.Module):
    """a x^2 / 2 + b x^4 / (1 + sigma^2)"""

    weights: jax.Array

    def at(self, sigma):
        return lambda x: self.weights[0] * x[0] ** 2 / 2 + self.weights[1] * x[0] ** 4 / (1 + sigma**2)

    def reference(self, sigma):
        return dist.Normal(0.5, jnp.hypot(1.5, sigma)).expand([1]).to_event(1)

    def __call__(self, x):
        return self.at(LEVELS[0])(x)


class Bell(eqx.Module):
    """x^2 / 2v, where v is the variance of data at each level, and 2 without noise."""

    weight: jax.Array

    def at(self, sigma):
        return lambda x: self.weight * x @ x / (2 * (2.0 + sigma**2 - LEVELS[0] ** 2))

    def __call__(self, x):
        return self.at(LEVELS[0])(x)


QUARTIC = Quartic(jnp.array([0.5, 0.05]))


def exact_loss(energy, data):
    """Minus the mean over levels of E[log p(x | y)], by quadrature over both noises and over x."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    grid = jnp.linspace(-7, 7, 1401)

    def of_level(low, high):
        u = jax.vmap(lambda x: energy.at(low)(x[None]))
        spread = jnp.sqrt(high**2 - low**2)
        x = data[:, :1] + jnp.sqrt(low**2 - LEVELS[0] ** 2) * nodes
        y = data[:, :1] + jnp.sqrt(high**2 - LEVELS[0] ** 2) * nodes
        of_grid = -u(grid) - (y[..., None] - grid) ** 2 / (2 * spread**2)
        log_z = jax.nn.logsumexp(of_grid, axis=-1)
        # |y - x|^2 has no parameters of the energy
        return jnp.mean((u(x.ravel()).reshape(x.shape) + log_z) @ weights)

    return sum(map(of_level, LEVELS[:-1], LEVELS[1:])) / (len(LEVELS) - 1)


KERNELS = {"MALA": Dynamics(ebm.MALA(), 100, 0.3), "HMC": Dynamics(ebm.HMC(), 15, 0.2)}


@pytest.mark.parametrize(("name", "moves_from"), [("MALA", "noisy"), ("HMC", "noisy"), ("MALA", "reference")])
def test_gradient_is_that_of_the_recovery_likelihood(name, moves_from):
    num, data = 64, jnp.asarray(two_modes(64))
    exact = jax.grad(exact_loss)(QUARTIC, data).weights
    objective, batch = ebm.RecoveryLikelihood(LEVELS, KERNELS[name], moves_from), jnp.tile(data, (8, 1))

    def one(key):
        def loss(energy):
            density = Density(energy, None, (1,))
            return objective.loss(key, density, (), State(jnp.asarray(KERNELS[name].step_size), ()), batch)[0]

        return jax.grad(loss)(QUARTIC).weights

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num)))
    error = found.std(axis=0, ddof=1) / np.sqrt(num)
    scores = (found.mean(axis=0) - exact) / error
    assert np.max(np.abs(scores)) < t_limit(2 * 3, num - 1), scores
    assert np.all(error < 0.1 * np.abs(exact))  # so that the scores mean something


def test_with_a_base_all_levels_are_tilted():
    """A base that makes up for what the energy lacks has the same draws, and the same gradient."""
    base, key = dist.Normal(0.0, 2.0).expand([1]).to_event(1), jax.random.key(0)
    objective, batch = ebm.RecoveryLikelihood(LEVELS), jnp.asarray(two_modes(32))

    def gradient(first, base):
        def loss(energy):
            return objective.loss(key, Density(energy, base, (1,)), (), State(jnp.asarray(0.1), ()), batch)[0]

        return jax.grad(loss)(Quartic(jnp.array([first, 0.05]))).weights

    np.testing.assert_allclose(gradient(1.0, None), gradient(0.75, base))


@pytest.mark.parametrize("name", KERNELS)
def test_the_chain_walked_down_has_the_density_of_the_data(name):
    """Normal data, whose conditional densities are known: the variance of draws at the smallest level."""
    num, energy = 32, Bell(jnp.ones(()))
    start = dist.Normal(0.0, np.sqrt(2 + LEVELS[-1] ** 2 - LEVELS[0] ** 2)).expand([1]).to_event(1)

    def variance(key):
        return jnp.mean(ebm.recover(key, energy, LEVELS, start, num=2000, dynamics=KERNELS[name]) ** 2)

    found = np.asarray(jax.jit(jax.vmap(variance))(jax.random.split(jax.random.key(0), num)))
    score = (found.mean() - 2.0) / (found.std(ddof=1) / np.sqrt(num))
    assert abs(score) < t_limit(len(KERNELS), num - 1), score


def test_two_modes_are_learned():
    """As far as it gets: draws of the chain have the weight of the first, .3, nearly right, the energy less so."""
    levels = ebm.noise_levels(0.5, 4.0, 4)  # data are at the first as they are, and it is wide enough to see both
    energy = ebm.NoiseConditionalEnergy(jax.random.key(1), 1, levels, scale=1.8, width=32)
    optimiser = optax.adam(optax.cosine_decay_schedule(5e-3, 600))
    settings = {"num_steps": 600, "averaging": 0.99, "batch_size": 128, "progress_bar": False}
    objective = ebm.RecoveryLikelihood(levels, Dynamics(ebm.Langevin(), 20, 0.05))
    fitted = ebm.fit(jax.random.key(1), energy, two_modes(10_000), objective, optimiser=optimiser, **settings)
    test = two_modes(10_000, seed=1)
    assert log_likelihood(fitted.energy, test, LINE) > best_log_likelihood(test) - 0.2
    given = jax.random.key(2), fitted.energy, levels, energy.reference(levels[-1])
    draws = ebm.recover(*given, num=4000, dynamics=objective.dynamics)
    assert abs(np.mean(draws < -0.3) - np.mean(test < -0.3)) < 0.05
