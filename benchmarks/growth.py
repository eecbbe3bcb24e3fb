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

import numpy as np
import numpyro
from evidence import gauss
from log_z import COLUMNS, INTERVAL, RESAMPLES, Runs
from peers import TOOLS
from records import as_header, as_row

import ebm_ppl as ebm

NAMES = ("SMC", "FittedReference", "BlackJAX tempered")
WANTED = 0.1


def runs_of(name: str, dim: int, seeds: int) -> Runs:
    """All seeds of a tool in one dimension, one after the other in this process."""
    problem = gauss(dim)
    run, records = TOOLS[name](problem.target), []
    for seed in range(seeds):
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ebm.EnergyWarning)  # doubts are counted
            found = run(seed)
        records.append(
            {
                "outcome": "done",
                "exact": problem.log_z,
                "tolerance": problem.tolerance,
                "value": found.value,
                "std_error": found.std_error,
                "evaluations": found.evaluations,
                "doubts": found.doubts,
                "cold": seed == 0,
                "seconds": time.perf_counter() - start,
            }
        )
    return Runs(records)


def wanted(merit: float) -> float:
    """Evaluations for an error of `WANTED`."""
    return (merit / WANTED) ** 2


def exponent(runs: dict[int, Runs]) -> str:
    """The slope of log evaluations over log d, with its bootstrap interval over seeds."""
    rng = np.random.default_rng(0)

    def slope(merits: list[float]) -> float:
        return float(np.polyfit(np.log(list(runs)), np.log([wanted(merit) for merit in merits]), 1)[0])

    slopes = [slope([each.resampled(rng) for each in runs.values()]) for _ in range(RESAMPLES)]
    low, high = np.quantile(slopes, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    return f"{slope([each.merit() for each in runs.values()]):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", nargs="+", type=int, default=[10, 30, 100, 300, 1000])
    parser.add_argument("--tools", nargs="+", default=list(NAMES), choices=list(TOOLS))
    parser.add_argument("--seeds", type=int, default=8, help="runs of each tool in each dimension")
    options = parser.parse_args()
    numpyro.enable_x64()
    print(as_header("d", *COLUMNS[1:], f"evaluations / 1000 for {WANTED}"), flush=True)
    exponents = []
    for name in options.tools:
        runs: dict[int, Runs] = {}
        for dim in options.dims:
            runs[dim] = runs_of(name, dim, options.seeds)
            print(as_row(str(dim), name, *runs[dim].row(), f"{wanted(runs[dim].merit()) / 1000:.3g}"), flush=True)
        if len(runs) > 1:
            exponents.append(f"{name}: evaluations for an error of {WANTED} grow as d to the power {exponent(runs)}")
    print("", *exponents, sep="\n")


if __name__ == "__main__":
    main()
