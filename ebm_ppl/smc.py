"""Tempered sequential Monte Carlo: from the reference through the prior energies to the data.

    stage t            pi_t(z)  proportional to  pi_0(z) exp(-U_prior(z) [phase 1 done] - beta_t U(z))
    weights            w_t^i = exp( -(beta_t - beta_{t-1}) U(z^i) )
    log Z increment    log (1/N) sum_i w_t^i
    log Z              sum of the increments, kept apart by phase: "prior", then "data"
    evidence           the "data" part: log Z(prior and data) - log Z(prior)
    one phase          where every prior energy is normalised, log Z(prior) = 0, and both are tempered together

Each stage weighs, resamples, and moves the particles (`moves.py`) by a kernel that leaves pi_t invariant. The metric
is learned from the cloud, **crosswise**: each half of the particles moves by the covariance of the other half. A metric
of the very particles that it moves would favour the directions in which they happen to spread, and biases log Z (by
-.012 a stage for 1000 particles of a Gaussian in 32 dimensions).

Everything is written for one run; `parallel.py` takes it over independent runs, `sharding.Layout` a function of one
particle over all, in chunks and on a mesh where wanted.

The standard error comes from the genealogy, as Lee and Whiteley's (2018). What descends from the k-th initial particle
is a family. At each stage its weight differs from its number, and these differences add up to its influence on log Z,

    psi_k = sum_t sum_{i in family k} ( w_t^i / sum_j w_t^j - 1/N )
    variance of log Z = sum_k psi_k^2 / ( 1 - sum_k S_k^2 )                 S_k: weight of family k now

Resampling changes the numbers and leaves psi as it is, so that its own noise counts only as far as the particles still
remember it when they are weighed the next time. The divisor makes up for deviations being from the mean of the same
families: with the last but one of them the error grows beyond all bounds, since nothing is known of it. A run that lost
most of a mode states a small error, too: see "Limits" in README.md.

Every stage resamples, so that the conditional ESS of Zhou, Johansen and Aston (2016) is the ESS. At equal evaluations
neither weights carried over stages, nor waste-free SMC (Dau and Chopin 2022), nor persistent sampling (Karamanis and
Seljak 2025) was better throughout: benchmarks/README.md has the numbers.

That error bar assumes that the moves mix. Where the particles follow pi_t, its invariant moves leave every mean as it
is, up to noise; where they lag behind, stage after stage carries a mean the same way. The drift is that sum,

    D_j = sum_t ( mean_i z_t^ij - sum_i w_t^i z_{t-1}^ij ) / sd_t^j        its noise: sum_t ( 1/ESS_t + 1/N )

and a run whose largest D_j is beyond `UNSETTLED` of its noise ends in a warning. (Of 210 runs on 21 targets with known
log Z none came to 2.1; of 10 on a funnel in a box, whose log Z came out 1.7 too low, 9 were beyond 4.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc.ess import log_ess
from blackjax.smc.resampling import systematic
from blackjax.smc.solver import dichotomy
from jax.scipy.special import logsumexp

from ebm_ppl import parallel, sharding
from ebm_ppl.kernels import HMC, MALA, MCLMC
from ebm_ppl.moves import move
from ebm_ppl.scale import DenseScale
from ebm_ppl.sharding import Layout, Mesh
from ebm_ppl.stages import SMALLEST_STEP, StageInfo, as_path, check, check_start, final_values, phase_estimates
from ebm_ppl.target import Phase, Tilted
from ebm_ppl.typing import Array, Draws, EnergyError, PRNGKey

UNSETTLED = 4.0


@dataclasses.dataclass(frozen=True)
class SMC:
    """Adaptive tempered sequential Monte Carlo with gradient moves tuned from the particles.

    Args:
        num_particles: particles in each independent run, an even number.
        target_ess: each stage takes the largest temperature step that keeps this share of effective particles.
        kernel: what moves the particles; only kernels that leave their target invariant.
        num_moves: moves of each particle in a round. A stage makes rounds until the particles have decorrelated from
            where they were, or a round no longer helps, at most 20.
        max_stages: bound on the number of stages of a phase.
        chunk_size: particles that are evaluated at a time, where all of them at once would not fit into memory; it
            changes results by rounding only.

    References:
        Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo samplers; Buchholz, Chopin and Jacob (2021),
        Adaptive tuning of Hamiltonian Monte Carlo within sequential Monte Carlo; Lee and Whiteley (2018), Variance
        estimation in the particle filter.
    """

    num_particles: int = 1000
    target_ess: float = 0.6
    kernel: HMC | MALA | MCLMC = dataclasses.field(default_factory=lambda: HMC(max_leapfrogs=64))
    num_moves: int = 5
    max_stages: int = 500
    chunk_size: int | None = None
    name = "SMC"

    def __post_init__(self):
        if self.num_particles < 4 or self.num_particles % 2:
            raise EnergyError(f"num_particles is an even number of at least 4; got {self.num_particles}.")
        if not 0 < self.target_ess < 1:
            raise EnergyError(f"target_ess is a share between 0 and 1, exclusive; got {self.target_ess}.")
        if self.chunk_size is not None and self.chunk_size < 2:
            raise EnergyError(f"chunk_size is a number of particles, at least 2; got {self.chunk_size}.")
        if isinstance(self.kernel, MCLMC) and not self.kernel.adjusted:
            raise EnergyError(
                "Unadjusted MCLMC does not leave its target invariant, so it may not sit inside SMC: use adjusted=True."
            )


class Cloud(NamedTuple):
    """The particles of one run, equally weighted, and what has been learned so far."""

    z: Array
    """(N, dim)"""
    base: Array
    """Log density that is not tempered in this phase, (N,)."""
    energy: Array
    """Energy that is tempered in this phase, (N,)."""
    eve: Array
    """Index of the initial particle from which each descends, (N,)."""
    beta: Array
    step_size: Array
    log_z: Array
    influence: Array
    """Of the family of each initial particle on log Z of this phase, (N,)."""
    weighted: Array
    """Particles of the last stage before resampling, (N, dim), and their normalised log weights, (N,)."""
    log_weight: Array
    variance: Array
    """Relative variance of this phase's part of Z, once it is done."""
    drift: Array
    """How far the moves of all stages have carried each coordinate's mean, in standard deviations, (dim,)."""
    drift_noise: Array
    """Variance of it for particles that follow their targets."""


