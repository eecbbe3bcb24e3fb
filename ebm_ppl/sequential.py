"""The evidence along the observations: particles that take in the data one block after another.

    blocks           y_1, ..., y_T, in the order of `times`
    targets          pi_t(z)  proportional to  pi_0(z) exp(-U_prior(z)) p(y_1:t | z)
    weights          w_t^i = p(y_s+1:t | z^i, y_1:s)         particles at pi_s, s < t
    log evidence     log p(y_1:t) = log p(y_1:s) + log (1/N) sum_i w_t^i
    elpd             log p(y_t | y_1:t-1)                    its increments, which add up to log p(y_1:T)

This is iterated batch importance sampling: the particles go as far as leaves them effective (`target_ess`), past many
blocks where these say little, and only then are resampled and moved. They may stop within a block, whose likelihood is
then in to a power: so the particles are tempered into an observation that alone says too much.

The engine is `smc.run`: each way from one stop to the next is a phase of one stage. Where the next stop is depends on
the particles, so the phases are made while the run goes on (`_Walk`). Independent runs share their stops: these are as
near as the neediest run asks for, which costs a few stages and keeps the runs independent but for that.

Standard errors come from the genealogy, as in `weighing.py`. With psi_t^k the influence on log Z of the family of the
k-th particle of the (tilted) prior up to block t, and S_t^k its weight there,

    var log p(y_1:t)        about  sum_k (psi_t^k)^2 / (1 - sum_k (S_t^k)^2)
    var log p(y_s+1:t)      about  sum_k (psi_t^k - psi_s^k)^2 / (1 - sum_k (S_t^k)^2)
                            =  sum_ab G_ab / (1 - sum_k (S_t^k)^2)   a, b in s+1..t; G_ab = sum_k dpsi_a^k dpsi_b^k

References:
    Chopin (2002), A sequential particle filter method for static models.
    Lee and Whiteley (2018), Variance estimation in the particle filter.
    Buerkner, Gabry and Vehtari (2020), Approximate leave-future-out cross-validation for Bayesian time series models.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from ebm_ppl import parallel
from ebm_ppl.arviz import Coords, Dims, to_datatree
from ebm_ppl.blocks import Arriving, Position, at, axes_of, blocks, energies_of_observations
from ebm_ppl.cloud import Cloud
from ebm_ppl.evidence import read_log_z, weigh
from ebm_ppl.probe import check_tails
from ebm_ppl.sharding import Layout
from ebm_ppl.smc import SMC
from ebm_ppl.stages import SMALLEST_STEP
from ebm_ppl.target import Phase, Target
from ebm_ppl.typing import (
    ArrayLike,
    EnergyError,
    LogZ,
    PRNGKey,
    TemperingStalledError,
    as_key,
    error_of_mean,
    log_mean,
    log_sum,
)

if TYPE_CHECKING:
    import xarray as xr

MOST_TIMES = 1000
"""Whose covariances are stored, for each pair."""


def sequential_evidence(
    key: PRNGKey,
    target: Target,
    sampler: SMC | None = None,
    *,
    times: ArrayLike | None = None,
    plate: str | None = None,
    num_runs: int = 1,
    progress_bar: bool = False,
    coords: Coords | None = None,
    dims: Dims | None = None,
) -> xr.DataTree:
    """The log evidence along the observations, `log p(y_1:t)`, and its increments, in nats, with standard errors.

    The increments `elpd[t] = log p(y_t | y_1:t-1)` are the leave-future-out log predictive densities. Their sum is the
    log evidence: that of all data is what `log_z(key, target, SMC())` estimates by another path.

    The blocks are taken out of the one joint density, so that latent sites of any kind may stay in the model, those of
    a single observation included. If an observation's density depends on other observed values (an autoregression),
    `times` must follow them.

    Args:
        key: from `jax.random.key`.
        target: from `ebm_ppl.target`.
        sampler: settings of `SMC`. `target_ess` says after how many blocks the particles move.
        times: when each observation comes in, shape (n,): in ascending order, those with equal times together.
            Default: one by one, in the order of the plate.
        plate: the plate whose n members are the observations. Needed only where the data lie in several. Losses count
            as data. What lies outside of the plate (a loss of all parameters, say) comes in before everything else:
            its log evidence is the attribute `before`, and the increments are given it.
        num_runs: independent runs, averaged on the scale of Z, with errors as in `log_z`.
        progress_bar: show progress, in a terminal or a notebook.
        coords, dims: as in ArviZ.

    Returns:
        A DataTree as that of `sample(key, target, SMC())`, which `read_log_z` reads, too, with one more group,
        `sequential`: `log_evidence`, `log_evidence_se`, `elpd`, `elpd_se` and `num_observations` by `time`, and
        those of each run, with the prefix `run_`, by `chain` and `time`. Errors of different times are not independent:
        `evidence_between` has those of sums.

    Raises:
        EnergyError: for discrete latent sites, whose observations have no terms of their own; without data; and where
            `times` or `plate` do not fit the data.
        NoReferenceError, IntractablePartitionError, DegenerateParticlesError: as `log_z`, with the time.

    References:
        Chopin (2002), A sequential particle filter method for static models; Buerkner, Gabry and Vehtari (2020),
        Approximate leave-future-out cross-validation for Bayesian time series models.
    """
    import xarray as xr
    from tqdm.auto import tqdm

    key, sampler = as_key(key), SMC() if sampler is None else sampler
    target.require_tractable()
    target.require_reference()
    target.require_known_constant()
    check_tails(target, needs_normalisation=True)
    axes, num = axes_of(target, plate)
    outside = [name for name, axis in axes if axis is None]
    times, block = blocks(times, num, bool(outside))
    nothing = at(0, 0.0)
    with tqdm(total=int(np.max(block)) + 1, desc="SMC observations", disable=not progress_bar) as bar:
        walk = _Walk(Arriving(target, block, nothing, nothing, axes), sampler, bar)
        try:
            draws = weigh(key, target, sampler, num_runs, False, next_phase=walk.next_phase)
        except EnergyError as error:
            if not walk.accounts:
                raise
            named = ["outside of the plate", *times] if outside else times
            where = named[min(int(walk.target.start.block), len(named) - 1)]
            raise type(error)(f"While the observations from time {where} on came in: {error}") from error
    runs, between = _by_run(walk.accounts, draws.z.dtype), _between(walk.accounts, len(times))
    whole = {"data_value": runs["log_evidence"][:, -1], "data_std_error": runs["log_evidence_se"][:, -1]}
    own = (draws.log_z or {})["num_evaluations"] + walk.num_evaluations / num_runs
    whole["num_evaluations"] = own
    attrs = draws.attrs | {"num_evaluations": float(np.sum(own))}
    draws = dataclasses.replace(draws, log_z=(draws.log_z or {}) | whole, attrs=attrs)
    tree = to_datatree(target, draws, coords=coords, dims=dims)
    group = _as_group(runs, times, block, outside).assign(between).assign_coords(also_time=times)
    group.attrs["resolution"] = float(np.finfo(draws.z.dtype).eps)
    tree["sequential"] = xr.DataTree(group)
    return tree


def evidence_between(data: xr.DataTree, start: Any = None, stop: Any = None) -> LogZ:
    """The log evidence of the observations from one time to another, given those before, in nats.

        log p(y_start:stop | y_before start)

    Args:
        data: what `sequential_evidence` returned.
        start, stop: the first and the last time of the range, both included; the first and the last of all where None.

    Raises:
        EnergyError: where the result is of another kind, has more than 1000 times, or none in the range.

    Reference:
        Lee and Whiteley (2018), Variance estimation in the particle filter.

    Example:
        >>> ebm_ppl.evidence_between(data, 1990, 1999)
    """
    if "sequential" not in data.children:
        raise EnergyError("This result has no group 'sequential': the range is of what sequential_evidence returns.")
    group = data["sequential"].to_dataset()
    if "run_products" not in group:
        raise EnergyError(f"There are more than {MOST_TIMES} times, so that their covariances have not been stored.")
    inside = group.sel(time=slice(start, stop), also_time=slice(start, stop))
    if not inside.sizes["time"]:
        raise EnergyError(f"There is no observation from time {start} to {stop}.")
    values = inside["run_elpd"].values.sum(axis=1)
    variances = inside["run_products"].values.sum(axis=(1, 2)) / inside["run_known"].values[:, -1]
    rounding = group.attrs["resolution"] * np.abs(inside["run_log_evidence"].values[:, -1])
    first, last = inside["time"].values[[0, -1]]
    return LogZ(
        value=float(inside["elpd"].sum()),
        std_error=error_of_mean(values, np.hypot(np.sqrt(variances), rounding)),
        method=str(data.attrs["sampler"]),
        replicates=values,
        data_id=f"{data.attrs.get('data_id')} from {first} to {last}",
        doubts=read_log_z(data).doubts,
    )


# The walk


class _Account:
    """What one run says of log p(y_1:t) after each block, and its errors from the genealogy."""

    def __init__(self, num: int):
        self.log_z = 0.0
        """Of the data that are in."""
        self.influence = self.influence_at_block = np.zeros(num)
        """Of the family of each initial particle on log Z, (N,): so far, and up to the last block: `weighing.py`."""
        self.value: list[float] = []
        self.variance: list[float] = []
        self.elpd_variance: list[float] = []
        self.known: list[float] = []
        """1 - sum_k (S_t^k)^2"""
        self.changes: list[np.ndarray] = []
        """Of the influence by each block, (N,)."""

    def pass_by(self, log_weights: np.ndarray, eve: np.ndarray) -> None:
        """Takes in blocks that the particles have been weighed for.

        Args:
            log_weights: of the particles for all that is not in yet, up to each block, (block, N).
            eve: initial particle from which each of them descends, (N,).
        """
        num = len(eve)
        for log_weight in log_weights:
            total = log_sum(log_weight)
            weights = np.exp(log_weight - total)
            influence = self.influence + np.bincount(eve, weights - 1 / num, num)
            known = max(1 - np.sum(np.bincount(eve, weights, num) ** 2), np.finfo(float).tiny)
            self.value.append(self.log_z + total - math.log(num))
            self.variance.append(np.sum(influence**2) / known)
            change = influence - self.influence_at_block
            self.elpd_variance.append(np.sum(change**2) / known)
            self.known.append(float(known))
            self.changes.append(change)
            self.influence_at_block = influence

    def move(self, cloud: Cloud) -> None:
        """The particles have been resampled and moved."""
        self.log_z += float(cloud.log_z)
        self.influence = self.influence + np.asarray(cloud.influence, float)


class _Walk:
    """Where the particles are to go next, and what has been found on the way."""

    def __init__(self, target: Arriving, sampler: SMC, bar: Any):
        self.target, self.sampler, self.bar = target, sampler, bar
        self.num_blocks = int(np.max(target.block)) + 1
        self.prior = iter([target.target.prior()] if "prior" in target.target.roles().values() else [])
        self.accounts: list[_Account] = []
        self.weighed: list[tuple[np.ndarray, np.ndarray]] = []
        """Of each run, what `_Account.pass_by` is to hear of when the particles have moved."""
        self.num_evaluations, self.num_stages = 0.0, 0

    def next_phase(self, clouds: list[Cloud]) -> tuple[Phase, Any] | None:
        """The prior energies, then the data from one position to the next, a stage each; None at the end."""
        if prior := next(self.prior, None):
            return "prior", prior
        runs, start = _of_runs(clouds), self.target.stop
        for account, weighed, run in zip(self.accounts, self.weighed, runs, strict=False):
            account.pass_by(*weighed)
            account.move(run)
        self.accounts = self.accounts or [_Account(len(run.eve)) for run in runs]
        if start.block == self.num_blocks:
            return None
        energies = self._energies(clouds, start)
        passed, stop = _reach(energies, start, self.sampler.target_ess)
        self.weighed = [
            (-each, np.asarray(run.eve))
            for each, run in zip(np.cumsum(energies[:, :passed], axis=1), runs, strict=True)
        ]
        self.target = dataclasses.replace(self.target, start=start, stop=stop)
        self.num_stages = 0 if passed else self.num_stages + 1
        self.bar.update(passed)
        stalled = not passed and stop.part - start.part < SMALLEST_STEP
        if stalled or self.num_stages >= self.sampler.max_stages:
            raise TemperingStalledError(
                f"Tempering stalled at the power {start.part:.3e} of a block, after {self.num_stages} stages: its "
                "energies spread too far over the particles. Put fewer observations in a block, or use more particles."
            )
        return "data", self.target

    def _energies(self, clouds: list[Cloud], start: Position) -> np.ndarray:
        """What is left of each block for all particles, (run, block, N)."""
        layout = Layout(chunk_size=self.sampler.chunk_size)
        parts = parallel.over(energies_of_observations, [cloud.z for cloud in clouds], self.target, layout)
        self.num_evaluations += 2 * self.sampler.num_particles * len(self.accounts)  # here, and on entering the phase
        energies = np.concatenate(jax.device_get(parts)).astype(float).swapaxes(1, 2)
        energies[np.isnan(energies)] = np.inf
        order = np.argsort(self.target.block, kind="stable")
        firsts = np.searchsorted(np.asarray(self.target.block)[order], np.arange(start.block, self.num_blocks))
        energies = np.add.reduceat(energies[:, order], firsts, axis=1)
        energies[:, 0] *= 1 - start.part
        return energies


def _of_runs(clouds: list[Cloud]) -> list[Cloud]:
    """The cloud of each run, from those of the parts, which have a leading axis."""
    return [jax.tree.map(lambda x, i=i: np.asarray(x)[i], cloud) for cloud in clouds for i in range(len(cloud.beta))]


def _reach(energies: np.ndarray, start: Position, target_ess: float) -> tuple[int, Position]:
    """How many blocks all runs can pass with enough effective particles, and where they are to stop after that.

    Args:
        energies: what is left of each block, (run, block, N).
    """
    weighed = np.cumsum(energies, axis=1)
    enough = np.all(_effective(weighed) >= _enough(target_ess) * energies.shape[2], axis=0)
    passed = int(np.sum(np.cumprod(enough)))
    if passed == energies.shape[1]:
        return passed, at(int(start.block) + passed, 0.0)
    before = weighed[:, passed - 1] if passed else np.zeros_like(weighed[:, 0])
    share = _share(before, energies[:, passed], _enough(target_ess))
    if share == 1.0:
        return passed + 1, at(int(start.block) + passed + 1, 0.0)
    part = 0.0 if passed else float(start.part)
    return passed, at(int(start.block) + passed, part + share * (1 - part))


def _share(before: np.ndarray, energy: np.ndarray, enough: float) -> float:
    """The largest share of a block's energies that leaves all runs enough effective particles among those with mass."""
    alive = np.isfinite(before) & np.isfinite(energy)
    if not np.all(np.any(alive, axis=1)):
        return 1.0  # the engine has an error for it
    before, energy = np.where(alive, before, np.inf), np.where(alive, energy, 0.0)

    def surplus(share: float) -> float:
        return float(np.min(_effective(before + share * energy) / np.sum(alive, axis=1))) - enough

    if surplus(1.0) >= 0:
        return 1.0
    root: Any = brentq(surplus, 0.0, 1.0, xtol=1e-3 * SMALLEST_STEP) if surplus(0.0) > 0 else 0.0
    return float(root)


