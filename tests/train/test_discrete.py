"""Training on discrete data: gradients and log Z against sums over all states, and what is learned."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax.scipy.special import logsumexp
from lattice_problems import bits, boltzmann, categories, flat, probabilities, rbm
from limits import chi2_limits, t_limit, z_limit

import ebm_ppl as ebm
from ebm_ppl.train.objective import Density, log_prob
from ebm_ppl.train.walkers import Dynamics

# Likelihood, with negatives from chains

MACHINE, BASE = rbm(8, 4), bits(8)
"""2^8 visible states. A sweep of it leaves a bias in the gradient of ten errors of the test below, six none to see."""


def batch(num, seed=0):
    """Of data that the machine is not a model of."""
    rng = np.random.default_rng(seed)
    return jnp.asarray((rng.random((num, 8)) < np.linspace(0.1, 0.9, 8)).astype(float))


def replicated(objective, machines, num_replicas, batch):
    """Gradient and metrics at each of some machines, that the state goes through, for independent keys.

    Args:
        machines: an RBM whose arrays have one more axis in front.
    """
    num = len(machines.hidden_bias)

    def one(key):
        key_init, key_steps = jax.random.split(key)
        first = jax.tree.map(lambda x: x[0], machines)
        parameters, start = objective.init(key_init, Density(first, BASE, (8,)), batch)

        def step(state, at):
            k, machine = at

            def loss(machine):
                key = jax.random.fold_in(key_steps, k)
                return objective.loss(key, Density(machine, BASE, (8,)), parameters, state, batch)

            gradient, (state, metrics) = jax.grad(loss, has_aux=True)(machine)
            return state, (flat(gradient), metrics)

        return jax.lax.scan(step, start, (jnp.arange(num), machines))[1]

    return jax.device_get(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num_replicas)))


SAMPLING = {
    "contrastive": ebm.ContrastiveDivergence(Dynamics(ebm.Gibbs(), 6)),
    "persistent": ebm.PersistentContrastiveDivergence(128, 0.0, Dynamics(ebm.Gibbs(), 1)),
    "jarzynski, Gibbs": ebm.Jarzynski(256, dynamics=Dynamics(ebm.Gibbs(), 1)),
    "jarzynski, with gradients": ebm.Jarzynski(256, dynamics=Dynamics(ebm.GibbsWithGradients(), 4)),
    "jarzynski, block": ebm.Jarzynski(256, dynamics=Dynamics(ebm.BlockGibbs(), 1)),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_gradient_is_that_of_the_likelihood(name):
    num, data = 64, batch(128)

    def exact_loss(machine):
        return jnp.mean(jax.vmap(machine)(data)) + machine.log_z()

    exact = flat(jax.grad(exact_loss)(MACHINE))
    machines = jax.tree.map(lambda x: jnp.stack([x] * 6), MACHINE)
    gradients = replicated(SAMPLING[name], machines, num, data)[0][:, -1]
    error = gradients.std(axis=0, ddof=1) / np.sqrt(num)
    scores = (gradients.mean(axis=0) - exact) / error
    assert np.max(np.abs(scores)) < t_limit(len(exact) * len(SAMPLING), num - 1), scores
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(exact)  # so that the scores mean something


@pytest.mark.parametrize("kernel", [ebm.Gibbs(), ebm.GibbsWithGradients(), ebm.BlockGibbs()], ids=lambda x: x.name)
def test_log_z_of_the_witness_is_unbiased_while_the_weights_move(kernel):
    """E[e^A] = Z at every step, by walkers that are far behind: the weights go all their way in eight steps."""
    num, steps = 256, jnp.linspace(0, 1, 8)
    machines = jax.tree.map(lambda x: jnp.tensordot(steps, x, 0), MACHINE)
    objective = ebm.Jarzynski(128, dynamics=Dynamics(kernel, 1))
    _, metrics = replicated(objective, machines, num, batch(16))
    exact = np.array([jax.tree.map(lambda x, i=i: x[i], machines).log_z() for i in range(8)]) - 8 * np.log(2)
    # At the start all units are free, and the hidden ones are summed out: 2^4.
    np.testing.assert_allclose(metrics["log_z"][:, 0], 4 * np.log(2), atol=1e-12)
    ratios = np.exp(metrics["log_z"] - exact)
    scores = (ratios.mean(axis=0) - 1)[1:] / (ratios.std(axis=0, ddof=1)[1:] / np.sqrt(num))
    assert np.max(np.abs(scores)) < t_limit(3 * 7, num - 1), scores
    assert exact[-1] - exact[0] > 2 and ratios.std(axis=0)[-1] < 0.3
    assert np.all(metrics["step_size"] == 0.1)


# Differences between neighbours

DIFFERENCES = {
    "pseudo": ebm.PseudoLikelihood,
    "ratio": ebm.RatioMatching,
    "concrete": ebm.ConcreteScoreMatching,
}
MODELS = {
    "rbm": (rbm(4, 3), None, 4, 2),
    "skewed bits": (boltzmann(4), bits(4, jnp.array([0.2, 0.5, 0.6, 0.9])), 4, 2),
    "three states": (boltzmann(3, 0.4), categories([0.2, 0.3, 0.5], 3), 3, 3),
}


def expected(objective, model, q):
    """Its loss of an energy, in expectation over all states by their probability q."""
    _, base, dim, k = model
    states = ebm.enumerate_states(dim, k)

    def loss(energy):
        density = Density(energy, base, (dim,))
        each = jax.vmap(lambda x: objective.loss(jax.random.key(0), density, (), (), x[None])[0])(states)
        return each @ q

    return jax.jit(loss)


def true_probabilities(model):
    energy, base, dim, k = model
    return probabilities(Density(energy, base, (dim,)).total, dim, k)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_truth_and_nothing_beside_it_has_no_slope(name, model):
    energy, _, _, k = MODELS[model]
    q = true_probabilities(MODELS[model])
    slope = jax.jit(jax.grad(expected(DIFFERENCES[name](k), MODELS[model], q)))
    np.testing.assert_allclose(flat(slope(energy)), 0.0, atol=1e-12)
    off = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(1).normal(size=x.shape), energy)
    assert np.linalg.norm(flat(slope(off))) > 1e-3


def conditionals(p, states):
    """Of each coordinate's states given all others, (state, coordinate, num_states)."""
    table = dict(zip(map(tuple, np.asarray(states).astype(int)), p, strict=True))
    k = int(np.max(states)) + 1
    each = np.array(
        [[[table[(*x[:i], v, *x[i + 1 :])] for v in range(k)] for i in range(len(x))] for x in table], float
    )
    return each / each.sum(axis=2, keepdims=True)


