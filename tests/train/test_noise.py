"""Energies that are conditional on a level of noise: what they learn at each, and draws by walking down the levels."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from limits import t_limit
from train_problems import best_log_likelihood, log_likelihood, two_modes

import ebm_ppl as ebm
from ebm_ppl.train.objective import Density
from ebm_ppl.train.walkers import Dynamics

LEVELS = (0.3, 0.8, 2.0)
LINE = dist.Uniform(-15.0, 15.0).expand([1]).to_event(1)
"""Where a density without a base is integrated."""


class Bells(eqx.Module):
    """|x|^2 / 2v, with a variance for each of `LEVELS`."""

    variances: jax.Array

    def at(self, sigma):
        variance = self.variances[jnp.argmin(jnp.abs(jnp.array(LEVELS) - sigma))]
        return lambda x: x @ x / (2 * variance)

    def __call__(self, x):
        return self.at(LEVELS[0])(x)


class Modes(eqx.Module):
    """Minus the log of `sum_j w_j N(m_j, 1 + sigma^2)` on a line, up to a constant of its own at each level."""

    means: jax.Array
    logit: jax.Array
    """Log odds of the second mode."""
    slope: float = 0.0
    """Of the constant, in log sigma."""

    def at(self, sigma):
        def energy(x):
            each = dist.Normal(self.means, jnp.sqrt(1 + sigma**2)).log_prob(x[0])
            weights = jax.nn.log_sigmoid(jnp.array([-1.0, 1.0]) * self.logit)
            return self.slope * jnp.log(sigma) - jax.nn.logsumexp(each + weights)

        return energy

    def __call__(self, x):
        return self.at(0.1)(x)


FAR = jnp.array([-10.0, 10.0])
ODDS = jnp.log(3.0)


def far_modes(num, seed=0):
    """.25 N(-10, 1) + .75 N(10, 1), shape (num, 1)."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((num, 1)) < 0.25, -10.0, 10.0) + rng.normal(size=(num, 1))


# Learning


def slopes_of_denoising(variances, batch, num=64):
    """Loss and its gradient in the variance of each level, (num, 1 + levels), for independent keys."""
    return np.asarray(slope_of_denoising(jax.random.split(jax.random.key(0), num), variances, batch))


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, None))
def slope_of_denoising(key, variances, batch):
    def loss(energy):
        density = Density(energy, None, batch.shape[1:])
        return ebm.DenoisingScoreMatching(LEVELS).loss(key, density, (), (), batch)[0]

    value, gradient = jax.value_and_grad(loss)(Bells(variances))
    return jnp.append(value, gradient.variances)


def test_denoising_at_many_levels_is_least_at_the_noisy_density_of_each():
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(2000, 2)))
    mean_square = float(jnp.mean(batch**2))
    best = mean_square + jnp.array(LEVELS) ** 2
    found = slopes_of_denoising(best, batch)
    # weighted by sigma^2, the least loss of a level is d/2 (1 - sigma^2 / v)
    exact = np.append(np.mean(1 - jnp.array(LEVELS) ** 2 / best), np.zeros(len(LEVELS)))
    limit = t_limit(3 * len(exact), len(found) - 1)

    def scores(found):
        return (found.mean(axis=0) - exact) / (found.std(axis=0, ddof=1) / np.sqrt(len(found)))

    assert np.max(np.abs(scores(found))) < limit, scores(found)
    assert np.all(scores(slopes_of_denoising(0.9 * best, batch))[1:] < -limit)
    assert np.all(scores(slopes_of_denoising(1.1 * best, batch))[1:] > limit)


def test_two_modes_are_learned():
    """Of data with noise of .2 on them; the best that it can is .006 nats below the data's own density."""
    levels = ebm.noise_levels(0.2, 4.0, 8)
    energy = ebm.NoiseConditionalEnergy(jax.random.key(0), 1, levels, scale=1.8, width=32)
    optimiser = optax.adam(optax.cosine_decay_schedule(5e-3, 1000))
    settings = {"num_steps": 1000, "averaging": 0.99, "batch_size": 256, "progress_bar": False}
    objective = ebm.DenoisingScoreMatching(levels)
    fitted = ebm.fit(jax.random.key(1), energy, two_modes(10_000), objective, optimiser=optimiser, **settings)
    test = two_modes(10_000, seed=1)
    gap = best_log_likelihood(test) - log_likelihood(fitted.energy, test, LINE)
    assert gap < 0.1


