"""Networks as energies: shapes, slopes that are bounded, and a classifier that is trained as a joint density."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import ebm_ppl as ebm


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (3, 9, 7)], ids=str)
def test_an_image_has_one_energy_and_a_gradient_everywhere(shape):
    energy = ebm.ConvEnergy(jax.random.key(0), shape, (4, 8))
    x = jax.random.normal(jax.random.key(1), shape)
    value, slope = jax.value_and_grad(energy)(x)
    assert value.shape == () and slope.shape == shape and np.all(slope != 0)


def test_networks_of_images_are_layers_of_a_sequential():
    keys = jax.random.split(jax.random.key(0))
    there = ebm.ConvNetwork(keys[0], (8, 8), (4,), 3)
    back = ebm.DeconvNetwork(keys[1], 3, (8, 8), (4,))
    both = eqx.nn.Sequential([eqx.nn.Lambda(lambda x: x.reshape(8, 8)), there, back])
    np.testing.assert_array_equal(both(jnp.ones(64)), back(there(jnp.ones((8, 8)))))


def test_other_images_are_refused_with_both_shapes():
    with pytest.raises(ebm.EnergyShapeError, match=r"\(8, 7\); the network takes \(8, 8\)"):
        ebm.ConvEnergy(jax.random.key(0), (8, 8))(jnp.zeros((8, 7)))
    with pytest.raises(ebm.EnergyError, match="height, width"):
        ebm.ConvEnergy(jax.random.key(0), (8,))


def test_a_joint_energy_is_minus_the_log_of_the_sum_over_classes():
    logits = jnp.array([0.3, -1.0, 2.0])
    energy = ebm.JointEnergy(lambda x: logits * x[0])
    assert float(energy(jnp.array([2.0]))) == pytest.approx(-np.log(np.sum(np.exp(2.0 * np.asarray(logits)))))


def operator(layer, shape):
    """Matrix of a layer without its bias."""
    zero = jnp.zeros(shape)
    return jax.jacobian(lambda x: layer(x).ravel())(zero).reshape(-1, zero.size)


def test_layers_are_scaled_to_the_bound():
    """Of a linear layer exactly, of a convolution at most: by the matrix of the map itself."""
    network = ebm.ConvNetwork(jax.random.key(0), (8, 8), (4, 8), 3)
    large = jax.tree.map(lambda x: 10 * x if eqx.is_inexact_array(x) else x, network)
    scaled = ebm.SpectralNorm(large, num_iterations=100).normalised()
    shapes = [(1, 8, 8), (4, 4, 4)]
    norms = [np.linalg.norm(operator(c, s), 2) for c, s in zip(scaled.convolutions, shapes, strict=True)]
    assert all(0.3 < norm < 1 + 1e-6 for norm in norms), norms
    assert np.linalg.norm(scaled.head.weight, 2) == pytest.approx(1.0, rel=1e-6)


def test_small_layers_stay_as_they_are():
    network = ebm.MLPEnergy(jax.random.key(0), 2, width=4)
    small = jax.tree.map(lambda x: 0.1 * x if eqx.is_inexact_array(x) else x, network)
    x = jnp.array([0.3, -0.2])
    assert float(ebm.SpectralNorm(small)(x)) == float(small(x))


def test_the_slope_is_bounded():
    """By the product of the bounds, at thousands of points; without the norm it is not."""
    large = jax.tree.map(
        lambda x: 6 * x if eqx.is_inexact_array(x) else x, ebm.MLPEnergy(jax.random.key(0), 5, width=16)
    )
    points = 3 * jax.random.normal(jax.random.key(1), (5000, 5))

    def steepest(energy):
        return float(jnp.max(jnp.linalg.norm(jax.vmap(jax.grad(energy))(points), axis=1)))

    assert steepest(ebm.SpectralNorm(large, num_iterations=50)) <= 1 + 1e-6
    assert steepest(ebm.SpectralNorm(large, bound=2.0, num_iterations=50)) > 1
    assert steepest(large) > 8


def test_the_gradient_of_the_norm_is_that_of_the_singular_value():
    network = eqx.nn.Linear(6, 4, key=jax.random.key(0))
    network = eqx.tree_at(lambda n: n.weight, network, 5 * network.weight)
    x = jnp.arange(6.0)

    def exact(weight):
        return jnp.sum(eqx.tree_at(lambda n: n.weight, network, weight / jnp.linalg.norm(weight, 2))(x) ** 2)

    def ours(weight):
        return jnp.sum(ebm.SpectralNorm(eqx.tree_at(lambda n: n.weight, network, weight), 1.0, 200)(x) ** 2)

    np.testing.assert_allclose(jax.grad(ours)(network.weight), jax.grad(exact)(network.weight), rtol=1e-5, atol=1e-6)


# A classifier that is a density, too


def three_classes(num, seed=0):
    """Normals of unit variance about three corners, with classes 1/2, 1/3 and 1/6."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, num, p=[1 / 2, 1 / 3, 1 / 6])
    return rng.normal(size=(num, 2)) + CORNERS[labels], labels


CORNERS = np.array([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
BASE = dist.Normal(0.0, 3.0).expand([2]).to_event(1)


def classifier(seed=0):
    return ebm.JointEnergy(eqx.nn.MLP(2, 3, 32, 2, jax.nn.softplus, key=jax.random.key(seed)))


def test_labels_train_the_classifier_beside_the_density():
    """Both to within .03 nats of what the truth has, at data that were not seen."""
    (x, labels), (seen_not, labels_not) = three_classes(5000), three_classes(5000, seed=1)
    fitted = ebm.fit(
        jax.random.key(1),
        classifier(),
        x,
        ebm.NoiseContrast(ratio=4),
        base=BASE,
        labels=labels,
        optimiser=optax.adam(5e-3),
        num_steps=600,
        averaging=0.99,
        progress_bar=False,
    )
    log_joint = dist.Normal(0, 1).log_prob(seen_not[:, None] - CORNERS).sum(-1) + np.log([1 / 2, 1 / 3, 1 / 6])
    exact = jax.nn.log_softmax(log_joint, axis=1)[np.arange(5000), labels_not].mean()
    logits = jax.vmap(fitted.energy.logits)(jnp.asarray(seen_not))
    ours = jax.nn.log_softmax(logits, axis=1)[np.arange(5000), labels_not].mean()
    assert ours > exact - 0.03
    log_z = fitted.record["training"]["log_z"].values[-100:].mean()
    density = BASE.log_prob(seen_not) - jax.vmap(fitted.energy)(seen_not) - log_z
    assert abs(np.mean(density) - np.mean(np.logaddexp.reduce(log_joint, axis=1))) < 0.05
    assert set(fitted.record["training"]) >= {"cross_entropy", "accuracy", "loss", "log_z"}


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (np.zeros(9, int), ebm.EnergyShapeError, r"shape \(9,\)"),
        (np.zeros(10), ebm.EnergyShapeError, "dtype float64"),
        (np.arange(10), ebm.EnergyShapeError, r"from 0 to 9; the classifier's logits have shape \(3,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, error, message):
    with pytest.raises(error, match=message):
        ebm.fit(jax.random.key(0), classifier(), np.zeros((10, 2)), ebm.ScoreMatching(), labels=labels)


def test_labels_of_an_energy_that_classifies_nothing_are_refused():
    with pytest.raises(ebm.EnergyError, match="JointEnergy"):
        ebm.fit(
            jax.random.key(0),
            ebm.MLPEnergy(jax.random.key(0), 2),
            np.zeros((10, 2)),
            ebm.ScoreMatching(),
            labels=np.zeros(10, int),
        )
