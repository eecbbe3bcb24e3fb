"""Error of log Z: our estimators and those of other packages, side by side.

    python benchmarks/log_z.py                                  all problems, all tools
    python benchmarks/log_z.py --targets g10 schools --tools SMC dynesty --seeds 5 --peer-seeds 2
    python benchmarks/log_z.py --out runs.jsonl                 appends each run to a file, and runs only what it lacks
    python benchmarks/log_z.py --read runs.jsonl more.jsonl     only prints the tables

Every tool (`peers.py`) gets the same models (`evidence.py`) in double precision, in a process of its own; they take
turns seed by seed. A run that takes longer than `--limit` seconds is killed, and its tool is not asked that problem
again. See README.md for the columns.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from typing import Any

import numpy as np
from cube import OutOfReachError
from evidence import PROBLEMS
from peers import OURS, PEERS, TOOLS
from records import Record, append, as_header, as_row, run_or_read, versions
from served import EndedError, Served

# A record is one run: problem, tool, seed, outcome; where that is "done", also value, std_error, evaluations, seconds,
# doubts.
PACKAGES = ("ebm_ppl", "jax", "numpyro", "blackjax", "pymc", "dynesty", "nautilus-sampler", "jaxns", "pocomc")
GOALS = {"1/5": 5.0, "1/2": 2.0}
"""What share of a peer's error ours shall be at equal evaluations, and the ratio of theirs to ours that this takes."""
INTERVAL = 0.8
RESAMPLES = 2000
HOPELESS = "killed", "out of reach"
"""Outcomes after which a tool is not asked the same problem again."""


# The process of one tool