def test_score_matching_is_blind_to_the_weights_of_modes_that_lie_apart():
    """Two modes 20 standard deviations apart: the means are those of the data, the weights those of the start.

    At many levels the wide ones tell of the weights, and an energy whose levels have them in common learns them.
    """
    data, start = far_modes(4000), Modes(0.9 * FAR, jnp.zeros(()))
    share = np.mean(data > 0)
    settings = {"optimiser": optax.adam(0.02), "num_steps": 600, "averaging": 0.99, "progress_bar": False}
    exact = np.array([data[data < 0].mean(), data[data > 0].mean()])
    blind = ebm.fit(jax.random.key(0), start, data, ebm.ScoreMatching(), **settings).energy
    np.testing.assert_allclose(blind.means, exact, atol=0.1)
    assert abs(float(blind.logit)) < 1e-6
    wide = ebm.DenoisingScoreMatching(ebm.noise_levels(0.1, 15.0, 8))
    seeing = ebm.fit(jax.random.key(0), start, data, wide, **settings).energy
    np.testing.assert_allclose(seeing.means, exact, atol=0.5)
    assert abs(jax.nn.sigmoid(seeing.logit) - share) < 0.03


# The network


def test_the_energy_by_itself_is_that_of_the_smallest_level():
    energy = ebm.NoiseConditionalEnergy(jax.random.key(0), 3, LEVELS)
    x = jnp.array([0.3, -1.0, 2.0])
    assert energy(x) == energy.at(LEVELS[0])(x) != energy.at(LEVELS[1])(x)
    each = jax.vmap(lambda sigma: energy.at(sigma)(x))(jnp.array(LEVELS))
    np.testing.assert_allclose(each, [energy.at(sigma)(x) for sigma in LEVELS])
    assert any(leaf is sigma for sigma in [jnp.array(0.4)] for leaf in jax.tree.leaves(energy.at(sigma)))


def test_without_its_network_it_is_the_reference():
    energy = ebm.NoiseConditionalEnergy(jax.random.key(0), 2, LEVELS, scale=1.7)
    plain = eqx.tree_at(
        lambda e: e.network, energy, jax.tree.map(lambda w: 0 * w if eqx.is_array(w) else w, energy.network)
    )
    x = np.random.default_rng(0).normal(size=(20, 2))
    for sigma in LEVELS:
        total = jax.vmap(plain.at(sigma))(x) + energy.reference(sigma).log_prob(x)
        np.testing.assert_allclose(total, total[0])


def test_in_single_precision_too(run_in_float32):
    run_in_float32("""
        import jax, jax.numpy as jnp, numpy as np, ebm_ppl as ebm
        levels = ebm.noise_levels(0.01, 50.0, 8)
        energy = ebm.NoiseConditionalEnergy(jax.random.key(0), 2, levels)
        data = np.random.default_rng(0).normal(size=(200, 2))
        for objective in (ebm.DenoisingScoreMatching(levels), ebm.RecoveryLikelihood(levels)):
            fitted = ebm.fit(jax.random.key(1), energy, data, objective, num_steps=20, progress_bar=False)
            assert fitted.energy(jnp.ones(2)).dtype == jnp.float32
        given = jax.random.key(2), fitted.energy, levels, energy.reference(50.0)
        draws = ebm.anneal(*given, num=64)
        assert draws.points.dtype == jnp.float32 and np.isfinite(draws.log_z)
        assert np.all(np.isfinite(ebm.recover(*given, num=64)))
    """)


# Draws


def annealed(energy, levels, num_replicas=64, **settings):
    """Log Z and the weight of the mode below zero, for independent keys."""

    def one(key):
        start = dist.Normal(0.0, np.hypot(10.0, levels[-1])).expand([1]).to_event(1)
        found = ebm.anneal(key, energy, levels, start, num=256, **settings)
        return found.log_z, jax.nn.softmax(found.log_weight) @ (found.points[:, 0] < 0)

    return jax.device_get(jax.vmap(one)(jax.random.split(jax.random.key(0), num_replicas)))


