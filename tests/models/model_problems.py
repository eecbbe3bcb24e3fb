"""Models of latents whose likelihood, posterior and best encoder are known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats as st

import ebm_ppl as ebm

SCALE = 0.5
"""Of the noise."""
LOADINGS = np.array([[1.0, 0.5, -0.5, 2.0], [0.5, 1.0, 0.5, -0.375]]).T
"""W, whose columns are orthogonal, so that the posterior's covariance is diagonal."""
SHIFT = np.array([1.0, 0.0, -1.0, 0.5])


def _linear(weight, bias):
    into, out = weight.shape[1], weight.shape[0]
    layer = eqx.nn.Linear(into, out, key=jax.random.key(0))
    return eqx.tree_at(lambda x: (x.weight, x.bias), layer, (jnp.asarray(weight), jnp.asarray(bias)))


def linear_gaussian(encoder="exact", is_learned=False, **settings):
    """z ~ N(0, I), x ~ N(b + W z, s^2 I), with the exact encoder, one that is wrong, or none."""
    variances = posterior_variances()
    gain = (variances[:, None] * LOADINGS.T) / SCALE**2
    weight, bias = np.concatenate([gain, np.zeros_like(gain)]), np.append(-gain @ SHIFT, np.log(variances) / 2)
    encoders = {
        "exact": _linear(weight, bias),
        "wrong": _linear(0.7 * weight, bias + np.array([0.2, -0.1, 0.3, -0.2])),
        None: None,
    }
    likelihood = ebm.GaussianLikelihood((4,), SCALE, is_learned)
    return ebm.LatentModel(2, _linear(LOADINGS, SHIFT), likelihood, encoder=encoders[encoder], **settings)


def posterior_variances():
    """Of both latents, the same for all x."""
    return 1 / (1 + np.sum(LOADINGS**2, axis=0) / SCALE**2)


def marginal():
    """p(x)"""
    return st.multivariate_normal(SHIFT, LOADINGS @ LOADINGS.T + SCALE**2 * np.eye(4))


def draws(seed, num):
    """`(z, x)` drawn together."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(num, 2))
    return z, SHIFT + z @ LOADINGS.T + SCALE * rng.normal(size=(num, 4))
