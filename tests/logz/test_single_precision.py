"""Every estimator in JAX's default precision, on a conjugate regression: a finite answer within its own error.

All run in one process, since a process has one precision by default and its start takes seconds.
"""

import json

import numpy as np
import pytest
from limits import z_limit

QUICK = {"FittedReference": "num_draws=1024, pilot=ebm.SMC(num_particles=300, num_moves=2)"}
"""The first opinion of the default; the others take a minute."""
OTHERS = {
    "AIS": "",
    "BDMC": "",
    "Bridge": "num_samples=400",
    "Consultation": "tol=0.02",
    "MBAR": "",
    "NestedSampling": "num_live=200, num_delete=20",
    "ParallelTempering": "num_draws=256",
    "SteppingStone": "",
    "ThermodynamicIntegration": "",
    "SMC": "num_particles=400",
}
SOURCE = """
    import json, warnings
    import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
    import ebm_ppl as ebm

    def model(x, y):
        b = numpyro.sample("b", dist.Normal(0, 1).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ b, 0.5).to_event(1), obs=y)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3)); y = x @ np.array([1.0, -0.5, 0.2]) + 0.5 * rng.normal(size=20)
    marginal = x @ x.T + 0.25 * np.eye(20)
    exact = -0.5 * (y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(2 * np.pi * marginal)[1])
    target = ebm.target(model, x.astype(np.float32), y.astype(np.float32))
    assert jnp.zeros(1).dtype == jnp.float32
    found = {}
    warnings.simplefilter("ignore", ebm.EnergyWarning)
    for name, settings in METHODS.items():
        log_z = ebm.log_z(jax.random.key(0), target, eval(f"ebm.{name}({settings})"))
        found[name] = log_z.value - float(exact), log_z.std_error, log_z.diagnostics["num_nan_energy"]
    print(json.dumps(found))
"""


@pytest.mark.parametrize("methods", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["quick", "others"])
def test_right_in_single_precision(run_in_float32, methods):
    printed = run_in_float32(SOURCE.replace("METHODS", repr(methods)))
    found = json.loads(printed.strip().splitlines()[-1])
    assert list(found) == list(methods)
    for name, (error, std_error, num_nan) in found.items():
        assert 0 < std_error < 0.3 and num_nan == 0, name
        assert abs(error) < z_limit(len(QUICK | OTHERS)) * np.hypot(std_error, 1e-4), f"{name}: {error} ± {std_error}"


def estimates():
    """Value, standard error and NaNs of 500 observations with tails, whose log Z is several hundred nats below zero."""
    import warnings

    import jax
    import numpy as np
    import numpyro
    import numpyro.distributions as dist

    import ebm_ppl as ebm

    def model(x, y):
        b = numpyro.sample("b", dist.Normal(0, 1).expand([3]).to_event(1))
        scale = numpyro.sample("scale", dist.LogNormal(0, 1))
        numpyro.sample("y", dist.StudentT(4, x @ b, scale).to_event(1), obs=y)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3))
    target = ebm.target(model, x, x @ np.array([1.0, -0.5, 0.2]) + rng.standard_t(4, size=500))
    pilot = ebm.SMC(num_particles=300, num_moves=2)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.EnergyWarning)
        for method in (ebm.FittedReference(num_draws=1024, pilot=pilot), ebm.SMC(num_particles=1000)):
            log_z = ebm.log_z(jax.random.key(0), target, method)
            found.append((log_z.value, log_z.std_error, log_z.diagnostics["num_nan_energy"]))
    return str(target.sample_reference(jax.random.key(0)).dtype), found


@pytest.mark.slow
def test_many_observations_agree_with_double_precision(in_both_precisions):
    (narrow, single), (wide, double) = in_both_precisions(estimates)
    assert (narrow, wide) == ("float32", "float64")
    for (value, std_error, num_nan), (right, error, _) in zip(single, double, strict=True):
        assert right < -700 and num_nan == 0 and 0 < std_error < 0.3
        assert abs(value - right) < z_limit(len(single)) * np.hypot(std_error, error), (value - right, std_error, error)