def divergence(name, q, p, states):
    """By the definition of each: how far p is from q, which is zero at q alone."""
    of_q, of_p = conditionals(q, states), conditionals(p, states)
    if name == "pseudo":
        return q @ np.sum(of_q * np.log(of_q / of_p), axis=(1, 2))
    if name == "ratio":
        return q @ np.sum((of_q - of_p) ** 2, axis=(1, 2)) / 2
    own = np.asarray(states).astype(int)[..., None]
    ratios = [c / np.take_along_axis(c, own, axis=2) for c in (of_q, of_p)]
    return q @ np.sum((ratios[0] - ratios[1]) ** 2, axis=(1, 2))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_loss_is_a_divergence_from_the_data_and_a_constant(name, model):
    """To rounding, whatever the data's density: so that it is least at that of the data, and there alone."""
    energy, base, dim, k = MODELS[model]
    states = ebm.enumerate_states(dim, k)
    q = np.random.default_rng(2).dirichlet(np.full(len(states), 5.0))
    loss = expected(DIFFERENCES[name](k), MODELS[model], q)
    others = [jax.tree.map(lambda x, s=s: s * x, energy) for s in (1.0, 0.3, -0.5)]
    values = np.array([loss(other) for other in others])
    exact = np.array([divergence(name, q, true_probabilities((other, base, dim, k)), states) for other in others])
    np.testing.assert_allclose(np.diff(values), np.diff(exact), rtol=1e-9)
    assert np.all(np.abs(np.diff(exact)) > 1e-3)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_some_coordinates_are_right_on_average(name):
    density, data = Density(rbm(8, 4), BASE, (8,)), batch(8)
    exact, _ = DIFFERENCES[name]().loss(jax.random.key(0), density, (), (), data)
    some = DIFFERENCES[name](num_coordinates=3)
    keys = jax.random.split(jax.random.key(1), 2000)
    values = np.asarray(jax.jit(jax.vmap(lambda key: some.loss(key, density, (), (), data)[0]))(keys))
    score = (values.mean() - exact) / (values.std(ddof=1) / np.sqrt(len(values)))
    assert abs(score) < t_limit(3, len(values) - 1)
    assert 0 < values.std() / np.sqrt(len(values)) < 0.05 * abs(exact)


