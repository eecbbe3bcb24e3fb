"""Which nodes of a graph a classifier should not be trusted on: energies of its evidence, at three scales.

Of node v the classifier, whatever it is, gives logits l(v) and an embedding h(v), here without the edges A, which say
who is whose neighbour: a network that takes edges is passed none.

    evidence       e_c = l_c - strength r_c                     r_c = offset + slope (h - m_c)' S_c^-1 (h - m_c)
    energy         U = -log sum_c exp(e_c)                      `GraphEnergy`: exp(-U) can be integrated over h
    diffusion      P = (keep I + (1 - keep) D^-1 (A + I))^num_steps                         `diffused`; D: degrees
    independent    U(v)                                         high where the node itself is strange
    local          -log sum_c exp((P e)_c)                      high, too, where evidence of neighbours is in conflict
    group          (P U)(v)                                     high where the neighbourhood is strange
    total          their sum                                    `GraphScores`
    trust          w = min(1, exp(limit - U))                   limit: what U comes up to where evidence was fitted
    evidential     alpha = exp(-local) softmax(P w log p)       log p = e + U; local = -log sum_c alpha_c
    baselines      U(v) of the plain logits                     `logit_energy`
                   the same after two steps of P without I      `gnnsafe`

The logits of a network of rectified units are linear along a ray of embeddings, so that without r_c there are rays
along which U falls for ever, and exp(-U) has no integral. m_c and S_c are moments of embeddings of class c; offset and
slope map the central 95 % of the distances onto those of the logits, so that neither outweighs the other.

Scales, and r_c in the units of the logits, are as in the public code. By default the rest is not. That code fits on
what the classifier makes with edges, and scores without. It has a diagonal covariance of each class, with as much of
1e-8 added as it takes, by which units that are zero on all nodes of a class outweigh all others; here there is one,
shrunk towards a multiple of the identity. Offset and slope are of each class there, two numbers here; strength is 1
there, here the half, which is among those it compares. It has no prediction: that of alpha = exp(P e) would be
dictated by the neighbour that is farthest off, which by w has no say.

References:
    Fuchsgruber, Wollschläger and Günnemann (2024), Energy-based epistemic uncertainty for graph neural networks; Wu,
    Chen, Yang and Yan (2023), Energy-based out-of-distribution detection for graph neural networks; Liu, Wang, Owens
    and Li (2020), Energy-based out-of-distribution detection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.energy import as_energy_values
from ebm_ppl.typing import Array, ArrayLike, EnergyError, EnergyShapeError, NonFiniteEnergyError

if TYPE_CHECKING:
    import xarray as xr

SCALES = "independent", "local", "group", "total"
CENTRAL = 0.025, 0.975
"""Quantiles between which distances and logits are mapped onto one another."""
AT_ONCE = 4096
"""Nodes whose evidence is found at once."""


class GraphScores(eqx.Module):
    """How strange each node is at each scale: energies in nats, high where it is unlike what was trained on."""

    independent: Array
    """Of the node alone, (node,)."""
    local: Array
    """Of the evidence of its neighbourhood, (node,)."""
    group: Array
    """The mean of its neighbourhood's, (node,)."""
    log_alpha: Array
    """log of the counts of each class in the neighbourhood, (node, class); -log of their sum is `local`.

    In a model they are a prior of the class probabilities, `dist.Dirichlet(1 + jnp.exp(log_alpha))`.
    """

    @property
    def total(self) -> Array:
        """The sum of the three scales, (node,)."""
        return self.independent + self.local + self.group

    @property
    def probabilities(self) -> Array:
        """alpha / sum alpha, (node, class): a prediction in which strange nodes have no say."""
        return jax.nn.softmax(self.log_alpha)

    def to_datatree(self, *, nodes: Sequence[Any] | None = None, classes: Sequence[Any] | None = None) -> xr.DataTree:
        """A DataTree whose group `scores` has `energy` (node, scale), `log_alpha` and `probability` (node, class).

        Args:
            nodes, classes: what to call them, if anything.
        """
        import xarray as xr

        energy = np.stack([getattr(self, scale) for scale in SCALES], axis=1)
        by_class = {"log_alpha": self.log_alpha, "probability": self.probabilities}
        columns = {name: (("node", "class"), np.asarray(each)) for name, each in by_class.items()}
        names = {"scale": SCALES, "node": nodes, "class": classes}
        coords = {dim: list(each) for dim, each in names.items() if each is not None}
        scores = xr.Dataset({"energy": (("node", "scale"), energy, {"units": "nats"})} | columns, coords)
        tree = xr.DataTree.from_dict({"scores": scores})
        tree.attrs = {"inference_library": "ebm_ppl"}
        return tree


