"""What particles of one stage, or of several, weigh at the next temperature."""

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc.persistent_sampling import compute_log_persistent_weights
from jax.scipy.special import logsumexp

from ebm_ppl.weighing import join, no_ensemble, weigh

BETAS, LOG_Z = (0.0, 0.1, 0.3, 0.6), (0.0, -0.7, -1.6, -2.2)


def _ensemble(room: int, num: int = 50):
    """Particles of four stages in a ring, and the energies of all of them, (stage, N)."""
    z = jax.random.normal(jax.random.key(0), (len(BETAS), num, 1))
    energy = 3 * z[..., 0] ** 2
    eve = jnp.arange(num)
    ensemble = no_ensemble(z[0], room)
    log_z = jnp.array([*LOG_Z, LOG_Z[-1]])
    for stage, beta in enumerate(BETAS):
        ensemble = join(ensemble, z[stage], energy[stage], eve, jnp.asarray(beta), jnp.zeros(num))
        ensemble = ensemble._replace(log_z=ensemble.log_z - log_z[stage + 1] + log_z[stage])
    return ensemble, energy


def test_weights_of_one_stage_are_those_of_the_step():
    ensemble, energy = _ensemble(1)
    weighed = weigh(ensemble, jnp.asarray(BETAS[-1]), 0.6)
    log_w = -(weighed.beta - BETAS[-1]) * energy[-1]
    np.testing.assert_allclose(weighed.log_weight[:, 0], log_w - logsumexp(log_w), rtol=1e-12)
    np.testing.assert_allclose(weighed.increment, logsumexp(log_w) - np.log(50), rtol=1e-12)
    assert 0 < weighed.step and np.exp(-logsumexp(2 * weighed.log_weight)) >= 0.6 * 50 * (1 - 1e-3)


def test_weights_of_several_stages_are_those_of_blackjax():
    ensemble, energy = _ensemble(4)
    weighed = weigh(ensemble, jnp.asarray(BETAS[-1]), 0.6)
    schedule = jnp.array([*BETAS, weighed.beta])
    log_weight, log_z = compute_log_persistent_weights(
        -energy, jnp.array(LOG_Z), schedule, len(BETAS), normalize_to_one=True
    )
    np.testing.assert_allclose(weighed.log_weight, log_weight.T, rtol=1e-9)
    np.testing.assert_allclose(LOG_Z[-1] + weighed.increment, log_z, rtol=1e-9)


def test_a_ring_forgets_its_oldest_stages():
    """And with room for more stages than there have been, those that have not been weigh nothing."""
    beta = jnp.asarray(BETAS[-1])
    short, energy = _ensemble(3)
    np.testing.assert_allclose(jnp.sort(short.energy, axis=1), jnp.sort(energy[1:].T, axis=1))
    exact, roomy = (weigh(_ensemble(room)[0], beta, 0.6) for room in (4, 9))
    np.testing.assert_array_equal(roomy.log_weight[:, 4:], -jnp.inf)
    np.testing.assert_allclose(roomy.log_weight[:, :4], exact.log_weight, rtol=1e-9)
    np.testing.assert_allclose(roomy.increment, exact.increment, rtol=1e-9)
    np.testing.assert_allclose(roomy.variance, exact.variance, rtol=1e-9)
