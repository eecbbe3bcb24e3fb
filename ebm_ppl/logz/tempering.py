"""Parallel tempering: log Z from all rungs of ladders whose chains swap, and draws of the posterior from the last.

    run             `rounds.run`: tuning in rounds, then energies U[k, c, d] of draw d of replica c at rung k
    log Z           `path.multistate` of these energies: Bennett's multistate acceptance ratio
    its error       log Z ~ sum_k mean_cd x[k, c, d] to first order, and by swaps the rungs of a replica depend on one
                    another. The replicas do not, and so the variance is var_c(y_c) / C of their sums over rungs,
                    y_c = sum_k mean_d x[k, c, d]

An effective size of the series sum_k x[k, c, d] knows less than this spread: what two separate modes are worth changes
slowly and little beside the rest, and its autocorrelation drowns. (On the benchmark's two modes such an error was
.04 where 24 runs of 16 replicas strayed by .063 from the truth, and the spread said .063.)
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from ebm_ppl.independence import require_chains
from ebm_ppl.kernels import HMC, MALA, MCLMC, require_adjusted
from ebm_ppl.logz import rounds
from ebm_ppl.logz.integral import LARGEST_RHAT, Integral, disagreement, warn_of
from ebm_ppl.logz.ladder import LOW_ACCEPTANCE, Rungs
from ebm_ppl.logz.path import FEWEST, error_of, multistate
from ebm_ppl.logz.replicas import rejections, round_trips
from ebm_ppl.logz.rounds import Run
from ebm_ppl.target import Target, Tilted
from ebm_ppl.typing import Draws, EnergyError, PRNGKey, with_error

FEWEST_MOVES = 4
"""Of the first round."""
HIGH_REJECTION = 0.85
"""Of swaps between neighbours, beyond which points hardly pass."""
FEWEST_TRIPS = 2
"""Round trips of a replica on average, below which the last rungs have hardly been restarted from the reference."""


@dataclasses.dataclass(frozen=True)
class ParallelTempering:
    """Non-reversible parallel tempering: chains from the reference to the posterior that swap their points.

    A method of `log_z` and a sampler of `sample`. Each replica has a chain at every inverse temperature, and takes
    independent draws of the reference at the first; points that travel from there to the posterior and back carry
    what separate modes are worth. Temperatures, step sizes and metrics are tuned in rounds of doubling length.

    Args:
        num_replicas: independent ladders; their spread is the error. `num_chains` of `sample`.
        num_draws: moves of each chain that count. `num_samples` of `sample`.
        num_rungs: inverse temperatures, the reference and the posterior included; about twice the communication
            barrier where None.
        num_rounds: of tuning: of num_draws / 2, num_draws / 4, ... moves, the shortest first.
        kernel: what moves the points between swaps; only kernels that leave their target invariant.

    References:
        Syed, Bouchard-Cote, Deligiannidis and Doucet (2022), Non-reversible parallel tempering: a scalable highly
        parallel MCMC scheme.
    """

    num_replicas: int = 16
    num_draws: int = 1024
    num_rungs: int | None = None
    num_rounds: int = 6
    kernel: HMC | MALA | MCLMC = dataclasses.field(default_factory=lambda: HMC(max_leapfrogs=64))
    name = "parallel tempering"

    def __post_init__(self):
        if self.num_replicas < FEWEST:
            raise EnergyError(
                f"num_replicas is {FEWEST} at least, since their spread is the error; got {self.num_replicas}."
            )
        if self.num_rungs is not None and self.num_rungs < 2:
            raise EnergyError(f"num_rungs is 2 at least: the reference and the posterior; got {self.num_rungs}.")
        if self.num_rounds < 1:
            raise EnergyError(f"num_rounds is a positive number of rounds of tuning; got {self.num_rounds}.")
        if self.num_draws >> self.num_rounds < FEWEST_MOVES:
            raise EnergyError(
                f"The first of {self.num_rounds} rounds has num_draws / {2**self.num_rounds} moves, which must be "
                f"{FEWEST_MOVES} at least: num_draws is {self.num_draws}."
            )
        require_chains(self.kernel, "a replica of parallel tempering")
        require_adjusted(self.kernel, self.name)

    def integrate(self, key: PRNGKey, target: Tilted) -> Integral:
        """log Z of all energies of a target at once, from one run.

        Raises:
            NonFiniteEnergyError: for an energy of -inf.
            DegenerateParticlesError: where no draw of the reference has any mass.
        """
        run = _run(key, target, self)
        passage = _passage(run)
        value, std_error = estimate(Rungs(run.beta, np.moveaxis(run.last.energy, 2, 0)))
        return Integral(
            value=value,
            std_error=std_error,
            num_evaluations=run.num_evaluations,
            num_nan=run.num_nan,
            story=(
                f"{self.num_rounds} rounds of tuning to {self.num_draws >> 1} moves: communication barrier "
                + ", ".join(f"{barrier:.1f}" for barrier in run.barriers[:-1]),
                f"{self.num_replicas} replicas of {self.num_draws} draws at {len(run.beta)} rungs: {passage}",
                f"MBAR of all rungs: log Z {with_error(value, std_error)}, {run.num_evaluations:.0f} evaluations",
            ),
            doubts=tuple(_doubts(passage, self)),
            diagnostics={"num_rungs": len(run.beta), **passage._asdict()},
        )


class Passage(NamedTuple):
    """How well points passed the ladder."""

    barrier: float
    """Lambda, the sum of the rejection rates."""
    rejection: list[float]
    """Rate of each swap between neighbours."""
    round_trips: list[int]
    """Of each replica."""
    round_trip_rate: float
    """For each move of a replica."""
    best_round_trip_rate: float
    """1 / (2 + 2 Lambda)"""
    largest_rhat: float
    """Over the replicas: of the energies of a rung, or of a coordinate of the last."""
    least_acceptance: float
    """Of the moves at a rung."""

    def __str__(self) -> str:
        return (
            f"communication barrier {self.barrier:.2f}, {sum(self.round_trips)} round trips ({self.round_trip_rate:.4f}"
            f" a move, at best {self.best_round_trip_rate:.4f}), rejections {min(self.rejection):.2f} to "
            f"{max(self.rejection):.2f}, R-hat {self.largest_rhat:.3f}"
        )


def estimate(rungs: Rungs) -> tuple[float, float]:
    """log Z and its standard error from the energies of replicas, which are the chains of `Rungs`."""
    log_z, contributions = multistate(rungs)
    of_replicas = np.sum(np.mean(contributions, axis=2), axis=0, keepdims=True)
    return float(log_z[-1]), error_of(of_replicas)


def draw(key: PRNGKey, target: Target, method: ParallelTempering, *, progress_bar: bool = False) -> Draws:
    """Draws of the posterior from the last rung, replicas as chains, with warnings of what speaks against them.

    Where the model has an evidence, `log_z` has what the run says of it: one value for all replicas.
    """
    target.require_tractable()
    target.require_reference()
    run = _run(key, target, method, progress_bar)
    passage, last, doubts = _passage(run), run.last, _doubts(_passage(run), method)
    warn_of(run.num_nan, doubts, stacklevel=4)
    attrs = {
        "inference_library": "ebm_ppl",
        "sampler": method.name,
        "sampler_settings": repr(method),
        "adjusted": 1,
        "num_divergent": int(last.stats["diverging"].sum()),
        "num_nan_energy": run.num_nan,
        "num_evaluations": run.num_evaluations,
        "communication_barrier": passage.barrier,
        "round_trips": sum(passage.round_trips),
        "round_trip_rate": passage.round_trip_rate,
        "largest_rhat": passage.largest_rhat,
        "doubts": "\n".join(doubts),
    }
    ladder = {
        "beta": run.beta,
        "rejection_rate": np.append(passage.rejection, np.nan),
        "accept_rate": np.append(np.nan, np.mean(last.accepted, axis=(0, 1))),
        "step_size": np.append(np.nan, run.step_size),
        "mean_energy": np.mean(last.energy, axis=(0, 1)),
    }
    z: Any = last.z[:, :, -1]
    stats: Any = last.stats
    return Draws(z, stats, attrs, log_z=_log_z(run, target), tempering=ladder)


def _log_z(run: Run, target: Target) -> dict[str, np.ndarray] | None:
    """What a run says of all energies, under the names of `LogZ.runs`: of the whole, where the prior has its own."""
    if target.spec.unknown_constant or target.spec.ignored:
        return None
    value, std_error = estimate(Rungs(run.beta, np.moveaxis(run.last.energy, 2, 0)))
    phases = [phase for phase, _ in target.phases()]
    name = "whole" if len(phases) > 1 else "prior" if phases == ["prior"] else "data"
    found = {f"{name}_value": value, f"{name}_std_error": std_error}
    found |= {"num_evaluations": run.num_evaluations, "num_nan": run.num_nan}
    return {name: np.array([number], float) for name, number in found.items()}


def _run(key: PRNGKey, target: Tilted, method: ParallelTempering, progress_bar: bool = False) -> Run:
    return rounds.run(
        key,
        target,
        method.kernel,
        num_replicas=method.num_replicas,
        num_rungs=method.num_rungs,
        num_rounds=method.num_rounds,
        num_draws=method.num_draws,
        progress_bar=progress_bar,
    )


def _passage(run: Run) -> Passage:
    last = run.last
    rejection = np.mean(rejections(run.beta, last.energy), axis=(0, 1))
    trips = round_trips(last.ends)
    values = *np.moveaxis(last.energy[..., 1:], 2, 0), *np.moveaxis(last.z[:, :, -1], 2, 0)
    return Passage(
        barrier=float(np.sum(rejection)),
        rejection=rejection.tolist(),
        round_trips=trips.tolist(),
        round_trip_rate=float(np.sum(trips) / last.ends[..., 0].size),
        best_round_trip_rate=float(1 / (2 + 2 * np.sum(rejection))),
        largest_rhat=max(map(disagreement, values)),
        least_acceptance=float(np.min(np.mean(last.accepted, axis=(0, 1)))),
    )


def _doubts(passage: Passage, method: ParallelTempering) -> list[str]:
    doubts = []
    if not passage.largest_rhat <= LARGEST_RHAT:
        doubts.append(
            f"The replicas disagree (R-hat {passage.largest_rhat:.2f} of the energies of a rung or a coordinate of the "
            "last): log Z and the draws may be off by more than the stated error. More num_draws or a reparametrised "
            "model help."
        )
    if np.mean(passage.round_trips) < FEWEST_TRIPS:
        doubts.append(
            f"All {method.num_replicas} replicas together made {sum(passage.round_trips)} round trips between the "
            "reference and the posterior: what separate modes are worth has hardly come through. More num_draws help, "
            "and a reference nearer to the posterior."
        )
    if not max(passage.rejection[1:], default=0.0) <= HIGH_REJECTION:
        doubts.append(
            f"Swaps between neighbouring rungs are rejected at a rate of {max(passage.rejection[1:]):.0%}: the rungs "
            "are too far apart. More num_rungs help, or num_rungs=None."
        )
    if not passage.least_acceptance >= LOW_ACCEPTANCE:
        doubts.append(
            f"The chains of a rung accept {passage.least_acceptance:.0%} of their moves: they hardly move. More "
            "num_draws, which tune them longer, or a reparametrised model help."
        )
    return doubts
