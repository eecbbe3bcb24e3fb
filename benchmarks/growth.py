"""How the cost of log Z grows with the dimension, on correlated Gaussians whose log Z has a closed form.

    python benchmarks/growth.py                                 d = 10, 30, 100, 300, 1000, by our SMC, our fitted
                                                                reference and BlackJAX's tempered SMC
    python benchmarks/growth.py --dims 10 100 --tools SMC --seeds 5

The model is `evidence.gauss`: a standard normal prior, and a normal likelihood with covariance `.1 * .9^|i-j|`. A run
of E evaluations with a root mean square error r would take about E (r / .1)^2 evaluations for an error of .1; the
exponent is the slope of its logarithm over that of d. Tempering should need stages in proportion to sqrt(d), HMC
leapfrog steps in proportion to d^(1/4), and the particles must make up for the sum of the stages' variances, sqrt(d)
again: d^1.25 (Beskos, Crisan and Jasra 2014; Beskos et al. 2013).
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import NamedTuple

import numpy as np
from estimate import Estimate
from evidence import gauss
from peers import TOOLS

import ebm_ppl as ebm

NAMES = ("SMC", "FittedReference", "BlackJAX tempered")
WANTED = 0.1
RESAMPLES = 2000
INTERVAL = 0.8


class Cost(NamedTuple):
    """Runs of a tool in one dimension."""

    dim: int
    errors: np.ndarray
    stated: np.ndarray
    evaluations: np.ndarray
    num_doubted: int
    seconds: float
    """Of a run, after the first."""

    def wanted(self, chosen: np.ndarray | slice = slice(None)) -> float:
        """Evaluations for an error of `WANTED`."""
        return float(np.mean(self.evaluations[chosen]) * np.mean(self.errors[chosen] ** 2) / WANTED**2)

    def resampled(self, rng: np.random.Generator) -> float:
        return self.wanted(rng.integers(len(self.errors), size=len(self.errors)))

    def row(self, name: str) -> str:
        cells = (
            *(name, str(self.dim), str(len(self.errors)), f"{np.mean(self.errors):+.3f}"),
            *(f"{np.sqrt(np.mean(self.errors**2)):.3f}", f"{np.mean(self.stated):.3f}"),
            *(f"{np.mean(self.evaluations) / 1000:.0f}", f"{self.wanted() / 1000:.3g}"),
            *(str(self.num_doubted), f"{self.seconds:.1f}"),
        )
        return f"| {' | '.join(cells)} |"


def cost(name: str, dim: int, seeds: int) -> Cost:
    """All seeds of a tool in one dimension."""
    problem = gauss(dim)
    run, found, seconds = TOOLS[name](problem.target), [], []
    for seed in range(seeds):
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ebm.EnergyWarning)  # doubts are counted
            found.append(run(seed))
        seconds.append(time.perf_counter() - start)
    return _of_runs(dim, problem.log_z, found, float(np.median(seconds[1:] or seconds)))


def _of_runs(dim: int, exact: float, found: list[Estimate], seconds: float) -> Cost:
    return Cost(
        dim,
        errors=np.array([run.value for run in found]) - exact,
        stated=np.array([np.nan if run.std_error is None else run.std_error for run in found]),
        evaluations=np.array([run.evaluations for run in found]),
        num_doubted=sum(bool(run.doubts) for run in found),
        seconds=seconds,
    )


def exponent(costs: list[Cost]) -> str:
    """The slope of log evaluations over log d, with its bootstrap interval over seeds."""
    log_dims = np.log([each.dim for each in costs])
    rng = np.random.default_rng(0)

    def slope(wanted: list[float]) -> float:
        return float(np.polyfit(log_dims, np.log(wanted), 1)[0])

    slopes = [slope([each.resampled(rng) for each in costs]) for _ in range(RESAMPLES)]
    low, high = np.quantile(slopes, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    return f"{slope([each.wanted() for each in costs]):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", nargs="+", type=int, default=[10, 30, 100, 300, 1000])
    parser.add_argument("--tools", nargs="+", default=list(NAMES), choices=list(TOOLS))
    parser.add_argument("--seeds", type=int, default=8, help="runs of each tool in each dimension")
    options = parser.parse_args()
    import numpyro

    numpyro.enable_x64()
    columns = (
        *("tool", "d", "seeds", "mean error", "rmse", "stated error", "evaluations / 1000"),
        *("the same for an error of .1", "doubted", "warm s"),
    )
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    exponents = []
    for name in options.tools:
        costs = []
        for dim in options.dims:
            costs.append(cost(name, dim, options.seeds))
            print(costs[-1].row(name), flush=True)
        if len(costs) > 1:
            exponents.append(f"{name}: evaluations for an error of .1 grow as d to the power {exponent(costs)}")
    print("", *exponents, sep="\n")


if __name__ == "__main__":
    main()
