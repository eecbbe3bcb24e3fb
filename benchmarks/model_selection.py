"""Gaussian or Student-t noise? Regressions chosen by log p(y) at their most likely parameters (`ebm.fit_latent`).

    python benchmarks/model_selection.py                   100 data sets, half of each truth; a few minutes
    python benchmarks/model_selection.py --free            the degrees of freedom are fitted, too
    python benchmarks/model_selection.py --truth 3 --sets 20 --checks 5

    y_i = x_i' w + s e_i        i = 1..500, x_i ~ N(0, I_8), w ~ N(0, I_8), s = 1; e_i normal, or Student t
    fitted                      w integrated over, w ~ N(0, tau^2 I_8); s and tau are parameters

Degrees of freedom are 4 in the Student-t model and in its data. Both models then have two parameters, and log p(y) is
compared as it is. Where they are fitted (`--free`), the Student-t model has a third and contains the other, so that it
owes log(500) / 2 nats for it, by BIC.

The last table holds log p(y) against an answer at the same parameters: in closed form for the Gaussian model, by
`ebm.log_z` for the other.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import scipy.stats as st
from numpyro.distributions import constraints

import ebm_ppl as ebm

jax.config.update("jax_enable_x64", True)

NUM, DIM = 500, 8
DEGREES = 4.0
SETTINGS = {"optimiser": optax.adam(0.05), "num_steps": 150, "averaging": 0.9, "progress_bar": False}


def regression(x: jax.Array, y: jax.Array, noise: Callable[[jax.Array, jax.Array], dist.Distribution]) -> None:
    scale = numpyro.param("scale", jnp.std(y), constraint=constraints.positive)
    spread = numpyro.param("spread", 1.0, constraint=constraints.positive)
    weights = numpyro.sample("weights", dist.Normal(0.0, spread).expand([DIM]).to_event(1))
    numpyro.sample("y", noise(x @ weights, scale).to_event(1), obs=y)


def gaussian(x: jax.Array, y: jax.Array) -> None:
    regression(x, y, dist.Normal)


def student(x: jax.Array, y: jax.Array) -> None:
    regression(x, y, lambda mean, scale: dist.StudentT(DEGREES, mean, scale))


def free_student(x: jax.Array, y: jax.Array) -> None:
    degrees = numpyro.param("degrees", 10.0, constraint=constraints.positive)
    regression(x, y, lambda mean, scale: dist.StudentT(degrees, mean, scale))


def data_sets(seeds: range, degrees: float) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The truth, x and y, as often by the one as by the other."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        x, weights = rng.normal(size=(NUM, DIM)), rng.normal(size=DIM)
        truth = ("gaussian", "student")[seed % 2]
        noise = rng.normal(size=NUM) if truth == "gaussian" else rng.standard_t(degrees, NUM)
        yield truth, x, x @ weights + noise


def exact(x: np.ndarray, y: np.ndarray, scale: float, spread: float) -> float:
    """log p(y) of the Gaussian model."""
    covariance = float(scale) ** 2 * np.eye(NUM) + float(spread) ** 2 * x @ x.T
    return float(st.multivariate_normal(np.zeros(NUM), covariance).logpdf(y))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=100, help="data sets")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--truth", type=float, default=DEGREES, help="degrees of freedom of the Student-t data")
    parser.add_argument("--free", action="store_true", help="fit the degrees of freedom")
    parser.add_argument("--particles", type=int, default=128, help="walkers of each population")
    parser.add_argument("--checks", type=int, default=4, help="data sets on which log p(y) is held against an answer")
    options = parser.parse_args()
    models = {"gaussian": gaussian, "student": free_student if options.free else student}
    sampler = ebm.SMC(num_particles=options.particles, num_moves=2)
    fits, start, first = [], time.perf_counter(), 0.0
    seeds = range(options.first, options.first + options.sets)
    for seed, (truth, x, y) in zip(seeds, data_sets(seeds, options.truth), strict=True):
        keys = jax.random.split(jax.random.key(seed), len(models))
        fitted = {
            name: ebm.fit_latent(key, ebm.target(model, x, y), sampler, **SETTINGS)
            for key, (name, model) in zip(keys, models.items(), strict=True)
        }
        fits.append((truth, x, y, fitted))
        first = first or time.perf_counter() - start
        margin = fitted["student"].log_z - fitted["gaussian"].log_z
        print(f"{seed}: {truth}, student over gaussian {margin}", file=sys.stderr, flush=True)
    _print_choices(fits, math.log(NUM) / 2 if options.free else 0.0)
    later = (time.perf_counter() - start - first) / max(options.sets - 1, 1)
    print(f"\n{first:.0f} s for the first data set, compilation included; {later:.1f} s for each of the others.\n")
    _print_checks(fits[: options.checks])


def _print_choices(fits: list, owed: float) -> None:
    rows = {}
    for truth, _, _, fitted in fits:
        margin = fitted["student"].log_z - fitted["gaussian"].log_z - owed
        rows.setdefault(truth, []).append((margin.value, margin.std_error))
    print("| truth | data sets | right | student over gaussian, nats: least, median, most | mean stated error |")
    print("|---|---|---|---|---|")
    for truth, margins in rows.items():
        values, errors = np.array(margins).T
        right = int(np.sum((values > 0) == (truth == "student")))
        spread = ", ".join(f"{each:.1f}" for each in (values.min(), np.median(values), values.max()))
        print(f"| {truth} | {len(values)} | {right} | {spread} | {errors.mean():.2f} |")


def _print_checks(fits: list) -> None:
    print("| truth | model | parameters | log p(y) | answer |")
    print("|---|---|---|---|---|")
    for seed, (truth, x, y, fitted) in enumerate(fits):
        for name, each in fitted.items():
            found = each.parameters
            if name == "gaussian":
                answer = f"{exact(x, y, **found):.2f}"
            else:
                answer = str(ebm.log_z(jax.random.key(seed), each.target))
            told = ", ".join(f"{name} {float(value):.3g}" for name, value in found.items())
            print(f"| {truth} | {name} | {told} | {each.log_z} | {answer} |")


if __name__ == "__main__":
    main()
