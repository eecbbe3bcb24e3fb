"""Every estimator on models of every kind: prior energies, losses, simplexes, Cholesky factors, discrete sites.

What each estimator does on spaces without constraints, and how well its error holds, is in the file of each.
"""

import warnings

import jax
import pytest
from limits import t_limit
from problems import PROBLEMS

import ebm_ppl as ebm
from ebm_ppl.logz.importance import BLOCKS

PILOT = ebm.SMC(num_particles=300, target_ess=0.5, num_moves=2)
METHODS = {
    "AIS": ebm.AIS(num_chains=512, num_stages=128, pilot=PILOT),
    "BDMC": ebm.BDMC(num_chains=512, num_stages=64, pilot=PILOT),
    "Bridge": ebm.Bridge(num_samples=400),
    "MBAR": ebm.MBAR(pilot=PILOT),
    "SteppingStone": ebm.SteppingStone(pilot=PILOT),
    "ThermodynamicIntegration": ebm.ThermodynamicIntegration(pilot=PILOT),
    "ParallelTempering": ebm.ParallelTempering(num_draws=512),
    "NestedSampling": ebm.NestedSampling(num_live=200, num_delete=20),
    "FittedReference": ebm.FittedReference(pilot=PILOT, num_draws=1024),
    "default": None,
}
NAMES = "dirichlet_multinomial", "correlation", "dynamic_support", "enumerated", "three_roles"
LIMIT = t_limit(len(METHODS) * len(NAMES), BLOCKS - 1)
"""Of each score: an error from `BLOCKS` blocks has Student's law, and those of the others are known better."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_evidence(method, name):
    problem = PROBLEMS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm.EnergyWarning)  # Bridge takes any divergence for a doubt
        found = ebm.log_z(jax.random.key(1), problem.target(), METHODS[method])
    assert 0 < found.std_error < 0.3
    assert abs(found.value - problem.log_z) < LIMIT * found.std_error
    if problem.log_z_prior is not None:
        assert found.parts["prior"] == pytest.approx(problem.log_z_prior, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_laplace_is_an_approximation(name):
    with pytest.warns(ebm.EnergyWarning, match="does not know its own error"):
        found = ebm.log_z(jax.random.key(1), PROBLEMS[name].target(), ebm.Laplace())
    assert abs(found.value - PROBLEMS[name].log_z) < 1.5