def of_pairs(parameters, dim):
    """The Boltzmann machine of its bias and the couplings of its pairs, one after another."""
    J = jnp.zeros((dim, dim)).at[np.triu_indices(dim, 1)].set(parameters[dim:])
    empty = ebm.BoltzmannEnergy(jax.random.key(0), dim)
    return eqx.tree_at(lambda machine: (machine.weights, machine.bias), empty, (J + J.T, parameters[:dim]))


def to_pairs(machine):
    return np.concatenate([machine.bias, machine.couplings[np.triu_indices(len(machine.bias), 1)]])


@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_couplings_of_a_known_machine_are_recovered(name):
    """By `fit`, within the error that estimates of the kind have: H^-1 G H^-1 / n, of the loss of one point with mean
    curvature H and covariance G of its slopes, which sums over all states give."""
    dim, num, seeds = 4, 2000, 3
    truth = to_pairs(boltzmann(dim, 0.6))
    states, objective = ebm.enumerate_states(dim), DIFFERENCES[name]()
    p = probabilities(of_pairs(truth, dim), dim)

    def of_state(parameters, x):
        return objective.loss(jax.random.key(0), Density(of_pairs(parameters, dim), None, (dim,)), (), (), x[None])[0]

    slopes = jax.jit(jax.vmap(jax.grad(of_state), (None, 0)))(truth, states)
    curvature = np.tensordot(p, jax.jit(jax.vmap(jax.hessian(of_state), (None, 0)))(truth, states), 1)
    covariance = np.linalg.solve(curvature, np.linalg.solve(curvature, (slopes.T * p) @ slopes).T) / num
    assert np.sqrt(np.diag(covariance)).max() < 0.3

    total, optimiser = 0.0, optax.adam(optax.cosine_decay_schedule(0.1, 300))  # one program for all seeds
    for seed in range(seeds):
        data = np.asarray(states)[np.random.default_rng(seed).choice(len(states), num, p=p)]
        fitted = ebm.fit(
            jax.random.key(seed),
            ebm.BoltzmannEnergy(jax.random.key(0), dim),
            data,
            objective,
            optimiser=optimiser,
            num_steps=300,
            every=300,
            batch_size=num,
            progress_bar=False,
        )
        assert fitted.record["training"]["gradient_norm"].values[-1] < 1e-3
        off = to_pairs(fitted.energy) - truth
        total += off @ np.linalg.solve(covariance, off)
    low, high = chi2_limits(3, seeds * len(truth))
    assert low < total < high


# Input


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (ebm.PseudoLikelihood(), r"Data of pseudo-likelihood: 1 of 3 events .* states 0..1, the first at 2 \(2\)"),
        (ebm.RatioMatching(), "Data of ratio matching: 1 of 3"),
        (ebm.ConcreteScoreMatching(), "Data of concrete score matching: 1 of 3"),
        (ebm.ContrastiveDivergence(Dynamics(ebm.Gibbs())), "Walkers of Gibbs: 1 of 3"),
        (ebm.PersistentContrastiveDivergence(64, dynamics=Dynamics(ebm.GibbsWithGradients())), "Walkers of Gibbs with"),
        (ebm.PseudoLikelihood(3, num_coordinates=3), "num_coordinates is 3, of events of 2 numbers"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_what_is_no_state_is_refused(objective, message):
    data = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    with pytest.raises(ebm.EnergyError, match=message):
        ebm.fit(jax.random.key(0), boltzmann(2), data, objective, num_steps=1, progress_bar=False)


def test_held_out_data_are_looked_at_too():
    data, bad = np.array([[0.0, 1.0]]), np.array([[0.0, 0.5]])
    with pytest.raises(ebm.EnergyError, match=r"Data of pseudo-likelihood: 1 of 1 .* \(0.5\)"):
        ebm.fit(jax.random.key(0), boltzmann(2), data, ebm.PseudoLikelihood(), held_out=bad, progress_bar=False)


def test_a_base_whose_draws_are_no_states_is_refused():
    data, base = np.array([[0.0, 1.0]]), categories([0.2, 0.3, 0.5], 2)
    objective = ebm.Jarzynski(64, dynamics=Dynamics(ebm.Gibbs(), 1))
    with pytest.raises(ebm.EnergyError, match=r"Walkers of Gibbs: .* no states 0..1"):
        ebm.fit(jax.random.key(0), boltzmann(2), data, objective, base=base, progress_bar=False)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ebm.EnergyError, match="num_states"):
        ebm.PseudoLikelihood(1)
    with pytest.raises(ebm.EnergyError, match="num_coordinates is 1 at least"):
        ebm.RatioMatching(num_coordinates=0)


