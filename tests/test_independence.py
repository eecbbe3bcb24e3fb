"""The independence sampler, one move of many points at a time, and the scales that kernels move by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as st
from limits import FAMILY_WISE

import ebm_ppl as ebm
from ebm_ppl.centring import Centring
from ebm_ppl.kernels import Tuning
from ebm_ppl.scale import DenseScale, DiagonalScale, LowRankScale

NUM = 20_000
CENTRING = Centring(*(jnp.array(x) for x in ([0, 0], [0, 0], [0.3, -0.2], [0.0, 0.1], [0.0, 0.8])))
FACTOR = jnp.array([[0.6, 0.0], [-0.9, 1.8]])
TUNING = Tuning(jnp.ones(()), DenseScale(FACTOR, jnp.linalg.inv(FACTOR)), centre=jnp.array([0.4, -0.7]))
"""Far from a fit, so that a ratio that lacks anything is seen."""


def log_density(z):
    """z_0 is standard normal, and z_1 given it has the standard deviation exp(z_0)."""
    v, x = z
    return -0.5 * v**2 - v - 0.5 * (x * jnp.exp(-v)) ** 2


def draws():
    """Independent draws of that density."""
    normal = jax.random.normal(jax.random.key(0), (NUM, 2))
    return normal * jnp.stack([jnp.ones(NUM), jnp.exp(normal[:, 0])], axis=1)


def moved(sampler, tuning, num_moves):
    """These draws after moves, and what the last move says."""
    kernel = sampler.kernel()

    def step(states, key):
        keys = jax.random.split(key, NUM)
        return jax.vmap(lambda key, state: kernel.step(key, state, log_density, tuning, 1))(keys, states)

    states = jax.vmap(lambda z: kernel.init(z, log_density))(draws())
    states, stats = jax.lax.scan(step, states, jax.random.split(jax.random.key(1), num_moves))
    return states, jax.tree.map(lambda x: x[-1], stats)


@pytest.mark.parametrize("centring", [None, CENTRING], ids=["own coordinates", "non-centred"])
@pytest.mark.parametrize("degrees", [1, 5])
def test_draws_stay_distributed_as_they_are(degrees, centring):
    states, stats = moved(ebm.Independence(degrees), TUNING._replace(centring=centring), 5)
    v, x = states.position.T
    for normal in (v, x * jnp.exp(-v), (v + x * jnp.exp(-v)) / np.sqrt(2)):
        assert st.kstest(normal, "norm").pvalue > FAMILY_WISE / 12
    np.testing.assert_allclose(states.logdensity, jax.vmap(log_density)(states.position), rtol=1e-10)
    assert 0.05 < np.mean(stats["jump_rate"]) < 0.9 and np.mean(stats["acceptance_rate"]) > 0.3


def test_proposals_are_accepted_as_by_metropolis_and_hastings():
    """Against the Student t distribution of SciPy."""
    sampler = ebm.Independence(5)
    keys = jax.random.split(jax.random.key(2), NUM)
    old, new = draws(), jax.vmap(lambda key: sampler._draw(key, TUNING))(keys)

    def jump(key, old, new):
        here, there = (sampler.kernel().init(z, log_density) for z in (old, new))
        return sampler._jumps(key, here, there, TUNING)

    jumped, rate = jax.vmap(jump)(keys, old, new)
    proposal = st.multivariate_t(TUNING.centre, FACTOR @ FACTOR.T, df=5)
    ratio = jax.vmap(log_density)(new) - jax.vmap(log_density)(old) + proposal.logpdf(old) - proposal.logpdf(new)
    np.testing.assert_allclose(rate, np.exp(np.minimum(ratio, 0.0)), rtol=1e-8, atol=1e-300)
    assert abs(np.mean(jumped - rate)) < 5 * np.sqrt(np.mean(rate * (1 - rate)) / NUM)
    whitened = np.linalg.solve(FACTOR, (new - TUNING.centre).T)[0]
    assert st.kstest(whitened, "t", args=(5,)).pvalue > FAMILY_WISE


def test_proposals_without_a_number_are_rejected_and_counted():
    kernel = ebm.Independence().kernel()

    def step(key, where):
        def density(z):
            return jnp.where(z[0] > 0, where, log_density(z))

        state = kernel.init(jnp.array([-1.0, 0.5]), density)
        return kernel.step(key, state, density, TUNING, 1)

    keys = jax.random.split(jax.random.key(0), 1000)
    states, stats = jax.vmap(lambda key: step(key, jnp.nan))(keys)
    assert np.all(states.position[:, 0] <= 0) and np.all(np.isfinite(states.logdensity))
    assert 200 < np.sum(stats["nan_energy"]) < 1000 and not np.any(stats["infinite_density"])
    _, stats = jax.vmap(lambda key: step(key, jnp.inf))(keys)
    assert 200 < np.sum(stats["infinite_density"]) < 1000


def test_degrees_are_a_positive_whole_number():
    for degrees in (0, -1, 2.5, np.inf):
        with pytest.raises(ebm.EnergyError, match="positive whole number"):
            ebm.Independence(degrees)


def test_the_local_step_is_adjusted():
    with pytest.raises(ebm.EnergyError, match="does not leave its target invariant"):
        ebm.Independence(local=ebm.MCLMC(adjusted=False))


@pytest.mark.parametrize(
    "scale",
    [
        DiagonalScale(jnp.array([0.5, 2.0, 3.0])),
        DenseScale.of_covariance(jnp.array([[2.0, 0.5, 0.1], [0.5, 1.0, -0.3], [0.1, -0.3, 4.0]])),
        LowRankScale(jnp.array([0.5, 2.0, 3.0]), jnp.array([[0.6], [0.8], [0.0]]), jnp.array([5.0])),
    ],
    ids=lambda scale: type(scale).__name__,
)
def test_scales_there_and_back(scale):
    z = jnp.array([1.0, -2.0, 0.3])
    np.testing.assert_allclose(scale.times(scale.whitened(z)), z, rtol=1e-10)
    np.testing.assert_allclose(scale.push(scale.pull(z)), z, rtol=1e-10)
