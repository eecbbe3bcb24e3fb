"""Machines of a few units, whose every state is gone through."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import ebm_ppl as ebm


def rbm(num_visible, num_hidden, scale=1.0, seed=0):
    """Whose weights are as large as those of one that was trained."""
    return scaled(ebm.RBMEnergy(jax.random.key(seed), num_visible, num_hidden), scale, seed)


def boltzmann(dim, scale=1.0, seed=0):
    return scaled(ebm.BoltzmannEnergy(jax.random.key(seed), dim), scale, seed)


def scaled(energy, scale, seed):
    """With independent normal parameters of that deviation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape)), energy)


def bits(dim, probability=0.5):
    """A base of independent bits."""
    return dist.Bernoulli(probability).expand([dim]).to_event(1)


def categories(probabilities, dim):
    return dist.Categorical(jnp.asarray(probabilities)).expand([dim]).to_event(1)


def probabilities(energy, dim, num_states=2):
    """Of all states, by NumPy."""
    weights = np.exp(-np.array([energy(x) for x in ebm.enumerate_states(dim, num_states)]))
    return weights / weights.sum()


def flat(energy):
    """Its parameters, one after another."""
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(eqx.filter(energy, eqx.is_array))])
