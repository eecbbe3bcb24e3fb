"""The search for a reference in many dimensions: by the gradients at a cloud that is too small to be fitted."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ebm_ppl as ebm
from ebm_ppl.logz import search as search_module
from ebm_ppl.logz.fitted import BY_PILOT, IMPORTANCE, SHORT_PATH, Pilot, _doubts
from ebm_ppl.logz.importance import LARGEST_K_OF_FEW, Weighed, draw
from ebm_ppl.logz.integral import Opinion
from ebm_ppl.logz.modes import find_modes
from ebm_ppl.logz.search import GOOD_SHARE, MOST_MODES, Effort, attainable_share, find_reference

DIM, NUM = 30, 300
EFFORT = Effort(num_ascents=16, num_draws=1024, max_refits=0, defence=0.01, flow=None)
COVARIANCE = 0.1 * 0.9 ** np.abs(np.subtract.outer(np.arange(DIM), np.arange(DIM)))
POSTERIOR = np.linalg.inv(np.eye(DIM) + np.linalg.inv(COVARIANCE))


def target_of(log_likelihood):
    def model():
        x = numpyro.sample("x", dist.Normal(0, 1).expand([DIM]).to_event(1))
        ebm.energy_factor("likelihood", -log_likelihood(x), role="loss")

    return ebm.target(model)


def log_likelihood_about(mean):
    return dist.MultivariateNormal(jnp.full(DIM, mean), COVARIANCE).log_prob


def cloud_about(mean):
    """Draws of the posterior of a likelihood about a mean."""
    centre = POSTERIOR @ np.linalg.solve(COVARIANCE, np.full(DIM, mean))
    return np.random.default_rng(0).multivariate_normal(centre, POSTERIOR, size=NUM)


def search(log_likelihood, log_z=0.0):
    story = []
    found, _ = find_reference(jax.random.key(0), target_of(log_likelihood), cloud_about(1.0), log_z, EFFORT, story)
    return found, story


LOG_Z = dist.MultivariateNormal(jnp.zeros(DIM), np.eye(DIM) + COVARIANCE).log_prob(jnp.ones(DIM))


def test_gradients_fit_what_the_cloud_is_too_small_for():
    found, story = search(log_likelihood_about(1.0), float(LOG_Z))
    assert attainable_share(NUM, DIM) < 0.3
    assert found.seen.effective_share > GOOD_SHARE
    assert abs(found.seen.value - LOG_Z) < 4 * found.seen.std_error < 0.1
    assert "by gradients" in story[-1]  # no mixture was fitted
    ascents = found.num_evaluations - NUM - EFFORT.num_draws
    assert ascents > 2 * DIM


def test_a_mode_that_the_gradients_know_nothing_of_is_left_to_mixtures():
    """Two modes of one mass, the cloud in one of them, which a search for modes finds."""
    one, other = log_likelihood_about(1.0), log_likelihood_about(-1.0)
    found, story = search(lambda x: jnp.logaddexp(one(x), other(x)), float(LOG_Z))
    assert not any("by gradients" in line for line in story)
    assert any("modes that the pilot missed" in line for line in story)
    assert abs(found.seen.value - LOG_Z - np.log(2)) < max(4 * found.seen.std_error, 0.5)


def forty_modes():
    """Narrow ones on a grid, of which nobody has met but the first, and log Z."""
    centres = 4.0 * np.stack(np.meshgrid(np.arange(8) - 3.5, np.arange(5) - 2.0), axis=-1).reshape(40, 2)

    def model():
        x = numpyro.sample("x", dist.Normal(0, 8).expand([2]).to_event(1))
        modes = dist.Normal(centres, 0.3).to_event(1).log_prob(x)
        ebm.energy_factor("modes", -jax.nn.logsumexp(modes), role="loss")

    log_z = np.log(np.sum(np.exp(dist.Normal(0, np.hypot(8, 0.3)).log_prob(centres).sum(axis=1))))
    return ebm.target(model), np.random.default_rng(0).normal(centres[0], 0.3, size=(NUM, 2)), log_z


@pytest.mark.parametrize("most", [MOST_MODES, 8])
def test_every_mode_gets_a_component_or_is_counted(most, monkeypatch):
    """Of forty 32 had one, and the others were missed without a word."""
    monkeypatch.setattr(search_module, "MOST_MODES", most)
    target, cloud, log_z = forty_modes()
    found, modes = find_reference(
        jax.random.key(0), target, cloud, float(log_z), EFFORT._replace(num_ascents=512, num_draws=4096), []
    )
    assert len(modes.z) == 40
    if most == MOST_MODES:
        assert found.num_left_out == 0 and abs(found.seen.value - log_z) < 4 * found.seen.std_error < 0.3
    else:
        assert found.num_left_out == 31


@pytest.mark.parametrize(
    ("branch", "num", "is_told"),
    [(IMPORTANCE, 3, True), (SHORT_PATH, 3, True), (BY_PILOT, 3, False), (IMPORTANCE, 0, False)],
)
def test_modes_that_are_left_out_are_a_doubt(branch, num, is_told):
    """Where draws of the reference, or a path from it, are the answer."""
    answer = Opinion(0.0, 0.1, 0.0, 1.0, 0)
    doubts = _doubts(answer, branch, Pilot(np.zeros((1, 2)), answer, (), ""), Weighed(np.zeros((16, 64)), 0), num)
    assert [doubt.startswith("3 of the modes") for doubt in doubts] == [True] * is_told


def test_modes_known_from_before():
    """The ascents of this search do not come to the narrow one."""
    wide, narrow = log_likelihood_about(1.0), dist.MultivariateNormal(jnp.full(DIM, -4.0), 1e-3 * COVARIANCE).log_prob
    target = target_of(lambda x: jnp.logaddexp(wide(x), narrow(x)))
    known, _ = find_modes(target, np.full((2, DIM), -4.0), np.ones(DIM))
    stories = [], []
    for modes, story in zip((None, known), stories, strict=True):
        _, met = find_reference(jax.random.key(0), target, cloud_about(1.0), float(LOG_Z), EFFORT, story, modes)
        assert len(met.z) == 1 + (modes is not None)
    assert not any("the pilot missed" in line for line in stories[0])
    assert "16 ascents arrived: 2 modes, 1 of them from before" in stories[1][0]
    assert any("1 modes that the pilot missed" in line for line in stories[1])


def test_a_fit_with_a_heavy_tail_is_not_good_enough(monkeypatch):
    """Nearly all draws are effective, but for a tail without a mean: so another fit, and that one is the better."""

    def drawn(*arguments):
        z, seen = draw(*arguments)
        if not tails:
            rng = np.random.default_rng(0)
            light = 0.01 * rng.random(seen.log_weight.shape)
            seen = Weighed(np.maximum(-0.95 * np.log(rng.random(light.shape)) - 5, light), 0)
        tails.append(seen.pareto_k)
        shares.append(seen.effective_share)
        return z, seen

    tails, shares, story = [], [], []
    monkeypatch.setattr("ebm_ppl.logz.search.draw", drawn)

    def model():
        x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        ebm.energy_factor("nothing", 0.0 * x[0], role="loss")

    cloud = np.random.default_rng(1).normal(size=(NUM, 2))
    effort = EFFORT._replace(max_refits=2)
    found, _ = find_reference(jax.random.key(0), ebm.target(model), cloud, 0.0, effort, story)
    assert tails[0] > LARGEST_K_OF_FEW > tails[1] and shares[0] > shares[1] and len(tails) == 2
    assert found.seen.pareto_k == tails[1] and "tail is heavy" in story[1]


def test_a_cloud_that_does_not_span_the_space_is_joined_by_draws(monkeypatch):
    """Halves of 20 points in 30 dimensions: their gradients alone fit next to nothing, those at more draws all."""

    def share():
        found, _ = find_reference(jax.random.key(0), target, cloud_about(1.0)[:40], float(LOG_Z), EFFORT, [])
        assert abs(found.seen.value - LOG_Z) < 4 * found.seen.std_error
        return found.seen.effective_share

    target = target_of(log_likelihood_about(1.0))
    joined = share()
    monkeypatch.setattr("ebm_ppl.logz.search.POINTS_PER_DIMENSION", 0)
    assert joined > 0.8 > share() + 0.1


def test_gradients_in_coordinates_of_their_own():
    """Of a funnel of 30 coordinates, v ~ N(0, 1) and x ~ N(0, e^v), whose cloud is too small for a mixture."""

    def model():
        v = numpyro.sample("v", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(0, jnp.exp(v)).expand([DIM - 1]).to_event(1))

    rng, story = np.random.default_rng(0), []
    v = rng.normal(size=(NUM, 1))
    cloud = np.concatenate([v, np.exp(v) * rng.normal(size=(NUM, DIM - 1))], axis=1)
    target, shares = ebm.target(model), []
    for seed in range(3):
        found, _ = find_reference(jax.random.key(seed), target, cloud, 0.0, EFFORT, story)
        assert "non-centred" in story[-2] or "scales that follow" in story[-2]
        assert "by gradients" in story[-1]
        shares.append(found.seen.effective_share)
    assert np.median(shares) > 0.8  # of 12 keys one has a single heavy draw, and a share of .5


def test_gradients_that_are_not_finite_are_left_alone_and_counted():
    @jax.custom_jvp
    def without_gradient(x):
        return log_likelihood_about(1.0)(x)

    without_gradient.defjvp(lambda primals, tangents: (without_gradient(*primals), jnp.nan * tangents[0].sum()))
    found, story = search(without_gradient, float(LOG_Z))
    assert not any("by gradients" in line for line in story) and "fit 1" in story[-1]
    assert found.num_evaluations >= NUM + EFFORT.num_draws
