"""The Stein discrepancy: its kernel against derivatives, its sums against a double loop, its size and its power."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from limits import t_limit

import ebm_ppl as ebm
from ebm_ppl.evaluate.chains import spacing
from ebm_ppl.evaluate.significance import median_distance
from ebm_ppl.evaluate.stein import PERSISTENCE, bootstrap, stein_kernel, wild_signs

NUM = 500
"""Replications."""
SIZE = 0.05
SLACK = 2 * np.sqrt(SIZE * (1 - SIZE) / NUM)


def banana(x):
    """x_0 ~ N(0, 1), x_1 | x_0 ~ N(x_0^2, 1/2^2)"""
    return x[0] ** 2 / 2 + 2 * (x[1] - x[0] ** 2) ** 2


def draw_banana(key, num):
    first, second = jax.random.normal(key, (2, num))
    return jnp.stack([first, first**2 + second / 2], axis=1)


def test_kernel_is_the_one_of_the_definition():
    scale = 1.3

    def k(x, y):
        return (1 + jnp.sum((x - y) ** 2) / scale**2) ** -0.5

    def h(x, y):
        s, t = -jax.grad(banana)(x), -jax.grad(banana)(y)
        mixed = jax.jacfwd(jax.grad(k, 0), 1)(x, y)
        return s @ t * k(x, y) + s @ jax.grad(k, 1)(x, y) + t @ jax.grad(k, 0)(x, y) + jnp.trace(mixed)

    points = draw_banana(jax.random.key(0), 6) + 0.3
    scores = -jax.vmap(jax.grad(banana))(points)
    for i in range(6):
        for j in range(6):
            found = stein_kernel((points[i], scores[i]), (points[j], scores[j]), jnp.asarray(scale))
            assert float(found) == pytest.approx(float(h(points[i], points[j])), rel=1e-9, abs=1e-9)


def test_statistic_and_p_value_are_those_of_the_whole_matrix():
    """Of more points than a block has."""
    num, scale = 150, jnp.asarray(0.9)
    points = draw_banana(jax.random.key(0), num)
    scores = -jax.vmap(jax.grad(banana))(points)
    signs = wild_signs(jax.random.key(1), (num,), 50, 0.0).astype(float)
    pairs = jax.vmap(jax.vmap(lambda i, j: stein_kernel((points[i], scores[i]), (points[j], scores[j]), scale)))
    h = np.array(pairs(*jnp.indices((num, num))))
    np.fill_diagonal(h, 0.0)
    exact = h.sum() / (num * (num - 1))
    simulated = np.einsum("ib,ij,jb->b", signs, h, signs) / (num * (num - 1))
    statistic, p_value = bootstrap(points, scores, scale, signs)
    assert float(statistic) == pytest.approx(exact, rel=1e-9)
    assert float(p_value) == pytest.approx((1 + np.sum(simulated >= exact)) / 51)


def p_values(draw, energy, num=200, lead=None, persistence=0.0, replications=NUM):
    """Of independent replications, in one program; `draw(key)` gives points of shape (num, dim)."""
    lead = (num,) if lead is None else lead
    score = jax.vmap(lambda x: -jax.grad(energy)(x))

    def once(key):
        key_points, key_scale, key_signs = jax.random.split(key, 3)
        points = draw(key_points)
        signs = wild_signs(key_signs, lead, 199, persistence).astype(points.dtype)
        return bootstrap(points, score(points), median_distance(key_scale, points), signs)[1]

    keys = jax.random.split(jax.random.key(0), replications)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(once, keys, batch_size=25))(keys))


def bell(x):
    return x @ x / 2


DRAWS = {
    "bell": (bell, lambda key: jax.random.normal(key, (200, 2))),
    "banana": (banana, lambda key: draw_banana(key, 200)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_size_is_five_percent(name):
    """Within two standard errors of it, of 500 replications."""
    energy, draw = DRAWS[name]
    assert abs(np.mean(p_values(draw, energy) <= SIZE) - SIZE) < SLACK


ALTERNATIVES = {
    "shifted by .3": (bell, lambda key: jax.random.normal(key, (200, 2)) + jnp.array([0.3, 0.0])),
    "tails of Student's t": (bell, lambda key: jax.random.t(key, 3.0, (200, 2)) / np.sqrt(3.0)),
    "a bend that is too weak": (banana, lambda key: draw_banana(key, 200) * jnp.array([1.0, 0.8])),
}
"""Each of 200 points."""


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_power(name):
    energy, draw = ALTERNATIVES[name]
    assert np.mean(p_values(draw, energy, replications=200) <= SIZE) > 0.9


def autoregression(key, num_chains, num_draws, correlation=0.9):
    """Chains of N(0, I) in the plane, shape (num_chains, num_draws, 2); 19 draws are worth one."""

    def step(x, noise):
        x = correlation * x + np.sqrt(1 - correlation**2) * noise
        return x, x

    start, noise = jax.random.normal(key, (num_chains, 2)), jax.random.fold_in(key, 1)
    chains = jax.lax.scan(step, start, jax.random.normal(noise, (num_draws, num_chains, 2)))[1]
    return chains.swapaxes(0, 1)


def test_size_of_chains_that_are_thinned_with_signs_that_last():
    """Chains of 1000 draws of which 19 are worth one."""

    def draw(key):
        return autoregression(key, 4, 1000)[:, ::19].reshape(-1, 2)

    rejected = np.mean(p_values(draw, bell, lead=(4, 53), persistence=PERSISTENCE) <= SIZE)
    assert abs(rejected - SIZE) < SLACK


def test_signs_that_are_independent_reject_chains_that_are_right():
    """What a bootstrap for independent points makes of draws that depend on one another."""

    def draw(key):
        return autoregression(key, 4, 50).reshape(-1, 2)

    assert np.mean(p_values(draw, bell, replications=200) <= SIZE) > 0.5


def test_chains_are_thinned_to_what_they_are_worth():
    chains = autoregression(jax.random.key(0), 4, 2000)
    assert spacing(np.asarray(chains)) == pytest.approx(19, rel=0.25)
    found = ebm.stein_test(jax.random.key(1), bell, chains, chains=True)
    assert found.num_points == pytest.approx(8000 / 19, rel=0.3) and found.p_value > 0.001
    assert ebm.stein_test(jax.random.key(1), bell, chains, chains=True, thin=40).num_points == 200
    moved = ebm.stein_test(jax.random.key(1), bell, chains + 0.5, chains=True)
    assert moved.p_value < 0.01


def test_signs_are_as_correlated_as_they_should_be():
    signs = np.asarray(wild_signs(jax.random.key(0), (2, 3), 40_000, 0.5)).reshape(2, 3, -1)
    assert set(np.unique(signs)) == {-1, 1}
    for (a, i), (b, j), exact in (
        ((0, 0), (0, 1), 0.5),
        ((0, 1), (0, 2), 0.5),
        ((0, 0), (0, 2), 0.25),
        ((0, 2), (1, 0), 0),
    ):
        products = signs[a, i] * signs[b, j]
        assert abs(products.mean() - exact) < t_limit(4, 39_999) * products.std(ddof=1) / 200


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_expectation_under_the_density_is_zero_in_bounded_support_too(scale):
    """Stein's identity, of an energy on the unit square that is tilted from a Beta base."""
    base = dist.Beta(2.0, 1.0).expand([2]).to_event(1)

    def once(key):
        points = dist.Beta(2.0, 3.0).sample(key, (100, 2))
        return points

    energy = lambda x: -2 * jnp.sum(jnp.log1p(-x))  # noqa: E731  # Beta(2, 1) times (1 - x)^2 is Beta(2, 3)
    keys = jax.random.split(jax.random.key(0), 100)
    settings = {"base": base, "scale": scale, "num_bootstrap": 19}
    found = np.array([ebm.stein_test(key, energy, once(key), **settings).statistic for key in keys])
    assert abs(found.mean()) < t_limit(2, 99) * found.std(ddof=1) / 10
    uniform = jax.random.uniform(jax.random.key(1), (200, 2))
    assert ebm.stein_test(jax.random.key(2), energy, uniform, base=base).p_value < 0.01


