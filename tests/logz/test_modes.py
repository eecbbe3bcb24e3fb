"""Modes are found where they are, with the normal distribution that touches them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from problems import PROBLEMS

import ebm_ppl as ebm
from ebm_ppl import parallel
from ebm_ppl.logz.modes import find_modes
from ebm_ppl.logz.search import _modes

STARTS = np.random.default_rng(0).normal(0, 3, (32, 8))


def modes(target, num=32):
    starts = STARTS[:num, : target.dim]
    return find_modes(target, starts, np.std(starts, axis=0))


@pytest.mark.parametrize("name", ["correlated_normal", "regression"])
def test_a_normal_distribution_is_touched_everywhere(name):
    problem = PROBLEMS[name]
    found, evaluations = modes(problem.target())
    (site,) = problem.means
    np.testing.assert_allclose(found.z, [problem.means[site]], atol=1e-3)
    np.testing.assert_allclose(found.log_mass, [problem.log_z], atol=1e-5)
    covariance = found.scale.factor[0] @ found.scale.factor[0].T
    np.testing.assert_allclose(np.diag(covariance), problem.variances[site], rtol=1e-6)
    np.testing.assert_allclose(found.scale.factor[0] @ found.scale.inverse[0], np.eye(len(covariance)), atol=1e-9)
    assert 32 < evaluations < 32 * 100


def test_modes_come_once_each_and_the_highest_first():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
        centres, weights = jnp.array([[-4.0], [0.0], [5.0]]), jnp.array([0.2, 0.5, 0.3])
        log_density = jax.nn.logsumexp(dist.Normal(centres, 0.5).log_prob(x).sum(-1) + jnp.log(weights))
        ebm.energy_factor("mixture", -log_density, role="loss")

    found, _ = modes(ebm.target(model))
    np.testing.assert_allclose(found.z[:, 0], [0.0, 5.0, -4.0], atol=0.05)
    assert np.all(np.diff(found.log_density) < 0)


def test_modes_are_looked_for_until_none_has_been_met_only_once():
    """Twelve modes of unequal basins: the first ascents miss some of them, and say so."""
    centres = np.stack(np.meshgrid([-15.0, -5.0, 5.0, 15.0], [-12.0, 0.0, 12.0]), axis=-1).reshape(-1, 2)

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        density = jax.nn.logsumexp(dist.Normal(centres, 0.5).log_prob(x).sum(-1))
        ebm.energy_factor("mixture", -density, role="loss")

    target, deviation = ebm.target(model), np.full(2, 10.0)
    cloud = np.random.default_rng(0).normal(0, 10, (100, 2))
    few, _ = find_modes(target, cloud[:24], deviation)
    assert few.num_once > 0 and few.unseen == few.num_once / few.hits.sum() and len(few.z) < 12
    found = [_modes(jax.random.key(seed), target, cloud, 24) for seed in range(8)]
    assert all(evaluations > 24 * 8 for _, evaluations in found)
    # A search of few ascents may end with some unseen: of 20 keys 3 did.
    assert sum(len(modes.z) == 12 for modes, _ in found) >= 4
    again, _ = find_modes(target, cloud[:24], deviation, few)
    np.testing.assert_array_equal(again.hits, 2 * few.hits)


def test_a_density_without_a_mode_has_none():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ebm.energy_factor("cancel", jnp.sum(0.1 * x - x**2 / 2), role="loss")  # what is left falls for ever

    found, _ = modes(ebm.target(model))
    assert found.z.shape == (0, 2) and found.log_mass.shape == (0,)


@pytest.mark.slow
def test_a_spike_that_no_particle_meets_is_found():
    """Skilling's spike and slab: 100 parts to 1 lie where tempering meets them by luck alone."""

    def model():
        x = numpyro.sample("x", dist.Uniform(-0.5, 0.5).expand([10]).to_event(1))
        spike, slab = (dist.Normal(0.0, scale).log_prob(x).sum() for scale in (0.002, 0.1))
        ebm.energy_factor("spike and slab", -jnp.logaddexp(jnp.log(100.0) + spike, slab), role="loss")

    target, pilot = ebm.target(model), ebm.SMC(num_particles=300, target_ess=0.5, num_moves=2)
    found = ebm.log_z(jax.random.key(0), target, ebm.FittedReference(tol=0.01, pilot=pilot, num_draws=1024))
    (diagnostics,) = found.diagnostics["data"]
    assert abs(diagnostics["pilot"]) < 1  # all that the particles have seen is the slab
    assert abs(found.value - np.log(101)) < 5 * found.std_error and found.std_error < 0.05
    assert not found.doubts and any("the pilot missed" in line for line in found.story)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="threads are for the CPU")
def test_ascents_share_no_batch(monkeypatch):
    """In one, a correlated normal of 300 coordinates is a batch of its matrices, which wait for one another forever."""
    programs, over = [], parallel.over

    def recorded(function, parts, *shared):
        programs.append((parallel.prepare_over(function, parts[0], *shared), len(parts)))
        return over(function, parts, *shared)

    monkeypatch.setattr(parallel, "over", recorded)
    target = PROBLEMS["correlated_normal"].target()
    find_modes(target, np.zeros((32, target.dim)), np.ones(target.dim))
    assert [(program.in_threads, num_parts) for program, num_parts in programs] == [(True, 32)]
