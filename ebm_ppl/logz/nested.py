"""log Z by nested sampling: the reference is peeled off, shell by shell, from high energies to low ones.

    X(u)     share of the reference with an energy below u            Z = int exp(-u) d(1 - X(u))
    live     num_live draws of the reference below a contour u        BlackJAX's log likelihood is -U
    step     the num_delete live points of highest energy die; as many are born below the last of them, by slice
             sampling from survivors (`blackjax.ns.nss`: hit and run along directions of the live covariance)
    end      the live points die where they are, once they hold no more than `remaining` nats of log Z, or their
             energies and places differ by rounding only

With n_i live points just before the i-th death, of energy U_i,

    Z = X_0 sum_i exp(-U_i) (1/n_i) prod_{j<i} (1 - 1/n_j)      unbiased (Walter 2017)
    X_i = X_{i-1} t_i,   t_i ~ Beta(n_i, 1)                     simulated: the error of log Z is the spread of
                                                                log sum_i exp(-U_i) (X_{i-1} - X_i)

Plateaus: a point counts as live at a death only if it was born **strictly** below that energy. Points that tie die one
by one from a dwindling crowd, which gives their plateau the right volume (Fowlie, Handley and Su 2021), and a constant
energy is integrated exactly. Points of zero mass (energy +inf or NaN) never live: draws are made until `num_live` have
mass, and the share of them is X_0, with an error of its own.

Nothing of this holds unless the points born are fresh draws from below their contour. Two looks at that:

    insertion ranks     of those born among the live: uniform for fresh draws (Fowlie, Handley and Su 2020)
    memory              their correlation with the ranks of the survivors that they started from: zero for fresh draws

References:
    Skilling (2006), Nested sampling for general Bayesian computation; Yallup, Kroupa and Handley (2026), Nested slice
    sampling; Higson, Handley, Hobson and Lasenby (2018), Sampling errors in nested sampling parameter estimation;
    Walter (2017), Point process-based Monte Carlo estimation; Fowlie, Handley and Su (2020), Nested sampling
    cross-checks using order statistics; Fowlie, Handley and Su (2021), Nested sampling with plateaus.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc import slice as slice_sampling
from blackjax.ns import adaptive, from_mcmc, nss
from blackjax.ns.adaptive import AdaptiveNSState
from blackjax.ns.base import StateWithLogLikelihood

from ebm_ppl import parallel
from ebm_ppl.logz.integral import Integral, check_energies, draws_of_reference, total_energy
from ebm_ppl.target import Tilted
from ebm_ppl.typing import (
    Array,
    DegenerateParticlesError,
    EnergyError,
    NonFiniteEnergyError,
    PRNGKey,
    log_sum,
    with_error,
)

SLICES_PER_DIM = 5
"""Slices of a newborn point in each coordinate, unless set."""
MOST_BATCHES = 1000
"""Of `num_live` draws of the reference each, in search of points with mass."""
COMPRESSIONS = 400
"""Simulated sequences of volumes: they know the standard error to 4 %."""
MOST_EXPANSIONS, MOST_SHRINKAGE = 10, 100
UNLIKELY = 1e-5
"""Probability of insertion ranks below which newborn points are called no fresh draws."""
LONG_MEMORY = 0.1
"""Correlation of newborn points with their start beyond which the error bar is too small."""
FEW = 20
"""Survivors above a plateau, below which their share is known too coarsely."""


@dataclasses.dataclass(frozen=True)
class NestedSampling:
    """log Z by nested slice sampling, without gradients: it needs only to compare energies.

    NaN energies are counted among the draws of the reference. Slices stop at them as at a wall, without counting.

    Args:
        num_live: live points; the standard error is about sqrt(H / num_live) for an information of H nats.
        num_delete: points that die and are born in a step, less than `num_live`.
        num_inner_steps: slices between a survivor and the point born from it. Without a number, five for each
            coordinate.
        remaining: evidence of the live points, in nats of log Z, at which the run ends; they are counted in. Where
            single precision cannot tell the live points apart it ends sooner, if their energies are as near.
        max_steps: bound on the number of steps, each of which peels off num_delete / num_live nats of volume.
    """

    num_live: int = 500
    num_delete: int = 50
    num_inner_steps: int | None = None
    remaining: float = 1e-3
    max_steps: int = 10_000
    name = "nested sampling"

    def __post_init__(self):
        if not 1 <= self.num_delete < self.num_live:
            raise EnergyError(
                f"num_delete is at least 1 and less than num_live, which is {self.num_live}; got {self.num_delete}."
            )
        if self.num_inner_steps is not None and self.num_inner_steps < 1:
            raise EnergyError(f"num_inner_steps is a positive number of slices; got {self.num_inner_steps}.")
        if not self.remaining > 0:
            raise EnergyError(f"remaining is a positive number of nats; got {self.remaining}.")
        if self.max_steps < 1:
            raise EnergyError(f"max_steps is a positive number of steps; got {self.max_steps}.")

    def integrate(self, key: PRNGKey, target: Tilted) -> Integral:
        """log Z of all energies of a target at once, from one run.

        Raises:
            DegenerateParticlesError: where too few draws of the reference have mass, or the live points are flat.
            NonFiniteEnergyError: for an energy of -inf (infinite density).
            EnergyError: for fewer live points than their covariance needs, and for a run that is not over after
                `max_steps`.
        """
        return self.explore(key, target)[0]

    def explore(self, key: PRNGKey, target: Tilted) -> tuple[Integral, np.ndarray, np.ndarray]:
        """As `integrate`, with all points, shape (point, dim), and their log weights, which are posterior draws."""
        if self.num_live <= 2 * target.dim:
            raise EnergyError(
                f"num_live must be over twice the number of coordinates, {target.dim}; got {self.num_live}."
            )
        key_draw, key_run, key_host = jax.random.split(key, 3)
        rng = np.random.default_rng(int(jax.random.bits(key_host)))
        drawn = _draw(key_draw, target, self)
        run = _peel(key_run, target, self, drawn, rng)
        value, information = run.integral()
        std_error = run.std_error(rng)
        story = (
            f"{self.num_live} live points from {drawn.num} draws of the reference, {len(run.steps)} steps of "
            f"{self.num_delete} deaths to the last {run.left:.2g} nats: information {information:.2f} nats, memory "
            f"{run.memory:.2f}, p of the insertion ranks {run.p_value:.2g}, log Z {with_error(value, std_error)}"
        )
        found = Integral(
            value=value,
            std_error=std_error,
            num_evaluations=drawn.num + sum(float(step.num_evaluations) for step in run.steps),
            num_nan=drawn.num_nan,
            story=(story,),
            doubts=tuple(_doubts(run)),
            diagnostics={
                "information": information,
                "num_steps": len(run.steps),
                "memory": run.memory,
                "insertion_p_value": run.p_value,
                "fewest_survivors": run.fewest_survivors,
            },
        )
        return found, run.z, run.log_weight


class Drawn(NamedTuple):
    """The first live points, and how many draws of the reference it took to find them."""

    z: np.ndarray
    num: int
    num_nan: int

    @property
    def num_zero(self) -> int:
        """Draws without mass."""
        return self.num - len(self.z)


def _draw(key: PRNGKey, target: Tilted, method: NestedSampling) -> Drawn:
    """Draws of the reference until `num_live` of them have mass."""
    wanted, points, energies = method.num_live, [], []
    while sum(map(len, points)) < wanted and len(energies) < MOST_BATCHES:
        z, energy = draws_of_reference(jax.random.fold_in(key, len(energies)), target, wanted)
        energies.append(energy)
        points.append(z[energy < np.inf])
    energy, z = np.concatenate(energies), np.concatenate(points)
    check_energies(energy, "draws of the reference")
    if len(z) < wanted:
        raise DegenerateParticlesError(
            f"Only {len(z)} of {len(energy)} draws of the reference have any mass, and nested sampling wants {wanted}: "
            "soften a hard constraint, or put it into the support of the latent sites."
        )
    energy = energy[: np.flatnonzero(energy < np.inf)[wanted - 1] + 1]
    return Drawn(z[:wanted], len(energy), int(np.sum(np.isnan(energy))))


class Step(NamedTuple):
    """What a step says of itself."""

    z: Array
    """Those that died, (num_delete, dim)."""
    death: Array
    """Their -U, (num_delete,)."""
    contour: Array
    """-U that those born had to exceed."""
    start: Array
    """-U of the survivors from which the slices start, (num_delete,)."""
    born: Array
    """-U of those born, (num_delete,)."""
    num_evaluations: Array


def _start(z: Array, target: Tilted) -> AdaptiveNSState:
    return adaptive.init(
        z,
        init_state_fn=jax.vmap(lambda z: _particle(target, z)),
        update_inner_kernel_params_fn=nss.live_covariance_factor,
    )


def _particle(target: Tilted, z: Array, loglikelihood_birth: Any = jnp.nan) -> StateWithLogLikelihood:
    log_reference, energy = total_energy(target, z)
    log_likelihood = jnp.where(jnp.isnan(energy), -jnp.inf, -energy)
    return StateWithLogLikelihood(z, log_reference, log_likelihood, loglikelihood_birth * jnp.ones_like(log_likelihood))


def _step(member: tuple[PRNGKey, AdaptiveNSState], target: Tilted, num_slices: int, num_delete: int) -> Any:
    """BlackJAX's nested slice sampling, whose slices also tell where they were."""

    def particle(z: Array, loglikelihood_birth: Any) -> StateWithLogLikelihood:
        return _particle(target, z, loglikelihood_birth)

    one_slice = nss.slice_constrained_step(
        particle,
        slice_sampling.build_kernel(slice_sampling.stepping_out, MOST_EXPANSIONS, MOST_SHRINKAGE),
        nss.covariance_proposal,
    )

    def told(key: PRNGKey, state: StateWithLogLikelihood, loglikelihood_0: Array, **params: Array) -> Any:
        after, info = one_slice(key, state, loglikelihood_0, **params)
        return after, (state.loglikelihood, after.loglikelihood, info)

    kernel = from_mcmc.build_kernel(told, num_slices, nss.live_covariance_factor, num_delete)
    state, info = kernel(*member)
    before, after, slices = info.update_info
    death = info.particles.loglikelihood
    # Both ends of a slice are looked at before it expands.
    num_evaluations = jnp.sum(2.0 + slices.num_expansions + slices.num_shrink)
    return state, Step(info.particles.position, death, jnp.max(death), before[:, 0], after[:, -1], num_evaluations)