def test_weights_of_modes_that_lie_apart_are_not_seen():
    """As documented: only draws of the density, against data, tell of them."""

    def two(x):
        return -jnp.logaddexp(-((x[0] - 6) ** 2) / 2, -((x[0] + 6) ** 2) / 2) + x[1] ** 2 / 2

    side = jnp.where(jnp.arange(400) < 360, 6.0, -6.0)
    data = jax.random.normal(jax.random.key(0), (400, 2)).at[:, 0].add(side)
    assert ebm.stein_test(jax.random.key(1), two, data).p_value > 0.05
    draws = jax.random.normal(jax.random.key(2), (400, 2)).at[:, 0].add(jnp.where(jnp.arange(400) < 200, 6.0, -6.0))
    assert ebm.mmd_test(jax.random.key(3), data, draws).p_value < 0.01


def test_events_of_any_shape_are_points():
    data = jax.random.normal(jax.random.key(0), (60, 2, 3))
    found = ebm.stein_test(jax.random.key(1), lambda x: jnp.sum(x**2) / 2, data, num_bootstrap=99)
    flat = ebm.stein_test(jax.random.key(1), bell, data.reshape(60, 6), num_bootstrap=99)
    assert found == flat


BELL = jnp.zeros((20, 2)) + jnp.arange(20.0)[:, None]


