"""Markov chains: starting points, warm-up and draws, in compiled pieces driven by a host loop.

    start        z_c with finite log p and gradient, a bounded number of tries
    warm-up      stretches of `warmup.windows`; after each window all chains share what they have learned
    draws        steps of the same compiled function, with the tuning fixed

One compiled function of one chain serves warm-up and sampling and every number of steps, so that a run compiles the
model's gradient inside a kernel once; `pieces.py` takes it over all chains. The host loop that meets its pieces is the
one place for progress and for errors about the numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl import kernels, parallel, sharding
from ebm_ppl.centring import Centring, before_learning, learn_centring
from ebm_ppl.independence import require_chains
from ebm_ppl.kernels import HMC, MALA, MCLMC, NUTS, Kernel, Tuning
from ebm_ppl.pieces import in_pieces, loop, written
from ebm_ppl.sharding import Mesh
from ebm_ppl.starts import SHARED, Chain, chain_at, finite_chains, given_point
from ebm_ppl.target import Target
from ebm_ppl.typing import Array, Draws, EnergyError, EnergyWarning, NonFiniteEnergyError, PRNGKey
from ebm_ppl.warmup import WarmupState, end_stretch, halves, learn, unlearned, warmup_of, windows

Sampler = NUTS | HMC | MALA | MCLMC
NUM_CHAINS = 4
"""Where nothing is said."""
LONGEST_PIECE = 2000
LARGEST_RECORD = 2**23
"""Most numbers in the record of a chain's positions."""


class ChainState(NamedTuple):
    """All that continues a run: pass it to `ebm.sample(..., state=state)`."""

    parts: list[Chain]
    """All chains, in the parts of `parallel.split`."""
    tuning: Tuning
    """What the warm-up learned, for all of them."""
    step: int
    """Number of steps made so far."""
    key: PRNGKey
    """Of the run: what its chains share at step number i uses `fold_in(fold_in(key, SHARED), i)`."""
    sampler: Sampler
    mesh: Mesh | None = None
    """Whose devices share the chains, which are then one part."""


def run(
    key: PRNGKey,
    target: Target,
    sampler: Sampler,
    *,
    num_chains: int | None,
    num_warmup: int,
    num_samples: int,
    thin: int = 1,
    init: str | dict[str, Any] = "uniform",
    state: ChainState | None = None,
    progress_bar: bool = True,
    mesh: Mesh | None = None,
    meanwhile: Callable[[np.ndarray], None] = lambda z: None,
) -> tuple[Draws, ChainState]:
    """Draws from a target by a Markov chain sampler; see `ebm.sample`.

    While the steps compile `meanwhile` is called, with an array of the shape that the draws will have.
    """
    require_chains(sampler, "a chain")
    target.require_tractable()
    learned, mesh = None, sharding.flat(mesh)
    if state is None:
        num_chains = NUM_CHAINS if num_chains is None else num_chains
        state, learned = _start(key, target, sampler, num_chains, num_warmup, init, mesh)
        meanwhile(np.empty((num_chains, num_samples, target.dim), state.parts[0].kernel.position.dtype))
    else:
        _check_continues(state, target, sampler, num_chains)
        state, num_warmup = _moved(state, mesh), 0
    warmup_steps = 0 if _is_unadjusted(sampler) else num_warmup
    evaluations = 0
    with _progress(sampler.name, warmup_steps + num_samples * thin, progress_bar) as bar:
        if learned is not None:
            state, evaluations = _warm_up(target, sampler, state, learned, warmup_steps, bar)
        state, stats = _steps(target, sampler, state, num_samples * thin, bar)
    z: Any = stats.pop("z")
    attrs = {
        "inference_library": "ebm_ppl",
        "sampler": sampler.name,
        "sampler_settings": repr(sampler),
        "adjusted": int(not _is_unadjusted(sampler)),
        "num_warmup": num_warmup,
        "thin": thin,
        "num_divergent": int(stats["diverging"].sum()),
        "num_nan_energy": int(stats["nan_energy"].sum()),
        "non_centred": _non_centred(target, state.tuning.centring),
    }
    if not _is_unadjusted(sampler):  # whose tuner does not say what it costs
        attrs["num_evaluations"] = evaluations + int(stats["n_steps"].sum())
    _warn(attrs, z.shape[0] * z.shape[1])
    return Draws(z[:, thin - 1 :: thin], jax.tree.map(lambda x: x[:, thin - 1 :: thin], stats), attrs), state