class GraphEnergy(eqx.Module):
    """U = -log sum_c exp(e_c) of one node, by its logits and embedding: what `fit_graph_energy` returns.

    Reference: Fuchsgruber et al. (2024).

    Example:
        >>> alone = classifier(x, no_edges)  # logits and embeddings
        >>> scores = ebm_ppl.fit_graph_energy(*alone, labels).scores(*alone, edges)
        >>> strangest = jnp.argsort(-scores.total)
    """

    mean: Array
    """m_c, (class, dim)."""
    whitening: Array
    """A root of S_c^-1: (class, dim) where S_c is diagonal, else (class, dim, dim)."""
    offset: Array
    slope: Array
    """Of the regulariser, two numbers."""
    limit: Array
    """The energy up to which a node is trusted in predictions, in nats."""
    strength: float = eqx.field(static=True)

    def evidence(self, logits: Array, embedding: Array) -> Array:
        """e_c of one node, (class,): log of the counts that it has of each class."""
        away = embedding - self.mean
        white = self.whitening * away if self.whitening.ndim == 2 else jnp.einsum("cij,cj->ci", self.whitening, away)
        return logits - self.strength * (self.offset + self.slope * jnp.sum(white**2, axis=1))

    def __call__(self, logits: Array, embedding: Array) -> Array:
        return -jax.nn.logsumexp(self.evidence(logits, embedding))

    def scores(
        self, logits: ArrayLike, embeddings: ArrayLike, edges: ArrayLike, *, keep: float = 0.5, num_steps: int = 10
    ) -> GraphScores:
        """Energies of all nodes of a graph, at each scale.

        Args:
            logits: of the classifier without edges, shape (node, class).
            embeddings: the same, shape (node, dim).
            edges: pairs of a node and its neighbour, integers of shape (2, edge); where neither is first, both ways
                round. Loops are added to every node, and those that are there do not count twice.
            keep: share of its own that a node keeps in each step of the diffusion, from 0 to 1.
            num_steps: of the diffusion.

        Raises:
            EnergyShapeError: where shapes are at odds, or an edge is of a node that is not there.
            EnergyError: for what is no number or no edge, and settings out of range.
            NonFiniteEnergyError: for logits, embeddings or energies that are not finite, with the nodes.
        """
        logits, embeddings = _of_nodes(logits, "logits"), _of_nodes(embeddings, "embeddings")
        expected = (len(logits), len(self.mean)), (len(logits), self.mean.shape[1])
        if (logits.shape, embeddings.shape) != expected:
            raise EnergyShapeError(
                f"logits have shape {logits.shape} and embeddings {embeddings.shape}; expected (node, "
                f"{len(self.mean)}) and (node, {self.mean.shape[1]}), of the same nodes."
            )
        found = _scores(self, logits, embeddings, _pairs(edges, len(logits), loops=True), *_steps(keep, num_steps))
        _check_finite(found.independent[:, None], "Energies (embeddings may be too large for their squares)")
        return found


