"""Training against a generator: its bounds against quadrature and closed forms, and what the energy learns."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow
from limits import t_limit
from train_problems import BASE, best_log_likelihood, log_likelihood, log_z, two_modes

import ebm_ppl as ebm
from ebm_ppl.train.objective import Density

NUM = 64


def spline_flow(key, dim=1):
    transformer = RationalQuadraticSpline(knots=12, interval=4)
    settings = {"transformer": transformer, "flow_layers": dim, "nn_width": 16, "invert": False}
    return ebm.FlowGenerator(coupling_flow(key, base_dist=Normal(jnp.zeros(dim)), **settings))


def implicit(key, dim=1):
    return ebm.ImplicitGenerator(key, dim, width=32)


GENERATORS = {"flow": spline_flow, "implicit": implicit}


class Quartic(eqx.Module):
    """a x^2 / 2 + b x^4"""

    weights: jax.Array

    def __call__(self, x):
        return self.weights[0] * x[0] ** 2 / 2 + self.weights[1] * x[0] ** 4


QUARTIC = Quartic(jnp.array([-1.0, 0.05]))


def linear(key, encoder):
    """x = A z + b + s e, z in two dimensions and x in three, with an encoder whose mean is linear in x."""
    plain = ebm.ImplicitGenerator(key, 3, latent_dim=2, depth=0, noise=0.6)
    return eqx.tree_at(lambda g: (g.encoder.layers[0].weight, g.encoder.layers[0].bias), plain, encoder(plain))


def posterior(generator):
    """The encoder that is the posterior of z but for its correlation, of which a generator with columns at right
    angles has none: `(weight, bias)`."""
    a, b, s = generator.network.layers[0].weight, generator.network.layers[0].bias, 0.6
    covariance = jnp.linalg.inv(jnp.eye(2) + a.T @ a / s**2)
    mean = covariance @ a.T / s**2
    return (
        jnp.concatenate([mean, jnp.zeros((2, 3))]),
        jnp.concatenate([-mean @ b, 0.5 * jnp.log(jnp.diag(covariance))]),
    )


def other(generator):
    """With a slope and a width that are not those of the posterior."""
    (weight, bias), which = posterior(generator), jnp.array([0.8, 0.8, 1.0, 1.0])
    return which[:, None] * weight, which * bias + jnp.array([0.0, 0.0, 0.3, 0.3])


def mean_and_error(values):
    return np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))


def test_entropy_of_an_implicit_generator_is_bounded_from_below():
    """By as much as the encoder is off the posterior of z, and by nothing where it is that."""
    key = jax.random.key(0)
    right_angles = jnp.array([[1.0, 0.5], [-0.5, 1.0], [0.0, 0.0]])

    def entropies(encoder):
        def place(plain):
            return encoder(eqx.tree_at(lambda g: g.network.layers[0].weight, plain, right_angles))

        generator = eqx.tree_at(lambda g: g.network.layers[0].weight, linear(key, place), right_angles)
        return np.asarray(jax.vmap(generator.draw)(jax.random.split(jax.random.key(1), 20_000))[1])

    covariance = right_angles @ right_angles.T + 0.36 * jnp.eye(3)
    exact = float(dist.MultivariateNormal(jnp.zeros(3), covariance).entropy())
    (mean, error), (below, _) = map(mean_and_error, map(entropies, (posterior, other)))
    assert abs(mean - exact) < t_limit(1, 19_999) * error and error < 0.02
    # E[KL] of a normal distribution to another, in closed form
    a = right_angles
    noise = jnp.linalg.inv(jnp.eye(2) + a.T @ a / 0.36)
    mean_of = noise @ a.T / 0.36
    shift = 0.2**2 * jnp.diag(mean_of @ covariance @ mean_of.T)
    lost = 0.3 + (jnp.diag(noise) + shift) / (2 * jnp.diag(noise) * np.exp(0.6)) - 0.5
    score = (below - (exact - float(jnp.sum(lost)))) / mean_and_error(entropies(other))[1]
    assert abs(score) < t_limit(1, 19_999) and below < exact - 0.1


@pytest.mark.parametrize("name", GENERATORS)
def test_the_bound_is_below_log_z_by_the_divergence(name):
    """Before any training; of the flow the divergence itself is known by quadrature."""
    generator = GENERATORS[name](jax.random.key(0))
    objective, batch = ebm.Adversarial(generator, ratio=4), jnp.asarray(two_modes(64))
    density = Density(QUARTIC, BASE, (1,))
    parameters, _ = objective.init(jax.random.key(0), density, batch)

    def metrics(key):
        return objective.loss(key, density, parameters, (), batch)[1][1]

    found = jax.device_get(jax.jit(jax.vmap(metrics))(jax.random.split(jax.random.key(1), NUM)))
    mean, error = mean_and_error(found["log_z_lower"])
    assert mean < log_z(QUARTIC) - t_limit(2, NUM - 1) * error
    np.testing.assert_allclose(
        found["log_z_lower"] + found["log_likelihood_upper"], -jnp.mean(jax.vmap(density.total)(batch))
    )
    if name == "flow":
        grid = jnp.linspace(-12, 12, 4001)[:, None]
        log_q = jax.vmap(generator.flow.log_prob)(grid)
        terms = jnp.exp(log_q) * (-jax.vmap(density.total)(grid) - log_q)
        exact = jnp.sum(terms) * (grid[1, 0] - grid[0, 0])
        assert abs(mean - exact) < t_limit(2, NUM - 1) * error


@pytest.mark.parametrize("name", GENERATORS)
def test_energy_and_generator_have_the_slopes_that_they_should(name):
    """The energy that of data against draws, the generator that of the bound, and neither anything of the other's."""
    generator = GENERATORS[name](jax.random.key(0))
    objective, batch, key = ebm.Adversarial(generator), jnp.asarray(two_modes(4096)), jax.random.key(2)
    parameters, _ = objective.init(key, Density(QUARTIC, BASE, (1,)), batch)

    def loss(trained):
        energy, parameters = trained
        return objective.loss(key, Density(energy, BASE, (1,)), parameters, (), batch)[0]

    def bound(parameters):
        x, h = jax.vmap(objective.trained(parameters).draw)(jax.random.split(key, len(batch)))
        return jnp.mean(h - jax.vmap(Density(QUARTIC, BASE, (1,)).total)(x))

    of_energy, of_generator = jax.grad(loss)((QUARTIC, parameters))
    x, _ = jax.vmap(generator.draw)(jax.random.split(key, len(batch)))
    powers = [np.mean(np.asarray(batch) ** k) - np.mean(np.asarray(x) ** k) for k in (2, 4)]
    np.testing.assert_allclose(of_energy.weights, [powers[0] / 2, powers[1]])
    for found, exact in zip(jax.tree.leaves(of_generator), jax.tree.leaves(jax.grad(bound)(parameters)), strict=True):
        np.testing.assert_allclose(found, -exact, atol=1e-10)


