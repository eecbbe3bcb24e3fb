"""Energies on graphs: against hand-made graphs and dense matrices, what far nodes do, and evidence in a model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from arviz_stats.base import array_stats
from limits import t_limit, z_limit
from scipy.special import log_softmax, logsumexp
from scipy.stats import ttest_1samp

import ebm_ppl as ebm
from ebm_ppl.models.graph_ebm import SCALES, diffused

KEY = jax.random.key(0)
CHAIN = np.array([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
"""Four nodes in a row, edges both ways round."""
NUM_SEEDS = 16


def one_dimensional(strength=1.0):
    """Classes at 0 and at 2, of unit variance; every node is trusted."""
    numbers = jnp.zeros(()), jnp.ones(()), jnp.asarray(jnp.inf)
    return ebm.GraphEnergy(jnp.array([[0.0], [2.0]]), jnp.ones((2, 1)), *numbers, strength)


def clouds(seed=0, num=30, num_classes=3, dim=4):
    """Embeddings, logits that are linear in them, labels, and edges with loops, copies and nodes without any."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), num)
    h = 3 * np.eye(num_classes, dim)[labels] + rng.normal(size=(len(labels), dim)) * np.arange(1, dim + 1) / 3
    edges = rng.integers(0, len(labels) - 5, size=(2, 4 * len(labels)))
    return h @ rng.normal(size=(dim, num_classes)), h, labels, np.concatenate([edges, edges[:, :9]], axis=1)


# Scales and diffusion


def test_two_clusters_by_hand():
    # Two nodes of each class, and an edge between the clusters. Evidence is 0 of a node's own class, -4 of the other.
    found = one_dimensional().scores(np.zeros((4, 2)), [[0.0], [0.0], [2.0], [2.0]], CHAIN, num_steps=1)
    alone = -np.log1p(np.exp(-4.0))
    np.testing.assert_allclose(found.independent, [alone] * 4, atol=1e-6)
    np.testing.assert_allclose(found.group, [alone] * 4, atol=1e-6)
    # The middle ones take a half of the mean of their own, (0, -4) twice and (-4, 0) once: (-2/3, -10/3).
    middle = 2 / 3 - np.log1p(np.exp(-8 / 3))
    np.testing.assert_allclose(found.local, [alone, middle, middle, alone], atol=1e-6)
    np.testing.assert_allclose(found.total, [3 * alone, 2 * alone + middle, 2 * alone + middle, 3 * alone], atol=1e-6)
    p = 1 / (1 + np.exp([-4.0, -8 / 3, 8 / 3, 4.0]))
    np.testing.assert_allclose(found.probabilities, np.stack([p, 1 - p], axis=1), atol=1e-6)


def test_a_strange_node_shows_in_its_group():
    found = one_dimensional().scores(np.zeros((4, 2)), [[0.0], [0.0], [0.0], [-9.0]], CHAIN, num_steps=1)
    usual, strange = -np.log1p(np.exp(-4.0)), 81 - np.log1p(np.exp(-40.0))
    np.testing.assert_allclose(found.independent, [usual] * 3 + [strange], atol=1e-6)
    beside = (5 * usual + strange) / 6
    np.testing.assert_allclose(found.group, [usual, usual, beside, (usual + 3 * strange) / 4], atol=1e-6)


@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_scores_are_those_of_dense_matrices(num_steps):
    logits, h, labels, edges = clouds()
    energy, keep = ebm.fit_graph_energy(logits, h, labels), 0.3
    found = energy.scores(logits, h, edges, keep=keep, num_steps=num_steps)
    neighbours = np.zeros((len(h), len(h)))
    np.add.at(neighbours, tuple(edges), 1)
    np.fill_diagonal(neighbours, 1)
    step = keep * np.eye(len(h)) + (1 - keep) * neighbours / neighbours.sum(axis=1, keepdims=True)
    spread = np.linalg.matrix_power(step, num_steps)
    evidence = np.asarray(jax.vmap(energy.evidence)(logits, h))
    alone = -logsumexp(evidence, axis=1)
    trust = np.minimum(1, np.exp(energy.limit - alone))[:, None]
    local = -logsumexp(spread @ evidence, axis=1)
    np.testing.assert_allclose(found.independent, alone, rtol=1e-9)
    np.testing.assert_allclose(found.local, local, rtol=1e-9)
    np.testing.assert_allclose(found.group, spread @ alone, rtol=1e-9)
    log_p = log_softmax(spread @ (trust * log_softmax(evidence, axis=1)), axis=1)
    np.testing.assert_allclose(found.log_alpha, log_p - local[:, None], rtol=1e-8)
    np.testing.assert_allclose(logsumexp(found.log_alpha, axis=1), -found.local, rtol=1e-9)
    assert np.any(trust < 1)
    np.testing.assert_allclose(found.total[-5:], 3 * alone[-5:], rtol=1e-9)  # without neighbours