def fit_graph_energy(
    logits: ArrayLike,
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    covariance: Literal["full", "diagonal"] = "full",
    tied: bool = True,
    shrinkage: float = 0.3,
    strength: float = 0.5,
) -> GraphEnergy:
    """The energy of a trained classifier's nodes; the classifier stays as it is.

    Args:
        logits: of the classifier without edges, shape (node, class), on nodes like those that it was trained on.
        embeddings: of the same nodes: its last hidden layer, shape (node, dim).
        labels: the classes, integers of shape (node,); -1 where a node has none, or was not trained on. Means and
            covariances are those of labelled nodes, the scale of the regulariser is that of all.
        covariance: `"diagonal"` where units of the embedding are taken as independent.
        tied: whether there is one covariance, that of embeddings about the mean of their class, or each has its own.
        shrinkage: share, from 0 to 1, of the mean variance of a unit about the mean of its class, in every covariance.
        strength: of the regulariser; 0 leaves an energy that has no density.

    Raises:
        EnergyShapeError: where logits, embeddings and labels are of different nodes.
        EnergyError: where a class has too few labels, a covariance is singular, all logits of a class are the same, or
            settings are out of range.
        NonFiniteEnergyError: for logits or embeddings that are not finite, with the nodes.

    Reference: Fuchsgruber et al. (2024).
    """
    logits, embeddings, classes = _of_nodes(logits, "logits"), _of_nodes(embeddings, "embeddings"), np.asarray(labels)
    if len(embeddings) != len(logits) or classes.shape != logits.shape[:1]:
        raise EnergyShapeError(
            f"logits have shape {logits.shape}, embeddings {embeddings.shape}, labels {classes.shape}; expected "
            "(node, class), (node, dim) and (node,), of the same nodes."
        )
    num_classes = logits.shape[1]
    if not np.issubdtype(classes.dtype, np.integer) or classes.min() < -1 or classes.max() >= num_classes:
        raise EnergyError(f"labels are classes, integers below {num_classes}, or -1 for none; got {classes.dtype}.")
    if covariance not in ("full", "diagonal") or not 0 <= shrinkage <= 1 or not strength >= 0:
        given = f"{covariance!r}, {shrinkage}, {strength}"
        raise EnergyError(
            f"covariance is 'full' or 'diagonal', shrinkage in [0, 1], strength not negative; got {given}."
        )
    num = np.bincount(classes[classes >= 0], minlength=num_classes)
    if few := np.flatnonzero(num < (1 if tied else 2)).tolist():
        raise EnergyError(f"Classes {few} have too few labelled nodes: one at least, or two where tied=False.")
    of_class = [np.asarray(embeddings, np.float64)[classes == c] for c in range(num_classes)]
    mean = np.stack([each.mean(axis=0) for each in of_class])
    own = np.stack([np.cov(each.T, bias=True).reshape(2 * embeddings.shape[1:]) for each in of_class])
    pooled, identity = np.average(own, axis=0, weights=num), np.eye(embeddings.shape[1])
    unshrunk = np.broadcast_to(pooled, own.shape) if tied else own
    covariances = (1 - shrinkage) * unshrunk + shrinkage * np.mean(np.diag(pooled)) * identity
    if covariance == "diagonal":
        covariances = covariances * identity
    values = np.linalg.eigvalsh(covariances)
    if bad := np.flatnonzero(values[:, 0] <= len(identity) * np.finfo(embeddings.dtype).eps * values[:, -1]).tolist():
        raise EnergyError(
            f"The covariance of the embeddings of classes {bad} is singular: units are constant, or there are more of "
            "them than labelled nodes. A shrinkage above 0 mends that."
        )
    roots = np.linalg.inv(np.linalg.cholesky(covariances))
    whitening = jnp.asarray(np.einsum("cii->ci", roots) if covariance == "diagonal" else roots, embeddings.dtype)
    mean = jnp.asarray(mean, embeddings.dtype)
    zero, one = jnp.zeros((), logits.dtype), jnp.ones((), logits.dtype)
    bare = GraphEnergy(mean, whitening, zero, one, zero, strength=-1.0)  # whose evidence is the distances
    low, high = np.quantile(_evidence(bare, jnp.zeros_like(logits), embeddings), CENTRAL)
    floor, top = np.quantile(np.asarray(logits), CENTRAL)
    if not (high > low and top > floor):
        raise EnergyError("Logits, or embeddings, are the same on nearly all nodes: they say nothing of a scale.")
    slope = float(top - floor) / float(high - low)
    energy = GraphEnergy(mean, whitening, one * (floor - slope * low).item(), one * slope, zero, float(strength))
    limit = jnp.quantile(-jax.nn.logsumexp(_evidence(energy, logits, embeddings), axis=1), CENTRAL[1])
    return eqx.tree_at(lambda energy: energy.limit, energy, limit)


def logit_energy(logits: ArrayLike) -> Array:
    """U = -log sum_c exp(l_c) of each node, (node,): what is known of a node by its logits alone.

    Args:
        logits: of the classifier with its edges, shape (node, class).

    Reference: Liu et al. (2020).
    """
    return -jax.nn.logsumexp(_of_nodes(logits, "logits"), axis=1)


def gnnsafe(logits: ArrayLike, edges: ArrayLike, *, keep: float = 0.5, num_steps: int = 2) -> Array:
    """GNNSafe without its training: the logit energy, averaged over neighbours, (node,).

    A node without neighbours keeps its own (in the public code it loses the half of it at each step).

    Args:
        logits: of the classifier with its edges, shape (node, class).
        edges, keep, num_steps: as in `GraphEnergy.scores`, with no loops but those that are there.

    Reference: Wu et al. (2023).
    """
    return diffused(logit_energy(logits), edges, keep=keep, num_steps=num_steps, loops=False)


