# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which nodes of my graph should I not trust the classifier on?
#
# 1797 real digits of 8 x 8 pixels (those of scikit-learn) are the nodes of a graph; each is joined to the five that are
# most like it. A graph network learns eight of the digits from twenty labels each. Then it meets what it was not
# trained for: eights and nines, for which it has no class, and images that are scanned anew, by a broken scanner which
# shuffles their pixels. The edges stay as they were.

# %%
import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph

import ebm_ppl as ebm

FAST = bool(int(os.environ.get("EBM_PPL_FAST", "0")))  # a short run, for the tests
NUM_STEPS = 20 if FAST else 300
NUM_DRAWS = 50 if FAST else 1000

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("EBM_PPL_OUT", HERE / "output"))
OUT.mkdir(exist_ok=True, parents=True)

# %%
NUM_KNOWN, NUM_LABELS, BROKEN = 8, 20, 0.1
rng = np.random.default_rng(0)
images, digits = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
is_known = digits < NUM_KNOWN
is_labelled = np.zeros(len(digits), bool)
for digit in range(NUM_KNOWN):
    is_labelled[rng.choice(np.flatnonzero(digits == digit), NUM_LABELS, replace=False)] = True
is_broken = is_known & ~is_labelled & (rng.random(len(digits)) < BROKEN)
seen = images.copy()
seen[is_broken] = rng.permuted(images[is_broken], axis=1)


def neighbours(x):
    """The five nearest images of each, edges both ways round."""
    return np.unique(np.concatenate([pair := np.stack(kneighbors_graph(x, 5).nonzero()), pair[::-1]], axis=1), axis=1)


NO_EDGES = np.zeros((2, 0), int)

# %% [markdown]
# ## The classifier
#
# Two layers that average over neighbours, trained on the graph of the known digits alone, before the scanner broke.
# Nothing in it knows of uncertainty, and nothing of it changes below.


# %%
def convolved(x, edges):
    node, neighbour = edges
    root = jnp.sqrt(1.0 + jax.ops.segment_sum(jnp.ones(len(node)), node, len(x)))[:, None]
    return (jax.ops.segment_sum((x / root)[neighbour], node, len(x)) + x / root) / root


class GCN(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, key):
        key_first, key_second = jax.random.split(key)
        self.first = eqx.nn.Linear(64, 64, key=key_first)
        self.second = eqx.nn.Linear(64, NUM_KNOWN, key=key_second)

    def __call__(self, x, edges, key=None):
        drop = eqx.nn.Dropout(0.5, inference=key is None)
        keys = (None, None) if key is None else jax.random.split(key)
        hidden = jax.nn.relu(convolved(jax.vmap(self.first)(drop(x, key=keys[0])), edges))
        return convolved(jax.vmap(self.second)(drop(hidden, key=keys[1])), edges), hidden


@eqx.filter_jit
def trained(network, x, edges, labels, where):
    adam = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(0.01))

    def loss(network, key):
        logits, _ = network(x, edges, key)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels), where=where)

    def step(carry, key):
        network, state = carry
        updates, state = adam.update(jax.grad(loss)(network, key), state, network)
        return (eqx.apply_updates(network, updates), state), None

    keys = jax.random.split(jax.random.key(1), NUM_STEPS)
    return jax.lax.scan(step, (network, adam.init(network)), keys)[0][0]


before, labels = images[is_known], digits[is_known]
network = trained(
    GCN(jax.random.key(0)), *map(jnp.asarray, (before, neighbours(before), labels, is_labelled[is_known]))
)
run = eqx.filter_jit(lambda x, edges: network(jnp.asarray(x), jnp.asarray(edges)))

# %% [markdown]
# ## Evidence, fitted once
#
# What the classifier makes of each image by itself, with no edges, is all that is needed: logits, and the last hidden
# layer as embeddings. Evidence of a class is its logit, less what the embedding is away from the class; then it spreads
# along the edges.

# %%
energy = ebm.fit_graph_energy(*run(before, NO_EDGES), np.where(is_labelled[is_known], labels, -1))
edges = neighbours(images)
logits, _ = run(seen, edges)
scores = energy.scores(*run(seen, NO_EDGES), edges)
tree = scores.to_datatree(classes=range(NUM_KNOWN))
tree["scores"]["energy"].to_series().unstack().describe().round(1)

