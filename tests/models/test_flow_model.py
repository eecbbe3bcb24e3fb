"""Flows as models of data: a density that is exact, log Z = 0, and maximum likelihood through the one `fit`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow, masked_autoregressive_flow
from flowjax.train import fit_to_data
from limits import t_limit, z_limit
from numpyro.handlers import seed, trace
from numpyro.infer.util import log_density

import ebm_ppl as ebm

SPLINE = RationalQuadraticSpline(knots=6, interval=3.0)
SMALL = {"base_dist": Normal(jnp.zeros(2)), "flow_layers": 2, "nn_width": 8}


def bent(flow, size=0.3):
    """A flow whose numbers are drawn, not trained."""
    arrays, others = eqx.partition(flow, eqx.is_inexact_array)
    rng = np.random.default_rng(0)
    return eqx.combine(jax.tree.map(lambda x: x + size * rng.normal(size=x.shape), arrays), others)


def made(kind):
    if kind == "splines":
        return ebm.FlowModel(bent(coupling_flow(jax.random.key(0), transformer=SPLINE, **SMALL)))
    return ebm.FlowModel(bent(masked_autoregressive_flow(jax.random.key(0), **SMALL)))


AIS = ebm.AIS(num_chains=256, num_stages=100, pilot=ebm.SMC(num_particles=256, target_ess=0.5, num_moves=2))
KINDS = "splines", "autoregressive"
ADAM = optax.adam(1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_density_integrates_to_one_and_is_drawn_from(kind):
    """By the midpoint rule on a square that holds all draws; E_p[q / p] = 1 for a normal density q within."""
    model = made(kind)
    energy = jax.jit(jax.vmap(model))
    x = np.asarray(model.sample(jax.random.key(1), 20_000))
    low, high = x.min(axis=0) - 2.0, x.max(axis=0) + 2.0
    cells = 300
    sides = [low[i] + (high[i] - low[i]) * (np.arange(cells) + 0.5) / cells for i in range(2)]
    grid = np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2)
    assert np.exp(-energy(grid)).sum() * np.prod((high - low) / cells) == pytest.approx(1.0, abs=5e-3)
    q = dist.MultivariateNormal(x.mean(axis=0), np.cov(x.T) / 4)
    ratios = np.exp(q.log_prob(x) + energy(x))
    assert abs(ratios.mean() - 1) < z_limit(2) * ratios.std() / np.sqrt(len(ratios))


def test_log_z_is_zero_by_annealed_importance_sampling():
    model, base = made("splines"), dist.Normal(0.0, 2.0).expand([2]).to_event(1)

    def program():
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: model.energy(x) + base.log_prob(x), base))

    found = ebm.log_z(jax.random.key(2), ebm.target(program), AIS)
    assert abs(found.value) < 0.05
    assert abs(found.value) < z_limit(1) * found.std_error


def test_it_is_a_program_of_numpyro():
    model = made("autoregressive")
    x = model.sample(jax.random.key(3), 5)
    total, traced = log_density(model.model, (x,), {}, {})
    np.testing.assert_allclose(total, -sum(model.energy(each) for each in x), rtol=1e-9)
    assert [frame.name for frame in traced["x"]["cond_indep_stack"]] == ["observation"]
    drawn = trace(seed(model.model, jax.random.key(4))).get_trace(num=3)
    assert drawn["x"]["value"].shape == (3, 2) and not drawn["x"]["is_observed"]
    target = ebm.target(model.model, num=3)
    z = target.sample_reference(jax.random.key(5))
    np.testing.assert_allclose(target.log_reference(z), -sum(model(each) for each in z.reshape(3, 2)), rtol=1e-9)


def of_normal_events():
    """A normal flow fitted to (num, 2, 3) events, and to what maximum likelihood must come."""
    import flowjax.distributions
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import ebm_ppl

    data = np.random.default_rng(0).normal(2.0, 0.5, size=(500, 2, 3))
    model = ebm_ppl.FlowModel(flowjax.distributions.Normal(jnp.zeros((2, 3))))
    rate = optax.adam(optax.cosine_decay_schedule(0.1, 500))
    how = {"num_steps": 500, "batch_size": 500, "optimiser": rate, "progress_bar": False}
    fitted = ebm_ppl.fit(jax.random.key(0), model, data, ebm_ppl.MaximumLikelihood(), **how)
    flow, dtype = fitted.energy.flow, jnp.result_type(float)
    assert fitted.energy.event_shape == (2, 3)
    assert all(x.dtype == dtype for x in (flow.loc, flow.scale, fitted.energy(jnp.asarray(data[0], dtype))))
    found = np.stack([flow.loc, flow.scale]), np.stack([data.mean(axis=0), data.std(axis=0)])
    return [x.tolist() for x in found]


def test_maximum_likelihood_of_a_normal_flow_is_mean_and_deviation(in_both_precisions):
    for (found, expected), tolerance in zip(in_both_precisions(of_normal_events), (1e-3, 1e-4), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance)


def moons(num, rng):
    t = rng.uniform(0, np.pi, num)
    upper = rng.random(num) < 0.5
    x = np.where(upper, np.cos(t) - 0.5, 0.5 - np.cos(t)), np.where(upper, np.sin(t) - 0.25, 0.25 - np.sin(t))
    return np.stack(x, axis=1) + 0.1 * rng.normal(size=(num, 2))


@pytest.mark.slow  # it is a table of the benchmark, too
def test_two_moons_are_as_likely_as_after_the_training_of_flowjax():
    """The same flow, points, optimiser, batch and number of steps; the result is the best by the points held out."""
    epochs, size, replicas = 15, 128, 3
    untrained = coupling_flow(jax.random.key(0), transformer=SPLINE, **SMALL)
    gains = []
    for replica in range(replicas):
        rng, key = np.random.default_rng(replica), jax.random.key(replica)
        data, test = moons(size * 20, rng), jnp.asarray(moons(5000, rng))
        few = len(data) // 10
        steps = epochs * ((len(data) - few) // size)
        theirs, _ = fit_to_data(
            key, untrained, data, learning_rate=1e-2, max_epochs=epochs, max_patience=epochs, batch_size=size,
            show_progress=False,
        )  # fmt: skip
        fitted = ebm.fit(
            key, ebm.FlowModel(untrained), data[few:], ebm.MaximumLikelihood(), optimiser=ADAM, num_steps=steps,
            batch_size=size, averaging=0.95, held_out=data[:few], every=steps // epochs, progress_bar=False,
        )  # fmt: skip
        gains.append(float(np.mean(fitted.energy.flow.log_prob(test) - theirs.log_prob(test))))
    error = np.std(gains, ddof=1) / np.sqrt(replicas)
    assert np.mean(gains) > -t_limit(1, replicas - 1) * error
    assert np.mean(gains) > -0.02  # in nats, so that a large error is no excuse


def test_what_maximum_likelihood_refuses():
    data, base = jnp.zeros((10, 2)), dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    key, objective = jax.random.key(0), ebm.MaximumLikelihood()
    with pytest.raises(ebm.EnergyError, match="log Z = 0, such as FlowModel"):
        ebm.fit(key, ebm.MLPEnergy(key, dim=2), data, objective)
    with pytest.raises(ebm.EnergyError, match="takes no base"):
        ebm.fit(key, made("splines"), data, objective, base=base)
    with pytest.raises(ebm.EnergyError, match="distribution of flowjax without conditions"):
        ebm.FlowModel(base)
