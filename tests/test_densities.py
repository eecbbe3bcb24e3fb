"""The densities of the benchmark of training, and its log Z, against quadrature and closed forms."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from limits import z_limit
from scipy.special import logsumexp

FILE = Path(__file__).parent.parent / "benchmarks" / "densities.py"
SPEC = importlib.util.spec_from_file_location("densities", FILE)
densities = importlib.util.module_from_spec(SPEC)
sys.modules["densities"] = densities
SPEC.loader.exec_module(densities)

CELL = 0.04
SIDE = (np.arange(300) + 0.5) * CELL - 6
GRID = np.stack(np.meshgrid(SIDE, SIDE), axis=-1).reshape(-1, 2)


@pytest.mark.parametrize("name", densities.DENSITIES)
def test_density_is_normalised_and_that_of_the_draws(name):
    density, num = densities.DENSITIES[name](), 10_000
    on_grid = density.log_density(GRID) + np.log(CELL**2)
    assert logsumexp(on_grid) == pytest.approx(0, abs=5e-4)  # the funnel has 2e-4 of its mass beyond
    mass = np.exp(on_grid)
    expected = np.sum(mass * np.where(mass > 0, on_grid - np.log(CELL**2), 0))
    drawn = density.log_density(density.sample(np.random.default_rng(0), num))
    # Uniform on the squares of the board, the log density of draws does not vary.
    error = max(np.std(drawn) / np.sqrt(num), 1e-9)
    assert abs(np.mean(drawn) - expected) < z_limit(len(densities.DENSITIES)) * error


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_log_partition_of_a_normal_distribution(scale):
    log_z = densities.log_partition(lambda x: np.sum((x / scale) ** 2, axis=1) / 2)
    assert log_z == pytest.approx(np.log(2 * np.pi * scale**2), abs=1e-4)


@pytest.mark.parametrize(
    "energy", [lambda x: 0 * x[:, 0], lambda x: np.log1p(np.sum(x**2, axis=1)), lambda x: -x[:, 0]]
)
def test_mass_along_the_border_is_refused(energy):
    with pytest.raises(densities.UnboundedError, match="of the mass"):
        densities.log_partition(energy)
