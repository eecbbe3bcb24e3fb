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
# # What is the density of my data, how good is what I learned, and how do I use it?
#
# 569 breast tumours, each with the mean radius and the mean concavity of its cells' nuclei (scikit-learn's data, from
# Wisconsin). Their joint density is no Gaussian: benign and malignant ones make two bent groups that overlap. The
# notebook learns an energy for it in several ways, tests what was learned on tumours that were not trained on, and
# puts the energy into a model, where it fills in a concavity that was not measured.

# %%
import os
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from sklearn.datasets import load_breast_cancer

import ebm_ppl as ebm

FAST = bool(int(os.environ.get("EBM_PPL_FAST", "0")))  # a short run, for the tests
NUM_STEPS = 50 if FAST else 3000
NUM_DRAWS = 50 if FAST else 1000
NUM_PARTICLES = 100 if FAST else 2000

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("EBM_PPL_OUT", HERE / "output"))
OUT.mkdir(exist_ok=True, parents=True)
jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## The data
#
# Logarithms of both, in units of their standard deviations; a third of the tumours is kept for judgement.

# %%
table = load_breast_cancer(as_frame=True).frame
columns = np.log(np.stack([table["mean radius"], table["mean concavity"] + 0.005], axis=1))
columns = (columns - columns.mean(axis=0)) / columns.std(axis=0)
shuffled = np.random.default_rng(0).permutation(columns)
train, test = shuffled[:380], shuffled[380:]

# %% [markdown]
# ## Four ways to learn an energy
#
# The density is a wide normal base tilted by a small network, `p(x) = base(x) exp(-U(x)) / Z`. The ways differ in what
# they need: score matching the gradient of the energy, noise contrast draws of the base, the others walkers.

# %%
base = dist.Normal(0.0, 2.0).expand([2]).to_event(1)
energy = ebm.MLPEnergy(jax.random.key(0), dim=2, width=32, depth=2)
moves = ebm.Dynamics(ebm.MALA(), num_moves=5, step_size=0.3)
objectives = {
    "score matching": ebm.ScoreMatching(),
    "noise contrast": ebm.NoiseContrast(ratio=4),
    "persistent": ebm.PersistentContrastiveDivergence(512, dynamics=moves),
    "Jarzynski": ebm.Jarzynski(512, dynamics=ebm.Dynamics(ebm.MALA(), num_moves=1, step_size=0.3)),
}
optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-3, weight_decay=1e-2))
fitted = {
    name: ebm.fit(
        jax.random.key(1),
        energy,
        train,
        objective,
        base=base,
        optimiser=optimiser,
        num_steps=NUM_STEPS,
        averaging=0.99,
        progress_bar=False,
    )
    for name, objective in objectives.items()
}

# %% [markdown]
# ## How good is each?
#
# `evaluate` estimates log Z, and with it the likelihood of the tumours that were kept; it draws from the density, and
# tests data and draws against it. A Gaussian of the training data is there for comparison.

# %%
evaluated = {
    name: ebm.evaluate(
        jax.random.key(2),
        each.energy,
        test,
        base=base,
        method=ebm.SMC(NUM_PARTICLES),
        bounds=None if FAST else ebm.BDMC(),
        num_draws=NUM_DRAWS,
        num_simulations=50 if FAST else 1000,
    )
    for name, each in list(fitted.items())[: 1 if FAST else None]
}
gaussian = dist.MultivariateNormal(train.mean(axis=0), np.cov(train.T))
print(f"{'a Gaussian':16s} log-likelihood {float(np.mean(gaussian.log_prob(test))):.3f}")
for name, tree in evaluated.items():
    found, tests = tree["log_likelihood"], tree["tests"].to_dataset().set_coords("test")
    p_values = ", ".join(f"{each} {p:.2f}" for each, p in tests["p_value_holm"].to_series().items())
    print(
        f"{name:16s} log-likelihood {float(found['mean']):.3f} (data ± {float(found['std_error_data']):.3f}, log Z ± "
        f"{float(found['std_error_log_z']):.3f}); p-values: {p_values}"
    )

# %% [markdown]
# The landscape of the best, with draws on the left and the kept data on the right; and the energies of data, of draws
# and of the base. Draws that lie lower or higher than the data would be a sign of a bad fit.

# %%
best = max(evaluated, key=lambda name: float(evaluated[name]["log_likelihood"]["mean"]))
print("best:", best)
figure = ebm.plot_landscape(fitted[best].energy, base=base, samples=evaluated[best]["posterior"]["x"].values, data=test)
for axis in figure.axes[:2]:
    axis.set_xlabel("log mean radius (sd)")
figure.axes[0].set_ylabel("log mean concavity (sd)")
figure.savefig(OUT / "landscape.png", dpi=120)
figure = ebm.plot_energy_histograms(evaluated[best])
figure.savefig(OUT / "energies.png", dpi=120)

# %% [markdown]
# ## What training looked like
#
# Jarzynski's walkers have log Z at every step, and with it the likelihood of the training data.

# %%
training = fitted["Jarzynski"].record["training"].to_dataset()
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
axes[0].plot(training["step"], training["log_likelihood"].rolling(step=20, min_periods=1).mean())
axes[0].set_ylabel("log-likelihood of training data")
axes[1].plot(training["step"], training["ess"])
axes[1].set_ylabel("effective share of walkers")
for axis in axes:
    axis.set_xlabel("step")
figure.savefig(OUT / "training.png", dpi=120)

# %% [markdown]
# ## Back into a model: what was the concavity of a tumour, of which only the radius was measured?
#
# The trained energy is now the prior of a tumour, with its parameters as they are. A measurement of the radius, with an
# error, says what the concavity is likely to be. `energy_factor` adds the energy to a model by hand; an
# `EnergyDistribution` is the same as one site.

# %%
learned = fitted[best].energy


def model(radius):
    tumour = numpyro.sample("tumour", ebm.EnergyDistribution(learned, base))
    numpyro.sample("radius", dist.Normal(tumour[0], 0.1), obs=radius)


figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
for axis, radius in zip(axes, np.array([-1.0, 0.5, 1.5]), strict=True):
    draws = ebm.sample(jax.random.key(3), ebm.target(model, radius), num_samples=NUM_DRAWS, progress_bar=False)
    concavity = draws["posterior"]["tumour"].values[..., 1].ravel()
    near = columns[np.abs(columns[:, 0] - radius) < 0.2, 1]
    axis.hist(concavity, bins=40, density=True, alpha=0.6, label="posterior")
    axis.hist(near, bins=15, density=True, histtype="step", color="k", label=f"{len(near)} tumours of that radius")
    axis.set_title(f"radius {radius:+.1f} sd", fontsize="medium")
    axis.set_xlabel("log mean concavity (sd)")
    axis.set_ylim(0, 2.2)  # room for the legend
    axis.legend(frameon=False, fontsize="small")
figure.savefig(OUT / "concavity.png", dpi=120)

# %% [markdown]
# ## And with priors on the weights?
#
# A network whose weights have priors is a model of its own, of which the data are draws, and its `Z` depends on the
# weights. Without `log_partition` the posterior would be wrong without a word, so that it is refused:

# %%
from numpyro.contrib.module import random_eqx_module


def bayesian(data):
    network = random_eqx_module("energy", energy, prior=dist.Normal(0.0, 1.0))
    with numpyro.plate("tumours", len(data)):
        numpyro.sample("x", ebm.EnergyDistribution(network, base), obs=data)


try:
    ebm.sample(jax.random.key(4), ebm.target(bayesian, train), progress_bar=False)
except ebm.IntractablePartitionError as error:
    print(error)