def run(
    key: PRNGKey,
    target: Tilted,
    sampler: SMC,
    *,
    num_runs: int = 1,
    progress_bar: bool = True,
    mesh: Mesh | None = None,
    visit: Callable[[list[Cloud]], None] = lambda clouds: None,
    next_phase: Callable[[list[Cloud]], tuple[Phase, Tilted] | None] | None = None,
) -> Draws:
    """Independent runs of SMC; `log_z` of the result holds value and standard error of each phase and run.

    After each stage `visit` is called with the clouds at its temperature. The phases are those of the target, unless
    `next_phase` makes them, from the clouds at the end of the one before, until it returns None; of several with the
    same name `log_z` has the last. With a mesh, its devices share the particles of each run, and the runs take turns.

    Raises:
        NoReferenceError, IntractablePartitionError: where log Z has no meaning for the model.
        DegenerateParticlesError, NonFiniteEnergyError, TemperingStalledError: naming the stage.
    """
    target.require_tractable()
    target.require_reference()
    layout, keys, target = laid_out(key, target, sampler, num_runs, mesh)
    clouds = parallel.over(_initial, keys, target, sampler, layout)
    log_z, infos = {}, []
    known = iter(target.phases())
    while coming := next_phase(clouds) if next_phase else next(known, None):
        phase, tempered = coming
        clouds = parallel.over(_enter, clouds, tempered, phase, layout)
        check_start(np.concatenate([cloud.energy for cloud in clouds]), phase)
        first = len(infos)
        clouds, passed = _run_phase(keys, tempered, sampler, layout, phase, clouds, first, progress_bar, visit)
        log_z |= phase_estimates(phase, passed, num_runs, clouds[0].z.dtype)
        infos += passed
    final = [sharding.gathered((cloud.z, cloud.weighted, cloud.log_weight)) for cloud in clouds]
    final = jax.tree.map(lambda *parts: np.concatenate(parts), *final)
    z, weighted, log_weight = final
    path = as_path(infos, num_runs)
    path["role"] = np.array([phase != "prior" for phase, _ in infos], dtype=np.int8)
    attrs = {
        "inference_library": "ebm_ppl",
        "sampler": sampler.name,
        "sampler_settings": repr(sampler),
        "adjusted": 1,
        "num_nan_energy": int(np.nansum(path["num_nan"])),
        "num_evaluations": float(np.nansum(path["num_evaluations"])),
        "largest_drift": float(np.max(final_values(path["drift"]), initial=0.0)),
        "largest_mean_energy": float(np.max(np.abs(final_values(path["mean_energy"])), initial=0.0)),
    }
    particles = {"z": weighted, "log_weight": log_weight}
    return Draws(z, {}, attrs, particles=particles, stages=path, log_z=log_z)