class Run(NamedTuple):
    """The record of a run: all deaths, and how those born compare with those that were there."""

    drawn: Drawn
    live_z: np.ndarray
    live: np.ndarray
    """Live points at the end, and their -U, sorted by it."""
    steps: list[Step]
    ranks: np.ndarray
    """Among the live: of those born, uniform on (0, 1) for fresh draws, and of where they started from, (births, 2)."""
    fewest_survivors: float
    left: float
    """Evidence of the live points at the end, in nats of log Z."""

    @property
    def _order(self) -> np.ndarray:
        return np.argsort(np.concatenate([*(step.death for step in self.steps), self.live]), kind="stable")

    @property
    def deaths(self) -> np.ndarray:
        """-U of all points in the order of their deaths, to which the live ones of the end are added."""
        return np.concatenate([*(step.death for step in self.steps), self.live])[self._order]

    @property
    def z(self) -> np.ndarray:
        """The points in the same order, (point, dim)."""
        return np.concatenate([*(step.z for step in self.steps), self.live_z])[self._order]

    @property
    def num_live(self) -> np.ndarray:
        """Live points just before each death: those drawn, or born strictly below it, less those dead by then."""
        births = np.repeat([step.contour for step in self.steps], [len(step.death) for step in self.steps])
        return len(self.live) + np.searchsorted(births, self.deaths) - np.arange(len(self.deaths))

    @property
    def log_weight(self) -> np.ndarray:
        """Of the points: the log of their shell's share of the reference, less their energy."""
        log_shell = -np.log(self.num_live) + np.append(0.0, np.cumsum(np.log1p(-1.0 / self.num_live[:-1])))
        num, zero = self.drawn.num, self.drawn.num_zero
        log_shell += math.log((num - zero - 1) / (num - 1)) if zero else 0.0
        return log_shell + self.deaths

    def integral(self) -> tuple[float, float]:
        """log Z, from volumes that make Z unbiased, and the information of the posterior over the reference."""
        log_weight = self.log_weight
        value = log_sum(log_weight)
        return value, float(np.exp(log_weight - value) @ self.deaths) - value

    def std_error(self, rng: np.random.Generator) -> float:
        """Of log Z, from simulated volumes."""
        deaths, num_live, zero = self.deaths, self.num_live, self.drawn.num_zero
        values = np.empty(COMPRESSIONS)
        for i in range(COMPRESSIONS):
            log_shrink = -rng.standard_exponential(len(deaths)) / num_live
            log_shrink[-1] = -np.inf  # the last point has all that is left
            log_before = np.append(0.0, np.cumsum(log_shrink[:-1]))
            log_share = math.log(rng.beta(len(self.live), zero)) if zero else 0.0
            values[i] = log_share + log_sum(log_before + np.log(-np.expm1(log_shrink)) + deaths)
        return float(np.std(values, ddof=1))

    @property
    def p_value(self) -> float:
        """Of the insertion ranks, by Kolmogorov and Smirnov."""
        from scipy.stats import kstest  # which takes as long to import as the half of this package

        return float(kstest(self.ranks[:, 0], "uniform").pvalue) if len(self.ranks) else 1.0

    @property
    def memory(self) -> float:
        """Correlation of the insertion ranks with the ranks that they started from."""
        return float(np.corrcoef(self.ranks.T)[0, 1]) if len(self.ranks) else 0.0


