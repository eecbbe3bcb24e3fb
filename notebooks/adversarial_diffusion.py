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
# # Can one model be both a fast sampler and a density that I can put into a NumPyro model?
#
# A generator draws in one pass, and says nothing of how probable a point is. An energy says that, and needs a chain to
# draw from. Trained against each other, along a chain of noise, each has what the other lacks: the generator inverts
# one step of noise at a time, the energy tells it where its draws should lie, and its draws tell the energy its log Z.
# Here on five twisted arms, whose density is known, so that one can see how well.

# %%
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from scipy.special import logsumexp

import ebm_ppl as ebm

FAST = bool(int(os.environ.get("EBM_PPL_FAST", "0")))  # a short run, for the tests
NUM_STEPS = 20 if FAST else 4000
DEPTH = 1 if FAST else 2
NUM_DRAWS = 100 if FAST else 10_000
PRNG = "unsafe_rbg" if FAST else None  # numbers that are quick to compile
jax.config.update("jax_disable_most_optimizations", FAST)  # of programs that run for less time than they compile

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("EBM_PPL_OUT", HERE / "output"))
OUT.mkdir(exist_ok=True, parents=True)

# %% [markdown]
# ## The data
#
# Each arm is a narrow normal distribution, turned by an angle that grows with the radius. Such a turn leaves areas as
# they are, so that the density needs no Jacobian.

# %%
TURNS, ARM, SCALES, TWIST = 2 * np.pi * np.arange(5) / 5, np.array([1.3, 0.0]), np.array([0.4, 0.12]), 0.7


def turned(x, angle):
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]], axis=-1)


def true_log_density(x):
    arms = (turned(x[..., None, :], -TURNS - TWIST * np.linalg.norm(x, axis=-1, keepdims=True)) - ARM) / SCALES
    return logsumexp(-np.sum(arms**2, axis=-1) / 2, axis=-1) - np.log(10 * np.pi * np.prod(SCALES))


rng = np.random.default_rng(0)
arms = ARM + SCALES * rng.normal(size=(20_000, 2))
data = turned(arms, rng.choice(TURNS, len(arms)) + TWIST * np.linalg.norm(arms, axis=1)).astype(np.float32)

# %% [markdown]
# ## Training
#
# The lowest level of noise is that at which the data are taken as they are, the highest one hides them; five steps lie
# between. The generator is the faster of the two, and neither has momentum. Periodic activations see narrow arms early.

# %%
LEVELS, scale = (0.1, 0.2, 0.4, 0.8, 1.5, 2.5), float(data.std())


def wave(x):
    return jnp.sin(3 * x)


key = jax.random.key(0, impl=PRNG)
key_energy, key_generator, key_fit, key_draws, key_z, key_posterior = jax.random.split(key, 6)
energy = ebm.NoiseConditionalEnergy(key_energy, 2, LEVELS, scale, 64, DEPTH, wave)
generator = ebm.DenoisingGenerator(key_generator, 2, LEVELS, None, scale, 64, DEPTH, wave)
objective = ebm.AdversarialDiffusion(generator)
rates = {"energy": 3e-4, "generator": 2e-3}
falling = {name: optax.adam(optax.cosine_decay_schedule(rate, NUM_STEPS, 0.02), b1=0.0) for name, rate in rates.items()}
optimiser = optax.multi_transform(falling, ("energy", "generator"))
fitted = ebm.fit(
    key_fit,
    energy,
    data,
    objective,
    optimiser=optimiser,
    num_steps=NUM_STEPS,
    averaging=0.999,
    progress_bar=False,
)
energy, generator = fitted.energy, objective.trained(fitted.parameters)

# %% [markdown]
# The record: both divergences up to what no generator changes, and the effective share of the generator's draws when
# they are weighed by the energy. Near one the two agree on what the density is.

# %%
training = fitted.record["training"].to_dataset()
figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
titles = {"forward": "data to generator (nats)", "reverse": "generator to energy (nats)", "ess": "effective share"}
for axis, (name, title) in zip(axes, titles.items(), strict=True):
    axis.plot(training["step"], training[name].rolling(step=50, min_periods=1).mean())
    axis.set_title(title, fontsize="medium")
    axis.set_xlabel("step")
figure.savefig(OUT / "adversarial_diffusion_training.png", dpi=120)

# %% [markdown]
# ## The sampler
#
# Five passes through a small network make a draw. With the energy, each step is followed by a few moves of MALA, which
# take away most of what the generator leaves between the arms: the full form has 86.6 % of the generator's draws where
# 99.9 % of the data are, and 95.5 % of those that were moved.

