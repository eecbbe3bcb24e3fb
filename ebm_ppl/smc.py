"""Tempered sequential Monte Carlo: from the reference through the prior energies to the data.

    stage t            pi_t(z)  proportional to  pi_0(z) exp(-U_prior(z) [phase 1 done] - beta_t U(z))
    log Z              sum of the increments that the weights of each stage give (`weighing.py`),
                       kept apart by phase: "prior", then "data"
    evidence           the "data" part: log Z(prior and data) - log Z(prior)
    one phase          where every prior energy is normalised, log Z(prior) = 0, and both are tempered together

Each stage weighs, resamples, and moves the particles (`moves.py`) by a kernel that leaves pi_t invariant, in
coordinates that each half of the cloud learns from the other (`crosswise.py`).

Everything is written for one run; `parallel.py` takes it over independent runs, `sharding.Layout` a function of one
particle over all, in chunks and on a mesh where wanted.

The standard error comes from the families of particles that descend from the same initial one (`weighing.py`).

Particles can be used again, in two ways that go together, too:

    waste-free       N/P of the particles are resampled, each is the first state of a chain, and all P states count
    persistent       the particles of the last R stages are weighed together, and resampled from (`weighing.py`)

At equal evaluations neither is better throughout, nor are weights carried over stages: benchmarks/README.md has the
numbers. Every stage resamples, so that the conditional ESS of Zhou, Johansen and Aston (2016) is the ESS.

That error bar assumes that the moves mix. Where the particles follow pi_t, its invariant moves leave every mean as it
is, up to noise; where they lag behind, stage after stage carries a mean the same way. The drift is that sum,

    D_j = sum_t ( mean_i z_t^ij - sum_i w_t^i z_{t-1}^ij ) / sd_t^j        its noise: sum_t ( 1/ESS_t + 1/N )

and a run whose largest D_j is beyond `UNSETTLED` of its noise ends in a warning; the weights are those of the newest
particles by themselves. (Of 210 runs on 21 targets with known log Z none came to 2.1; of 10 on a funnel in a box, whose
log Z came out 1.7 too low, 9 were beyond 4. Particles used again hide it: of waste-free SMC 4 were, and of
persistent sampling with one move a round none, at errors as large.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc.ess import log_ess
from blackjax.smc.resampling import systematic

from ebm_ppl import parallel, sharding
from ebm_ppl.centring import before_learning
from ebm_ppl.cloud import Cloud, enter, in_new_coordinates, initial, lying, terms_of
from ebm_ppl.crosswise import crosswise
from ebm_ppl.independence import Mover
from ebm_ppl.kernels import HMC, require_adjusted
from ebm_ppl.moves import move
from ebm_ppl.sharding import Layout, Mesh
from ebm_ppl.stages import StageInfo, as_path, check, check_start, final_values, phase_estimates
from ebm_ppl.starts import explain
from ebm_ppl.target import Phase, Target, Tilted
from ebm_ppl.typing import Array, Draws, EnergyError, PRNGKey
from ebm_ppl.weighing import join, weigh

UNSETTLED = 4.0


@dataclasses.dataclass(frozen=True)
class SMC:
    """Adaptive tempered sequential Monte Carlo with moves tuned from the particles.

    Args:
        num_particles: particles in each independent run, an even number.
        target_ess: each stage takes the largest temperature step that keeps this share of effective particles.
        kernel: what moves the particles; only kernels that leave their target invariant.
        num_moves: moves of each particle in a round. A stage makes rounds until the particles have decorrelated from
            where they were, or a round no longer helps, at most 20.
        max_stages: bound on the number of stages of a phase.
        chain_length: states of each of the chains whose states are the particles; more than 1 is waste-free SMC. They
            are `num_moves` moves apart (1 is best), and the chain must be long enough to forget its start. The error
            bar rests on the number of chains, `num_particles / chain_length`: hundreds.
        persistence: stages of a phase whose particles are weighed together; more than 1 is persistent sampling. The
            effective particles, of which a stage keeps the share `target_ess`, are those of all of them, so that steps
            are shorter.
        chunk_size: particles that are evaluated at a time, where all of them at once would not fit into memory; it
            changes results by rounding only.

    References:
        Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo samplers; Buchholz, Chopin and Jacob (2021),
        Adaptive tuning of Hamiltonian Monte Carlo within sequential Monte Carlo; Lee and Whiteley (2018), Variance
        estimation in the particle filter; Dau and Chopin (2022), Waste-free sequential Monte Carlo; Karamanis and
        Seljak (2025), Persistent sampling: enhancing the efficiency of sequential Monte Carlo.
    """

    num_particles: int = 1000
    target_ess: float = 0.6
    kernel: Mover = dataclasses.field(default_factory=lambda: HMC(max_leapfrogs=64))
    num_moves: int = 5
    max_stages: int = 500
    chain_length: int = 1
    persistence: int = 1
    chunk_size: int | None = None
    name = "SMC"

    def __post_init__(self):
        if self.num_particles < 4 or self.num_particles % 2:
            raise EnergyError(f"num_particles is an even number of at least 4; got {self.num_particles}.")
        if not 0 < self.target_ess < 1:
            raise EnergyError(f"target_ess is a share between 0 and 1, exclusive; got {self.target_ess}.")
        chains, rest = divmod(self.num_particles, 2 * max(self.chain_length, 1))
        if self.chain_length < 1 or rest or chains < 2:
            raise EnergyError(
                "The particles are those of an even number of chains, at least four: num_particles is a multiple of "
                f"2 * chain_length; got {self.num_particles} with chain_length {self.chain_length}."
            )
        if self.persistence < 1:
            raise EnergyError(f"persistence is a number of stages, at least 1; got {self.persistence}.")
        if self.chunk_size is not None and self.chunk_size < 2:
            raise EnergyError(f"chunk_size is a number of particles, at least 2; got {self.chunk_size}.")
        require_adjusted(self.kernel, self.name)


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
    if next_phase is None:
        prepare(target, sampler, layout, keys)
    clouds = parallel.over(initial, keys, target, sampler.num_particles, sampler.persistence, layout)
    log_z, infos = {}, []
    known = iter(target.phases())
    while coming := next_phase(clouds) if next_phase else next(known, None):
        phase, tempered = coming
        clouds = [cloud._replace(centring=None) for cloud in clouds]
        clouds = parallel.over(enter, clouds, tempered, phase, layout)
        energy = np.concatenate([cloud.energy for cloud in clouds])
        check_start(energy, phase, lambda run, clouds=clouds: _example(target, clouds, run))
        first = len(infos)
        clouds, passed = _run_phase(keys, tempered, sampler, layout, phase, clouds, first, progress_bar, visit)
        log_z |= phase_estimates(phase, passed, num_runs, clouds[0].z.dtype)
        infos += passed
    final = [sharding.gathered((cloud.z, cloud.ensemble.z, cloud.log_weight)) for cloud in clouds]
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
    particles = {"z": weighted.reshape(num_runs, -1, target.dim), "log_weight": log_weight.reshape(num_runs, -1)}
    return Draws(z, {}, attrs, particles=particles, stages=path, log_z=log_z)


def _example(target: Tilted, clouds: list[Cloud], run: int) -> str:
    """What is wrong with a particle of a run, in a model whose sites have names."""
    z = np.concatenate(sharding.gathered([cloud.z for cloud in clouds]))
    return explain(target, jnp.asarray(z[run, 0])) if isinstance(target, Target) else ""


def laid_out(
    key: PRNGKey, target: Tilted, sampler: SMC, num_runs: int, mesh: Mesh | None
) -> tuple[Layout, list[Array], Tilted]:
    """How the particles lie on a mesh, the keys of the runs in parts, and the target where the particles are."""
    layout = Layout(sharding.flat(mesh), sampler.chunk_size)
    in_half = sampler.num_particles // sampler.chain_length // 2
    sharding.require_equal_shares(in_half, layout.mesh, "particles (or their chains) in each half of the cloud")
    keys = parallel.split(jax.random.split(key, num_runs), most=num_runs)
    return layout, *sharding.everywhere((keys, target), layout.mesh)


def prepare(target: Tilted, sampler: SMC, layout: Layout, keys: list[Array]) -> list[parallel.Program]:
    """Starts to compile all that a run needs, unless it learns coordinates where none were expected."""

    def results(program: parallel.Program) -> Any:
        if layout.mesh is None:
            return program.shapes
        lie = program.compiled.result().output_shardings
        return jax.tree.map(lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), program.shapes, lie)

    place = before_learning(target, len(keys[0]), 2) if sampler.kernel.metric == "auto" else None
    begun = parallel.prepare_over(initial, keys[0], target, sampler.num_particles, sampler.persistence, layout)
    programs, cloud = [begun], results(begun)
    for phase, tempered in target.phases():
        entered = parallel.prepare_over(enter, cloud, tempered, phase, layout)
        member = keys[0], results(entered)._replace(centring=sharding.everywhere(place, layout.mesh))
        shared = tempered, sampler, layout, phase, jax.ShapeDtypeStruct((), int)
        programs += [entered, parallel.prepare_over(_stage, member, *shared, in_place=True)]
    return programs


def lags(drift: float) -> bool:
    """Whether the largest drift is that of particles that do not follow their targets, or unknown."""
    return not drift <= UNSETTLED


def lagging(drift: float) -> tuple[str, ...]:
    """The doubt about particles that lag behind their targets, by the largest drift, where they do."""
    if not lags(drift):
        return ()
    return (
        f"The moves of SMC carried a coordinate's mean by {drift:.1f} standard errors along the path, where 0 is "
        "expected: the particles lag behind their targets, and log Z and the posterior may be off by far more than "
        "the stated error. More moves (num_moves), a larger target_ess or a reparametrised model help; more "
        "particles alone do not. smc['drift'] has the path.",
    )


def _run_phase(
    keys: list[Array],
    target: Tilted,
    sampler: SMC,
    layout: Layout,
    phase: Phase,
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
            now = [clouds[i] for i in under_way]
            if sampler.kernel.metric == "auto":
                now = in_new_coordinates(now, target, layout)
            members = list(zip((keys[i] for i in under_way), now, strict=True))
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
    member: tuple[PRNGKey, Cloud], target: Tilted, sampler: SMC, layout: Layout, phase: Phase, stage: Array
) -> tuple[tuple[PRNGKey, Cloud], StageInfo]:
    """One stage of a run, or none if it is done: some of its part may be."""
    key, cloud = member
    after, info = _one_stage(jax.random.fold_in(key, stage), target, sampler, layout, phase, cloud)
    done = cloud.beta >= 1.0
    kept = jax.tree.map(lambda new, old: jnp.where(done, old, new), after, cloud)
    info = jax.tree.map(lambda x: jnp.where(done, jnp.nan, x), info)
    return (key, lying(kept, layout)), layout.everywhere(info)


def _one_stage(
    key: PRNGKey, target: Tilted, sampler: SMC, layout: Layout, phase: Phase, cloud: Cloud
) -> tuple[Cloud, StageInfo]:
    """Weigh, resample, move: from the temperature of the cloud to the next one."""
    num, length = sampler.num_particles, sampler.chain_length
    key_resample, key_move = jax.random.split(key)
    nan = jnp.isnan(cloud.energy) | ~jnp.isfinite(cloud.base)
    energy = jnp.where(nan, jnp.inf, cloud.energy)

    ensemble = join(cloud.ensemble, cloud.z, energy, cloud.eve, cloud.beta, cloud.influence)
    weighed = weigh(ensemble, cloud.beta, sampler.target_ess)
    beta, weights = weighed.beta, jnp.exp(weighed.log_weight)
    before, eve = layout.everywhere(ensemble.z.reshape(-1, cloud.z.shape[-1])), ensemble.eve.ravel()
    ancestors = systematic(key_resample, weights.ravel(), num)
    ess = jnp.exp(log_ess(weighed.log_weight.ravel()))

    def log_density(z: Array) -> Array:
        base, energy = terms_of(target, phase, z)
        return base - beta * energy

    resampled = layout.spread(before[ancestors].reshape(2, num // 2, -1), axis=1)
    coordinates = crosswise(resampled, cloud.centring, jnp.minimum(ess, num) / 2)
    # One in so many of a systematic sample, the first by chance, is a smaller systematic sample.
    first = ancestors.reshape(-1, length)[:, jax.random.randint(jax.random.fold_in(key_resample, 1), (), 0, length)]
    start = layout.spread(before[first].reshape(2, num // length // 2, -1), axis=1)
    moved, chains = move(
        key_move, start, log_density, sampler.kernel, sampler.num_moves, cloud.step_size, coordinates, layout, length
    )
    z = layout.spread(chains.reshape(num, -1))
    base, new_energy = layout.over(lambda z: terms_of(target, phase, z))(z)
    log_z = cloud.log_z + weighed.increment
    newest = jax.nn.softmax(jnp.where(jnp.isfinite(energy), -weighed.step * energy, -jnp.inf))
    carried = jnp.mean(z, axis=0) - newest @ jnp.where(newest[:, None] > 0, cloud.z, 0.0)  # some may lie at infinity
    rounding = jnp.finfo(z.dtype).eps * jnp.max(jnp.abs(z), axis=0) * num + jnp.finfo(z.dtype).tiny
    drift = cloud.drift + carried / jnp.maximum(jnp.std(z, axis=0), rounding)
    drift_noise = cloud.drift_noise + jnp.sum(newest**2) + 1 / num
    after = Cloud(
        z=z,
        base=base,
        energy=new_energy,
        eve=jnp.repeat(eve[first], length),
        beta=beta,
        step_size=moved.step_size,
        log_z=log_z,
        influence=weighed.influence,
        ensemble=ensemble._replace(log_z=ensemble.log_z - weighed.increment),
        log_weight=weighed.log_weight,
        variance=weighed.variance,
        drift=drift,
        drift_noise=drift_noise,
        centring=cloud.centring,
    )
    info = StageInfo(
        beta=beta,
        ess=ess,
        accept_rate=moved.accepted,
        num_moves=moved.moves,
        correlation=moved.correlation,
        log_z_increment=weighed.increment,
        log_z=log_z,
        log_z_std_error=jnp.sqrt(weighed.variance),
        mean_energy=jnp.sum(jnp.where(weights > 0, weights * ensemble.energy, 0.0)),
        drift=jnp.max(jnp.abs(drift)) / jnp.sqrt(drift_noise),
        step_size=moved.step_size,
        temperature_step=weighed.step,
        num_evaluations=num // length * (moved.leapfrogs + 1.0) + num,
        num_nan=moved.num_nan + jnp.sum(nan),
        num_zero=jnp.sum(energy == jnp.inf),
        num_infinite=jnp.maximum(jnp.sum(cloud.energy == -jnp.inf), jnp.sum(new_energy == -jnp.inf)),
    )
    return after, jax.tree.map(lambda x: jnp.asarray(x, z.dtype), info)
