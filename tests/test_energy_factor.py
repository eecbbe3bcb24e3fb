"""Energy factors: a NumPyro factor with a role, of the shape of the plates around it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import seed, trace
from numpyro.infer.util import log_density

import ebm_ppl
from ebm_ppl.distribution import ROLE_KEY


@pytest.mark.quick
@pytest.mark.parametrize("role", ["prior", "loss"])
def test_factor_is_a_numpyro_factor_with_a_role(role):
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm_ppl.energy_factor("tilt", 3.0 * x**2, role=role, beta=0.5)

    site = trace(seed(model, 0)).get_trace()["tilt"]
    assert site["is_observed"] and site["infer"][ROLE_KEY] == role and site["infer"]["is_auxiliary"]
    value, _ = log_density(model, (), {}, {"x": jnp.array(0.7)})
    np.testing.assert_allclose(value, dist.Normal(0.0, 1.0).log_prob(0.7) - 0.5 * 3.0 * 0.7**2, rtol=1e-14)


def test_unknown_role_is_refused():
    with pytest.raises(ebm_ppl.EnergyError, match=r"'likelihood'.*either 'prior' or 'loss'"):
        seed(lambda: ebm_ppl.energy_factor("tilt", 0.0, role="likelihood"), 0)()


def factor_in_plates(shape, plates, beta=1.0):
    def model():
        from contextlib import ExitStack

        with ExitStack() as stack:
            for name, size, dim in plates:
                stack.enter_context(numpyro.plate(name, size, dim=dim))
            ebm_ppl.energy_factor("tilt", jnp.ones(shape), beta=beta)

    return trace(seed(model, 0)).get_trace()["tilt"]


ROWS, COLUMNS = ("rows", 3, -2), ("columns", 4, -1)


@pytest.mark.parametrize(
    ("shape", "plates"),
    [((), []), ((4,), [COLUMNS]), ((3, 4), [ROWS, COLUMNS]), ((3, 1), [ROWS])],
)
def test_factor_of_the_shape_of_its_plates(shape, plates):
    site = factor_in_plates(shape, plates)
    assert site["fn"].log_prob(site["value"]).shape == shape


@pytest.mark.parametrize(
    ("shape", "plates", "expected"),
    [
        ((4,), [], "()"),
        ((1,), [], "()"),
        ((), [COLUMNS], "(4,)"),
        ((1,), [COLUMNS], "(4,)"),
        ((3,), [COLUMNS], "(4,)"),
        ((3, 4), [COLUMNS], "(4,)"),
        ((4,), [ROWS, COLUMNS], "(3, 4)"),
        ((4, 3), [ROWS, COLUMNS], "(3, 4)"),
    ],
)
def test_factor_of_another_shape_is_an_error_with_both_shapes(shape, plates, expected):
    with pytest.raises(ebm_ppl.EnergyShapeError) as error:
        factor_in_plates(shape, plates)
    assert f"shape {shape}" in str(error.value) and f"shape {expected}" in str(error.value)


def test_beta_may_vary_over_a_plate_but_not_add_dimensions():
    site = factor_in_plates((4,), [COLUMNS], beta=jnp.arange(4.0))
    np.testing.assert_allclose(site["fn"].log_prob(site["value"]), -jnp.arange(4.0))
    with pytest.raises(ebm_ppl.EnergyShapeError):
        factor_in_plates((), [], beta=jnp.ones(4))


def test_negative_beta_is_refused():
    with pytest.raises(ebm_ppl.EnergyError, match="negative"):
        factor_in_plates((), [], beta=-1.0)


def test_factor_depends_on_an_enumerated_site():
    from numpyro.contrib.funsor import config_enumerate, enum
    from numpyro.contrib.funsor import log_density as enumerated_log_density

    def model():
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(2)))
        with numpyro.plate("n", 3):
            label = numpyro.sample("label", dist.Categorical(weights))
            ebm_ppl.energy_factor("tilt", jnp.arange(3.0) * label, role="loss")

    weights = jnp.array([0.3, 0.7])
    value, _ = enumerated_log_density(enum(config_enumerate(model), -2), (), {}, {"weights": weights})
    exact = jnp.sum(jnp.log(weights[0] + weights[1] * jnp.exp(-jnp.arange(3.0))))
    np.testing.assert_allclose(value, dist.Dirichlet(jnp.ones(2)).log_prob(weights) + exact, rtol=1e-12)
