"""Another reference leaves the density as it is, and its log Z."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from limits import chi2_limits, z_limit
from problems import PROBLEMS
from test_mixture import fit

import ebm_ppl as ebm
from ebm_ppl import smc
from ebm_ppl.rebase import Rebased


def rebased(name, num=400, widen=1.5, defence=0.05):
    """A problem over a mixture fitted to draws of its own reference, which is a poor one on purpose."""
    target = PROBLEMS[name].target()
    z = jax.jit(jax.vmap(target.sample_reference))(jax.random.split(jax.random.key(0), num))
    return target, Rebased(target, fit(widen * np.asarray(z)), jnp.asarray(defence))


@pytest.mark.parametrize("name", ["regression", "dirichlet_multinomial", "dynamic_support", "three_roles", "mixture"])
def test_density_is_the_same(name):
    target, other = rebased(name)
    z = jax.jit(jax.vmap(other.sample_reference))(jax.random.split(jax.random.key(0), 20))
    log_q, energies = jax.jit(jax.vmap(other.staged_terms))(z)
    np.testing.assert_array_equal(energies[:, 0], 0.0)
    exact = jax.jit(jax.vmap(target.log_density))(z)
    np.testing.assert_allclose(log_q - energies[:, 1], exact, rtol=1e-10, atol=1e-9)


def test_reference_is_normalised_and_drawn_from():
    """E_q[f / q] is the integral of f, for f the density of the model's own reference and for that of the mixture."""
    _, other = rebased("regression", defence=0.3)
    z = jax.jit(jax.vmap(other.sample_reference))(jax.random.split(jax.random.key(1), 20_000))
    log_q = jax.jit(jax.vmap(lambda z: other.staged_terms(z)[0]))(z)
    densities = other.target.log_reference, other.proposal.log_density
    for density in densities:
        ratio = np.exp(np.asarray(jax.jit(jax.vmap(density))(z) - log_q))
        assert abs(ratio.mean() - 1) < z_limit(len(densities)) * ratio.std() / np.sqrt(len(ratio))


@pytest.mark.slow
def test_smc_from_another_reference():
    _, other = rebased("mixture")
    draws = smc.run(jax.random.key(2), other, ebm.SMC(num_particles=300), num_runs=100, progress_bar=False)
    scores = (draws.log_z["data_value"] - PROBLEMS["mixture"].log_z) / draws.log_z["data_std_error"]
    low, high = chi2_limits(1, 100)
    assert low < np.sum(scores**2) < high
