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
# # Is there spatial clustering in sudden infant deaths?
#
# North Carolina, 1974-78: births and sudden infant deaths in 100 counties, with their neighbours. Deaths follow births
# and, as is known, the share of non-white births. **Do neighbouring counties resemble each other beyond that?**
#
# The county effects get a prior that is an *energy*: a penalty on differences between neighbours, of unknown strength
# `tau`. Such a prior has a partition function that depends on `tau`. Forget it, and every sampler returns a wrong
# answer without a word. This notebook shows how that looks, and how to get it right.

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from arviz_stats import loo, summary

import ebm_ppl as ebm

FAST = bool(int(os.environ.get("EBM_PPL_FAST", "0")))  # a short run, for the tests
NUM_DRAWS = 200 if FAST else 1000
NUM_PARTICLES = 100 if FAST else 2000

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("EBM_PPL_OUT", HERE / "output"))
OUT.mkdir(exist_ok=True, parents=True)
jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## The data
#
# The expected number of deaths is births times the rate of the whole state; the covariate is the standardised square
# root of the non-white share of births.

# %%
counties = np.genfromtxt(HERE / "data" / "sids_counties.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
pairs = np.loadtxt(HERE / "data" / "sids_neighbours.csv", delimiter=",", skiprows=1, dtype=int)
deaths = counties["sids_deaths"].astype(float)
expected = counties["births"] * deaths.sum() / counties["births"].sum()
share = np.sqrt(counties["nonwhite_births"] / counties["births"])
nonwhite = (share - share.mean()) / share.std()

laplacian = np.zeros((100, 100))
np.add.at(laplacian, (pairs[:, 0], pairs[:, 0]), 1)
np.add.at(laplacian, (pairs[:, 1], pairs[:, 1]), 1)
laplacian[pairs[:, 0], pairs[:, 1]] = laplacian[pairs[:, 1], pairs[:, 0]] = -1
eigenvalues = np.linalg.eigvalsh(laplacian)
print(f"{len(counties)} counties, {len(pairs)} pairs of neighbours, {deaths.sum():.0f} deaths")

# %% [markdown]
# ## The model
#
# $$ y_i \sim \mathrm{Poisson}\big(E_i\, e^{a + b x_i + \phi_i}\big), $$
# $$ p(\phi \mid \tau) = \frac{1}{Z(\tau)}\, N(\phi; 0, I)\,
#    \exp\Big(-\frac{\tau}{2} \sum_{i \sim j} (\phi_i - \phi_j)^2\Big). $$
#
# The energy sees one vector `phi` and returns one number; any function would do. The base,
# independent unit normals, keeps it proper.


# %%
differences = ebm.QuadraticEnergy(jnp.asarray(laplacian))  # 1/2 phi' L phi = 1/2 sum of squared differences


def counts_given(phi, expected, nonwhite, deaths):
    a = numpyro.sample("a", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.Normal(0, 1))
    with numpyro.plate("county", len(expected)):
        numpyro.sample("deaths", dist.Poisson(expected * jnp.exp(a + b * nonwhite + phi)), obs=deaths)


def spatial(expected, nonwhite, deaths, log_partition=None):
    tau = numpyro.sample("tau", dist.LogNormal(1, 1.5))
    base = dist.Normal(0, 1).expand([len(expected)]).to_event(1)
    log_z = log_partition(tau) if callable(log_partition) else log_partition
    phi = numpyro.sample("phi", ebm.EnergyDistribution(differences, base, beta=tau, log_partition=log_z))
    counts_given(phi, expected, nonwhite, deaths)


data_args = (expected, nonwhite, deaths)

# %% [markdown]
# ## Forgetting Z(tau) is refused
#
# `Z(tau)` depends on the latent `tau`, and we have not said what it is. The package finds the dependence by analysis of
# the model, and stops before the first draw:

# %%
try:
    ebm.sample(jax.random.key(0), ebm.target(spatial, *data_args))
except ebm.IntractablePartitionError as error:
    print(f"IntractablePartitionError: {error}")

# %% [markdown]
# Here the partition function is a Gaussian integral:
# $\log Z(\tau) = -\frac12 \sum_k \log(1 + \tau \lambda_k)$, with the eigenvalues $\lambda_k$ of the graph Laplacian.


# %%
def log_partition(tau):
    return -0.5 * jnp.sum(jnp.log1p(tau * eigenvalues))


target = ebm.target(spatial, *data_args, log_partition=log_partition)
posterior = ebm.sample(jax.random.key(1), target, num_samples=NUM_DRAWS, progress_bar=not FAST)
print(summary(posterior, var_names=["tau", "a", "b"]))

# %% [markdown]
# For comparison, the answer of anybody who forgets `Z(tau)`: it has to be asked for, with `log_partition="ignore"`.
# No divergence, a good R-hat, and a smoothness that has vanished.

# %%
forgotten = ebm.sample(
    jax.random.key(1),
    ebm.target(spatial, *data_args, log_partition="ignore"),
    num_samples=NUM_DRAWS,
    progress_bar=False,
    log_likelihood=False,
)
print(summary(forgotten, var_names=["tau", "b"]))

# %% [markdown]
# The toy version, in two lines: `y ~ exp(-theta y^4) / Z(theta)`, 200 draws at `theta = 2`. The closed form is
# $\log Z(\theta) = \text{const} - \frac14 \log \theta$; relative to a flat base on (-5, 5), the same up to a constant.

# %%
rng = np.random.default_rng(0)
toy_data = rng.choice([-1.0, 1.0], 200) * (rng.gamma(0.25, 1 / 2.0, 200)) ** 0.25


def toy(y, answer):
    theta = numpyro.sample("theta", dist.HalfNormal(5))
    log_z = {"missing": None, "forgotten": "ignore", "given": -0.25 * jnp.log(theta)}[answer]
    quartic = ebm.EnergyDistribution(lambda v: v**4, dist.Uniform(-5, 5), beta=theta, log_partition=log_z)
    with numpyro.plate("draws", len(y)):
        numpyro.sample("y", quartic, obs=y)


for answer in ("missing", "forgotten", "given"):
    toy_target = ebm.target(toy, toy_data, answer)
    try:
        draws = ebm.sample(jax.random.key(2), toy_target, num_samples=NUM_DRAWS, progress_bar=False)
    except ebm.IntractablePartitionError:
        print(f"Z(theta) {answer}: refused")
        continue
    theta = draws["posterior"]["theta"].values
    print(f"Z(theta) {answer}: theta = {theta.mean():.3f} +- {theta.std():.3f} (truth 2)")

# %% [markdown]
# ## The same posterior by SMC, with the evidence
#
# Sequential Monte Carlo goes from the reference through the prior energy to the data, and gives the log evidence with
# a standard error. Its draws should agree with those of NUTS.

# %%
weighed = ebm.sample(
    jax.random.key(3), target, ebm.SMC(num_particles=NUM_PARTICLES), num_chains=1, progress_bar=not FAST
)
log_z_spatial = ebm.read_log_z(weighed)
print(f"log evidence, smooth county effects: {log_z_spatial}")
for name, result in (("NUTS", posterior), ("SMC", weighed)):
    log_tau, b = np.log(result["posterior"]["tau"].values), result["posterior"]["b"].values
    print(f"{name}: log tau {log_tau.mean():.3f} ({log_tau.std():.3f}), b {b.mean():.3f} ({b.std():.3f})")

# %%
ebm.plot_smc(weighed).savefig(OUT / "smc.png", dpi=110)

# %% [markdown]
# ## Is the clustering real? Two rivals
#
# - **independent**: county effects with no energy, `phi ~ N(0, I)`.
# - **shrunk**: county effects as small as the data wants, but deaf to neighbours: the energy is
#   `tau/2 * sum phi_i^2`, and `log Z(tau) = -50 log(1 + tau)`. This is the fair rival: it, too, can make the effects
#   small, so what remains in favour of `spatial` is the neighbourhood.


# %%
def independent(expected, nonwhite, deaths):
    phi = numpyro.sample("phi", dist.Normal(0, 1).expand([len(expected)]).to_event(1))
    counts_given(phi, expected, nonwhite, deaths)


def shrunk(expected, nonwhite, deaths):
    tau = numpyro.sample("tau", dist.LogNormal(1, 1.5))
    base = dist.Normal(0, 1).expand([len(expected)]).to_event(1)
    log_z = -0.5 * len(expected) * jnp.log1p(tau)
    energy = ebm.EnergyDistribution(lambda phi: 0.5 * jnp.sum(phi**2), base, beta=tau, log_partition=log_z)
    counts_given(numpyro.sample("phi", energy), expected, nonwhite, deaths)


rivals = {"independent": independent, "shrunk": shrunk}
for name, rival in list(rivals.items())[1 if FAST else 0 :]:
    rival_target = ebm.target(rival, *data_args)
    log_z = ebm.log_z(jax.random.key(4), rival_target, ebm.SMC(num_particles=NUM_PARTICLES))
    print(f"log evidence, {name}: {log_z};  log Bayes factor of spatial over {name}: {log_z_spatial - log_z}")

# %% [markdown]
# ## What the data say, county by county
#
# `loo` works as it is: the energy term is no observation, and is not counted as one.

# %%
print(loo(posterior))
posterior.update(ebm.posterior_predictive(jax.random.key(5), target, posterior))
prior = ebm.prior_predictive(jax.random.key(6), target, num_samples=NUM_DRAWS, sampler=ebm.NUTS())
posterior.to_netcdf(OUT / "spatial.nc", engine="h5netcdf")

# %%
outlines = np.genfromtxt(HERE / "data" / "sids_outlines.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
effect = np.exp(posterior["posterior"]["phi"].mean(("chain", "draw")).values)
names = list(counties["county"])
figure, axes = plt.subplots(2, 1, figsize=(8, 6.2), layout="constrained")
ratio = np.log2(np.clip((deaths + 0.5) / (expected + 0.5), 0.25, 4))
panels = ((axes[0], ratio, "observed over expected deaths"), (axes[1], np.log2(effect), "smoothed county effect"))
for axis, values, title in panels:
    limit = np.abs(values).max()
    shade = plt.get_cmap("RdBu_r")((values / limit + 1) / 2)
    for county in np.unique(outlines["county"]):
        of_county = outlines[outlines["county"] == county]
        for part in np.unique(of_county["part"]):
            ring = of_county[of_county["part"] == part]
            axis.fill(ring["lon"], ring["lat"], fc=shade[names.index(county)], ec="0.5", lw=0.4)
    scale = plt.cm.ScalarMappable(plt.Normalize(-limit, limit), "RdBu_r")
    figure.colorbar(scale, ax=axis, label="log2", shrink=0.8)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_aspect(1.25)
    axis.set_axis_off()
figure.savefig(OUT / "map.png", dpi=110)

# %%
figure, axis = plt.subplots(figsize=(5.5, 3), layout="constrained")
bins = np.geomspace(1e-3, 60, 60)
shown = ((forgotten, "Z(tau) forgotten"), (posterior, "Z(tau) given, NUTS"), (weighed, "Z(tau) given, SMC"))
for result, label in shown:
    tau = result["posterior"]["tau"].values.ravel()
    axis.hist(tau, bins, weights=np.full(tau.size, 1 / tau.size), alpha=0.55, label=label)
axis.set_xscale("log")
axis.set_xlabel("tau, strength of the smoothness")
axis.set_yticks([])
axis.legend(frameon=False, fontsize=8)
figure.savefig(OUT / "tau.png", dpi=110)

# %%
ebm.plot_energies(posterior, prior).savefig(OUT / "energies.png", dpi=110)
print(f"Wrote {', '.join(sorted(path.name for path in OUT.iterdir()))} to {os.path.relpath(OUT)}/")
