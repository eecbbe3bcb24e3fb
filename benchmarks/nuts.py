"""Speed of NUTS: ebm_ppl, NumPyro, and PyMC with nutpie, side by side in one run.

    python benchmarks/nuts.py                                   five models, three tools, three seeds, cold starts
    python benchmarks/nuts.py --models schools --seeds 1 --no-cold

Every tool draws 4 chains x 1000 from the same model (`models.py`) in double precision, with its own default warm-up,
in a process of its own. They take turns seed by seed, so that a busy machine troubles all of them alike. NumPyro runs
twice: as it comes, and with the setting of JAX's compiler that the import of ebm_ppl makes (`ebm_ppl/xla.py`), as it
does where both are imported. See README.md for the columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import models
import numpy as np
from served import Served

Arrays = dict[str, np.ndarray]
TOOLS = ("ebm_ppl", "numpyro", "numpyro_set", "nutpie")
CHAINS = 4
DRAWS = 1000
WARMUP = {"ebm_ppl": 500, "numpyro": 1000, "nutpie": 400}
"""The default of each tool; NumPyro has none, its documentation and examples use 1000."""
WANTED_ESS = 1000
MARGIN = 1.15
BLOCK = 100
TRIALS = 3
"""Runs of each of NumPyro's chain methods, in turn, of which the one with the least median time is taken."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One timed run of 4 chains x 1000 draws.

    Attributes:
        draws: of the latent sites, each (chain, draw, ...).
        seconds: of sampling, without warm-up and compilation.
        gradients: leapfrog steps of all chains while sampling.
    """

    draws: Arrays
    seconds: float
    gradients: int
    divergences: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a table needs of a run."""

    ess: float
    raw_ess: float
    seconds: float
    gradients: int
    divergences: int

    @property
    def ess_per_second(self) -> float:
        return self.ess / self.seconds

    @property
    def ess_per_kilogradient(self) -> float:
        return 1000 * self.ess / self.gradients


# The tools: made once for a model, then run for each seed in a process of their own


class EbmPpl:
    """Our NUTS: a run with its warm-up returns a state, and a continuation from it is timed."""

    label = "ebm_ppl"

    def __init__(self, name: str, data: Arrays):
        import ebm_ppl as ebm

        self.target = ebm.target(models.numpyro_model(name, "ebm_ppl"), **data)
        self.run(0)

    def run(self, seed: int) -> Run:
        import jax

        state = self._warm_up(seed)
        start = time.perf_counter()
        draws, _ = self._continue(state, DRAWS)
        seconds = time.perf_counter() - start
        sites = jax.device_get(jax.jit(jax.vmap(jax.vmap(self.target.constrain)))(draws.z))
        return Run(sites, seconds, int(draws.stats["n_steps"].sum()), int(draws.stats["diverging"].sum()))

    def _warm_up(self, seed: int) -> Any:
        return self._mcmc(seed, WARMUP["ebm_ppl"], BLOCK, None)[1]

    def _continue(self, state: Any, num_samples: int) -> Any:
        return self._mcmc(0, 0, num_samples, state)

    def _mcmc(self, seed: int, num_warmup: int, num_samples: int, state: Any) -> Any:
        import jax

        import ebm_ppl as ebm
        from ebm_ppl import mcmc

        return mcmc.run(
            jax.random.key(seed),
            self.target,
            ebm.NUTS(),
            num_chains=CHAINS,
            num_warmup=num_warmup,
            num_samples=num_samples,
            state=state,
            progress_bar=False,
        )