# %%
draws = {}
for name, given in {"generator": {}, "moved by the energy": {"energy": energy}}.items():
    ebm.denoise(key_draws, generator, num=NUM_DRAWS, **given)  # compiles
    start = time.perf_counter()
    draws[name] = ebm.denoise(key_draws, generator, num=NUM_DRAWS, **given)["posterior"]["x"].values[0]
    least = np.quantile(true_log_density(data), 1e-3)
    share = np.mean(true_log_density(draws[name].astype(float)) > least)
    print(f"{name}: {NUM_DRAWS} draws in {time.perf_counter() - start:.2f} s, {share:.1%} where 99.9% of data are")

figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), sharex=True, sharey=True, layout="constrained")
for axis, (name, x) in zip(axes, ({"data": data} | draws).items(), strict=True):
    axis.scatter(*x[:3000].T, s=2, alpha=0.5, lw=0, color="k" if name == "data" else "C1")
    axis.set(title=name, xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
figure.savefig(OUT / "adversarial_diffusion_draws.png", dpi=120)

# %% [markdown]
# ## The density
#
# `energy(x)` is that of the data themselves. Its density is `exp(-U(x)) / Z`, here on a square, whose uniform density
# is the base. On the plane Z is a sum over a grid; where there are more dimensions `ebm.log_z` finds it, as it does
# here, too: 5.265 ± 0.050, and 5.259 by the grid. The energy is .076 nats from the truth, where the uniform density is
# 2.75 from it. What is left is seen in the picture: the shapes of the arms are learned, their weights only roughly,
# since at the lowest level hardly a noisy point could come from two of them.

# %%
square = dist.Uniform(-4.0, 4.0).expand([2]).to_event(1)
sampler = ebm.MALA() if FAST else ebm.SMC(kernel=ebm.HMC(max_leapfrogs=8))
energies = jax.jit(jax.vmap(energy))
wide = np.stack(np.meshgrid(*2 * [(np.arange(400) + 0.5) / 50 - 4]), axis=-1).reshape(-1, 2).astype(np.float32)
log_z = logsumexp(-np.asarray(energies(wide))) - np.log(2500)


def prior():
    numpyro.sample("x", ebm.EnergyDistribution(energy, square))


if not FAST:
    found = ebm.log_z(key_z, ebm.target(prior), sampler, progress_bar=False)
    print(f"log Z by SMC, with that of the base: {found.value + np.log(64):.3f} ± {found.std_error:.3f}")
truth = np.mean(true_log_density(data))
divergence = truth + np.mean(energies(data)) + log_z
print(f"log Z {log_z:.3f}; KL of the truth: {divergence:.3f} nats, and {truth + np.log(64):.3f} to the uniform density")

side = np.linspace(-3, 3, 201)
grid = np.stack(np.meshgrid(side, side), axis=-1)
surfaces = {
    "true density": true_log_density(grid),
    "exp(-U) / Z": -np.asarray(energies(grid.astype(np.float32).reshape(-1, 2))).reshape(len(side), -1) - log_z,
}
figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), sharey=True, layout="constrained")
shown = None
for axis, (name, log_density) in zip(axes, surfaces.items(), strict=True):
    shown = axis.pcolormesh(side, side, np.exp(log_density), vmin=0, vmax=0.7, cmap="Blues", rasterized=True)
    axis.set(title=name, aspect="equal", xlabel="x[0]")
axes[0].set_ylabel("x[1]")
figure.colorbar(shown, ax=axes, shrink=0.9)
figure.savefig(OUT / "adversarial_diffusion_density.png", dpi=120)

# %% [markdown]
# ## In a model
#
# A point of the arms, of which only the first coordinate was measured, with an error of .1: where was the second? The
# energy is the prior of the point. The curve is the posterior by quadrature, with the true density as the prior. Every
# arm that was measured there has its peak, where it should be; heights differ as the weights of the arms do.

# %%


def model(seen):
    x = numpyro.sample("x", ebm.EnergyDistribution(energy, square))
    numpyro.sample("seen", dist.Normal(x[0], 0.1), obs=seen)


figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), sharey=True, layout="constrained")
for axis, seen in zip(axes, [0.0, -1.2, 0.8], strict=True):
    if FAST and seen:
        continue
    tree = ebm.sample(key_posterior, ebm.target(model, seen), sampler, num_chains=1, progress_bar=False)
    axis.hist(
        tree["posterior"]["x"].values[0, :, 1], bins=np.linspace(-3, 3, 61), density=True, alpha=0.6, label="draws"
    )
    exact = np.exp(surfaces["true density"] - (side - seen) ** 2 / (2 * 0.1**2)).sum(axis=1)
    axis.plot(side, exact / exact.sum() / (side[1] - side[0]), color="k", lw=1, label="truth")
    axis.set(title=f"first coordinate {seen:+.1f}", xlabel="second coordinate")
axes[0].legend(frameon=False, fontsize="small")
figure.savefig(OUT / "adversarial_diffusion_posterior.png", dpi=120)