def test_the_gradient_of_a_flow_has_no_noise_at_the_density_itself():
    flow = spline_flow(jax.random.key(0))
    density = Density(lambda x: -flow.flow.log_prob(x), None, (1,))
    objective = ebm.Adversarial(flow)
    parameters, _ = objective.init(jax.random.key(0), density, jnp.zeros((4, 1)))
    slopes = jax.grad(lambda p: objective.loss(jax.random.key(1), density, p, (), jnp.zeros((4, 1)))[0])(parameters)
    np.testing.assert_allclose(jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(slopes)]), 0.0, atol=1e-10)


def optimiser(of_energy, num):
    """Slow for the energy, without momentum for both."""
    rates = {"energy": of_energy, "generator": 5e-3}
    each = {name: optax.adam(optax.cosine_decay_schedule(rate, num), b1=0.0) for name, rate in rates.items()}
    return optax.multi_transform(each, ("energy", "generator"))


def trained(name, num, of_energy, data, base, dim=1):
    energy = ebm.MLPEnergy(jax.random.key(0), dim, width=32)
    objective = ebm.Adversarial(GENERATORS[name](jax.random.key(1), dim))
    settings = {"num_steps": num, "optimiser": optimiser(of_energy, num), "progress_bar": False}
    fitted = ebm.fit(jax.random.key(2), energy, data, objective, base=base, **settings)
    return fitted, objective.trained(fitted.parameters)


def bound_of(generator, energy, base):
    x, h = jax.vmap(generator.draw)(jax.random.split(jax.random.key(3), 20_000))
    return mean_and_error(h - jax.vmap(Density(energy, base, base.event_shape).total)(x))


@pytest.mark.slow
def test_two_modes_are_learned_against_a_flow():
    """Within .03 nats of the best, with a bound that is tight."""
    fitted, flow = trained("flow", 1200, 3e-3, two_modes(10_000), BASE)
    test = two_modes(10_000, seed=1)
    gap = best_log_likelihood(test) - log_likelihood(fitted.energy, test)
    (lower, error), exact = bound_of(flow, fitted.energy, BASE), log_z(fitted.energy)
    assert gap < 0.03
    assert -t_limit(1, 19_999) * error < exact - lower < 0.02


@pytest.mark.slow
def test_the_bound_is_tight_in_two_dimensions():
    """Of a correlated normal distribution with a bend."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(5000, 2))
    data[:, 1] = 0.5 * data[:, 1] + 0.5 * (data[:, 0] ** 2 - 1)
    base = dist.Normal(0.0, 2.0).expand([2]).to_event(1)
    fitted, flow = trained("flow", 500, 2e-3, data, base, dim=2)
    line = np.linspace(-9, 9, 361)
    grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    exact = jax.nn.logsumexp(base.log_prob(grid) - jax.vmap(fitted.energy)(grid)) + 2 * np.log(line[1] - line[0])
    lower, error = bound_of(flow, fitted.energy, base)
    assert -t_limit(1, 19_999) * error < exact - lower < 0.1


@pytest.mark.slow
def test_two_modes_are_learned_against_an_implicit_generator():
    """Less well: its entropy is known from below alone."""
    fitted, generator = trained("implicit", 1200, 1e-3, two_modes(10_000), BASE)
    test = two_modes(10_000, seed=1)
    gap = best_log_likelihood(test) - log_likelihood(fitted.energy, test)
    (lower, error), exact = bound_of(generator, fitted.energy, BASE), log_z(fitted.energy)
    untrained = best_log_likelihood(test) - log_likelihood(ebm.MLPEnergy(jax.random.key(0), 1, width=32), test)
    assert gap < 0.5 * untrained
    assert exact - lower > -t_limit(1, 19_999) * error


def test_a_generator_of_other_points_is_refused():
    with pytest.raises(ebm.EnergyShapeError, match=r"a point of shape \(2,\)"):
        ebm.fit(jax.random.key(0), QUARTIC, two_modes(10), ebm.Adversarial(implicit(jax.random.key(0), 2)), base=BASE)
    with pytest.raises(ebm.EnergyError, match="ratio"):
        ebm.Adversarial(implicit(jax.random.key(0)), ratio=0)
    with pytest.raises(ebm.EnergyError, match="noise"):
        ebm.ImplicitGenerator(jax.random.key(0), 1, noise=0.0)
