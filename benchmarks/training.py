"""Training of energies on the plane: our objectives, and those of ebmkit and torchebm, side by side.

    python benchmarks/training.py                               all densities, objectives and tools, three seeds
    python benchmarks/training.py --densities rings funnel --objectives "noise contrast" --steps 500 --seeds 1
    python benchmarks/training.py --out runs.jsonl              appends each run to a file, and runs only what it lacks
    python benchmarks/training.py --read runs.jsonl more.jsonl  only prints the tables

Every tool (`trainers.py`) trains the same network on the same draws of a density (`densities.py`) with the same
optimiser, in a process of its own on one core. They take turns run by run. Judged at points held out, with log Z by
quadrature for all of them. See README.md for the columns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from typing import Any

import numpy as np
from densities import DENSITIES, UnboundedError, log_partition
from records import Record, append, as_header, as_row, run_or_read, versions
from served import EndedError, Served
from trainers import OBJECTIVES, OURS, TOOLS

# A record is one run: density, objective, tool, seed, steps, outcome; where that is "done", also the log likelihood at
# each point held out, that of the density itself, steps per second by both clocks, and seconds of compilation.
PACKAGES = ("ebm_ppl", "jax", "ebmkit", "torchebm", "torch")
TRAINED, HELD_OUT = 20_000, 10_000
GOAL = 2.5
"""How many times as many steps per second ours shall do."""
Cell = tuple[str, str, str]
"""Density, objective and tool."""


# The process of one tool


def serve(request: Record) -> None:
    """Answers each run that it is asked for with its record."""
    answers, sys.stdout = sys.stdout, sys.stderr
    if request["core"] is not None:
        os.sched_setaffinity(0, {request["core"]})
    if request["tool"] != OURS:
        import torch

        torch.set_num_threads(1)
    trainers: dict[str, Any] = {}
    for asked in map(json.loads, sys.stdin):
        try:
            if asked["objective"] not in trainers:
                trainers[asked["objective"]] = TOOLS[request["tool"]](asked["objective"])
            answer = measured(trainers[asked["objective"]], asked)
        except Exception as error:
            unbounded = isinstance(error, UnboundedError)
            answer = {"outcome": "unbounded" if unbounded else "failed", "message": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def measured(trainer: Any, asked: Record) -> Record:
    """One run: other draws to train on for each seed, the same to judge by for all."""
    density = DENSITIES[asked["density"]]()
    data = density.sample(np.random.default_rng(asked["seed"]), TRAINED).astype(np.float32)
    held_out = density.sample(np.random.default_rng(10**6), HELD_OUT)
    run = trainer.train(asked["seed"], data, asked["steps"])
    log_likelihood = -run.energy(held_out.astype(np.float32)) - log_partition(run.energy)
    return {
        "outcome": "done",
        "log_likelihood": np.round(log_likelihood, 4).tolist(),
        "exact": float(np.mean(density.log_density(held_out))),
        "rate": asked["steps"] / run.seconds,
        "processor_rate": asked["steps"] / run.processor_seconds,
        "compilation": run.compilation,
    }


class Tool:
    """A tool; its process starts with its first run."""

    def __init__(self, name: str, core: int | None, limit: float):
        self.name, self.core, self.limit = name, core, limit
        self.served: Served | None = None

    def run(self, asked: Record) -> Record:
        record = asked | {"tool": self.name, "limit": self.limit, "versions": versions(PACKAGES)}
        try:
            return record | json.loads(self._process().ask(json.dumps(asked), self.limit))
        except EndedError as error:
            self.served = None
            return record | {"outcome": "killed", "message": str(error)}

    def _process(self) -> Served:
        if self.served is None:
            request = json.dumps({"tool": self.name, "core": self.core})
            self.served = Served([sys.executable, __file__, "--serve", request])
        return self.served

    def stop(self) -> None:
        if self.served is not None:
            self.served.stop()


def run_all(options: argparse.Namespace, records: list[Record]) -> None:
    """All runs that are asked for and not there yet, in turns; each is added to the records, and to the file."""
    tools = [Tool(name, options.core, options.limit) for name in options.tools]
    known = {key(record) for record in records}
    for seed in range(options.seeds):
        for density in options.densities:
            for objective in options.objectives:
                asked = {"density": density, "objective": objective, "seed": seed, "steps": options.steps}
                for tool in tools:
                    if objective in TOOLS[tool.name].objectives and key(asked | {"tool": tool.name}) not in known:
                        print(f"{density}, {objective}, {tool.name}, seed {seed} ...", file=sys.stderr, flush=True)
                        records.append(tool.run(asked))
                        append(records[-1], options.out)
    for tool in tools:
        tool.stop()


def key(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("density", "objective", "tool", "seed", "steps"))


# Tables


class Runs:
    """The runs of one tool with one objective on one density, by seed."""

    def __init__(self, records: list[Record]):
        self.records = records
        self.done = {record["seed"]: record for record in records if record["outcome"] == "done"}
        self.is_whole = len(self.done) == len(records)

    def log_likelihood(self) -> float:
        return float(np.mean([np.mean(record["log_likelihood"]) for record in self.done.values()]))

    def cell(self) -> str:
        """Mean log likelihood, less than that of the density itself, and its range over seeds."""
        if not self.is_whole or not self.done:
            return ", ".join(sorted({record["outcome"] for record in self.records} - {"done"}))
        gaps = [np.mean(record["log_likelihood"]) - record["exact"] for record in self.done.values()]
        spread = f" ({min(gaps):.3f} to {max(gaps):.3f})" if len(gaps) > 1 else ""
        return f"{np.mean(gaps):.3f}{spread}"

    def minus(self, other: Runs) -> tuple[float, float]:
        """Difference of log likelihoods, paired by seed and point, and its standard error over both."""
        seeds = sorted(self.done.keys() & other.done.keys())
        ours, theirs = (np.array([runs.done[seed]["log_likelihood"] for seed in seeds]) for runs in (self, other))
        gaps = ours - theirs
        variance = gaps.mean(axis=0).var(ddof=1) / gaps.shape[1]
        variance += gaps.mean(axis=1).var(ddof=1) / len(seeds) if len(seeds) > 1 else 0.0
        return float(gaps.mean()), math.sqrt(variance)

    def times_faster(self, other: Runs, clock: str) -> list[float]:
        """Of each run that both have."""
        return [self.done[seed][clock] / other.done[seed][clock] for seed in self.done.keys() & other.done.keys()]


def print_tables(records: list[Record]) -> None:
    """What the runs say, in Markdown."""
    grouped: dict[Cell, list[Record]] = {}
    for record in records:
        grouped.setdefault((record["density"], record["objective"], record["tool"]), []).append(record)
    found = {cell: Runs(runs) for cell, runs in grouped.items()}
    print(*sorted({record["versions"] for record in records}), sep="\n")
    densities = [name for name in DENSITIES if any(cell[0] == name for cell in found)]
    print("\nLog likelihood less that of the density itself, in nats at each point held out:\n")
    print(as_header("objective", "tool", *densities))
    for objective in OBJECTIVES:
        for tool in TOOLS:
            runs = [found.get((density, objective, tool)) for density in densities]
            if any(runs):
                print(as_row(objective, tool, *(each.cell() if each else "-" for each in runs)))
    print_best(found, densities)
    print_rates(found)
    print_notes(found)


def print_best(found: dict[Cell, Runs], densities: list[str]) -> None:
    """The best of ours against the best of the peers."""
    print("\nThe best of ours and of the peers:\n")
    print(as_header("density", "ours", "best peer", "ours less theirs, nats", "at least as good"))
    for density in densities:
        whole = {cell: runs for cell, runs in found.items() if cell[0] == density and runs.is_whole and runs.done}
        ours, theirs = ({cell: r for cell, r in whole.items() if (cell[2] == OURS) == is_ours} for is_ours in (1, 0))
        if ours and theirs:
            best, peer = (max(cells, key=lambda cell: whole[cell].log_likelihood()) for cells in (ours, theirs))
            gap, error = whole[best].minus(whole[peer])
            verdict = "yes" if gap >= 0 else "within two errors" if gap > -2 * error else "no"
            print(as_row(density, best[1], f"{peer[2]}, {peer[1]}", f"{gap:+.4f} ({error:.4f})", verdict))


def print_rates(found: dict[Cell, Runs]) -> None:
    """Steps per second of ours over those of each peer with the same objective."""
    print(f"\nOur steps per second over theirs, median (range) of all runs; the goal is {GOAL}:\n")
    print(as_header("objective", "peer", "on the clock", "of processor time", "goal met", "compilation, s"))
    for objective in OBJECTIVES:
        for tool in [name for name in TOOLS if name != OURS]:
            pairs = [
                (found[density, objective, OURS], found[density, objective, tool])
                for density in DENSITIES
                if {(density, objective, OURS), (density, objective, tool)} <= found.keys()
            ]
            ratios = {
                clock: [ratio for ours, theirs in pairs for ratio in ours.times_faster(theirs, clock)]
                for clock in ("rate", "processor_rate")
            }
            if not ratios["rate"]:
                continue
            cells = [f"{np.median(x):.2g} ({min(x):.2g} to {max(x):.2g})" for x in ratios.values()]
            compilation = max(record["compilation"] for ours, _ in pairs for record in ours.done.values())
            met = "yes" if np.median(ratios["processor_rate"]) >= GOAL else "no"
            print(as_row(objective, tool, *cells, met, f"{compilation:.1f}"))


def print_notes(found: dict[Cell, Runs]) -> None:
    """Why some runs have no answer."""
    for cell, runs in found.items():
        causes = {record["message"] for record in runs.records if record["outcome"] != "done"}
        print(*(f"\n- {', '.join(cell)}: {' '.join(cause.split())[:200]}" for cause in sorted(causes)), sep="", end="")
    print()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", nargs="+", default=list(DENSITIES), choices=list(DENSITIES))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each tool with each objective on each density")
    parser.add_argument("--steps", type=int, default=2000, help="of the optimiser in each run")
    parser.add_argument("--core", type=int, help="the core that all tools run on; any, where none is given")
    return parser


if __name__ == "__main__":
    run_or_read(arguments(), serve, run_all, print_tables)