# %%
usual = is_known & ~is_labelled & ~is_broken
rivals = {"logit energy": ebm.logit_energy(logits), "GNNSafe": ebm.gnnsafe(logits, edges)}
rivals |= {scale: tree["scores"]["energy"].sel(scale=scale).values for scale in tree["scores"]["scale"].values}
print(f"{'':14s}{'eights, nines':>18s}{'broken scanner':>18s}")
for name, score in rivals.items():
    areas = (ebm.auroc(score[usual], score[strange]) for strange in (~is_known, is_broken))
    print(f"{name:14s}" + "".join(f"{area.value:10.3f} ± {area.std_error:.3f}" for area in areas))

# %% [markdown]
# Areas under the curve by which a score tells strange nodes from usual ones. Each scale finds a strangeness of its own
# kind: eights and nines sit among others like them, which the group scale sees (.993); an image of the broken scanner
# sits among whole ones, which have spoken for it in the classifier's logits (.672) and speak for it in its group
# (.568), so that only the independent scale sees it (.977). Their sum is near the best for both (.989 and .915), and
# the independent scale alone is (.961 and .977). The two baselines are not.
#
# The strangest nodes by each:

# %%
best = {scale: np.argsort(-rivals[scale])[:12] for scale in ("independent", "local", "group", "total")}
sheet = seen[np.concatenate(list(best.values()))].reshape(-1, 8, 8)
ebm.plot_images(sheet, num_columns=12, rows=list(best)).savefig(OUT / "uncertain_graphs_strangest.png", dpi=120)

# %%
groups = {"known digits": usual, "eights and nines": ~is_known, "broken scanner": is_broken}
figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
for axis, name in zip(axes, ("logit energy", "group", "total"), strict=True):
    bins = np.linspace(*np.quantile(rivals[name], (0.0, 0.995)), 40)
    for label, where in groups.items():
        axis.hist(rivals[name][where], bins, density=True, histtype="step", lw=1.5, label=label)
    axis.set(xlabel=f"{name}, nats", yticks=[])
axes[0].legend(fontsize=8)
figure.savefig(OUT / "uncertain_graphs_energies.png", dpi=120)

# %% [markdown]
# ## Predictions that strange nodes do not spoil, and whether their probabilities hold
#
# Of the digits that have a class, those of the broken scanner included.

# %%
judged = is_known & ~is_labelled
predictions = {"classifier": jax.nn.softmax(logits), "evidence": scores.probabilities}
figure, axis = plt.subplots(figsize=(3.6, 3.4), layout="constrained")
for name, p in predictions.items():
    p = np.asarray(p)
    right, held = p.argmax(axis=1) == digits, ebm.calibration(p[judged], digits[judged], num_bins=10)
    axis.scatter(
        held.confidence, held.accuracy, 4 * np.sqrt(held.num), label=f"{name}, error {held.error:.3f}", alpha=0.7
    )
    of = ", ".join(f"{np.mean(right[x]):.3f} of {label}" for label, x in groups.items() if label != "eights and nines")
    print(f"{name}: right are {of}; calibration error {held.error:.3f}")
axis.plot([0, 1], [0, 1], "k:", lw=1)
axis.set(xlabel="confidence", ylabel="share of right classes", title="areas go as the root of numbers")
axis.title.set_fontsize(9)
axis.legend(loc="lower left", fontsize=8)
figure.savefig(OUT / "uncertain_graphs_reliability.png", dpi=120)

# %% [markdown]
# Both are right on 98.6 % of the whole digits; of the 128 broken ones the classifier has three wrong and evidence two,
# which is no difference. Both say "sure" of nearly all and are right, so that the errors of calibration are small and
# the few that are in doubt say little. What saves broken images is the graph, which was made of whole ones. With edges
# from the broken pixels, which then are neighbours of one another, one in ten is right by either.
#
# ## Evidence in a model
#
# Somebody has typed in what the images show, and guesses in an unknown share of cases. Nobody has checked. Counts of
# evidence make a Dirichlet distribution of each image's class, of which one answer needs the mean only.


# %%
def clerk(p, answers):
    knows = numpyro.sample("knows", dist.Beta(1.0, 1.0))
    numpyro.sample("answers", dist.Categorical(probs=knows * p + (1 - knows) / NUM_KNOWN).to_event(1), obs=answers)


guesses = rng.random(len(digits)) < 0.3
answers = np.where(guesses, rng.integers(NUM_KNOWN, size=len(digits)), digits)
target = ebm.target(clerk, scores.probabilities[judged], answers[judged])
posterior = ebm.sample(
    jax.random.key(2), target, num_chains=2, num_warmup=NUM_DRAWS, num_samples=NUM_DRAWS, progress_bar=False
)["posterior"]
knows = posterior["knows"]
truth = 1 - np.mean(guesses[judged])
print(f"the clerk knows {float(knows.mean()):.3f} ± {float(knows.std()):.3f} of the images, in truth {truth:.3f}")
