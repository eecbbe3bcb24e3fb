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
# The petals of 150 irises: **do their lengths fall into two groups, or one?** A normal mixture answers by its evidence.
# But a mixture of two components has each posterior mode twice, once for either way to name the components, and whether
# an estimator of the evidence has seen both decides whether it is right. Five estimators answer here; one of them is
# wrong, and the question is how one would know without the others.

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
from sklearn.datasets import load_iris

import ebm_ppl as ebm

FAST = bool(int(os.environ.get("EBM_PPL_FAST", "0")))  # a short run, for the tests
SMALL = ebm.FittedReference(pilot=ebm.SMC(num_particles=300, num_moves=1), num_draws=1024, max_refits=1)

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("EBM_PPL_OUT", HERE / "output"))
OUT.mkdir(exist_ok=True, parents=True)
jax.config.update("jax_enable_x64", True)

# %%
length = load_iris().data[:, 2]
y = (length - length.mean()) / length.std()


def mixture(num):
    """Each component has a weight, a mean and a standard deviation of its own."""

    def model(y):
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.full(num, 2.0))) if num > 1 else jnp.ones(1)
        mean = numpyro.sample("mean", dist.Normal(0, 1).expand([num]).to_event(1))
        sd = numpyro.sample("sd", dist.LogNormal(-1, 0.7).expand([num]).to_event(1))
        components = dist.Normal(mean, sd)
        with numpyro.plate("flower", len(y)):
            numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), components), obs=y)

    return ebm.target(model, y)


# %% [markdown]
# ## What an expert would do
#
# `ebm.log_z(key, target)` with no method fits a reference to a pilot's particles, compares the two, and asks another
# family where the first answer is not clean. `story` tells how the number came about, `doubts` why not to believe it.

# %%
names = ["one group", "two groups"]
default = SMALL if FAST else None
found = {name: ebm.log_z(jax.random.key(num), mixture(num), default) for num, name in enumerate(names, start=1)}
for name, log_z in found.items():
    print(f"{name}: {log_z}")
print(*found[names[-1]].story, sep="\n")

# %%
table = ebm.compare(found)
print(table[["log_evidence", "se", "log_bf", "dse", "probability", "warning"]].round(3).to_string())
ebm.plot_compare(table).savefig(OUT / "compare.png", dpi=110)

# %% [markdown]
# ## Five opinions on one model
#
# Two of them rest on Markov chains. Those of `Bridge` start anywhere and stay in the mode they came to;
# `ParallelTempering` lets its chains travel by way of the prior.

# %%
METHODS = {
    "fitted reference": SMALL if FAST else ebm.FittedReference(),
    "SMC": ebm.SMC(num_particles=200 if FAST else 2000),
    "nested sampling": ebm.NestedSampling(num_live=60, num_delete=12) if FAST else ebm.NestedSampling(),
    "parallel tempering": ebm.ParallelTempering(num_draws=256 if FAST else 1024),
    "bridge": ebm.Bridge(num_warmup=100, num_samples=200) if FAST else ebm.Bridge(),
}
target = mixture(2)
opinions = {}
for name, method in METHODS.items():
    with warnings.catch_warnings(record=True):  # the doubts are printed below
        opinions[name] = ebm.log_z(jax.random.key(0), target, method)
for name, log_z in opinions.items():
    print(
        f"{name:20s}{log_z.value:9.3f} ± {log_z.std_error:.3f}   {log_z.diagnostics['num_evaluations']:.0f} evaluations"
    )
    for doubt in log_z.doubts:
        print(f"    in doubt: {doubt}")

# %% [markdown]
# ## How one knows
#
# By three signs, of which the second needs no other estimator:
#
# - **Families disagree.** Reweighed draws, tempering, nested shells and travelling chains fail in different ways, so
#   their agreement is worth more than a small error bar.
# - **The estimator doubts itself.** The chains of `Bridge` sit in different modes, and R-hat says so. A `LogZ` in doubt
#   prints so, warns, and hands its doubts on to every Bayes factor made of it.
# - **The size of the gap.** Whoever has seen one of two equal modes is log 2 too low.

# %%
figure, axis = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
for row, log_z in enumerate(opinions.values()):
    colour = "tab:red" if log_z.doubts else "tab:blue"
    axis.errorbar(log_z.value, row, xerr=2 * log_z.std_error, fmt="o", color=colour, capsize=3)
axis.set_yticks(range(len(opinions)), list(opinions))
axis.invert_yaxis()
axis.set_xlabel("log evidence (nats), ± 2 standard errors; red: in doubt")
one_mode = opinions["fitted reference"].value - np.log(2)
axis.axvline(one_mode, ls=":", color="0.5")
axis.annotate("one of two modes", (one_mode, -0.35), fontsize=8, color="0.4")
figure.savefig(OUT / "opinions.png", dpi=110)
print(f"Wrote pictures to {os.path.relpath(OUT)}/")
