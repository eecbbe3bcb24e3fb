"""Kernels of discrete states: their transition matrices, from very many moves, against what they should be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from lattice_problems import bits, boltzmann, categories, probabilities, rbm
from limits import chi2_limits, z_limit

import ebm_ppl as ebm
from ebm_ppl.train.objective import Density
from ebm_ppl.train.walkers import Dynamics, next_step_size, walk

SKEWED = jnp.array([0.2, 0.5, 0.9])
COUPLED = dist.MixtureSameFamily(
    dist.Categorical(jnp.array([0.3, 0.7])), dist.Bernoulli(jnp.array([[0.2, 0.5, 0.9], [0.7, 0.3, 0.4]])).to_event(1)
)
CASES = {
    "Gibbs": (ebm.Gibbs(), rbm(3, 2), bits(3)),
    "Gibbs, three states": (ebm.Gibbs(3), boltzmann(2, 0.7), categories([0.2, 0.3, 0.5], 2)),
    "with gradients": (ebm.GibbsWithGradients(), rbm(3, 2), bits(3)),
    "with gradients, skewed base": (ebm.GibbsWithGradients(), boltzmann(3), bits(3, SKEWED)),
    "block": (ebm.BlockGibbs(), rbm(3, 2), bits(3)),
    "block, skewed base": (ebm.BlockGibbs(), rbm(3, 2), bits(3, SKEWED)),
    "block, no base": (ebm.BlockGibbs(), rbm(3, 2), None),
    "block, coupled base": (ebm.BlockGibbs(), rbm(3, 2), COUPLED),
}
NUM = 40_000
"""Moves from each state."""


def truth(name):
    """States, the probability of each, and their density."""
    kernel, energy, base = CASES[name]
    dim = len(energy.visible_bias if isinstance(energy, ebm.RBMEnergy) else energy.bias)
    density = Density(energy, base, (dim,))
    states = ebm.enumerate_states(dim, kernel.num_states)
    return states, probabilities(density.total, dim, kernel.num_states), density


@functools.cache
def moved(name):
    """How often a move from each state has led where, (state, state), and the mean acceptance rate."""
    kernel = CASES[name][0]
    states, _, density = truth(name)
    starts, dynamics = jnp.repeat(states, NUM, axis=0), Dynamics(kernel, 1)
    ends, accepted = jax.jit(lambda x: walk(jax.random.key(0), x, density, dynamics, jnp.asarray(0.1)))(starts)
    index = np.asarray(ends @ (kernel.num_states ** jnp.arange(states.shape[1])[::-1])).astype(int)
    np.testing.assert_array_equal(states[index], ends)
    return np.stack([np.bincount(each, minlength=len(states)) for each in index.reshape(len(states), NUM)]), accepted


@pytest.mark.parametrize("name", CASES)
def test_a_move_leaves_the_density_as_it_is(name):
    """Of a chain that starts at a state with the probability that it has."""
    _, p, _ = truth(name)
    shares = moved(name)[0] / NUM
    after = p @ shares
    # Of p_x times shares, whose rows are independent; the last state has what the others leave.
    covariance = sum(w**2 * (np.diag(row) - np.outer(row, row)) / NUM for w, row in zip(p, shares, strict=True))
    off = (after - p)[:-1]
    low, high = chi2_limits(2 * len(CASES), len(off))
    assert low < off @ np.linalg.solve(covariance[:-1, :-1], off) < high
    assert np.all(np.sqrt(np.diag(covariance)) < 0.002)  # so that the score means something


REVERSIBLE = [name for name in CASES if not name.startswith("Gibbs")]


@pytest.mark.parametrize("name", REVERSIBLE)
def test_a_move_is_in_detailed_balance(name):
    _, p, _ = truth(name)
    shares = moved(name)[0] / NUM
    flow, variance = p[:, None] * shares, p[:, None] ** 2 * shares * (1 - shares) / NUM
    pairs = np.triu_indices(len(p), 1)
    there, error = (flow - flow.T)[pairs], np.sqrt((variance + variance.T)[pairs])
    assert np.all(there[error == 0] == 0)  # what two flips part is never met
    scores = there[error > 0] / error[error > 0]
    assert len(scores) >= 12 and np.max(np.abs(scores)) < z_limit(28 * len(REVERSIBLE)), scores


def conditional_sweep(p, states):
    """Transition matrix of a sweep: the product of those of its draws."""
    sweep = np.eye(len(p))
    for i in range(states.shape[1]):
        others = np.delete(np.asarray(states), i, axis=1)
        same = np.all(others[:, None] == others[None], axis=2)
        sweep = sweep @ (same * p / (same @ p)[:, None])
    return sweep


def proposal_of_gradients(p, states, density):
    """Transition matrix of Gibbs with gradients, by a loop."""
    matrix, states = np.zeros((len(p), len(p))), np.asarray(states)
    slopes = np.array([jax.grad(density.log_density)(x) for x in states])
    welcome = np.exp((1 - 2 * states) * slopes / 2)
    q = welcome / welcome.sum(axis=1, keepdims=True)
    for x, state in enumerate(states):
        for i in range(len(state)):
            y = int(np.argmax(np.all(states == np.where(np.arange(len(state)) == i, 1 - state, state), axis=1)))
            matrix[x, y] = q[x, i] * min(1, p[y] * q[y, i] / (p[x] * q[x, i]))
    return matrix + np.diag(1 - matrix.sum(axis=1))


def layer_by_layer(machine, p, states, base):
    """Transition matrix of block Gibbs, by the sum over hidden states."""
    hidden = ebm.enumerate_states(len(machine.hidden_bias))

    def bernoulli(logits, outcomes):
        on = 1 / (1 + np.exp(-np.asarray(logits)))
        return np.prod(np.where(np.asarray(outcomes) == 1, on[:, None], 1 - on[:, None]), axis=-1)

    up = bernoulli(states @ machine.weights.T + machine.hidden_bias, hidden[None])
    log_base, slope = np.zeros(len(p)), np.zeros(states.shape[1])
    if base is not None:
        log_base, slope = np.array(base.log_prob(states)), np.array(jax.grad(base.log_prob)(jnp.zeros_like(states[0])))
    down = bernoulli(hidden @ machine.weights + machine.visible_bias + slope, states[None])
    rest = log_base - states @ slope
    matrix = (up @ down) * np.minimum(1, np.exp(rest[None] - rest[:, None]))
    return matrix + np.diag(1 - matrix.sum(axis=1))


@pytest.mark.parametrize("name", CASES)
def test_transitions_have_their_probabilities(name):
    kernel, energy, base = CASES[name]
    states, p, density = truth(name)
    if isinstance(kernel, ebm.Gibbs):
        exact = conditional_sweep(p, states)
    elif isinstance(kernel, ebm.GibbsWithGradients):
        exact = proposal_of_gradients(p, states, density)
    else:
        exact = layer_by_layer(energy, p, states, base)
    np.testing.assert_allclose(p @ exact, p, rtol=1e-9)
    counts, accepted = moved(name)
    assert np.all(counts[exact < 1e-12] == 0)
    likely = exact > 1e-12
    score = np.sum((counts - NUM * exact)[likely] ** 2 / (NUM * exact[likely]))
    low, high = chi2_limits(2 * len(CASES), int(likely.sum() - len(p)))
    assert low < score < high
    if "gradients" in name or "coupled" in name:
        assert 0.2 < accepted < 0.999
    else:
        np.testing.assert_allclose(accepted, 1.0, atol=1e-12)


def test_the_log_density_that_a_state_carries_is_that_of_its_position():
    for name in CASES:
        states, _, density = truth(name)
        kernel = Dynamics(CASES[name][0]).kernel_for(density)

        def step(state, key, density=density, kernel=kernel):
            return kernel.step(key, state, density.log_density, None, jnp.ones((), int))[0], None

        start = kernel.init(states[3], density.log_density)
        state, _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 5))
        np.testing.assert_allclose(state.logdensity, density.log_density(state.position), rtol=1e-12)


def test_there_is_no_step_size_to_adapt():
    for kernel in (ebm.Gibbs(), ebm.GibbsWithGradients(), ebm.BlockGibbs()):
        assert next_step_size(jnp.asarray(0.3), jnp.asarray(0.1), Dynamics(kernel)) == 0.3


def test_an_energy_without_a_number_shows():
    def energy(x):
        return jnp.where(x[1] > 0, jnp.nan, jnp.sum(x))

    density = Density(energy, None, (3,))
    kernel = ebm.Gibbs().kernel()
    state = kernel.init(jnp.zeros(3), density.log_density)
    state, stats = kernel.step(jax.random.key(0), state, density.log_density, None, jnp.ones((), int))
    assert stats["nan_energy"] and jnp.isnan(state.logdensity)


def test_block_gibbs_needs_hidden_units():
    points = jnp.zeros((2, 3))
    with pytest.raises(ebm.EnergyError, match=r"hidden units of an RBMEnergy; got a BoltzmannEnergy. Gibbs\(\) moves"):
        walk(jax.random.key(0), points, Density(boltzmann(3), None, (3,)), Dynamics(ebm.BlockGibbs()), jnp.asarray(0.1))


def test_a_number_of_states_is_one():
    with pytest.raises(ebm.EnergyError, match="num_states is a whole number, 2 at least; got 1"):
        ebm.Gibbs(1)
