"""Flows fitted to energies: both divergences by their closed forms, weights of modes, and what tells of a misfit."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow
from jax.scipy.special import logsumexp
from limits import t_limit

import ebm_ppl as ebm
from ebm_ppl.models.flow_fit import ForwardKL, ReverseKL
from ebm_ppl.train.objective import Density

Y = jnp.array([2.0, -1.0])
LOG_Z = float(dist.Normal(0.0, np.sqrt(2.0)).log_prob(Y).sum())
PARTICLES = ebm.SMC(num_particles=1000, target_ess=0.5, num_moves=2)
FLOW = coupling_flow(
    jax.random.key(0), base_dist=Normal(jnp.zeros(2)), transformer=RationalQuadraticSpline(knots=6, interval=4.0),
    flow_layers=4, nn_width=24,
)  # fmt: skip
SIDE = 0.7 * np.arange(-2, 3)
CIRCLE = np.arange(8) * np.pi / 4
MODES = {
    "8 Gaussians": (1.5 * np.stack([np.cos(CIRCLE), np.sin(CIRCLE)], axis=1), 0.2, np.arange(1.0, 9) / 36),
    "25 Gaussians": (np.stack(np.meshgrid(SIDE, SIDE), axis=-1).reshape(-1, 2), 0.15, np.arange(1.0, 26) / 325),
    "two modes": (np.array([[-10.0, 0.0], [6.0, 0.0]]) / 4, 0.25, np.array([0.25, 0.75])),
}


def conjugate(y):
    """Its posterior is N(y / 2, 1 / 2)."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def mixture(centres, scale, weights):
    base = dist.Normal(0.0, 2.0).expand([2]).to_event(1)

    def tilt(x):
        squares = jnp.sum((x - centres) ** 2, axis=1)
        log_density = logsumexp(jnp.log(weights) - squares / (2 * scale**2)) - jnp.log(2 * jnp.pi * scale**2)
        return base.log_prob(x) - log_density

    numpyro.sample("x", ebm.EnergyDistribution(tilt, base))


def of_modes(name):
    """Its target; centres are repeated, so that all three have as many and share their programs."""
    centres, scale, weights = MODES[name]
    first = np.repeat(weights[:1], 26 - len(weights)) / (26 - len(weights))
    padded = np.concatenate([np.repeat(centres[:1], len(first), axis=0), centres[1:]])
    arrays = padded, np.asarray(scale), np.append(first, weights[1:])
    return ebm.target(mixture, *map(jnp.asarray, arrays))


def shares(flow, name):
    return ebm.mode_weights(flow.sample(jax.random.key(9), (20_000,)), MODES[name][0]).weight


@pytest.mark.parametrize("objective", [ForwardKL, ReverseKL])
def test_gradients_of_both_divergences_are_those_of_their_closed_forms(objective):
    """q = N(m, s^2), p = N(y / 2, 1 / 2): of -E_p[log q], and of E_q[log q - log p], in m and s."""
    m, s, p = jnp.array([1.2, -0.3]), jnp.array([0.8, 0.9]), dist.Normal(Y / 2, np.sqrt(0.5))
    how = objective(ebm.target(conjugate, Y), 4000)

    def loss(numbers, key):
        density = Density(ebm.FlowModel(Normal(*numbers)), None, (2,))
        return how.loss(key, density, (), (), jnp.zeros((1, 2)))[0]

    found = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))((m, s), jax.random.split(jax.random.key(1), 20))
    if objective is ForwardKL:
        expected = (m - p.loc) / s**2, 1 / s - (p.variance + (m - p.loc) ** 2) / s**3
    else:
        expected = (m - p.loc) / p.variance, s / p.variance - 1 / s
    for each, exact in zip(found, expected, strict=True):
        error = np.std(each, axis=0, ddof=1) / np.sqrt(20)
        assert np.all(np.abs(np.mean(each, axis=0) - exact) < t_limit(2 * 2 * 2, 19) * error)


def test_log_z_and_what_weights_say_of_a_posterior():
    how = {"divergence": "reverse", "num_by_example": 200, "num_by_energy": 200, "num_draws": 4096}
    flow, target = Normal(jnp.zeros(2)), ebm.target(conjugate, Y)
    found = ebm.fit_flow_to(jax.random.key(2), target, flow, PARTICLES, progress_bar=False, **how)
    assert abs(found.log_z.value - LOG_Z) < t_limit(1, 15) * found.log_z.std_error
    assert found.log_z.diagnostics["effective_share"] > 0.9 and not found.log_z.doubts
    assert {"example", "example_held_out", "energy"} <= set(found.record.children)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("8 Gaussians", "25 Gaussians")), "two modes"]
)
def test_all_modes_are_covered_with_their_weights(name):
    how = {"num_by_example": 600, "num_by_energy": 300, "num_draws": 4096, "progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.EnergyWarning)  # of a flow that is small
        found = ebm.fit_flow_to(jax.random.key(3), of_modes(name), FLOW, PARTICLES, **how)
    of_flow = shares(found.flow, name)
    assert np.max(np.abs(of_flow - MODES[name][2])) < 0.05
    assert np.min(of_flow / MODES[name][2]) > 0.25


def test_plain_reverse_kl_loses_modes_and_says_so():
    how = {"divergence": "reverse", "num_by_energy": 300, "num_draws": 4096, "progress_bar": False}
    with pytest.warns(ebm.EnergyWarning, match="The flow is not the target"):
        found = ebm.fit_flow_to(jax.random.key(3), of_modes("8 Gaussians"), FLOW, None, **how)
    assert np.sum(shares(found.flow, "8 Gaussians") < 0.25 * MODES["8 Gaussians"][2]) >= 1


def test_what_makes_no_sense_is_refused():
    target = ebm.target(conjugate, Y)
    for settings in ({"num_draws": 100}, {"num_by_energy": -1}, {"divergence": "both"}):
        with pytest.raises(ebm.EnergyError, match=next(iter(settings))):
            ebm.fit_flow_to(jax.random.key(0), target, **settings)
    with pytest.raises(ebm.EnergyError, match="sampler=None leaves"):
        ebm.fit_flow_to(jax.random.key(0), target, sampler=None, num_by_energy=0)
    with pytest.raises(ebm.EnergyShapeError, match="points of shape \\(3,\\)"):
        ebm.fit_flow_to(jax.random.key(0), target, Normal(jnp.zeros(3)))