@pytest.mark.parametrize(("kernel", "resample"), [(ebm.MALA(), 0.5), (ebm.MALA(), 0.0), (ebm.HMC(), 0.5)])
def test_annealing_has_the_draws_and_log_z_of_the_smallest_level(kernel, resample):
    """Modes 20 standard deviations apart, and a Z at each level that is another."""
    levels = ebm.noise_levels(0.1, 10.0, 10)
    energy = Modes(FAR, ODDS, slope=2.0)
    log_z, weight = annealed(energy, levels, resample=resample, dynamics=Dynamics(kernel, 5, 1.0))
    ratio = np.exp(log_z + 2.0 * np.log(levels[0]))
    for found, exact in ((ratio, 1.0), (weight, 0.25)):
        score = (found.mean() - exact) / (found.std(ddof=1) / np.sqrt(len(found)))
        assert abs(score) < t_limit(6, len(found) - 1), (exact, score)
        assert found.std(ddof=1) / np.sqrt(len(found)) < 0.05 * exact


def test_weights_of_walkers_are_those_of_the_smallest_level():
    """Where it has other weights than the wide ones, as after score matching, walkers bring theirs."""

    class Other(Modes):
        def at(self, sigma):
            return Modes(self.means, jnp.where(sigma < 0.2, 0.0, self.logit)).at(sigma)

    levels = ebm.noise_levels(0.1, 10.0, 10)
    _, weight = annealed(Other(FAR, ODDS), levels)
    score = (weight.mean() - 0.5) / (weight.std(ddof=1) / 8)
    assert abs(score) < t_limit(2, 63)
    found = ebm.anneal(jax.random.key(0), Other(FAR, ODDS), levels, LINE, num=4000, resample=0.0)
    assert abs(np.mean(found.points < 0) - 0.5) > 0.1


# Refusals


def refused(objective, energy):
    return ebm.fit(jax.random.key(0), energy, two_modes(10), objective, progress_bar=False, num_steps=1)


@pytest.mark.parametrize("objective", [ebm.DenoisingScoreMatching(LEVELS), ebm.RecoveryLikelihood(LEVELS)])
def test_an_energy_without_these_levels_is_refused(objective):
    with pytest.raises(ebm.EnergyError, match=r"MLPEnergy has no levels of noise: .* NoiseConditionalEnergy"):
        refused(objective, ebm.MLPEnergy(jax.random.key(0), 1))
    with pytest.raises(ebm.EnergyError, match=r"smallest level of noise of the objective, 0.3: give both the same"):
        refused(objective, ebm.NoiseConditionalEnergy(jax.random.key(0), 1, (0.1, 2.0)))


@pytest.mark.parametrize("levels", [(), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (np.nan, 1.0)])
def test_levels_that_do_not_grow_are_refused(levels):
    for use in (
        ebm.DenoisingScoreMatching,
        ebm.RecoveryLikelihood,
        lambda levels: ebm.NoiseConditionalEnergy(jax.random.key(0), 1, levels),
        lambda levels: ebm.anneal(jax.random.key(0), Modes(FAR, ODDS), levels, LINE),
        lambda levels: ebm.recover(jax.random.key(0), Modes(FAR, ODDS), levels, LINE),
    ):
        with pytest.raises(ebm.EnergyError, match="smallest first"):
            use(levels)


def test_other_settings_out_of_range_are_refused():
    with pytest.raises(ebm.EnergyError, match="two at least"):
        ebm.noise_levels(0.1, 1.0, 1)
    with pytest.raises(ebm.EnergyError, match="scale"):
        ebm.NoiseConditionalEnergy(jax.random.key(0), 1, LEVELS, scale=0.0)
    with pytest.raises(ebm.EnergyError, match=r"MALA.. or HMC"):
        ebm.anneal(jax.random.key(0), Modes(FAR, ODDS), LEVELS, LINE, dynamics=Dynamics())
    with pytest.raises(ebm.EnergyError, match="two levels at least"):
        ebm.RecoveryLikelihood((0.1,))


@pytest.mark.parametrize("draw", [ebm.anneal, ebm.recover])
def test_a_start_or_base_of_other_events_is_refused(draw):
    with pytest.raises(ebm.EnergyShapeError, match=r"The start has event shape \(\) and batch shape \(1,\)"):
        draw(jax.random.key(0), Modes(FAR, ODDS), LEVELS, dist.Normal(0.0, 1.0).expand([1]))
    with pytest.raises(ebm.EnergyShapeError, match=r"The base has event shape \(2,\)"):
        base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        draw(jax.random.key(0), Modes(FAR, ODDS), LEVELS, LINE, base=base)
    with pytest.raises(ebm.EnergyError, match="num is 1 at least"):
        draw(jax.random.key(0), Modes(FAR, ODDS), LEVELS, LINE, num=0)