def _peel(key: PRNGKey, target: Tilted, method: NestedSampling, drawn: Drawn, rng: np.random.Generator) -> Run:
    """Steps until the live points hold no more than `remaining` nats, or none would survive: they are a plateau."""
    num_slices = method.num_inner_steps or SLICES_PER_DIM * target.dim
    state = parallel.over(_start, [drawn.z[None]], target, hurry=True)[0]
    steps, ranks, fewest = [], [np.empty((0, 2))], math.inf
    while True:
        live = np.asarray(state.particles.loglikelihood[0], float)
        order = np.argsort(live, kind="stable")
        live, live_z = live[order], np.asarray(state.particles.position[0])[order]
        if live[-1] == np.inf:
            raise NonFiniteEnergyError(
                f"An energy is -inf (infinite density) after {len(steps)} steps: bound the energy from below."
            )
        dead, rest = float(state.integrator.logZ[0]), float(state.integrator.logZ_live[0])
        left = float(np.logaddexp(0.0, rest - dead))
        survivors = live[live > live[method.num_delete - 1]]
        if not len(survivors) or left <= method.remaining:
            return Run(drawn, live_z, live, steps, np.concatenate(ranks), fewest, left)
        if len(steps) >= method.max_steps:
            raise EnergyError(
                f"Nested sampling has not ended after max_steps = {method.max_steps} steps: the live points still hold "
                f"{left:.3g} nats of log Z, {np.logaddexp(dead, rest):.3f} so far. Raise max_steps, or bound the "
                "energy from below."
            )
        if not np.all(np.isfinite(state.inner_kernel_params["covariance_factor"])):
            if live[-1] - live[0] <= method.remaining:  # flat to rounding: what they hold is known
                return Run(drawn, live_z, live, steps, np.concatenate(ranks), fewest, left)
            raise DegenerateParticlesError(
                f"The covariance of the live points is singular after {len(steps)} steps: raise num_live or "
                "num_inner_steps, or use jax.config.update('jax_enable_x64', True)."
            )
        member = jax.random.fold_in(key, len(steps))[None], state
        state, step = parallel.over(_step, [member], target, num_slices, method.num_delete)[0]
        step = jax.tree.map(lambda x: np.asarray(x[0], float), step)
        steps.append(step)
        ranks.append(np.stack([_ranks(survivors, of, rng) for of in (step.born, step.start)], axis=1))
        fewest = min(fewest, len(survivors))


