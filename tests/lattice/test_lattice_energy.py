"""Energies of discrete data against sums over their hidden units, and log Z against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lattice_problems import boltzmann, flat, probabilities, rbm

import ebm_ppl as ebm
from ebm_ppl.lattice import energy as lattice_energy


def test_free_energy_of_an_rbm_is_its_joint_energy_with_hidden_units_summed_out():
    machine = rbm(5, 3)
    for v in np.random.default_rng(0).integers(0, 2, (10, 5)).astype(float):
        joint = [
            np.exp(machine.visible_bias @ v + machine.hidden_bias @ h + h @ machine.weights @ v)
            for h in itertools.product([0.0, 1.0], repeat=3)
            for h in [np.array(h)]
        ]
        np.testing.assert_allclose(-machine(jnp.asarray(v)), np.log(np.sum(joint)), rtol=1e-12)


def test_energy_of_a_boltzmann_machine_is_a_sum_over_pairs():
    machine = boltzmann(4)
    J = machine.couplings
    np.testing.assert_array_equal(J, J.T)
    np.testing.assert_array_equal(np.diag(J), 0)
    x = np.array([1.0, 0.0, 2.0, 1.0])
    pairs = sum(J[i, j] * x[i] * x[j] for i, j in itertools.combinations(range(4), 2))
    np.testing.assert_allclose(machine(jnp.asarray(x)), -machine.bias @ x - pairs, rtol=1e-12)


@pytest.mark.parametrize("machine", [rbm(6, 3), boltzmann(6)], ids=["rbm", "boltzmann"])
def test_an_event_may_be_an_image(machine):
    x = jnp.array([1.0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(machine(x.reshape(2, 3)), machine(x))
    np.testing.assert_allclose(ebm.enumerate_log_z(machine, (2, 3)), ebm.enumerate_log_z(machine, 6), rtol=1e-14)


def test_states_are_all_there_once_in_order():
    expected = list(itertools.product(range(3), repeat=4))
    np.testing.assert_array_equal(ebm.enumerate_states(4, 3), expected)


@pytest.mark.parametrize("dim", [3, 13], ids=["one chunk", "two chunks"])
def test_log_z_of_an_ising_chain(dim):
    """By its transfer matrix: 2 (2 cosh J)^(n-1), free ends."""

    def energy(x):
        return -0.4 * jnp.sum((2 * x[1:] - 1) * (2 * x[:-1] - 1))

    assert dim < 10 or 2**dim > lattice_energy.CHUNK
    exact = np.log(2) + (dim - 1) * np.log(2 * np.cosh(0.4))
    np.testing.assert_allclose(ebm.enumerate_log_z(energy, dim), exact, rtol=1e-13)


def test_log_z_of_independent_numbers_with_three_states():
    bias = jnp.array([0.3, -1.0, 2.0, 0.0])
    exact = np.sum(np.log(np.sum(np.exp(np.arange(3)[:, None] * bias), axis=0)))
    np.testing.assert_allclose(ebm.enumerate_log_z(lambda x: -bias @ x, 4, num_states=3), exact, rtol=1e-13)


@pytest.mark.parametrize("sizes", [(8, 4), (4, 8), (5, 5)])
def test_log_z_of_an_rbm_is_the_same_by_either_layer(sizes):
    machine = rbm(*sizes)
    np.testing.assert_allclose(machine.log_z(), ebm.enumerate_log_z(machine, sizes[0]), rtol=1e-13)


def test_the_slope_of_log_z_is_minus_the_mean_slope_of_the_energy():
    machine = rbm(7, 3)
    by_log_z = flat(jax.grad(lambda machine: machine.log_z())(machine))
    slopes = jax.vmap(lambda x: flat(jax.grad(lambda machine: machine(x))(machine)))(ebm.enumerate_states(7))
    np.testing.assert_allclose(by_log_z, -probabilities(machine, 7) @ slopes, rtol=1e-11)


def test_a_large_hidden_layer_is_not_summed_over():
    """Sixty-four pixels, sixteen hidden units: 2^16 states and not 2^64."""
    machine = jax.tree.map(jnp.zeros_like, rbm(64, 16))
    np.testing.assert_allclose(machine.log_z(), 80 * np.log(2), rtol=1e-13)


def test_what_is_too_much_is_refused_with_the_remedy():
    with pytest.raises(ebm.EnergyError, match=r"2\^25 states are too many .* log_z\(\) sums over those"):
        ebm.enumerate_log_z(jnp.sum, 25)
    with pytest.raises(ebm.EnergyError, match=r"2\^30 states"):
        rbm(30, 30).log_z()
    with pytest.raises(ebm.EnergyError, match="num_states is a whole number"):
        ebm.enumerate_states(3, 1)
    with pytest.raises(ebm.EnergyShapeError, match=r"The energy of a state has shape \(3,\)"):
        ebm.enumerate_log_z(lambda x: x, 3)


def test_numbers_that_are_no_states_are_told_of():
    with pytest.raises(ebm.EnergyError, match=r"Data: 2 of 3 events .* 0..1, the first at 1 \(0.5\)"):
        lattice_energy.check_states(np.array([[0, 1.0], [1, 0.5], [2, 0]]), 2, "Data")
    lattice_energy.check_states(np.array([[0, 1.0], [2, 0]]), 3, "Data")


def test_single_precision(run_in_float32):
    source = """
        import jax, numpy as np, ebm_ppl as ebm
        machine = ebm.RBMEnergy(jax.random.key(0), 64, 12)
        machine = jax.tree.map(lambda x: np.random.default_rng(0).normal(0, 0.5, x.shape).astype("f4"), machine)
        print(repr(machine.log_z()))
    """
    machine = rbm(64, 12, 0.5)
    machine = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(0).normal(0, 0.5, x.shape)), machine)
    told = run_in_float32(source)
    assert "float32" in told
    np.testing.assert_allclose(float(told.split("(")[1].split(",")[0]), machine.log_z(), rtol=1e-5)