def _enough(target_ess: float) -> float:
    """A little more than what is wanted, so that no rounding makes two stages of a phase."""
    return target_ess + 1e-3 * (1 - target_ess)


def _effective(energy: np.ndarray) -> np.ndarray:
    """Effective particles of weights exp(-energy) along the last axis; 0 where none has mass."""
    whole: Any = logsumexp(-energy, axis=-1)
    squares: Any = logsumexp(-2 * energy, axis=-1)
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.exp(2 * whole - squares))


# The result


def _by_run(accounts: list[_Account], dtype: Any) -> dict[str, np.ndarray]:
    """Values and standard errors after each block, (run, block); what rounding of the energies adds is included."""
    value, variance, elpd_variance = (
        np.array([getattr(account, name) for account in accounts]) for name in ("value", "variance", "elpd_variance")
    )
    rounding = np.finfo(dtype).eps * np.abs(value)
    return {
        "log_evidence": value,
        "log_evidence_se": np.hypot(np.sqrt(variance), rounding),
        "elpd": np.diff(value, axis=1, prepend=0.0),
        "elpd_se": np.hypot(np.sqrt(elpd_variance), rounding),
    }


def _between(accounts: list[_Account], num_times: int) -> dict[str, Any]:
    """What the errors of sums over times are made of, by run."""
    if num_times > MOST_TIMES:
        return {}
    changes = np.array([account.changes[-num_times:] for account in accounts])
    return {
        "run_products": (("chain", "time", "also_time"), changes @ changes.swapaxes(1, 2)),
        "run_known": (("chain", "time"), np.array([account.known[-num_times:] for account in accounts])),
    }


def _as_group(runs: dict[str, np.ndarray], times: np.ndarray, block: np.ndarray, outside: list[str]) -> xr.Dataset:
    """The group `sequential`: averages of the runs on the scale of Z, and the runs."""
    import xarray as xr

    value = np.array([log_mean(each) for each in runs["log_evidence"].T])
    errors = {
        f"{name}_se": np.array([error_of_mean(*each) for each in zip(runs[name].T, runs[f"{name}_se"].T, strict=True)])
        for name in ("log_evidence", "elpd")
    }
    pooled = {"log_evidence": value, "elpd": np.diff(value, prepend=0.0), "num_observations": np.bincount(block)}
    pooled |= errors
    after = len(value) - len(times)  # the block of what lies outside of the plate has no time
    variables = {name: ("time", x[after:]) for name, x in pooled.items()}
    variables |= {f"run_{name}": (("chain", "time"), x[:, after:]) for name, x in runs.items()}
    group = xr.Dataset(variables, coords={"time": times, "chain": np.arange(len(runs["elpd"]))})
    if outside:
        group.attrs = {"before": value[0], "before_se": errors["log_evidence_se"][0], "outside": ", ".join(outside)}
    return group
