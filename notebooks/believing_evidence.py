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
# # How much do I believe this evidence?
#
# The lengths of 150 iris petals fall into a short and a long group. **How sure can one be of that, and of the number
# that says so?** A log evidence is one number from an integral that nobody can look at. This notebook asks five
# estimators of different kinds for it, sees one of them fail, and shows what tells the two cases apart.
#
# The model is a mixture of two normal distributions, and nothing in it says which of the two is called the first. So
# its posterior has two modes, which are mirror images: the classical trap for estimators that start from chains.

# %%
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.special import logsumexp
from sklearn.datasets import load_iris

import ebm_ppl as ebm

FAST = bool(int(os.environ.get("EBM_PPL_FAST", "0")))  # a short run, for the tests
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("EBM_PPL_OUT", HERE / "output"))
OUT.mkdir(exist_ok=True, parents=True)
jax.config.update("jax_enable_x64", True)
warnings.simplefilter("ignore", ebm.EnergyWarning)  # every doubt is a warning too; here they are printed instead

# %% [markdown]
# ## The data and two models

# %%
petals = load_iris().data[:: 5 if FAST else 1, 2]


def one_group(y):
    mean = numpyro.sample("mean", dist.Normal(4, 2))
    deviation = numpyro.sample("deviation", dist.LogNormal(-0.5, 0.5))
    with numpyro.plate("flower", len(y)):
        numpyro.sample("y", dist.Normal(mean, deviation), obs=y)


def two_groups(y):
    share = numpyro.sample("share", dist.Beta(2, 2))
    with numpyro.plate("group", 2):
        mean = numpyro.sample("mean", dist.Normal(4, 2))
        deviation = numpyro.sample("deviation", dist.LogNormal(-0.5, 0.5))
    group = dist.Categorical(jnp.stack([share, 1 - share]))
    with numpyro.plate("flower", len(y)):
        numpyro.sample("y", dist.MixtureSameFamily(group, dist.Normal(mean, deviation)), obs=y)


one, two = ebm.target(one_group, petals), ebm.target(two_groups, petals)

# %% [markdown]
# ## First of all: a case where the answer is known
#
# With one group there are two unknowns, and a sum over a grid gives the evidence to many digits. An estimator that
# disagrees with it on the easy model need not be asked about the hard one.

# %%
means, deviations = np.linspace(2.5, 5, 400), np.linspace(1, 3, 400)
grid_mean, log_deviation = np.meshgrid(means, np.log(deviations), indexing="ij")
log_prior = dist.Normal(4, 2).log_prob(grid_mean) + dist.LogNormal(-0.5, 0.5).log_prob(np.exp(log_deviation))
log_likelihood = sum(dist.Normal(grid_mean, np.exp(log_deviation)).log_prob(length) for length in petals)
cell = (means[1] - means[0]) * (deviations[1] - deviations[0])
exact = logsumexp(np.asarray(log_prior + log_likelihood)) + np.log(cell)
log_z_one = ebm.log_z(jax.random.key(0), one, ebm.Laplace() if FAST else None)
print(f"one group: {log_z_one}, on the grid {exact:.4f}")

# %% [markdown]
# ## What an expert would do
#
# `log_z` without a method fits a reference to a cheap pilot, weighs fresh draws of it, and asks a second opinion of
# another family where the first one is not clean. The story says what it did, step by step.

# %%
particles = 200 if FAST else 1000
quick = ebm.FittedReference(pilot=ebm.SMC(num_particles=particles), num_draws=512, max_refits=0) if FAST else None
log_z_two = ebm.log_z(jax.random.key(1), two, quick)
print(f"two groups: {log_z_two}, doubts: {log_z_two.doubts or 'none'}")
for line in log_z_two.story:
    print("  ", line)
print(f"log Bayes factor of two groups over one: {log_z_two - log_z_one}")

# %% [markdown]
# ## Five opinions
#
# Their ways are as different as can be: weights of draws from a fitted density; particles along a path of
# temperatures; shells of equal likelihood, without gradients; chains at many temperatures that exchange their places;
# and chains of the posterior, compared with a fitted density.

# %%
opinions = {
    "fitted reference": quick or ebm.FittedReference(),
    "SMC": ebm.SMC(num_particles=particles),
    "nested sampling": ebm.NestedSampling(),
    "parallel tempering": ebm.ParallelTempering(),
    "bridge sampling": ebm.Bridge(num_samples=200 if FAST else 2000),
}
if FAST:  # the two that take longest have tests of their own
    opinions = {name: opinions[name] for name in ("fitted reference", "SMC", "bridge sampling")}
