"""Error of log Z at equal numbers of evaluations: our SMC and BlackJAX's own adaptive tempered SMC.

    python benchmarks/smc.py                                    six targets with known answers, 20 seeds
    python benchmarks/smc.py --targets g32 funnel10 --seeds 5

BlackJAX gets what a user gives it at best: HMC moves with the covariance of the particles as inverse mass matrix, and a
step size that follows the acceptance rate (both through `inner_kernel_tuning`). Both tools see the same reference and
energies, in the same unconstrained coordinates and in double precision. See README.md for the columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from blackjax.smc import extend_params
from blackjax.smc.resampling import systematic
from blackjax.smc.tuning.from_kernel_info import update_scale_from_acceptance_rate
from blackjax.smc.tuning.from_particles import particles_covariance_matrix
from evidence import PROBLEMS, Problem

import ebm_ppl as ebm

SIX = "g10", "g32", "mix10", "funnel10", "schools", "logit31"
PEER_PARTICLES = 1000
PEER_ESS = 0.5
PEER_MOVES = 5
PEER_LEAPFROGS = 8
PEER_ACCEPTANCE = 0.8


# Estimators


@dataclasses.dataclass(frozen=True)
class Estimates:
    """Independent estimates of one log Z.

    Attributes:
        values: in nats, shape (seed,).
        std_errors: what each run says of itself, shape (seed,); None where a tool says nothing.
        evaluations: of the log density, with or without its gradient, in the mean over runs.
    """

    values: np.ndarray
    std_errors: np.ndarray | None
    evaluations: float
    seconds: float


def ours(target: ebm.Target, seeds: int) -> Estimates:
    """`ebm.log_z` with its defaults; the runs are batched."""
    start = time.perf_counter()
    log_z = ebm.log_z(jax.random.key(0), target, ebm.SMC(), num_runs=seeds)
    return Estimates(
        np.asarray(log_z.replicates),
        np.asarray(log_z.diagnostics["run_std_errors"]),
        log_z.diagnostics["num_evaluations"] / seeds,
        time.perf_counter() - start,
    )


def blackjax_tempered(target: ebm.Target, seeds: int) -> Estimates:
    """BlackJAX's adaptive tempered SMC; the runs are batched.

    A stage costs each particle its leapfrog steps, the start of its moves, and its weight. (The solver for the
    temperature evaluates it once more, which is not counted.)
    """
    start = time.perf_counter()
    run = jax.jit(jax.vmap(lambda key: _blackjax_run(key, target)))
    values, stages = jax.device_get(run(jax.random.split(jax.random.key(0), seeds)))
    evaluations = float(np.mean(stages)) * PEER_PARTICLES * (PEER_MOVES * PEER_LEAPFROGS + 2)
    return Estimates(values, None, evaluations, time.perf_counter() - start)


def _blackjax_run(key: jax.Array, target: ebm.Target) -> tuple[jax.Array, jax.Array]:
    """Log Z and the number of stages of one run."""
    key_prior, key_run = jax.random.split(key)
    particles = jax.vmap(target.sample_reference)(jax.random.split(key_prior, PEER_PARTICLES))

    def tuned(particles: jax.Array, step_size: jax.Array) -> dict[str, jax.Array]:
        covariance = particles_covariance_matrix(particles)
        return extend_params({"inverse_mass_matrix": covariance, "step_size": step_size})

    def updated(key: jax.Array, state: blackjax.smc.base.SMCState, info: blackjax.smc.base.SMCInfo) -> dict:
        accepted = jnp.mean(info.update_info.acceptance_rate)
        step_size = update_scale_from_acceptance_rate(step[0], accepted[None], PEER_ACCEPTANCE)[0]
        return tuned(state.particles, step_size)

    def hmc(key: jax.Array, state: blackjax.mcmc.hmc.HMCState, log_density: Callable, **settings: jax.Array) -> tuple:
        return kernel(key, state, log_density, num_integration_steps=PEER_LEAPFROGS, **settings)

    def stage(carry: tuple) -> tuple:
        state, log_z, count = carry
        step[0] = state.parameter_override["step_size"]
        state, info = smc.step(jax.random.fold_in(key_run, count), state)
        return state, log_z + info.log_likelihood_increment, count + 1

    kernel, step = blackjax.hmc.build_kernel(), [jnp.zeros(1)]
    smc = blackjax.inner_kernel_tuning(
        blackjax.adaptive_tempered_smc,
        target.log_reference,
        lambda z: -sum(target.energies(z).values()),
        hmc,
        blackjax.hmc.init,
        systematic,
        mcmc_parameter_update_fn=updated,
        initial_parameter_value=tuned(particles, jnp.asarray(target.dim**-0.25)),
        num_mcmc_steps=PEER_MOVES,
        target_ess=PEER_ESS,
    )
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), smc.init(particles))
    zero = jnp.zeros((), particles.dtype)
    _, log_z, count = jax.lax.while_loop(
        lambda carry: carry[0].sampler_state.tempering_param < 1.0, stage, (start, zero, jnp.zeros((), int))
    )
    return log_z, count


TOOLS = {"ebm_ppl": ours, "BlackJAX": blackjax_tempered}


# Tables


def mean_squared_error(estimates: Estimates, problem: Problem) -> float:
    """Of the estimates, less what the reference value itself is uncertain by."""
    return max(float(np.mean((estimates.values - problem.log_z) ** 2)) - problem.tolerance**2, 1e-12)


def work(estimates: Estimates, problem: Problem) -> float:
    """Squared error times thousands of evaluations: what stays the same as a run grows."""
    return mean_squared_error(estimates, problem) * estimates.evaluations / 1000


def row(name: str, tool: str, estimates: Estimates, problem: Problem) -> str:
    errors = estimates.values - problem.log_z
    own, coverage = "-", "-"
    if estimates.std_errors is not None:
        own = f"{estimates.std_errors.mean():.3f}"
        covered = np.abs(errors) <= 2 * np.hypot(estimates.std_errors, problem.tolerance)
        coverage = f"{covered.mean():.2f}"
    rmse = math.sqrt(mean_squared_error(estimates, problem))
    return (
        f"| {name} | {tool} | {rmse:.3f} | {errors.mean():+.3f} | {own} | {coverage} "
        f"| {estimates.evaluations / 1000:.0f} | {work(estimates, problem):.3g} | {estimates.seconds:.0f} |"
    )


def ratio_row(name: str, problem: Problem, found: dict[str, Estimates]) -> str:
    """BlackJAX's error over ours at equal evaluations, with an 80 % bootstrap interval over seeds."""
    rng = np.random.default_rng(0)

    def resampled(estimates: Estimates) -> Estimates:
        return dataclasses.replace(estimates, values=rng.choice(estimates.values, len(estimates.values)))

    def ratio(pair: list[Estimates]) -> float:
        return math.sqrt(work(pair[1], problem) / work(pair[0], problem))

    pair = [found["ebm_ppl"], found["BlackJAX"]]
    spread = np.quantile([ratio([resampled(each) for each in pair]) for _ in range(1000)], [0.1, 0.9])
    return f"| {name} | {ratio(pair):.2f} ({spread[0]:.2f}-{spread[1]:.2f}) |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(SIX), choices=list(PROBLEMS))
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--seeds", type=int, default=20, help="independent runs of each tool on each target")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    numpyro.enable_x64()
    rows, ratios = [], []
    for name in options.targets:
        print(f"{name} ...", file=sys.stderr, flush=True)
        problem = PROBLEMS[name]()
        found = {tool: TOOLS[tool](problem.target, options.seeds) for tool in options.tools}
        rows += [row(name, tool, estimates, problem) for tool, estimates in found.items()]
        if len(found) == len(TOOLS):
            ratios.append(ratio_row(name, problem, found))
    named = ", ".join(f"{package} {version(package)}" for package in ("ebm_ppl", "jax", "blackjax", "numpyro"))
    peer = f"N={PEER_PARTICLES}, ESS {PEER_ESS}, {PEER_MOVES} HMC moves of {PEER_LEAPFROGS} leapfrogs a stage"
    print(f"{named}; {options.seeds} seeds; ours: {ebm.SMC()}; BlackJAX: {peer}.\n")
    print(
        "| target | tool | rmse | bias | own standard error | within 2 of them | evaluations / 1000 "
        "| rmse^2 * evaluations / 1000 | seconds, compilation included |\n|" + " --- |" * 9
    )
    print(*rows, sep="\n")
    if ratios:
        print("\nError of BlackJAX over ours at equal evaluations (80 % bootstrap interval over seeds).\n")
        print("| target | ratio |\n| --- | --- |", *ratios, sep="\n")


if __name__ == "__main__":
    main()