def laid_out(
    key: PRNGKey, target: Tilted, sampler: SMC, num_runs: int, mesh: Mesh | None
) -> tuple[Layout, list[Array], Tilted]:
    """How the particles lie on a mesh, the keys of the runs in parts, and the target where the particles are."""
    layout = Layout(sharding.flat(mesh), sampler.chunk_size)
    sharding.require_equal_shares(sampler.num_particles // 2, layout.mesh, "particles in each half of the cloud")
    keys = parallel.split(jax.random.split(key, num_runs), most=num_runs)
    return layout, *sharding.everywhere((keys, target), layout.mesh)


def lagging(drift: float) -> tuple[str, ...]:
    """The doubt about particles that lag behind their targets, by the largest drift, where they do."""
    if not drift > UNSETTLED:
        return ()
    return (
        f"The moves of SMC carried a coordinate's mean by {drift:.1f} standard errors along the path, where 0 is "
        "expected: the particles lag behind their targets, and log Z and the posterior may be off by far more than "
        "the stated error. More moves (num_moves), a larger target_ess or a reparametrised model help; more "
        "particles alone do not. smc['drift'] has the path.",
    )


def _initial(key: PRNGKey, target: Tilted, sampler: SMC, layout: Layout) -> Cloud:
    num = sampler.num_particles
    z = layout.over(target.sample_reference)(jax.random.split(jax.random.fold_in(key, 0), num))
    zero, zeros = jnp.zeros((), z.dtype), jnp.zeros(num, z.dtype)
    step_size, drift = zero + target.dim**-0.25, jnp.zeros(target.dim, z.dtype)
    eve, log_weight = jnp.arange(num), zeros - jnp.log(num)
    return _lying(Cloud(z, zeros, zeros, eve, zero, step_size, zero, zeros, z, log_weight, zero, drift, zero), layout)


def _lying(cloud: Cloud, layout: Layout) -> Cloud:
    """Vectors for each particle over the devices, and whatever is a number everywhere."""
    z, weighted = layout.spread((cloud.z, cloud.weighted))
    numbers = layout.everywhere(cloud._replace(z=None, weighted=None))
    return numbers._replace(z=z, weighted=weighted)


def _enter(cloud: Cloud, target: Tilted, phase: str, layout: Layout) -> Cloud:
    """The same particles at the start of another phase."""
    base, energy = layout.over(lambda z: _split(target, phase, z))(cloud.z)
    zero, zeros = jnp.zeros_like(cloud.log_z), jnp.zeros_like(cloud.influence)
    cloud = cloud._replace(base=base, energy=energy, beta=zero, log_z=zero, influence=zeros, variance=zero)
    return _lying(cloud, layout)


def _split(target: Tilted, phase: str, z: Array) -> tuple[Array, Array]:
    """Log density that stays, and energy that is tempered."""
    log_reference, (prior, data) = target.staged_terms(z)
    if phase == "joint":
        return log_reference, prior + data
    return (log_reference, prior) if phase == "prior" else (log_reference - prior, data)


def _run_phase(
    keys: list[Array],
    target: Tilted,
    sampler: SMC,
    layout: Layout,
    phase: str,
    clouds: list[Cloud],
    first: int,
    progress_bar: bool,
    visit: Callable[[list[Cloud]], None],
) -> tuple[list[Cloud], list[tuple[str, StageInfo]]]:
    """All runs to the end of a phase; a run that is there leaves the rest of its record NaN."""
    from tqdm.auto import tqdm

    infos: list[tuple[str, StageInfo]] = []
    with tqdm(total=1.0, desc=f"SMC {phase}", disable=not progress_bar, bar_format=_BAR) as bar:
        while under_way := [i for i, cloud in enumerate(clouds) if np.any(np.asarray(cloud.beta) < 1.0)]:
            stage = np.array(first + len(infos) + 1)
            members = [(keys[i], clouds[i]) for i in under_way]
            results = parallel.over(_stage, members, target, sampler, layout, phase, stage, in_place=True)
            parts: list[Any] = [[np.full(len(cloud.beta), np.nan)] * len(StageInfo._fields) for cloud in clouds]
            for i, ((keys[i], clouds[i]), info) in zip(under_way, results, strict=True):
                parts[i] = jax.device_get(info)
            info: Any = StageInfo(*map(np.concatenate, zip(*parts, strict=True)))  # pyright: ignore
            check(info, phase, len(infos) + 1, sampler.num_particles, sampler.max_stages)
            infos.append((phase, info))
            visit(clouds)
            bar.n = round(float(min(np.min(cloud.beta) for cloud in clouds)), 4)
            bar.set_postfix_str(f"stage {len(infos)}, accepted {np.nanmean(info.accept_rate):.2f}")
    return clouds, infos


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"


def _stage(
    member: tuple[PRNGKey, Cloud], target: Tilted, sampler: SMC, layout: Layout, phase: str, stage: Array
) -> tuple[tuple[PRNGKey, Cloud], StageInfo]:
    """One stage of a run, or none if it is done: some of its part may be."""
    key, cloud = member
    after, info = _one_stage(jax.random.fold_in(key, stage), target, sampler, layout, phase, cloud)
    done = cloud.beta >= 1.0
    kept = jax.tree.map(lambda new, old: jnp.where(done, old, new), after, cloud)
    info = jax.tree.map(lambda x: jnp.where(done, jnp.nan, x), info)
    return (key, _lying(kept, layout)), layout.everywhere(info)


def _one_stage(
    key: PRNGKey, target: Tilted, sampler: SMC, layout: Layout, phase: str, cloud: Cloud
) -> tuple[Cloud, StageInfo]:
    """Weigh, resample, move: from the temperature of the cloud to the next one."""
    num = sampler.num_particles
    key_resample, key_move = jax.random.split(key)
    nan = jnp.isnan(cloud.energy) | ~jnp.isfinite(cloud.base)
    energy = jnp.where(nan, jnp.inf, cloud.energy)

    step = _temperature_step(energy, cloud.beta, sampler.target_ess)
    beta = jnp.where(cloud.beta + step >= 1.0 - SMALLEST_STEP, 1.0, cloud.beta + step)
    step = beta - cloud.beta
    log_w = -step * energy
    increment = logsumexp(log_w) - jnp.log(num)
    log_w = log_w - logsumexp(log_w)
    weights = jnp.exp(log_w)

    influence = cloud.influence.at[cloud.eve].add(weights - 1 / num)
    share = jnp.zeros(num, weights.dtype).at[cloud.eve].add(weights)
    variance = jnp.sum(influence**2) / jnp.maximum(1 - jnp.sum(share**2), jnp.finfo(weights.dtype).tiny)
    ancestors = systematic(key_resample, weights, num)
    ess = jnp.exp(log_ess(log_w))

    def log_density(z: Array) -> Array:
        base, energy = _split(target, phase, z)
        return base - beta * energy

    start = layout.spread(layout.everywhere(cloud.z)[ancestors].reshape(2, num // 2, -1), axis=1)
    # Not by vmap: with a batch of matrices the runs would have to go one at a time (`xla.may_run_beside_itself`).
    halves = [DenseScale.of_cloud(half, ess / 2) for half in start[::-1]]
    scales = jax.tree.map(lambda *of_halves: jnp.stack(of_halves), *halves)
    moved = move(key_move, start, log_density, sampler.kernel, sampler.num_moves, cloud.step_size, scales, layout)
    z = layout.spread(moved.states.position.reshape(num, -1))
    base, new_energy = layout.over(lambda z: _split(target, phase, z))(z)
    log_z = cloud.log_z + increment
    carried = jnp.mean(z, axis=0) - weights @ cloud.z
    rounding = jnp.finfo(z.dtype).eps * jnp.max(jnp.abs(z), axis=0) * num + jnp.finfo(z.dtype).tiny
    drift = cloud.drift + carried / jnp.maximum(jnp.std(z, axis=0), rounding)
    drift_noise = cloud.drift_noise + 1 / ess + 1 / num
    after = Cloud(
        z=z,
        base=base,
        energy=new_energy,
        eve=cloud.eve[ancestors],
        beta=beta,
        step_size=moved.step_size,
        log_z=log_z,
        influence=influence,
        weighted=cloud.z,
        log_weight=log_w,
        variance=variance,
        drift=drift,
        drift_noise=drift_noise,
    )
    info = StageInfo(
        beta=beta,
        ess=ess,
        accept_rate=moved.accepted,
        num_moves=moved.moves,
        correlation=moved.correlation,
        log_z_increment=increment,
        log_z=log_z,
        log_z_std_error=jnp.sqrt(variance),
        mean_energy=jnp.sum(jnp.where(weights > 0, weights * cloud.energy, 0.0)),
        drift=jnp.max(jnp.abs(drift)) / jnp.sqrt(drift_noise),
        step_size=moved.step_size,
        temperature_step=step,
        num_evaluations=num * (moved.leapfrogs + 2.0),
        num_nan=moved.num_nan + jnp.sum(nan),
        num_zero=jnp.sum(energy == jnp.inf),
        num_infinite=jnp.sum(cloud.energy == -jnp.inf),
    )
    return after, jax.tree.map(lambda x: jnp.asarray(x, z.dtype), info)


def _temperature_step(energy: Array, beta: Array, target_ess: float) -> Array:
    """The largest step that keeps the wanted share of effective particles among those with non-zero mass."""
    alive = jnp.isfinite(energy)
    wanted = jnp.log(target_ess * jnp.sum(alive))
    safe = jnp.where(alive, energy, 0.0)

    def surplus(step: Array) -> Array:
        return log_ess(jnp.where(alive, -step * safe, -jnp.inf)) - wanted

    return dichotomy(surplus, jnp.zeros_like(beta), 1.0 - beta, eps=1e-6)