def _check_continues(state: ChainState, target: Target, sampler: Sampler, num_chains: int | None) -> None:
    """Raises where chains are not of this target, by their log densities, or not of this sampler and number."""
    if sampler != state.sampler:
        raise EnergyError(f"The state to continue is of {state.sampler}, and the sampler now is {sampler}.")
    num = sum(len(part.key) for part in state.parts)
    if num_chains not in (None, num):
        raise EnergyError(f"The state to continue is of {num} chains, and num_chains is {num_chains}.")
    if not _is_of(target, state):
        raise EnergyError(
            "The state to continue is of another target: the log densities of its chains are not those of this model "
            "with these data. Start new chains there: init= takes values of the latent sites."
        )


def _is_of(target: Target, state: ChainState) -> bool:
    """Whether the log densities of all chains are this target's, up to rounding."""
    positions = [part.kernel.position for part in state.parts]
    if positions[0].shape[1:] != (target.dim,):
        return False
    now = np.concatenate(parallel.over(_log_density, positions, target, hurry=True, mesh=state.mesh))
    known = np.concatenate([part.kernel.logdensity for part in state.parts])
    rounding = math.sqrt(np.finfo(known.dtype).eps) * (1 + np.abs(known))
    return bool(np.all(np.abs(now - known) <= rounding))


def _log_density(z: Array, target: Target) -> Array:
    return target.log_density(z)


def _is_unadjusted(sampler: Sampler) -> bool:
    return isinstance(sampler, MCLMC) and not sampler.adjusted


def _kernel(sampler: Sampler) -> Kernel:
    return kernels.unadjusted_mclmc() if _is_unadjusted(sampler) else sampler.kernel()


def _warm_up(
    target: Target, sampler: Sampler, state: ChainState, learned: WarmupState, num_warmup: int, bar: Any
) -> tuple[ChainState, int]:
    """The chains after their warm-up, with what they have learned together, and its leapfrog steps."""
    evaluations = 0
    for length, is_window in windows(num_warmup):
        centring = state.tuning.centring
        state, record = _steps(target, sampler, state, length, bar, warming_up=True)
        evaluations += int(record["n_steps"].sum())
        if is_window:
            if sampler.metric == "auto":
                found = learn_centring(*halves(record["z"]), target.site_numbers)
                centring = before_learning(target) if found is None else found
            for some in _with_room(record["z"], record["gradient"]):
                learned = parallel.once(learn, sampler, learned, centring, *some)
        adaptations = [part.adaptation for part in state.parts]
        learned, tuning, restarted = parallel.once(end_stretch, sampler, learned, adaptations, target.dim, is_window)
        parts = [part._replace(adaptation=new) for part, new in zip(state.parts, restarted, strict=True)]
        state = state._replace(parts=parts, tuning=tuning._replace(centring=centring))
    return state, evaluations


def _non_centred(target: Target, centring: Centring | None) -> str:
    """Which sites were moved in coordinates that follow another's, as a phrase."""
    if centring is None:
        return ""
    numbers, driver = target.site_numbers, np.asarray(centring.driver)
    driven = np.flatnonzero(driver != np.arange(len(driver)))
    pairs = dict.fromkeys(zip(numbers[driven], numbers[driver[driven]], strict=True))
    names = target.latent_names
    return ", ".join(f"{names[site]} by {names[of]}" for site, of in pairs)


