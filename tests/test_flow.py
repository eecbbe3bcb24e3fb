"""Normalising flows as proposals: a density that is that of its draws, and a log Z that is right with either branch."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from limits import chi2_limits, t_limit, z_limit
from paramax import unwrap
from problems import PROBLEMS
from test_mixture import made as made_mixture

import ebm_ppl as ebm
from ebm_ppl import smc
from ebm_ppl.flow import BATCH, DEGREES, STEEPEST, FlowDensity, _untrained, fit_flow, reverse_divergence
from ebm_ppl.logz.importance import BLOCKS, weigh
from ebm_ppl.rebase import Blend, Rebased
from ebm_ppl.scale import DenseScale

NUM_DRAWS, NUM_RUNS = 20_000, 6
SMALL = ebm.SMC(num_particles=300, target_ess=0.5, num_moves=2)
FLOW = ebm.Flow(num_layers=4, width=16, num_steps=100)
NAMES = "regression", pytest.param("dirichlet_multinomial", marks=pytest.mark.slow)


def made(dim=2, size=0.3):
    """A flow whose numbers are drawn, not trained."""
    arrays, others = eqx.partition(_untrained(dim, 3, 8, np.dtype(float)), eqx.is_inexact_array)
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(lambda x: x + size * rng.normal(size=x.shape), arrays)
    covariance = np.full((dim, dim), 0.5) + np.diag(0.5 + np.arange(dim))
    return FlowDensity(jnp.arange(1.0, dim + 1), DenseScale.of_covariance(covariance), eqx.combine(arrays, others))


def from_cube(proposal, dim=2):
    return proposal.from_cube(np.random.default_rng(1).uniform(size=(NUM_DRAWS, dim + 2)))


def independent(proposal):
    return jax.jit(jax.vmap(proposal.sample))(jax.random.split(jax.random.key(0), NUM_DRAWS))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_density_is_that_of_the_transformed_base(dim):
    """By the Jacobian of `place` as JAX differentiates it, and its inverse as it comes back."""
    flow = made(dim)
    place = eqx.filter_jit(lambda x: flow.place(x))
    slopes, log_density = eqx.filter_jit(jax.jacfwd(place)), eqx.filter_jit(lambda z: flow.log_density(z))
    for x in np.random.default_rng(0).normal(size=(5, dim)):
        z, jacobian = place(jnp.asarray(x)), slopes(jnp.asarray(x))
        expected = dist.StudentT(DEGREES).log_prob(x).sum() - np.linalg.slogdet(jacobian)[1]
        assert log_density(z) == pytest.approx(float(expected), rel=1e-9)
        assert abs(np.linalg.slogdet(jacobian)[1]) > 0.01


def test_affine_coupling_flow_moves_nothing_at_first_and_its_scales_are_bounded():
    flow = ebm.affine_coupling_flow(3, num_layers=2, width=4, largest=0.5)
    points = jnp.array([[0.0, 1.0, -2.0], [1e3, 0.3, 5.0]])
    np.testing.assert_allclose(jnp.sort(flow.bijection.transform(points[0])), jnp.sort(points[0]))  # in another order
    np.testing.assert_allclose(flow.log_prob(points[0]), dist.Normal().log_prob(points[0]).sum(), rtol=1e-6)
    arrays, others = eqx.partition(flow, eqx.is_inexact_array)
    wild = unwrap(eqx.combine(jax.tree.map(lambda x: x + 100.0, arrays), others)).bijection
    for x in points:
        log_det = wild.transform_and_log_det(x)[1]
        # Two layers, each of which scales two of three coordinates, by exp(.5) at most.
        assert log_det == pytest.approx(2 * 2 * 0.5)


def test_affine_coupling_flow_refuses_what_it_cannot_be():
    for settings in ({"dim": 1}, {"dim": 2, "num_layers": 0}, {"dim": 2, "largest": 0.0}):
        with pytest.raises(ebm.EnergyError, match="A coupling flow has two coordinates at least"):
            ebm.affine_coupling_flow(**settings)


def test_a_draw_off_a_cliff_leaves_the_gradient_within_single_precision():
    noise = jnp.array([[0.1], [-0.3], [2.0]], jnp.float32)

    def divergence(scale):
        return reverse_divergence(scale * noise, lambda z: jnp.where(z[0] > 1, 1e25 * z[0], 0.5 * z[0] ** 2))

    value, slope = jax.value_and_grad(divergence)(jnp.float32(1.0))
    assert value > 1e24
    assert slope == pytest.approx((STEEPEST * 2.0 + 0.1**2 + 0.3**2) / 3, rel=1e-6)
    assert jnp.isfinite(slope**2)


@pytest.mark.parametrize("draws", [independent, from_cube])
@pytest.mark.parametrize("name", ["flow", "blend"])
def test_density_is_normalised_and_drawn_from(draws, name):
    """E_q[f / q] = 1 for known densities f: for each part of a blend, and for a normal one within the flow."""
    flow, guard = made(), made_mixture()
    proposal = flow if name == "flow" else Blend(flow, guard, jnp.asarray(0.3))
    z = draws(proposal)
    log_q = jax.jit(jax.vmap(proposal.log_density))(z)
    if name == "flow":
        centre, covariance = np.mean(z, axis=0), np.cov(z.T) / 3
        densities = [dist.MultivariateNormal(centre, covariance).log_prob]
    else:
        densities = [jax.jit(jax.vmap(each.log_density)) for each in (flow, guard)]
    for density in densities:
        ratio = np.exp(density(z) - log_q)
        assert abs(ratio.mean() - 1) < z_limit(2 * 3) * ratio.std() / math.sqrt(NUM_DRAWS)


def test_what_a_flow_cannot_reach_has_the_density_of_the_guard():
    flow, guard, share = made(), made_mixture(), 0.3
    broken = eqx.tree_at(lambda flow: flow.mean, flow, jnp.full(2, jnp.nan))
    z = jnp.ones(2)
    found = Blend(broken, guard, jnp.asarray(share)).log_density(z)
    assert found == pytest.approx(float(guard.log_density(z)) + math.log(share))


def trained(name, seed, settings=FLOW):
    """A problem over a blend of a flow and a wide mixture, fitted to a pilot's cloud."""
    from test_mixture import fit

    key_pilot, key_fit = jax.random.split(jax.random.key(seed))
    target = PROBLEMS[name].target()
    cloud = np.asarray(smc.run(key_pilot, target, SMALL, progress_bar=False).z[0])
    flow, evaluations = fit_flow(key_fit, cloud, np.ones(len(cloud)), target, settings)
    blend = Blend(flow, fit(cloud).with_tails(0.5), jnp.asarray(0.2))
    return Rebased(target, blend, jnp.asarray(0.05)), evaluations