@pytest.mark.parametrize(
    ("points", "settings", "error", "message"),
    [
        (BELL[:5], {}, ebm.EnergyError, "10 points at least; got 5"),
        (BELL.at[0, 0].set(jnp.nan), {}, ebm.EnergyError, "1 of 20 events that are not finite"),
        (jnp.ones((20, 2)), {}, ebm.EnergyError, "must not coincide"),
        (BELL, {"scale": -1.0}, ebm.EnergyError, "positive length"),
        (BELL, {"num_bootstrap": 5}, ebm.EnergyError, "num_bootstrap is 19 at least"),
        (BELL, {"thin": 0, "chains": True}, ebm.EnergyError, "thin"),
        (BELL, {"thin": 2}, ebm.EnergyError, "thin"),
        (BELL, {"base": dist.Normal(0.0, 1.0)}, ebm.EnergyShapeError, r"event shape \(\)"),
        (BELL, {"base": dist.Poisson(1.0).expand([2]).to_event(1)}, ebm.EnergyError, "discrete"),
        (
            BELL,
            {"base": dist.Exponential().expand([2]).to_event(1)},
            ebm.EnergyError,
            "1 of 20 points lie on the border",
        ),
    ],
    ids=["few", "nan", "same", "scale", "bootstrap", "thin", "thin of points", "base", "discrete", "border"],
)
def test_what_makes_no_sense_is_refused(points, settings, error, message):
    with pytest.raises(error, match=message):
        ebm.stein_test(jax.random.key(0), bell, points, **settings)


def test_scores_whose_products_overflow_are_refused():
    """Their statistic is a NaN, than which no simulated one is larger."""
    with pytest.raises(ebm.NonFiniteEnergyError, match=r"gradients of the energy go up to .*e\+200"):
        ebm.stein_test(jax.random.key(0), lambda x: 1e200 * x @ x, np.linspace(-1, 1, 20)[:, None])


def test_chains_that_are_too_short_are_refused():
    with pytest.raises(ebm.EnergyError, match="four draws at least"):
        ebm.stein_test(jax.random.key(0), lambda x: x @ x, np.random.default_rng(0).normal(size=(5, 3, 1)), chains=True)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ebm.NonFiniteEnergyError, match="not finite at 1 of 20 points"):
        ebm.stein_test(jax.random.key(0), lambda x: jnp.sum(jnp.sqrt(x)), BELL)
    with pytest.raises(ebm.EnergyShapeError, match="one number for each event"):
        ebm.stein_test(jax.random.key(0), lambda x: x, BELL)
