"""What `target.py` and `distribution.py` lean on of NumPyro's private parts, each part by itself."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cases import Y, deterministics, nested_plates, subsampled
from numpyro.handlers import seed, trace


def gamma_model():
    numpyro.sample("x", dist.Gamma(2.0, 1.0))


def test_contract_unconstrain_params():
    """It constrains values and emits the Jacobian as a hidden factor site; constrained densities are untouched."""
    from numpyro.infer.util import _unconstrain_params

    z = jnp.array(0.4)
    recorded = trace(_unconstrain_params(gamma_model, {"x": z})).get_trace()
    np.testing.assert_allclose(recorded["x"]["value"], jnp.exp(z))
    (hidden,) = set(recorded) - {"x"}
    site = recorded[hidden]
    assert site["type"] == "sample" and site["is_observed"]
    np.testing.assert_allclose(site["fn"].log_prob(site["value"]), z)


def test_contract_substitute_default_key():
    from numpyro.infer.util import _substitute_default_key

    recorded = trace(_substitute_default_key(lambda: numpyro.deterministic("u", numpyro.prng_key()))).get_trace()
    assert jnp.issubdtype(recorded["u"]["value"].dtype, jax.dtypes.prng_key)


def test_contract_guess_max_plate_nesting():
    from numpyro.infer.util import _guess_max_plate_nesting

    assert _guess_max_plate_nesting(trace(seed(nested_plates, 0)).get_trace()) == 2
    assert _guess_max_plate_nesting(trace(seed(gamma_model, 0)).get_trace()) == 0


def test_contract_constrain_fn():
    from numpyro.infer.util import constrain_fn

    assert "return_deterministic" in inspect.signature(constrain_fn).parameters
    values = constrain_fn(deterministics, (), {}, {"x": jnp.array(1.0)}, return_deterministic=True)
    assert set(values) == {"x", "doubled", "vector"}


def test_contract_helpful_support_errors():
    from numpyro.infer.util import helpful_support_errors

    site = trace(seed(lambda: numpyro.sample("x", dist.Bernoulli(0.5)), 0)).get_trace()["x"]
    with pytest.raises(ValueError, match="discrete sample site 'x'"), helpful_support_errors(site):
        raise NotImplementedError


def test_contract_is_identically_one():
    from numpyro.distributions.util import is_identically_one

    assert is_identically_one(1) and is_identically_one(1.0) and not is_identically_one(0.5)
    assert not is_identically_one(jnp.array([1.0, 2.0]))


def test_contract_plate_frames_and_sites():
    site = trace(seed(nested_plates, 0)).get_trace()["sd"]
    assert {(frame.name, frame.dim, frame.size) for frame in site["cond_indep_stack"]} == {
        ("group", -2, 2),
        ("member", -1, 4),
    }
    plate = trace(seed(lambda: subsampled(Y), 0)).get_trace()["observation"]
    assert plate["type"] == "plate" and plate["args"] == (4, 2) and plate["value"].shape == (2,)


def test_contract_masked_distribution():
    masked = dist.Normal(jnp.zeros(2), 1.0).mask(jnp.array([True, False]))
    np.testing.assert_array_equal(masked._mask, [True, False])


def test_contract_handler_stack_and_enumeration():
    from numpyro.contrib.funsor import enum
    from numpyro.primitives import _PYRO_STACK

    seen = []

    def model():
        with numpyro.plate("n", 3):
            seen.extend(type(handler).__name__ for handler in _PYRO_STACK)

    enum(model, -2)()
    assert "enum" in seen and "plate" in seen