def test_a_discrete_base_takes_floating_point_numbers():
    x = jnp.array([0.0, 2.0, 1.0])
    np.testing.assert_allclose(log_prob(categories([0.2, 0.3, 0.5], 3), x), np.log(0.2 * 0.5 * 0.3))
    slope = jax.grad(lambda x: log_prob(bits(3, 0.2), x))(x % 2)
    np.testing.assert_allclose(slope, np.log(0.2 / 0.8), rtol=1e-12)


# What is learned


def test_three_states_are_learned_by_walkers_and_differences_alike():
    """Of a machine in the family of the model: within .01 nats of the entropy of its data."""
    truth, base = boltzmann(3, 0.5), categories([0.2, 0.3, 0.5], 3)
    model = truth, base, 3, 3
    p, states = true_probabilities(model), ebm.enumerate_states(3, 3)
    data = np.asarray(states)[np.random.default_rng(0).choice(len(states), 8000, p=p)]
    for objective in (ebm.PseudoLikelihood(3), ebm.Jarzynski(512, dynamics=Dynamics(ebm.Gibbs(3), 1))):
        fitted = ebm.fit(
            jax.random.key(0),
            ebm.BoltzmannEnergy(jax.random.key(0), 3),
            data,
            objective,
            base=base,
            optimiser=optax.adam(0.02),
            num_steps=600,
            averaging=0.98,
            progress_bar=False,
        )
        learned = true_probabilities((fitted.energy, base, 3, 3))
        assert p @ np.log(p / learned) < 0.01


@pytest.fixture(scope="module")
def digits():
    """Of scikit-learn, 64 binary pixels each, some to train on and others."""
    from sklearn.datasets import load_digits

    pixels = (load_digits().data >= 8).astype(float)
    pixels = pixels[np.random.default_rng(0).permutation(len(pixels))]
    return pixels[:1500], pixels[1500:]


ADAM = optax.adam(0.02)
"""One for all, so that the seeds run by one program."""


def learned(objective, base, data, seed):
    return ebm.fit(
        jax.random.key(seed),
        ebm.RBMEnergy(jax.random.key(0), 64, 16),
        data,
        objective,
        base=base,
        optimiser=ADAM,
        num_steps=150,
        every=150,
        averaging=0.95,
        progress_bar=False,
    )


def log_z_over(base_logits, machine):
    """Exact, over 2^16 hidden states, relative to a base of independent bits: these are added to the visible biases."""
    joint = eqx.tree_at(lambda machine: machine.visible_bias, machine, machine.visible_bias + base_logits)
    return joint.log_z() - jnp.sum(jax.nn.softplus(base_logits))


DIGITS = {
    "persistent": (ebm.PersistentContrastiveDivergence(128, 0.0, Dynamics(ebm.BlockGibbs(), 5)), 1),
    "jarzynski": (ebm.Jarzynski(256, dynamics=Dynamics(ebm.BlockGibbs(), 1)), 5),
}


@pytest.mark.parametrize("name", DIGITS)
def test_digits_are_learned_and_log_z_is_known(name, digits):
    """From a base of independent pixels, that have the shares of the data: what an RBM gains on it at each digit that
    is held out, by the exact log Z. The witness has an unbiased Z of any energy that it has no say in, such as the one
    with averaged parameters."""
    (objective, num_seeds), (data, test) = DIGITS[name], digits
    on = (data.sum(axis=0) + 1) / (len(data) + 2)
    base, ratios = dist.Bernoulli(jnp.asarray(on)).to_event(1), []
    for seed in range(num_seeds):
        fitted = learned(objective, base, data, seed)
        log_z = log_z_over(jnp.log(on / (1 - on)), fitted.energy)
        gain = np.asarray(-jax.vmap(fitted.energy)(jnp.asarray(test)) - log_z)
        assert (gain.mean() - 1) / (gain.std(ddof=1) / np.sqrt(len(test))) > z_limit(6)  # one nat, beyond doubt
        if name == "jarzynski":
            witness = objective._weighed(fitted.state.witness, Density(fitted.energy, base, (64,)))
            told = witness.log_z + logsumexp(witness.log_weight) - np.log(len(witness.points))
            ratios.append(float(jnp.exp(told - log_z)))
    if ratios:
        error = np.std(ratios, ddof=1) / np.sqrt(num_seeds)
        assert abs(np.mean(ratios) - 1) < t_limit(1, num_seeds - 1) * error and error < 0.2