def _steps(
    target: Target, sampler: Sampler, state: ChainState, length: int, bar: Any, *, warming_up: bool = False
) -> tuple[ChainState, dict[str, np.ndarray]]:
    """The state after `length` steps, and their record, (chain, step, ...); that of the warm-up has gradients."""
    parts, ends = list(state.parts), [0] * len(state.parts)
    whole: Any = None
    shared = target, sampler, state.tuning, state.key, np.array(warming_up)
    for piece in in_pieces(_advance, parts, state.step, length, _capacity(target.dim), *shared, mesh=state.mesh):
        piece = piece if warming_up else piece._replace(record=_checked(piece.record))
        whole = written(whole, piece, len(parts), length)
        before, parts[piece.index], ends[piece.index] = sum(ends), piece.part, piece.end
        if not bar.disable:
            bar.set_postfix_str(_summary(piece.record), refresh=False)
        bar.update(sum(ends) // len(parts) - before // len(parts))
    return state._replace(parts=parts, step=state.step + length), whole


def _with_room(z: np.ndarray, gradient: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The steps of a window, (chain, step, dim), in records of the capacity of one piece, and how many each holds."""
    length, capacity = z.shape[1], _capacity(z.shape[2])
    for start in range(0, length, capacity):
        count = min(length - start, capacity)
        room = (0, 0), (0, capacity - count), (0, 0)
        here = slice(start, start + count)
        yield np.pad(z[:, here], room), np.pad(gradient[:, here], room), np.array(count)


def _capacity(dim: int) -> int:
    """Most steps in one piece: what the compiled function has room for."""
    return int(np.clip(LARGEST_RECORD // dim, 1, LONGEST_PIECE))


def _advance(
    chain: Chain, target: Target, sampler: Sampler, tuning: Tuning, run_key: Array, warming_up: Array, limits: Array
) -> tuple[Chain, dict[str, Array]]:
    """One chain through `count` steps from number `first` on, and a record with room for more."""
    shared_key = jax.random.fold_in(run_key, SHARED)
    log_density = jax.jit(lambda z: target.log_density(z))  # traced once, however often a kernel calls it
    kernel, adapt = _kernel(sampler), None if _is_unadjusted(sampler) else warmup_of(sampler, target.dim).adapt

    def step(chain: Chain, number: Array) -> tuple[Chain, dict[str, Array]]:
        learning = chain.adaptation
        now: Any = learning
        if adapt is not None:
            current = jnp.exp(learning.log_step_size)
            now = tuning._replace(step_size=jnp.where(warming_up, current, tuning.step_size))
        num_steps = kernel.length(jax.random.fold_in(shared_key, number), now, target.dim)
        key = jax.random.fold_in(chain.key, number)
        state, stats = kernel.step(key, chain.kernel, log_density, now, num_steps)
        if adapt is not None:
            adapted = adapt(learning, stats["acceptance_rate"])
            learning = jax.tree.map(lambda new, old: jnp.where(warming_up, new, old), adapted, learning)
        record = {"z": state.position, "gradient": state.logdensity_grad, "lp": state.logdensity}
        return Chain(state, chain.key, learning), record | stats | {"step_size": now.step_size}

    return loop(step, chain, limits, _capacity(target.dim))


def _start(
    key: PRNGKey,
    target: Target,
    sampler: Sampler,
    num_chains: int,
    num_warmup: int,
    init: str | dict[str, Any],
    mesh: Mesh | None,
) -> tuple[ChainState, WarmupState]:
    sharding.require_equal_shares(num_chains, mesh, "chains")
    start = init
    if isinstance(init, dict):
        start = given_point(target, init)
    elif init == "reference":
        target.require_reference()
    elif init != "uniform":
        raise EnergyError(f"init is 'uniform', 'reference' or a dictionary of values by site; got {init!r}.")
    members = parallel.split((np.arange(num_chains), np.zeros(num_chains, int)), most=_most_parts(mesh))
    learned, tuning = parallel.once(unlearned, sampler, target.dim)
    if sampler.metric == "auto" and not _is_unadjusted(sampler):
        tuning = tuning._replace(centring=before_learning(target))
    beginning = key, target, start, learned.step_size
    chains, _ = parallel.prepare_over(chain_at, members[0], *beginning, hurry=True, mesh=mesh).shapes
    tune = target, max(num_warmup, 60)
    if _is_unadjusted(sampler):
        chains = parallel.prepare_over(_tuned, chains, *tune, mesh=mesh).shapes
    coming = ChainState([chains] * len(members), tuning, 0, key, sampler, mesh)
    _prepare_steps(target, sampler, coming, learned, num_warmup)
    parts = finite_chains(members, mesh, *beginning)
    if _is_unadjusted(sampler):
        parts = parallel.over(_tuned, parts, *tune, mesh=mesh)
    return coming._replace(parts=parts), learned


def _most_parts(mesh: Mesh | None) -> int:
    return parallel.MOST_CALLS if mesh is None else 1


def _moved(state: ChainState, mesh: Mesh | None) -> ChainState:
    """The same chains on other devices."""
    if mesh == state.mesh:
        return state
    chains = jax.tree.map(lambda *parts: jnp.concatenate(parts), *state.parts)
    sharding.require_equal_shares(len(chains.key), mesh, "chains")
    return state._replace(parts=parallel.split(chains, most=_most_parts(mesh)), mesh=mesh)


def _prepare_steps(target: Target, sampler: Sampler, state: ChainState, learned: WarmupState, num_warmup: int) -> None:
    """Starts to compile what the chains run, in the order of its first use, from the shapes of their states."""
    chains = state.parts[0]
    limits, count, false = np.array([0, 0]), np.array(0), np.array(False)
    parallel.prepare_over(_advance, chains, target, sampler, state.tuning, state.key, false, limits, mesh=state.mesh)
    if _is_unadjusted(sampler):
        return
    kinds = [is_window for _, is_window in windows(num_warmup)]
    position = chains.kernel.position
    record = jax.ShapeDtypeStruct((len(state.parts) * len(position), _capacity(target.dim), target.dim), position.dtype)
    for is_window in dict.fromkeys(kinds):
        if is_window:
            parallel.prepare_once(learn, sampler, learned, state.tuning.centring, record, record, count)
        adaptations = [part.adaptation for part in state.parts]
        parallel.prepare_once(end_stretch, sampler, learned, adaptations, target.dim, is_window)


def _tuned(chain: Chain, target: Target, num_steps: int) -> Chain:
    """A chain of the unadjusted kernel after its tuning, which it makes alone."""
    key = jax.random.fold_in(chain.key, 2**32 - 1)  # no step will have this number
    state, tuning = kernels.tune_unadjusted_mclmc(key, chain.kernel.position, target.log_density, num_steps)
    return Chain(state, chain.key, tuning)


def _checked(record: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is kept of a record; raises where a chain or one of its proposals met infinite density."""
    infinite = np.argwhere((record["lp"] == np.inf) | record["infinite_density"])
    if infinite.size:
        chain, step = infinite[0]
        raise NonFiniteEnergyError(
            "The log density is +inf (an energy of -inf, infinite density) at or near the unconstrained point "
            f"{record['z'][chain, step].tolist()}: a chain never leaves such a point. Bound the energy from below."
        )
    return {name: x for name, x in record.items() if name not in ("gradient", "infinite_density")}


def _warn(attrs: dict[str, Any], num_draws: int) -> None:
    if attrs["num_nan_energy"]:
        warnings.warn(
            f"The energy was NaN in {attrs['num_nan_energy']} of {num_draws} trajectories; such points were rejected, "
            "as if they had zero density. sample_stats['nan_energy'] marks them.",
            EnergyWarning,
            stacklevel=4,
        )
    if not attrs["adjusted"]:
        warnings.warn(
            "Unadjusted MCLMC is biased by its step size: use these draws for exploration, or adjusted=True.",
            EnergyWarning,
            stacklevel=4,
        )


def _summary(record: dict[str, np.ndarray]) -> str:
    step_size, leapfrogs = np.mean(record["step_size"][:, -1]), np.mean(record["n_steps"])
    return f"step size {step_size:.2e}, {leapfrogs:.1f} leapfrogs a draw"


def _progress(name: str, total: int, enabled: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=name, disable=not enabled, unit="step", mininterval=0.2)