@pytest.mark.parametrize("name", NAMES)
def test_log_z_of_a_flow_and_its_error(name):
    scores = []
    for seed in range(NUM_RUNS):
        reference, evaluations = trained(name, seed)
        assert evaluations == FLOW.num_steps * BATCH
        final = weigh(jax.random.key(100 + seed), reference, 4096)
        scores.append((final.value - PROBLEMS[name].log_z) / final.std_error)
        assert final.effective_share > 0.6 and final.std_error < 0.03
    assert np.max(np.abs(scores)) < t_limit(NUM_RUNS * len(NAMES), BLOCKS - 1)
    assert np.mean(np.abs(scores) < 2) >= 0.5  # 93 % are expected


@pytest.mark.slow
def test_smc_from_a_flow():
    reference, _ = trained("regression", 0)
    draws = smc.run(jax.random.key(2), reference, SMALL, num_runs=20, progress_bar=False)
    scores = (draws.log_z["data_value"] - PROBLEMS["regression"].log_z) / draws.log_z["data_std_error"]
    low, high = chi2_limits(1, 20)
    assert low < np.sum(scores**2) < high


def test_fitted_reference_with_a_flow_tells_and_counts_it():
    problem = PROBLEMS["regression"]
    few = {"pilot": SMALL, "num_draws": 1024, "max_draws": 1024}
    with_flow, without = (
        ebm.FittedReference(flow=flow, **few).integrate(jax.random.key(0), problem.target()) for flow in (FLOW, None)
    )
    told = [line for line in with_flow.story if line.startswith("flow of 4 layers: ")]
    assert len(told) == 1 and told[0].endswith("% of the draws are effective")
    assert with_flow.num_evaluations - without.num_evaluations == FLOW.num_steps * BATCH + 1024
    assert abs(with_flow.value - problem.log_z) < t_limit(1, BLOCKS - 1) * with_flow.std_error


@pytest.mark.slow
def test_in_single_precision(run_in_float32):
    printed = run_in_float32(
        """
        import jax, numpyro, numpyro.distributions as dist
        import ebm_ppl as ebm

        def model():
            x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            numpyro.sample("y", dist.Normal(x[0] + x[1], 1.0), obs=1.0)

        pilot = ebm.SMC(num_particles=300, target_ess=0.5, num_moves=2)
        method = ebm.FittedReference(pilot=pilot, num_draws=1024, max_draws=1024, flow=ebm.Flow(2, 8, 50))
        found = ebm.log_z(jax.random.key(0), ebm.target(model), method)
        print(found.value, found.std_error)
        """
    )
    value, error = map(float, printed.split())
    assert abs(value - dist.Normal(0.0, math.sqrt(3.0)).log_prob(1.0)) < t_limit(1, BLOCKS - 1) * error


def test_flowjax_is_imported_only_where_a_flow_is_fitted(run_in_float32):
    assert run_in_float32("import sys, ebm_ppl; print('flowjax' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("settings", [{"num_layers": 0}, {"width": 0}, {"num_steps": -1}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ebm.EnergyError, match=next(iter(settings))):
        ebm.Flow(**settings)