found = {name: ebm.log_z(jax.random.key(2), two, method) for name, method in opinions.items()}
for name, log_z in found.items():
    print(f"{name:20s} {log_z}   {log_z.diagnostics['num_evaluations']:9.0f} evaluations")
    for doubt in log_z.doubts:
        print(f"{'':20s} doubt: {doubt}")

# %% [markdown]
# ## Does the error bar of one run hold?
#
# SMC's error comes from a single run, by the genealogy of its particles. Independent runs say whether to believe it:
# their spread should be what each of them states.

# %%
repeated = ebm.log_z(jax.random.key(4), two, ebm.SMC(num_particles=particles), num_runs=3 if FAST else 8)
stated = np.sqrt(np.mean(np.square(repeated.diagnostics["run_std_errors"])))
print(f"{len(repeated.replicates)} runs of SMC together: {repeated}")
print(f"each states an error of {stated:.3f}; their spread is {np.std(repeated.replicates, ddof=1):.3f}")

# %% [markdown]
# ## The one that fails, and how one knows
#
# Bridge sampling needs chains that have seen the whole posterior. Here each chain finds one of the mirror images and
# never leaves it. Where they split up, no number of draws puts the two into the right proportion, and R-hat tells:
# that is its doubt. (The mirror images weigh the same, so the answer is right even so; on two modes that are not alike
# it would not be.) But chance may put **all chains on the same side**, once in eight runs of four chains. Then the
# chains agree perfectly, the error bar is tiny, and the answer is too low by log 2 = 0.69, since half of the mass was
# never seen. No diagnostic of the chains themselves can know of what no chain has met. What knows is a look elsewhere:
# `Bridge` also climbs to the modes from draws of the prior, and says where no chain has been, and about how much is
# missing. An opinion of another family knows it, too.

# %%
shorter = ebm.Bridge(num_samples=200 if FAST else 1000)
runs = [ebm.log_z(jax.random.key(10 + seed), two, shorter) for seed in range(2 if FAST else 12)]
figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
best = log_z_two.value
axis.axvspan(best - 2 * log_z_two.std_error, best + 2 * log_z_two.std_error, color="0.85", label="log_z, 2 SE")
axis.axvline(best - np.log(2), color="0.6", ls=":", label="half of the mass")
rows = [*found.items(), *((f"bridge, run {number}", run) for number, run in enumerate(runs, 1))]
for height, (_, log_z) in enumerate(rows):
    colour = "C3" if log_z.doubts else "C0"
    axis.errorbar(log_z.value, -height, xerr=2 * log_z.std_error, fmt="o", ms=4, color=colour, capsize=2)
axis.set_yticks(-np.arange(len(rows)), [name for name, _ in rows], fontsize=8)
axis.set_xlabel("log evidence in nats, ± 2 standard errors; red: with doubts")
axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
figure.savefig(OUT / "opinions.png", dpi=110)
for what, words in (("chains disagree", "R-hat"), ("all chains on one side", "no chain has been to")):
    told = [run for run in runs if any(words in doubt for doubt in run.doubts)]
    print(f"bridge, {what}: {len(told)} of {len(runs)} runs say so; less what log_z says they are")
    print("  ", [f"{run.value - best:+.3f} ± {run.std_error:.3f}" for run in told])
print("runs without a doubt:", sum(not run.doubts for run in runs))

# %% [markdown]
# ## A mend that can be checked: the same model without its mirror image
#
# Let the first group be that of shorter petals, and describe the two means by their middle and their gap. Of two
# independent draws of $N(4, 2)$ the middle is $N(4, \sqrt 2)$, and the gap, whichever is the larger, half normal with
# scale $2 \sqrt 2$: the prior is the old one, with each pair of mirror images counted once. So the evidence is **the
# same number**, and no mirror image is left to be missed.
#
# A chain can still be caught, where the gap is nearly zero and the groups have each other's widths. Then it disagrees
# with the others, and the run says so: now its silence means something.


# %%
def in_order(y):
    share = numpyro.sample("share", dist.Beta(2, 2))
    middle = numpyro.sample("middle", dist.Normal(4, np.sqrt(2)))
    gap = numpyro.sample("gap", dist.HalfNormal(2 * np.sqrt(2)))
    mean = jnp.stack([middle - gap / 2, middle + gap / 2])
    with numpyro.plate("group", 2):
        deviation = numpyro.sample("deviation", dist.LogNormal(-0.5, 0.5))
    group = dist.Categorical(jnp.stack([share, 1 - share]))
    with numpyro.plate("flower", len(y)):
        numpyro.sample("y", dist.MixtureSameFamily(group, dist.Normal(mean, deviation)), obs=y)


ordered = ebm.target(in_order, petals)
for seed in range(1 if FAST else 4):
    print(f"in order, bridge sampling: {ebm.log_z(jax.random.key(3 + seed), ordered, shorter)}")