def test_baselines_by_hand():
    logits = np.log([[3.0, 1.0], [1.0, 1.0], [0.5, 0.5], [4.0, 4.0]])
    energies = -np.log([4.0, 2.0, 1.0, 8.0])
    np.testing.assert_allclose(ebm.logit_energy(logits), energies, atol=1e-12)
    edges = np.array([[0, 1], [1, 0]])  # two nodes have no neighbour
    step = np.array([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(ebm.gnnsafe(logits, edges), step @ step @ energies, atol=1e-12)
    np.testing.assert_allclose(ebm.gnnsafe(logits, np.zeros((2, 0))), energies, atol=1e-12)


def test_an_edge_goes_from_a_node_to_what_it_hears():
    heard = diffused([1.0, 5.0], [[0], [1]], keep=0.0, num_steps=1, loops=False)
    np.testing.assert_array_equal(heard, [5.0, 5.0])


# The regulariser


def test_energy_grows_as_a_square_along_a_hundred_rays():
    logits, h, labels, _ = clouds()
    head = eqx.nn.MLP(h.shape[1], 3, 16, 2, jax.nn.relu, key=KEY)
    logits = jax.vmap(head)(jnp.asarray(h))
    rays = jax.random.normal(jax.random.key(1), (100, h.shape[1]))

    def along(strength, far):
        energy = ebm.fit_graph_energy(logits, h, labels, strength=strength)
        return np.asarray(jax.vmap(lambda ray: energy(head(far * ray), far * ray))(rays)), energy

    far, energy = along(0.5, 1e7)
    white = np.einsum("ij,nj->ni", energy.whitening[0], rays)
    np.testing.assert_allclose(far / 1e14, 0.5 * energy.slope * np.sum(white**2, axis=1), rtol=1e-4)
    assert np.all(far > 0)
    (near, _), (far, _) = along(0.0, 1e3), along(0.0, 1e6)
    falling = (far < near) & (far < -1e3)  # a density that is not zero at infinity
    assert 10 < np.sum(falling) <= 100
    np.testing.assert_allclose(far[falling] / near[falling], 1e3, rtol=0.05)  # and no faster than linearly


@pytest.mark.parametrize(("covariance", "tied"), [("full", True), ("full", False), ("diagonal", True)])
def test_moments_and_scale(covariance, tied):
    logits, h, labels, _ = clouds()
    labels[::3] = -1
    energy = ebm.fit_graph_energy(logits, h, labels, covariance=covariance, tied=tied, shrinkage=0.0, strength=1.0)
    of_class = [h[labels == c] for c in range(3)]
    np.testing.assert_allclose(energy.mean, [each.mean(axis=0) for each in of_class], rtol=1e-12)
    own = [np.cov(each.T, bias=True) for each in of_class]
    pooled = np.average(own, axis=0, weights=[len(each) for each in of_class])
    for c, root in enumerate(np.asarray(energy.whitening)):
        expected = pooled if tied else own[c]
        if covariance == "diagonal":
            np.testing.assert_allclose(root, 1 / np.sqrt(np.diag(expected)), rtol=1e-9)
        else:
            np.testing.assert_allclose(np.linalg.inv(root.T @ root), expected, rtol=1e-9, atol=1e-12)
    regulariser = logits - jax.vmap(energy.evidence)(logits, h)
    middle = (0.025, 0.975)
    np.testing.assert_allclose(np.quantile(regulariser, middle), np.quantile(logits, middle), rtol=1e-9)
    energies = -logsumexp(logits - regulariser, axis=1)
    np.testing.assert_allclose(energy.limit, np.quantile(energies, 0.975), rtol=1e-9)


def test_shrinkage_is_towards_the_mean_variance():
    logits, h, labels, _ = clouds()

    def variances(shrinkage):
        energy = ebm.fit_graph_energy(logits, h, labels, covariance="diagonal", shrinkage=shrinkage)
        return energy.whitening[0] ** -2.0

    whole, none, part = map(variances, (1.0, 0.0, 0.25))
    np.testing.assert_allclose(whole, np.full(4, np.mean(none)), rtol=1e-9)
    np.testing.assert_allclose(part, 0.25 * whole + 0.75 * none, rtol=1e-9)


# What it is for


def shifted_graph(seed):
    """A graph of three classes, a linear classifier of averaged features, and other features on half of the nodes.

    Logits of both kinds of nodes with edges, and scores, for those of the graph that is shifted.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), 40)
    inside = 40 * rng.integers(3, size=300) + rng.integers(40, size=(2, 300))
    pairs = np.concatenate([inside, rng.integers(120, size=(2, 100))], axis=1)
    edges = np.concatenate([pairs, pairs[::-1]], axis=1)
    means = rng.normal(size=(3, 8))
    x = means[labels] + rng.normal(size=(120, 8))
    strange = rng.random(120) < 0.5
    other = np.where(strange[:, None], rng.normal(3, 3, size=x.shape), x)

    def classifier(x, edges):
        h = diffused(x, edges, keep=0.0, num_steps=2)
        return h @ means.T - np.sum(means**2, axis=1) / 2, h

    alone = np.zeros((2, 0), int)
    scores = ebm.fit_graph_energy(*classifier(x, alone), labels).scores(*classifier(other, alone), edges)
    return labels, strange, edges, classifier(other, edges)[0], scores


def test_strange_nodes_are_found_and_do_not_spoil_predictions():
    areas, accuracies = [], []
    for seed in range(NUM_SEEDS):
        labels, strange, edges, logits, scores = shifted_graph(seed)
        rivals = scores.total, ebm.logit_energy(logits), ebm.gnnsafe(logits, edges)
        ours, *theirs = (ebm.auroc(score[~strange], score[strange]).value for score in rivals)
        areas.append(ours - max(theirs))
        ours, theirs = (np.mean(np.argmax(x, axis=1) == labels) for x in (scores.probabilities, logits))
        accuracies.append(ours - theirs)
    limit = t_limit(2, NUM_SEEDS - 1)
    assert ttest_1samp(areas, 0.08).statistic > limit and ttest_1samp(accuracies, 0.0).statistic > limit


def test_a_far_node_has_no_say():
    logits, h, labels, _ = clouds()
    energy = ebm.fit_graph_energy(logits, h, labels)
    hub, leaves = 0, np.arange(1, 6)  # of class 0, all of them
    edges = np.concatenate([np.stack([np.full(5, hub), leaves]), np.stack([leaves, np.full(5, hub)])], axis=1)
    far = h.copy()
    far[leaves[0]] = energy.mean[1] + 1e3 * (energy.mean[1] - energy.mean[0])
    before, after = (np.asarray(energy.scores(logits, x, edges).probabilities[hub]) for x in (h, far))
    assert before.argmax() == after.argmax() == 0 and after[0] > 0.5


# Inside a model


def test_evidence_is_a_prior_of_class_probabilities():
    logits, h, labels, edges = clouds()
    scores = ebm.fit_graph_energy(logits, h, labels).scores(logits, h, edges, num_steps=2)
    alpha = 1 + jnp.exp(scores.log_alpha[jnp.array([3, 40, -1])])
    counts = jnp.array([[4, 1, 0], [0, 0, 3], [2, 2, 2]])  # answers of people who were asked

    def model():
        with numpyro.plate("node", 3):
            p = numpyro.sample("p", dist.Dirichlet(alpha))
            numpyro.sample("answers", dist.Multinomial(counts.sum(axis=1), p), obs=counts)

    draws = ebm.sample(
        KEY, ebm.target(model), num_chains=2, num_warmup=200, num_samples=500, log_likelihood=False, progress_bar=False
    )["posterior"]["p"]
    ess = array_stats.ess(draws.values, chain_axis=0, draw_axis=1, method="mean")
    exact = dist.Dirichlet(alpha + counts)
    z = (draws.mean(("chain", "draw")).values - exact.mean) / np.sqrt(exact.variance / ess)
    assert np.max(np.abs(z)) < z_limit(z.size)


# Results and faults


def test_scores_as_a_tree(tmp_path):
    logits, h, labels, edges = clouds()
    scores = ebm.fit_graph_energy(logits, h, labels).scores(logits, h, edges)
    names = [f"county {i}" for i in range(len(h))]
    scores.to_datatree(nodes=names, classes=["a", "b", "c"]).to_netcdf(tmp_path / "scores.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "scores.nc", engine="h5netcdf") as tree:
        assert tree["scores"]["energy"].dims == ("node", "scale")
        for scale in SCALES:
            np.testing.assert_array_equal(tree["scores"]["energy"].sel(scale=scale), getattr(scores, scale))
        at = tree["scores"].to_dataset().sel(node="county 7", **{"class": "b"})
        assert at["probability"] == scores.probabilities[7, 1] and at["log_alpha"] == scores.log_alpha[7, 1]
    assert scores.to_datatree()["scores"].sizes == {"node": 90, "scale": 4, "class": 3}


def test_precision_follows_the_data():
    logits, h, labels, edges = clouds()
    single = [x.astype(np.float32) for x in (logits, h)]
    double, found = (
        ebm.fit_graph_energy(*numbers, labels).scores(*numbers, edges) for numbers in ((logits, h), single)
    )
    for name in ("independent", "local", "group", "log_alpha"):
        assert getattr(found, name).dtype == jnp.float32
        np.testing.assert_allclose(getattr(found, name), getattr(double, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, int])
def test_coarse_numbers_are_cast(dtype):
    logits, h, labels, edges = clouds()
    energy = ebm.fit_graph_energy(logits, h, labels)
    with pytest.warns(ebm.EnergyWarning, match=f"logits has dtype {np.dtype(dtype).name}"):
        assert energy.scores(logits.astype(dtype), h, edges).total.dtype == jnp.float64


def spoiled(x, value, nodes=(7, 40)):
    x = x.copy()
    x[list(nodes), 1] = value
    return x


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_counted(value):
    logits, h, labels, edges = clouds()
    energy = ebm.fit_graph_energy(logits, h, labels)
    message = r"logits are not finite at 2 of 90 nodes; the first are \[7, 40\]"
    for call in (
        lambda: ebm.fit_graph_energy(spoiled(logits, value), h, labels),
        lambda: energy.scores(spoiled(logits, value), h, edges),
        lambda: ebm.logit_energy(spoiled(logits, value)),
        lambda: ebm.gnnsafe(spoiled(logits, value), edges),
    ):
        with pytest.raises(ebm.NonFiniteEnergyError, match=message):
            call()
    with pytest.raises(ebm.NonFiniteEnergyError, match="embeddings are not finite at 2 of 90"):
        energy.scores(logits, spoiled(h, value), edges)
    with pytest.raises(ebm.NonFiniteEnergyError, match=r"too large.*at 1 of 90 nodes; the first are \[9\]"):
        energy.scores(logits, spoiled(h, 1e200, [9]), edges)


def test_shapes_at_odds():
    logits, h, labels, edges = clouds()
    energy = ebm.fit_graph_energy(logits, h, labels)
    for call, message in (
        (lambda: energy.scores(logits[:-1], h, edges), r"\(89, 3\) and embeddings \(90, 4\)"),
        (lambda: energy.scores(logits, h[:, :3], edges), r"\(90, 3\) and embeddings \(90, 3\)"),
        (lambda: energy.scores(logits[:, 0], h, edges), r"logits have shape \(90,\)"),
        (lambda: energy.scores(logits, h, edges.T), r"edges have shape \(369, 2\)"),
        (lambda: energy.scores(logits, h, edges + 10), r"shape \(2, 369\), are of nodes 10 to 9\d; there are 90"),
        (lambda: energy.scores(logits, h, edges - 1), "nodes -1 to"),
        (lambda: ebm.fit_graph_energy(logits, h, labels[1:]), r"embeddings \(90, 4\), labels \(89,\)"),
    ):
        with pytest.raises(ebm.EnergyShapeError, match=message):
            call()


def test_settings_and_labels_out_of_range():
    logits, h, labels, edges = clouds()
    energy = ebm.fit_graph_energy(logits, h, labels)
    many = np.tile(h, 30)
    for call, message in (
        (lambda: energy.scores(logits > 0, h, edges), "logits has dtype bool"),
        (lambda: energy.scores(logits, h, edges + 0.5), "pairs of integers; got float64"),
        (lambda: energy.scores(logits, h, edges, keep=1.5), "keep is a share"),
        (lambda: ebm.gnnsafe(logits, edges, num_steps=-1), "num_steps not negative"),
        (lambda: ebm.fit_graph_energy(logits, h, labels * 2), "integers below 3"),
        (lambda: ebm.fit_graph_energy(logits, h, labels * 1.0), "got float64"),
        (lambda: ebm.fit_graph_energy(logits, h, labels, shrinkage=2.0), "shrinkage in"),
        (lambda: ebm.fit_graph_energy(logits, h, np.where(labels == 1, -1, labels)), r"Classes \[1\] have too few"),
        (lambda: ebm.fit_graph_energy(0 * logits, h, labels), "say nothing of a scale"),
        (lambda: ebm.fit_graph_energy(logits, many, labels, shrinkage=0.0), r"classes \[0, 1, 2\] is singular.*shrink"),
    ):
        with pytest.raises(ebm.EnergyError, match=message):
            call()
    assert np.all(np.isfinite(ebm.fit_graph_energy(logits, many, labels).scores(logits, many, edges).total))
