"""Laplace's approximation: exact for normal distributions, and never sold as more than it is."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from problems import PROBLEMS

import ebm_ppl as ebm

METHOD = ebm.Laplace(num_ascents=16)


def test_exact_where_the_posterior_is_normal():
    problem = PROBLEMS["regression"]
    with pytest.warns(ebm.EnergyWarning, match="does not know its own error"):
        found = ebm.log_z(jax.random.key(0), problem.target(), METHOD)
    assert found.value == pytest.approx(problem.log_z, abs=1e-5)
    assert np.isnan(found.std_error) and found.doubts and found.method == "Laplace"


def test_modes_add_up():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        parts = dist.Normal(jnp.array([[-4.0], [5.0]]), 0.2).log_prob(x).sum(-1)
        ebm.energy_factor("mixture", -jax.nn.logsumexp(parts + jnp.log(jnp.array([0.3, 0.7]))), role="loss")

    found = METHOD.integrate(jax.random.key(0), ebm.target(model))
    wide = dist.Normal(0.0, np.hypot(10.0, 0.2))
    exact = np.logaddexp(np.log(0.3) + 2 * wide.log_prob(-4.0), np.log(0.7) + 2 * wide.log_prob(5.0))
    assert found.value == pytest.approx(float(exact), abs=1e-4) and "2 modes" in found.story[0]


def test_no_mode_is_an_error():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ebm.energy_factor("cancel", jnp.sum(0.1 * x - x**2 / 2), role="loss")  # what is left falls for ever

    with pytest.raises(ebm.EnergyError, match="negative definite"):
        METHOD.integrate(jax.random.key(0), ebm.target(model))


def test_settings_that_make_no_sense():
    with pytest.raises(ebm.EnergyError, match="num_ascents"):
        ebm.Laplace(num_ascents=1)