def diffused(x: ArrayLike, edges: ArrayLike, *, keep: float = 0.5, num_steps: int = 10, loops: bool = True) -> Array:
    """P x: each step keeps a share of what a node has, the rest is the mean over its neighbours.

    Args:
        x: of each node, shape (node, ...).
        edges, keep, num_steps: as in `GraphEnergy.scores`.
        loops: whether each node is a neighbour of itself. Without, one that has no other keeps what it has.
    """
    x = as_energy_values(x, np.shape(x), "x")
    return _spread(x, _pairs(edges, len(x), loops), *_steps(keep, num_steps))


@eqx.filter_jit
def _scores(
    energy: GraphEnergy, logits: Array, embeddings: Array, pairs: Array, keep: Array, num_steps: int
) -> GraphScores:
    evidence = _evidence(energy, logits, embeddings)
    independent = -jax.nn.logsumexp(evidence, axis=1)[:, None]
    opinion = jnp.exp(jnp.minimum(energy.limit - independent, 0)) * (evidence + independent)
    columns = jnp.concatenate([evidence, opinion, independent], axis=1)  # all by one pass over the edges
    ends = np.array([1, 2]) * logits.shape[1]
    evidence, opinion, group = jnp.split(_spread(columns, pairs, keep, num_steps), ends, axis=1)
    local = -jax.nn.logsumexp(evidence, axis=1)
    log_alpha = jax.nn.log_softmax(opinion) - local[:, None]
    return GraphScores(independent[:, 0], local, group[:, 0], log_alpha)


@eqx.filter_jit
def _evidence(energy: GraphEnergy, logits: Array, embeddings: Array) -> Array:
    return jax.lax.map(lambda node: energy.evidence(*node), (logits, embeddings), batch_size=AT_ONCE)


@eqx.filter_jit
def _spread(x: Array, pairs: Array, keep: Array, num_steps: int) -> Array:
    """P x, where every node has a neighbour, if need be itself."""
    node, neighbour = pairs
    degree = jax.ops.segment_sum(jnp.ones(len(node), x.dtype), node, len(x)).reshape(-1, *[1] * (x.ndim - 1))
    keep = keep.astype(x.dtype)

    def step(_: int, x: Array) -> Array:
        return keep * x + (1 - keep) * jax.ops.segment_sum(x[neighbour], node, len(x)) / degree

    return jax.lax.fori_loop(0, num_steps, step, x)


def _pairs(edges: ArrayLike, num_nodes: int, loops: bool) -> Array:
    """Checked edges, with a loop at each node, or at those only that would have no neighbour."""
    pairs = np.asarray(edges)
    if pairs.ndim != 2 or len(pairs) != 2:
        raise EnergyShapeError(f"edges have shape {pairs.shape}; expected (2, edge), a node and its neighbour.")
    if pairs.size and not np.issubdtype(pairs.dtype, np.integer):
        raise EnergyError(f"edges are pairs of integers; got {pairs.dtype}.")
    if pairs.size and (pairs.min() < 0 or pairs.max() >= num_nodes):
        raise EnergyShapeError(
            f"edges, of shape {pairs.shape}, are of nodes {pairs.min()} to {pairs.max()}; there are {num_nodes} nodes, "
            "counted from 0."
        )
    pairs = pairs[:, pairs[0] != pairs[1]] if loops else pairs
    alone = np.arange(num_nodes) if loops else np.setdiff1d(np.arange(num_nodes), pairs[0])
    return jnp.asarray(np.concatenate([pairs, np.stack([alone, alone])], axis=1), int)


def _steps(keep: float, num_steps: int) -> tuple[Array, int]:
    if not 0 <= keep <= 1 or num_steps < 0:
        raise EnergyError(f"keep is a share, from 0 to 1, and num_steps not negative; got {keep} and {num_steps}.")
    return jnp.asarray(keep, float), int(num_steps)


def _of_nodes(x: ArrayLike, name: str) -> Array:
    """Floating-point numbers of shape (node, ...), all of them finite."""
    if np.ndim(x) != 2 or 0 in np.shape(x):
        raise EnergyShapeError(f"{name} have shape {np.shape(x)}; expected a row for each node.")
    x = as_energy_values(x, np.shape(x), name)
    _check_finite(x, name)
    return x


def _check_finite(x: Array, name: str) -> None:
    if bad := np.flatnonzero(~np.isfinite(np.asarray(x)).all(axis=1)).tolist():
        raise NonFiniteEnergyError(f"{name} are not finite at {len(bad)} of {len(x)} nodes; the first are {bad[:5]}.")