def _ranks(survivors: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rank of each point among the survivors and the points before it, ties in random order, made uniform on (0, 1)."""
    before = np.tri(len(points), k=-1, dtype=bool)
    below = np.searchsorted(survivors, points) + np.sum(before & (points < points[:, None]), axis=1)
    upto = np.searchsorted(survivors, points, side="right") + np.sum(before & (points <= points[:, None]), axis=1)
    places = len(survivors) + np.arange(len(points)) + 1
    return (below + rng.random(len(points)) * (upto - below + 1)) / places


def _doubts(run: Run) -> list[str]:
    doubts = []
    if run.memory > LONG_MEMORY:
        doubts.append(
            f"Points born in nested sampling remember where their slices started (their energies have a correlation "
            f"of {run.memory:.2f}, where 0 is expected): the error of log Z is larger than stated. More "
            "num_inner_steps or a reparametrised model help; more live points alone do not."
        )
    if run.p_value < UNLIKELY:
        doubts.append(
            f"The energies of points born in nested sampling do not rank among the live ones as fresh draws would (p = "
            f"{run.p_value:.1g}): log Z may be off by far more than the stated error. More num_inner_steps or a "
            "reparametrised model help."
        )
    if run.fewest_survivors < FEW:
        doubts.append(
            f"Only {run.fewest_survivors} live points were below a plateau of the energy, and all that were born next "
            "started from them: what lies below it may be known poorly. A larger num_live helps."
        )
    return doubts