class NumPyro:
    """NumPyro's NUTS by its fastest chain method, compiled once.

    `MCMC.run` compiles anew at every call, so it is called inside a compiled function, as its documentation shows.
    "parallel" puts an equal share of the chains on each of as many host devices as there are cores.
    """

    METHODS = ("vectorized", "parallel", "sequential")

    def __init__(self, name: str, data: Arrays):
        import jax
        import numpyro

        numpyro.set_host_device_count(min(CHAINS, os.cpu_count() or 1))
        self.model, self.data = models.numpyro_model(name, "numpyro"), data
        self.method = ""
        candidates = {method: self._compiled(method) for method in self.METHODS}
        keys = jax.random.split(jax.random.key(0))
        states = {method: jax.block_until_ready(warm_up(keys[0])) for method, (warm_up, _) in candidates.items()}
        seconds = {method: [] for method in candidates}
        for _ in range(1 + TRIALS):  # of which the first compiles
            for method, (_, sample) in candidates.items():
                seconds[method].append(_timed(sample, keys[1], states[method])[1])
        self.method = min(seconds, key=lambda method: float(np.median(seconds[method][1:])))
        self.warm_up, self.sample = candidates[self.method]

    @property
    def label(self) -> str:
        return f"NumPyro, {self.method}"

    def run(self, seed: int) -> Run:
        import jax

        key_warm_up, key_sample = jax.random.split(jax.random.key(seed))
        state = jax.block_until_ready(self.warm_up(key_warm_up))
        (sites, extra), seconds = _timed(self.sample, key_sample, state)
        return Run(sites, seconds, int(np.sum(extra["num_steps"])), int(np.sum(extra["diverging"])))

    def _compiled(self, method: str) -> tuple[Any, Any]:
        """`warm_up(key) -> state` and `sample(key, state) -> sites, statistics`, over all chains."""
        import jax

        if method == "vectorized":
            warm_up, sample = self._functions(CHAINS)
            return jax.jit(warm_up), jax.jit(sample)
        devices = jax.local_device_count() if method == "parallel" else CHAINS
        warm_up, sample = self._functions(CHAINS // devices)
        if method == "parallel":
            warm_up, sample = jax.pmap(warm_up), jax.pmap(sample)
        else:
            warm_up, sample = _one_by_one(jax.jit(warm_up)), _one_by_one(jax.jit(sample))

        def split(key: Any) -> Any:
            return jax.random.split(key, devices)

        def joined(key: Any, state: Any) -> Any:
            return jax.tree.map(lambda x: np.asarray(x).reshape(CHAINS, *x.shape[2:]), sample(split(key), state))

        return lambda key: warm_up(split(key)), joined

    def _functions(self, chains: int) -> tuple[Any, Any]:
        from numpyro.infer import MCMC, NUTS

        settings = {"num_warmup": WARMUP["numpyro"], "num_samples": DRAWS, "num_chains": chains}
        fields = ("num_steps", "diverging")

        def mcmc() -> MCMC:
            return MCMC(NUTS(self.model), **settings, chain_method="vectorized", progress_bar=False)

        def warm_up(key: Any) -> Any:
            chain = mcmc()
            chain.warmup(key, **self.data, extra_fields=fields)
            return chain.last_state

        def sample(key: Any, state: Any) -> Any:
            chain = mcmc()
            chain.post_warmup_state = state
            chain.run(key, **self.data, extra_fields=fields)
            return chain.get_samples(group_by_chain=True), chain.get_extra_fields(group_by_chain=True)

        return warm_up, sample


def _timed(sample: Callable, key: Any, state: Any) -> tuple[Any, float]:
    import jax

    start = time.perf_counter()
    drawn = jax.device_get(sample(key, state))
    return drawn, time.perf_counter() - start


def _one_by_one(function: Any) -> Any:
    """A function of one chain, called for each along the leading axis, its results stacked."""
    import jax
    import jax.numpy as jnp

    def each(*args: Any) -> Any:
        parts = [function(*jax.tree.map(lambda x, i=i: x[i], args)) for i in range(CHAINS)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    return each


class Nutpie:
    """PyMC with nutpie, which cannot continue a run: its seconds are shared out between warm-up and sampling.

    The share is that of the gradients, which are nearly all of its time.
    """

    label = "PyMC, nutpie"

    def __init__(self, name: str, data: Arrays):
        import nutpie

        self.compiled = nutpie.compile_pymc_model(models.pymc_model(name, data))
        self.run(0)

    def run(self, seed: int) -> Run:
        import nutpie

        start = time.perf_counter()
        sampler = nutpie.sample(
            self.compiled,
            draws=DRAWS,
            tune=WARMUP["nutpie"],
            chains=CHAINS,
            seed=seed,
            progress_bar=False,
            blocking=False,
        )
        while not _is_finished(sampler):
            time.sleep(0.0005)
        total = time.perf_counter() - start
        result = sampler.wait()
        gradients = int(result.sample_stats["n_steps"].sum())
        share = gradients / (gradients + int(result.warmup_sample_stats["n_steps"].sum()))
        return Run(_posterior(result), total * share, gradients, int(result.sample_stats["diverging"].sum()))


def _is_finished(sampler: Any) -> bool:
    """Asks a sampler in the background, which raises where it is too busy to answer."""
    try:
        return sampler.is_finished
    except TimeoutError:
        return False


def _posterior(result: Any) -> Arrays:
    return {str(name): np.asarray(value) for name, value in result.posterior.data_vars.items()}


# Warm: sampling alone


def measure(tool: Any, name: str, data: Arrays, seed: int) -> Measured:
    """One run of a tool, with the smallest effective sample sizes."""
    run = tool.run(seed)
    ess = smallest_ess(models.quantities(name, data, run.draws))
    return Measured(ess, smallest_ess(run.draws), run.seconds, run.gradients, run.divergences)


def smallest_ess(values: Arrays) -> float:
    """Smallest bulk effective sample size over all scalars; each array is (chain, draw, ...)."""
    from arviz_stats.base import array_stats

    return min(float(np.min(array_stats.ess(np.asarray(x), chain_axis=0, draw_axis=1))) for x in values.values())


def serve(request: dict[str, Any]) -> None:
    """The process of one tool: a line with the tool's label, then one with what was measured for each seed asked."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import numpyro

    numpyro.enable_x64()
    name, tool = request["model"], request["tool"]
    data = models.data(name)
    made = {"ebm_ppl": EbmPpl, "numpyro": NumPyro, "numpyro_set": NumPyro, "nutpie": Nutpie}[tool](name, data)
    print(made.label + ", our setting" * (tool == "numpyro_set"), file=answers, flush=True)
    for seed in sys.stdin:
        print(json.dumps(dataclasses.asdict(measure(made, name, data, int(seed)))), file=answers, flush=True)


class Tool:
    """A tool in a process of its own."""

    def __init__(self, name: str, tool: str):
        request = json.dumps({"model": name, "tool": tool})
        self.served = Served([sys.executable, __file__, "--serve", request], environment(tool))
        self.label = self.served.answer()

    def measure(self, seed: int) -> Measured:
        return Measured(**json.loads(self.served.ask(seed)))


def environment(tool: str) -> dict[str, str]:
    """Without settings of JAX's compiler, which each tool makes for itself, but for the one that NumPyro borrows."""
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    if tool != "numpyro_set":
        return clean
    from ebm_ppl.xla import SMALL_LOOP

    return clean | {"XLA_FLAGS": f"--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold={SMALL_LOOP}"}


def warm(name: str, tools: list[str], seeds: int) -> dict[str, list[Measured]]:
    """All seeds of all tools on a model, in turns; keyed by the tool, with NumPyro's chain method."""
    asked = [Tool(name, tool) for tool in tools]
    found: dict[str, list[Measured]] = {tool.label: [] for tool in asked}
    for seed in range(seeds):
        for tool in asked:
            found[tool.label].append(tool.measure(seed + 1))
    for tool in asked:
        tool.served.stop()
    return found


# Cold: a fresh process, until the smallest effective sample size is large enough


def cold_ebm_ppl(name: str, data: Arrays, draws: int, seed: int, method: str) -> Iterator[Arrays]:
    """All draws so far, after each block."""
    import jax

    import ebm_ppl as ebm

    jax.config.update("jax_enable_x64", True)
    target, blocks, state = ebm.target(models.numpyro_model(name, "ebm_ppl"), **data), [], None
    while True:
        result, state = ebm.sample(
            jax.random.key(seed), target, num_samples=draws, state=state, return_state=True, progress_bar=False
        )
        blocks.append(_posterior(result))
        yield _concatenated(blocks)


def cold_numpyro(name: str, data: Arrays, draws: int, seed: int, method: str) -> Iterator[Arrays]:
    """All draws so far, after each block."""
    import numpyro

    numpyro.set_host_device_count(CHAINS if method == "parallel" else 1)
    numpyro.enable_x64()
    import jax
    from numpyro.infer import MCMC, NUTS

    kernel = NUTS(models.numpyro_model(name, "numpyro"))
    settings = {"num_warmup": WARMUP["numpyro"], "num_samples": draws, "num_chains": CHAINS}
    mcmc, blocks = MCMC(kernel, **settings, chain_method=method, progress_bar=False), []
    mcmc.run(jax.random.key(seed), **data)
    while True:
        blocks.append(jax.device_get(mcmc.get_samples(group_by_chain=True)))
        yield _concatenated(blocks)
        mcmc.post_warmup_state = mcmc.last_state
        mcmc.run(jax.random.fold_in(jax.random.key(seed), len(blocks)), **data)


def cold_nutpie(name: str, data: Arrays, draws: int, seed: int, method: str) -> Iterator[Arrays]:
    """All draws, after each run: nutpie cannot continue one, so the next is twice as long."""
    import nutpie

    compiled = nutpie.compile_pymc_model(models.pymc_model(name, data))
    while True:
        yield _posterior(nutpie.sample(compiled, draws=draws, chains=CHAINS, seed=seed, progress_bar=False))
        draws *= 2


def _concatenated(blocks: list[Arrays]) -> Arrays:
    return {name: np.concatenate([block[name] for block in blocks], axis=1) for name in blocks[0]}


def cold_child(request: dict[str, Any]) -> None:
    """The fresh process: prints its seconds since it was asked for, without those of judging its draws."""
    name, tool = request["model"], request["tool"]
    with np.load(request["data"]) as file:
        data = dict(file)
    samplers = {"ebm_ppl": cold_ebm_ppl, "numpyro": cold_numpyro, "numpyro_set": cold_numpyro, "nutpie": cold_nutpie}
    sampler = samplers[tool]
    judging = 0.0
    for draws in sampler(name, data, request["draws"], request["seed"], request["method"]):
        done = time.time()
        seconds = done - request["start"] - judging
        ess = smallest_ess(models.quantities(name, data, draws))
        if ess >= WANTED_ESS:
            print(json.dumps({"seconds": seconds, "ess": ess}))
            return
        judging += time.time() - done


def cold(name: str, data: Arrays, tool: str, draws: int, method: str, seed: int, cache: Path) -> float:
    """Seconds from the start of a process to `WANTED_ESS` effective draws."""
    path = cache / f"{name}.npz"
    np.savez(path, **data)
    request = {"model": name, "tool": tool, "data": str(path), "draws": draws, "method": method, "seed": seed}
    caches = {"PYTENSOR_FLAGS": f"base_compiledir={cache}", "NUMBA_CACHE_DIR": str(cache / "numba")}
    request["start"] = time.time()
    command = [sys.executable, __file__, "--cold-request", json.dumps(request)]
    done = subprocess.run(command, env=environment(tool) | caches, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The cold start of {tool} on {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def cold_starts(name: str, data: Arrays, found: dict[str, list[Measured]], seeds: int) -> dict[str, list[float]]:
    """Cold seconds of each tool, in turns; nutpie with an empty and with a filled cache on disk."""
    seconds: dict[str, list[float]] = {}
    for seed in range(seeds):
        for label, runs in found.items():
            tool = _tool(label)
            method = label.split(", ")[1] if label.startswith("NumPyro") else ""
            wanted = MARGIN * WANTED_ESS * DRAWS / np.median([run.ess for run in runs])
            draws = BLOCK * int(np.ceil(wanted / BLOCK))
            with tempfile.TemporaryDirectory() as cache:
                starts = (label, f"{label}, cached") if tool == "nutpie" else (label,)
                for start in starts:
                    took = cold(name, data, tool, draws, method, seed, Path(cache))
                    seconds.setdefault(start, []).append(took)
    return seconds


def _tool(label: str) -> str:
    if label.endswith(", our setting"):
        return "numpyro_set"
    return {"ebm_ppl": "ebm_ppl", "NumPyro": "numpyro", "PyMC": "nutpie"}[label.split(", ")[0]]


# Tables


def row(name: str, label: str, runs: list[Measured], seconds: list[float]) -> str:
    """Medians over seeds."""
    middle = {
        "ess": np.median([run.ess for run in runs]),
        "seconds": np.median([run.seconds for run in runs]),
        "rate": np.median([run.ess_per_second for run in runs]),
        "gradients": np.median([run.gradients for run in runs]) / 1000,
        "efficiency": np.median([run.ess_per_kilogradient for run in runs]),
    }
    start = f"{np.median(seconds):.1f}" if seconds else "-"
    raw = f"{np.median([run.raw_ess for run in runs]):.0f}" if name == "network" else "-"
    return (
        f"| {name} | {label} | {middle['ess']:.0f} | {middle['seconds']:.3f} | {middle['rate']:.0f} "
        f"| {middle['gradients']:.1f} | {middle['efficiency']:.1f} | {sum(run.divergences for run in runs)} "
        f"| {start} | {raw} |"
    )


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median and range over seeds of the ratios."""
    ratios = np.asarray(ours) / np.asarray(theirs)
    return f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})"


def ratio_rows(name: str, found: dict[str, list[Measured]], seconds: dict[str, list[float]]) -> list[str]:
    """How many times better ours is than each peer."""
    if "ebm_ppl" not in found:
        return []
    ours, rows = found["ebm_ppl"], []
    for label, runs in found.items():
        if label == "ebm_ppl":
            continue
        rate = ratio([run.ess_per_second for run in ours], [run.ess_per_second for run in runs])
        efficiency = ratio([run.ess_per_kilogradient for run in ours], [run.ess_per_kilogradient for run in runs])
        starts = [ratio(seconds[key], seconds["ebm_ppl"]) for key in seconds if key in (label, f"{label}, cached")]
        rows.append(f"| {name} | {label} | {rate} | {efficiency} | {'; cached '.join(starts) or '-'} |")
    return rows


def versions() -> str:
    """Versions of the packages, of Python, and the number of cores."""
    packages = ("ebm_ppl", "jax", "blackjax", "numpyro", "pymc", "nutpie", "arviz-stats")
    named = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{named}, Python {platform.python_version()}, {os.cpu_count()} cores"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(models.NAMES), choices=models.NAMES)
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each tool on each model")
    parser.add_argument("--cold-seeds", type=int, default=1, help="cold starts of each tool on each model")
    parser.add_argument("--cold", action=argparse.BooleanOptionalAction, default=True, help="time fresh processes too")
    parser.add_argument("--cold-request", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.cold_request:
        cold_child(json.loads(options.cold_request))
        return
    if options.serve:
        serve(json.loads(options.serve))
        return
    rows, ratios = [], []
    for name in options.models:
        print(f"{name} ...", file=sys.stderr, flush=True)
        data = models.data(name)
        found = warm(name, options.tools, options.seeds)
        seconds = cold_starts(name, data, found, options.cold_seeds) if options.cold else {}
        own = [row(name, label, runs, seconds.get(label, [])) for label, runs in found.items()]
        ratios_of_model = ratio_rows(name, found, seconds)
        print(*own, *ratios_of_model, sep="\n", file=sys.stderr, flush=True)  # so that a run cut short is not lost
        rows += own
        ratios += ratios_of_model
    print(f"{versions()}; {CHAINS} chains x {DRAWS} draws after {WARMUP}; medians over {options.seeds} seeds.\n")
    columns = ("model", "tool", "min bulk ESS", "seconds", "ESS / s", "gradients / 1000", "ESS / 1000 gradients")
    print(_header(*columns, "divergences", "cold s", "raw weights' ESS"), *rows, sep="\n")
    if ratios:
        print("\nHow many times better ebm_ppl is than the peer: median (range over seeds).\n")
        print(_header("model", "peer", "ESS / s", "ESS / gradient", "cold"), *ratios, sep="\n")


def _header(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}"


if __name__ == "__main__":
    main()