def serve(request: Record) -> None:
    """Answers each seed that it is asked with the record of a run."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import numpyro

    numpyro.enable_x64()
    start = time.time()
    problem = PROBLEMS[request["problem"]]()
    # To state a problem, with its exact answer, is on nobody's clock.
    began, run = request["began"] + time.time() - start, None
    for seed in map(int, sys.stdin):
        record: Record = {"cold": run is None, "exact": problem.log_z, "tolerance": problem.tolerance}
        began = began if run is None else time.time()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                warnings.filterwarnings("ignore", "PyTensor could not link to a BLAS")
                run = run or TOOLS[request["tool"]](problem.target)
                estimate = run(seed)
            warned = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
            record |= {
                "outcome": "done" if math.isfinite(estimate.value) else "failed",
                "value": estimate.value,
                "std_error": estimate.std_error,
                "evaluations": estimate.evaluations,
                "seconds": time.time() - began,
                "doubts": list(dict.fromkeys([*estimate.doubts, *warned])),
            }
        except Exception as error:
            outcome = "out of reach" if isinstance(error, (OutOfReachError, ModuleNotFoundError)) else "failed"
            record |= {"outcome": outcome, "message": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(record), file=answers, flush=True)


class Tool:
    """A tool on a problem; its process starts with its first run."""

    def __init__(self, problem: str, name: str, limit: float):
        self.problem, self.name, self.limit = problem, name, limit
        self.served: Served | None = None

    def run(self, seed: int) -> Record:
        record = {
            "problem": self.problem,
            "tool": self.name,
            "seed": seed,
            "limit": self.limit,
            "versions": versions(PACKAGES),
        }
        try:
            return record | json.loads(self._process().ask(seed, self.limit))
        except EndedError as error:
            self.served = None
            return record | {"outcome": "killed", "message": str(error)}

    def _process(self) -> Served:
        if self.served is None:
            request = {"problem": self.problem, "tool": self.name, "began": time.time()}
            command = [sys.executable, __file__, "--serve", json.dumps(request)]
            # Some tools leave log files where they are.
            self.served = Served(command, directory=tempfile.gettempdir())
        return self.served

    def stop(self) -> None:
        if self.served is not None:
            self.served.stop()
            self.served = None


def run_all(options: argparse.Namespace, records: list[Record]) -> None:
    """All runs that are asked for and not there yet, in turns; each is added to the records, and to the file."""
    for problem in options.targets:
        tools = [Tool(problem, name, options.limit) for name in options.tools]
        for seed in range(max(options.seeds, options.peer_seeds)):
            for tool in tools:
                if seed >= (options.seeds if tool.name in OURS else options.peer_seeds):
                    tool.stop()
                elif not is_known(tool, seed, records):
                    print(f"{problem}, {tool.name}, seed {seed} ...", file=sys.stderr, flush=True)
                    records.append(tool.run(seed))
                    append(records[-1], options.out)
        for tool in tools:
            tool.stop()


def is_known(tool: Tool, seed: int, records: list[Record]) -> bool:
    """Whether the run is there, or one that makes it hopeless."""
    same = [record for record in records if (record["problem"], record["tool"]) == (tool.problem, tool.name)]
    return any(
        record["seed"] == seed or (record["outcome"] in HOPELESS and record["limit"] >= tool.limit) for record in same
    )


# Tables


class Runs:
    """The runs of one tool on one problem."""

    def __init__(self, records: list[Record]):
        self.records = records
        self.done = [record for record in records if record["outcome"] == "done"]
        self.errors = self._array("value") - self._array("exact")
        self.evaluations = self._array("evaluations")
        self.tolerance = self.done[0]["tolerance"] if self.done else 0.0

    def _array(self, name: str) -> np.ndarray:
        return np.array([record[name] for record in self.done], float)

    def rmse(self, chosen: Any = slice(None)) -> float:
        """Of the estimates, less what the reference value itself is uncertain by."""
        return math.sqrt(max(float(np.mean(self.errors[chosen] ** 2)) - self.tolerance**2, 1e-12))

    def merit(self, chosen: Any = slice(None)) -> float:
        """rmse * sqrt(evaluations): what stays the same as a run grows."""
        return self.rmse(chosen) * math.sqrt(np.mean(self.evaluations[chosen]))

    def resampled(self, rng: np.random.Generator) -> float:
        """The merit of as many runs, drawn from these."""
        return self.merit(rng.integers(len(self.done), size=len(self.done)))

    def row(self) -> list[str]:
        """The cells of the first table, problem and tool apart."""
        num = str(len(self.done)) if len(self.done) == len(self.records) else f"{len(self.done)} of {len(self.records)}"
        if not self.done:
            return [num, *("-" * 10)]
        seconds = {cold: [run["seconds"] for run in self.done if run["cold"] == cold] for cold in (True, False)}
        doubted = sum(bool(record["doubts"]) for record in self.done)
        return [
            num,
            f"{np.mean(self.errors):+.3f}",
            f"{self.rmse():.3f}",
            *self._stated(),
            f"{np.mean(self.evaluations) / 1000:.1f}",
            f"{self.merit():.3g}",
            *(f"{np.median(each):.1f}" if each else "-" for each in seconds.values()),
            str(doubted),
        ]

    def _stated(self) -> list[str]:
        """The mean error that runs state, and the share of runs within two of their own."""
        if any(record["std_error"] is None for record in self.done):
            return ["-", "-"]
        stated = self._array("std_error")
        within = np.abs(self.errors) <= 2 * np.hypot(stated, self.tolerance)
        return [f"{stated.mean():.3f}", f"{within.mean():.2f}"]

    def note(self) -> str | None:
        """Why some runs have no answer."""
        causes = [record.get("message", "not finite") for record in self.records if record["outcome"] != "done"]
        return "; ".join(dict.fromkeys(" ".join(cause.split()) for cause in causes)) or None


COLUMNS = (
    *("problem", "tool", "seeds", "mean error", "rmse", "stated error", "within 2 of them", "evaluations / 1000"),
    *("rmse * sqrt(evaluations)", "cold s", "warm s", "doubted"),
)


def ratio(ours: Runs | None, theirs: Runs) -> tuple[str, float]:
    """A cell of the second table, and the ratio in it, NaN where there is none."""
    if ours is None or not ours.done or not theirs.done:
        return "-", math.nan
    value = theirs.merit() / ours.merit()
    goal = next((name for name, least in GOALS.items() if value >= least), "no")
    if min(len(ours.done), len(theirs.done)) < 2:
        return f"{value:.2g}: {goal}" + "?" * (goal != "no"), value
    rng = np.random.default_rng(0)
    ratios = [theirs.resampled(rng) / ours.resampled(rng) for _ in range(RESAMPLES)]
    low, high = np.quantile(ratios, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    mark = "?" if goal != "no" and low < GOALS[goal] else ""
    return f"{value:.2g} ({low:.2g} to {high:.2g}): {goal}{mark}", value


def print_tables(records: list[Record]) -> None:
    """What the runs say, in Markdown."""
    found: dict[str, dict[str, Runs]] = {}
    for problem in [name for name in PROBLEMS if any(record["problem"] == name for record in records)]:
        of_problem = [record for record in records if record["problem"] == problem]
        grouped = {tool: [record for record in of_problem if record["tool"] == tool] for tool in TOOLS}
        found[problem] = {tool: Runs(runs) for tool, runs in grouped.items() if runs}
    print(*sorted({record["versions"] for record in records}), sep="\n")
    print("\n" + as_header(*COLUMNS))
    for problem, tools in found.items():
        print(*(as_row(problem, tool, *runs.row()) for tool, runs in tools.items()), sep="\n")
    notes = [
        f"- {problem}, {tool}: {note}"
        for problem, tools in found.items()
        for tool, runs in tools.items()
        if (note := runs.note())
    ]
    print("\nRuns without an answer:\n", *notes, sep="\n") if notes else None
    print_ratios(found)


def print_ratios(found: dict[str, dict[str, Runs]]) -> None:
    """How many times larger the errors of the peers are than each of ours, at equal evaluations."""
    present = [tool for tool in OURS if any(tool in tools for tools in found.values())]
    rows, ratios = [], {tool: [] for tool in present}
    for problem, tools in found.items():
        for peer in [name for name in tools if name in PEERS]:
            cells = {tool: ratio(tools.get(tool), tools[peer]) for tool in present}
            rows.append(as_row(problem, peer, *(cell for cell, _ in cells.values())))
            for tool, (_, value) in cells.items():
                ratios[tool] += [value] if math.isfinite(value) else []
    if not present or not rows:
        return
    print(
        f"\nError of the peer over ours at equal evaluations ({INTERVAL:.0%} bootstrap interval over seeds), and the "
        "goal that this meets: our error a fifth of theirs, or half. A question mark: not by the whole interval.\n"
    )
    print(as_header("problem", "peer", *present), *rows, "", sep="\n")
    for tool, values in ratios.items():
        met = [f"{name} in {sum(value >= least for value in values)}" for name, least in GOALS.items()]
        print(f"{tool}: of {len(values)} comparisons it meets {', '.join(met)}.")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--seeds", type=int, default=10, help="runs of each of our estimators on each problem")
    parser.add_argument("--peer-seeds", type=int, default=3, help="runs of each peer on each problem")
    return parser


if __name__ == "__main__":
    run_or_read(arguments(), serve, run_all, print_tables)
