"""Which nodes a graph classifier should not be trusted on: energies of its evidence, beside those of its logits.

    python benchmarks/graphs.py                     five seeds, and the large graph
    python benchmarks/graphs.py --seeds 0 --tables shifts

A stochastic block model of 7 classes of 120 nodes. Two nodes of a class are neighbours with probability .05, others
with .002, which leaves four in five neighbours in the own class, as in networks of citations. A node has each of 100
words or has it not: the 15 of its class with probability .25, others with .05. Classes 0 to 3 are known, 4 to 6 left
out. A graph convolutional network of two layers (64 rectified units, dropout of a half, Adam at .01 with a weight decay
of .0005, 200 steps) is trained on the graph of known classes, where 20 nodes of each class have a label. Then

- left out: the other classes join the graph;
- near: of half of the nodes without a label the words are drawn anew, each with its frequency among known nodes;
- normal: their words are standard normal numbers; Bernoulli: each is there with probability a half.

First table: area under the curve by which a score tells these nodes from the others without a label. Evidence is fitted
by `ebm.fit_graph_energy` as it comes, on the graph of known classes, without edges. Its settings (one full covariance,
shrunk by .3, strength .5) were chosen on seeds 100 to 104 of this model. The row "as public" has diagonal covariances
of each class, strength 1, and the fit with edges, as the public code does, and a shrinkage of .01. Second table: share
of nodes without a label, changed or not, whose class is right, and the calibration error, by the probabilities of the
classifier and by those of evidence.

Third table: 10^5 nodes, 10^6 edges both ways round, 7 classes, 64 units; processor seconds of `scores`, and of SciPy's
sparse products alone: ten, of the same 15 columns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
from records import as_header, as_row, timed, with_error

import ebm_ppl as ebm
from ebm_ppl.models.graph_ebm import SCALES

CLASSES, KNOWN, SIZE, LABELLED = 7, 4, 120, 20
WITHIN, BETWEEN = 0.05, 0.002
WORDS, OWN, OFTEN, SELDOM = 100, 15, 0.25, 0.05
HIDDEN, STEPS = 64, 200
SHIFTS = "left out", "near", "normal", "Bernoulli"
NO_EDGES = np.zeros((2, 0), int)
PUBLIC = {"covariance": "diagonal", "tied": False, "shrinkage": 0.01, "strength": 1.0}


class Graph(NamedTuple):
    """Nodes with features and classes, and edges both ways round."""

    x: np.ndarray
    label: np.ndarray
    edges: np.ndarray

    def only(self, chosen: np.ndarray) -> Graph:
        """The nodes that are chosen, and the edges between them."""
        number = np.cumsum(chosen) - 1
        return Graph(self.x[chosen], self.label[chosen], number[self.edges[:, chosen[self.edges].all(axis=0)]])


def block_model(rng: np.random.Generator) -> Graph:
    label = np.repeat(np.arange(CLASSES), SIZE)
    same = label[:, None] == label
    upper = np.triu(rng.random(same.shape) < np.where(same, WITHIN, BETWEEN), 1)
    often = np.argsort(rng.random((CLASSES, WORDS)), axis=1) < OWN
    x = rng.random((len(label), WORDS)) < np.where(often, OFTEN, SELDOM)[label]
    return Graph(x.astype(np.float32), label, np.stack(np.nonzero(upper | upper.T)))


class GCN(eqx.Module):
    """Two layers, each of which averages over neighbours with weights 1 / sqrt(degree degree')."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, key: jax.Array, num_features: int, num_classes: int):
        key_first, key_second = jax.random.split(key)
        self.first = eqx.nn.Linear(num_features, HIDDEN, key=key_first)
        self.second = eqx.nn.Linear(HIDDEN, num_classes, key=key_second)

    def __call__(self, x: jax.Array, edges: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Logits and embeddings of all nodes; with a key, of training."""
        drop = eqx.nn.Dropout(0.5, inference=key is None)
        keys = (None, None) if key is None else jax.random.split(key)
        hidden = jax.nn.relu(_convolved(jax.vmap(self.first)(drop(x, key=keys[0])), edges))
        return _convolved(jax.vmap(self.second)(drop(hidden, key=keys[1])), edges), hidden


def _convolved(x: jax.Array, edges: jax.Array) -> jax.Array:
    node, neighbour = edges
    root = jnp.sqrt(1.0 + jax.ops.segment_sum(jnp.ones(len(node)), node, len(x)))[:, None]
    return (jax.ops.segment_sum((x / root)[neighbour], node, len(x)) + x / root) / root


@eqx.filter_jit
def run(network: GCN, graph: Graph, edges: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return network(jnp.asarray(graph.x), jnp.asarray(edges))


@eqx.filter_jit
def train(key: jax.Array, graph: Graph, is_labelled: np.ndarray) -> GCN:
    """By the labels of some nodes of a graph."""
    x, label, edges = map(jnp.asarray, graph)
    key_start, key_steps = jax.random.split(key)
    start, static = eqx.partition(GCN(key_start, graph.x.shape[1], KNOWN), eqx.is_array)
    adam = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(0.01))

    def loss(network: GCN, key: jax.Array) -> jax.Array:
        logits, _ = eqx.combine(network, static)(x, edges, key)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label), where=is_labelled)

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        network, state = carry
        updates, state = adam.update(jax.grad(loss)(network, key), state, network)
        return (eqx.apply_updates(network, updates), state), None

    (network, _), _ = jax.lax.scan(step, (start, adam.init(start)), jax.random.split(key_steps, STEPS))
    return eqx.combine(network, static)


def shifted(rng: np.random.Generator, shift: str, whole: Graph, known: Graph, is_labelled: np.ndarray):
    """A graph, the nodes of it that are strange, and those that are not; neither has a label."""
    if shift == "left out":
        return whole, whole.label >= KNOWN, np.append(~is_labelled, np.zeros(len(whole.label) - len(known.label), bool))
    strange = ~is_labelled & (rng.random(len(is_labelled)) < 0.5)
    num = int(np.sum(strange)), WORDS
    draw = {
        "near": lambda: rng.random(num) < known.x.mean(axis=0),
        "normal": lambda: rng.normal(size=num),
        "Bernoulli": lambda: rng.random(num) < 0.5,
    }
    x = known.x.copy()
    x[strange] = draw[shift]()
    return known._replace(x=x), strange, ~is_labelled & ~strange


class Found(NamedTuple):
    """Of one seed."""

    area: dict[tuple[str, str], float]
    """By score and shift."""
    accuracy: dict[tuple[str, str], float]
    calibration: dict[tuple[str, str], float]
    """By prediction and shift."""


def one_seed(seed: int) -> Found:
    rng = np.random.default_rng(seed)
    whole = block_model(rng)
    known = whole.only(whole.label < KNOWN)
    is_labelled = np.concatenate([np.arange(SIZE) < LABELLED] * KNOWN)
    network = train(jax.random.key(seed), known, is_labelled)
    labels = np.where(is_labelled, known.label, -1)
    fitted = ebm.fit_graph_energy(*run(network, known, NO_EDGES), labels)
    as_public = ebm.fit_graph_energy(*run(network, known, known.edges), labels, **PUBLIC)
    found = Found({}, {}, {})
    for shift in SHIFTS:
        graph, strange, usual = shifted(rng, shift, whole, known, is_labelled)
        logits, _ = run(network, graph, graph.edges)
        alone = run(network, graph, NO_EDGES)
        evidence = fitted.scores(*alone, graph.edges)
        scores = {"logit energy": ebm.logit_energy(logits), "GNNSafe": ebm.gnnsafe(logits, graph.edges)}
        scores |= {scale: getattr(evidence, scale) for scale in SCALES}
        scores["total, as public"] = as_public.scores(*alone, graph.edges).total
        for name, score in scores.items():
            found.area[name, shift] = ebm.auroc(score[usual], score[strange]).value
        judged = usual if shift == "left out" else usual | strange
        for name, p in {"classifier": jax.nn.softmax(logits), "evidence": evidence.probabilities}.items():
            p, label = np.asarray(p)[judged], graph.label[judged]
            found.accuracy[name, shift] = float(np.mean(p.argmax(axis=1) == label))
            found.calibration[name, shift] = ebm.calibration(p, label).error
    return found


def print_shifts(seeds: list[int]) -> None:
    runs = [one_seed(seed) for seed in seeds]

    def row(label: str, of_runs: list[dict], name: str) -> str:
        by_shift = np.array([[each[name, shift] for shift in SHIFTS] for each in of_runs])
        columns = *by_shift.T, by_shift.mean(axis=1)
        return as_row(label, *(with_error(list(column)) for column in columns))

    print(as_header("area under the curve, by", *SHIFTS, "mean", *(f"mean, seed {seed}" for seed in seeds)))
    for name in dict.fromkeys(name for name, _ in runs[0].area):
        means = [np.mean([each.area[name, shift] for shift in SHIFTS]) for each in runs]
        print(row(name, [each.area for each in runs], name) + "".join(f" {mean:.3f} |" for mean in means))
    print()
    print(as_header("prediction", *SHIFTS, "mean"))
    for name in ("classifier", "evidence"):
        print(row(f"right, by {name}", [each.accuracy for each in runs], name))
    for name in ("classifier", "evidence"):
        print(row(f"calibration error of {name}", [each.calibration for each in runs], name))


def seconds(work: Callable[[], Any]) -> float:
    """Of the processor, median of five."""
    return float(np.median([timed(work)[0] for _ in range(5)]))


def print_large(num_nodes: int = 100_000, num_edges: int = 1_000_000) -> None:
    rng = np.random.default_rng(0)
    one_way = rng.integers(num_nodes, size=(2, num_edges))
    edges = np.concatenate([one_way, one_way[::-1]], axis=1)
    label = rng.integers(CLASSES, size=num_nodes)
    embeddings = rng.normal(label[:, None], 1, (num_nodes, HIDDEN)).astype(np.float32)
    logits = (5 * np.eye(CLASSES)[label] + rng.normal(size=(num_nodes, CLASSES))).astype(np.float32)
    first, fitted = timed(lambda: ebm.fit_graph_energy(logits, embeddings, label))
    compiled, _ = timed(lambda: fitted.scores(logits, embeddings, edges))
    ours = seconds(lambda: fitted.scores(logits, embeddings, edges))
    columns = rng.normal(size=(num_nodes, 2 * CLASSES + 1)).astype(np.float32)
    adjacency = scipy.sparse.csr_array((np.ones(2 * num_edges, np.float32), tuple(edges)), shape=(num_nodes,) * 2)
    adjacency += scipy.sparse.eye_array(num_nodes, dtype=np.float32)
    average = scipy.sparse.diags_array(1 / adjacency.sum(axis=1)) @ adjacency

    def chain() -> np.ndarray:
        x = columns
        for _ in range(10):
            x = 0.5 * x + 0.5 * (average @ x)
        return x

    theirs = seconds(chain)
    print(as_header("seconds", "fit", "first scores", "scores", "ten products by SciPy", "ratio"))
    print(as_row("", *(f"{x:.2f}" for x in (first, compiled, ours, theirs)), f"{ours / theirs:.1f}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--tables", nargs="+", choices=("shifts", "large"), default=["shifts", "large"])
    options = parser.parse_args()
    if "shifts" in options.tables:
        print_shifts(options.seeds)
        print()
    if "large" in options.tables:
        print_large()


if __name__ == "__main__":
    main()
