"""The search for a reference that looks like the target: fitted to a cloud, and to what ascents find beside it.

    modes         where ascents from draws of the reference end (`modes.py`): what the cloud may have missed
    fit           q, a mixture of Student t distributions (`mixture.py`), a component for each mode that the fit to the
                  cloud does not account for, and a share of the model's reference (`rebase.py`)
    refits        draws of q with weights w = pi_0 exp(-U) / q, pooled with the cloud, for as long as q gets better
    gradients     the covariance of n points is off by dim^2 / 4n nats: of the draws of a normal distribution with it no
                  more than exp(-dim^2 / 2n) are effective. Where that is little, first the normal distribution by
                  points and gradients (`metric.closest_normal`), and mixtures only where that has less
    coordinates   where q describes less than `GOOD_ENOUGH` of its draws and the cloud shows scales that follow other
                  coordinates, the same once more in coordinates where they do not (`centring.py`): a funnel, which no
                  mixture describes, is a normal distribution there
    flow          where asked for, a normalising flow with the best of these as its guard (`flow.py`), if it is better

References:
    Cappe, Douc, Guillin, Marin and Robert (2008), Adaptive importance sampling in general mixture classes; Ionides
    (2008), Truncated importance sampling.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl import parallel
from ebm_ppl.centring import Centring, coordinates_of, learn_centring
from ebm_ppl.flow import Flow, fit_flow
from ebm_ppl.logz.importance import Weighed, draw, draw_own, prepare_own
from ebm_ppl.logz.modes import Modes, find_modes, prepare_ascents, spread_of
from ebm_ppl.metric import closest_normal
from ebm_ppl.mixture import DEGREES, FEWEST_PLACES, TAILS, StudentMixture, fit_mixture, prepare_fit
from ebm_ppl.rebase import Blend, Proposal, Rebased
from ebm_ppl.scale import DenseScale
from ebm_ppl.target import Tilted, log_joint
from ebm_ppl.typing import Array, PRNGKey, generator, keys_of

UNACCOUNTED = 1.5
"""Nats by which a mode is higher than the fit says, to become a component of its own."""
MASS = 0.02, 9.0
"""Least and most mass of such a component, relative to the fit's."""
MOST_MODES = 64
"""Of those that get components of their own, the highest; the others are left out, and counted."""
FAITHFUL, BIASED = 0.5, 0.05
"""Weight of a point of the cloud, and once that is known to have missed a mode."""
MOST_SEARCHES = 8
GOOD_SHARE = 0.9
"""Effective share of the draws beyond which a better q is not worth its price."""
GOOD_ENOUGH = 0.5
"""The same for a search in other coordinates."""
POINTS_PER_DIMENSION = 3
"""Of a cloud whose gradients alone are enough."""
TAILS_SHARE = 0.1
"""Share of q that has heavy tails."""
GUARD_SHARE = 0.2
"""Share of the mixture that stays in q beside a flow, for the modes and tails that the flow misses."""
MOST_PADDED = 40
"""Coordinates up to which empty places for components cost less than a program for each number of them."""
WORTHWHILE = 1.1
"""Factor by which a refit must raise the effective share of the draws for another to follow."""


class Effort(NamedTuple):
    """How much a search may cost; see `FittedReference`."""

    num_ascents: int
    num_draws: int
    max_refits: int
    defence: float
    flow: Flow | None


class Search(NamedTuple):
    """The best reference found, the draws that showed it, and what the search has cost."""

    reference: Rebased
    z: np.ndarray
    """(draw, dim)"""
    seen: Weighed
    num_evaluations: int
    num_nan: int
    num_left_out: int = 0
    """Modes that have no part in the reference."""


class Slopes(NamedTuple):
    """Gradients of the log density, and where, each (num, dim)."""

    z: np.ndarray
    gradients: np.ndarray


class Given(NamedTuple):
    """What every fit starts from."""

    target: Tilted
    cloud: np.ndarray
    slopes: Slopes | None
    """Where the cloud alone tells too little."""
    modes: Modes
    log_z: float
    effort: Effort
    story: list[str]


class Placed(eqx.Module):
    """A mixture of non-centred coordinates u, as a density of z: a proposal (`rebase.Proposal`)."""

    mixture: StudentMixture
    centring: Centring

    def sample(self, key: PRNGKey) -> Array:
        return self.centring.place(self.mixture.sample(key))[0]

    def log_density(self, z: Array) -> Array:
        u, log_det = self.centring.coordinates(z)
        return self.mixture.log_density(u) + log_det

    def from_cube(self, u: np.ndarray) -> np.ndarray:
        return np.array(_all_placed(self.mixture.from_cube(u), self.centring))


@jax.jit
def _all_placed(u: Array, centring: Centring) -> Array:
    return jax.vmap(centring.place)(u)[0]


def _placed(mixture: StudentMixture, centring: Centring | None) -> Proposal:
    return mixture if centring is None else Placed(mixture, centring)


def prepare(key: PRNGKey, target: Tilted, effort: Effort, num_points: int) -> None:
    """Starts to compile what a search needs, for while the pilot is under way that will give it so many points."""
    prepare_own(key, target)
    prepare_ascents(target)
    if attainable_share(num_points, target.dim) >= GOOD_SHARE:
        prepare_fit(num_points + effort.max_refits * effort.num_draws, target.dim)


def find_reference(
    key: PRNGKey,
    target: Tilted,
    cloud: np.ndarray,
    log_z: float,
    effort: Effort,
    story: list[str],
    known: Modes | None = None,
) -> tuple[Search, Modes]:
    """The best of the fits, each told as a line of the story, and all modes that are known now.

    Args:
        cloud: points near the target, equally weighted, shape (num, dim).
        log_z: about that of the target, which says what a mode is worth.
        known: modes that an earlier search has met.
    """
    key_modes, key_given, key_learned, key_flow, key_slopes = keys_of(key, 5)
    modes, evaluations = _modes(key_modes, target, cloud, effort.num_ascents, known)
    before = f", {len(known.z)} of them from before" if known is not None else ""
    arrived = np.sum(modes.hits) - (np.sum(known.hits) if known is not None else 0)
    story.append(f"{arrived} ascents arrived: {len(modes.z)} modes{before}, {modes.num_once} of them met once")
    slopes = None
    if attainable_share(*cloud.shape) < GOOD_SHARE:
        slopes = _slopes(key_slopes, target, cloud, effort.num_draws)
        evaluations += len(slopes.z)
    given = Given(target, cloud, slopes, modes, log_z, effort, story)
    best = _fits(key_given, given, None)
    if best.seen.effective_share < GOOD_ENOUGH:
        half = len(cloud) // 2
        centring = learn_centring(cloud[:half], cloud[half:], target.site_numbers, target.is_logistic)
        if centring is not None:
            story.append("scales that follow other coordinates, so the same where they do not:")
            best = _better(best, _fits(key_learned, given, centring))
    if effort.flow is not None:
        best = _better(best, _with_flow(key_flow, given, best, effort.flow))
    return best._replace(num_evaluations=evaluations + best.num_evaluations), modes


def _fits(key: PRNGKey, given: Given, centring: Centring | None) -> Search:
    """The best of mixtures and, where the cloud alone tells too little of them, a fit to the gradients at it."""
    key_gradients, key_points = keys_of(key, 2)
    normal = _by_gradients(key_gradients, given, centring)
    if normal is None:
        return _mixtures(key_points, given, centring)
    if normal.seen.effective_share >= attainable_share(*given.cloud.shape):
        return normal
    return _better(_mixtures(key_points, given, centring), normal)


def attainable_share(num: int, dim: int) -> float:
    """About the largest effective share of the draws of a normal distribution with the moments of so many points."""
    return math.exp(-(dim**2) / (2 * num))


def _better(first: Search, second: Search) -> Search:
    """The one that fits better, at the cost of both."""
    best = max(first, second, key=lambda search: search.seen.fit)
    return best._replace(
        num_evaluations=first.num_evaluations + second.num_evaluations, num_nan=first.num_nan + second.num_nan
    )


def _by_gradients(key: PRNGKey, given: Given, centring: Centring | None) -> Search | None:
    """The normal distribution by gradients; None without them, or where it would leave a mode out."""
    if given.slopes is None:
        return None
    u, scores = given.slopes
    if centring is not None:
        u, scores = parallel.once(_pulled, u, scores, centring)
    if not np.all(np.isfinite(scores)):
        return None
    normal = _closest(u, scores)
    if np.any(_unaccounted(given.modes, normal, centring, given.log_z)):
        return None
    reference = _reference(given.target, normal, centring, given.effort)
    z, seen = draw(key, reference, given.effort.num_draws)
    given.story.append(f"a normal distribution by gradients: {seen.effective_share:.0%} of the draws are effective")
    return Search(reference, z, seen, seen.num, seen.num_nan)


def _slopes(key: PRNGKey, target: Tilted, cloud: np.ndarray, num_draws: int) -> Slopes:
    """Gradients at a cloud; in more dimensions than its halves span at draws of a first fit, too.

    Those of a normal target tell the same wherever they are.
    """

    def at(z: np.ndarray) -> np.ndarray:
        return np.concatenate(jax.device_get(parallel.over(_gradient, parallel.split(z), target)))

    gradients, dim = at(cloud), target.dim
    if len(cloud) >= POINTS_PER_DIMENSION * dim or not np.all(np.isfinite(gradients)):
        return Slopes(cloud, gradients)
    cube = generator(key).uniform(size=(num_draws, dim + 2))
    drawn = _closest(cloud, gradients).from_cube(cube)
    return Slopes(np.concatenate([cloud, drawn]), np.concatenate([gradients, at(drawn)]))


def _closest(z: np.ndarray, gradients: np.ndarray) -> StudentMixture:
    return StudentMixture.normal(*jax.device_get(parallel.once(closest_normal, z, gradients)))


def _gradient(z: Array, target: Tilted) -> Array:
    return jax.grad(lambda z: log_joint(target, z))(z)


def _pulled(z: Array, gradients: Array, centring: Centring) -> tuple[Array, Array]:
    """Many points in the coordinates of a centring, and the gradients of the log density there."""
    u = coordinates_of(z, centring)
    return u, jax.vmap(centring.pull)(u, gradients)


def _reference(target: Tilted, mixture: StudentMixture, centring: Centring | None, effort: Effort) -> Rebased:
    """Guarded by heavy tails and a share of the target's own reference."""
    proposal = _placed(_padded(mixture.with_tails(TAILS_SHARE), 2 * FEWEST_PLACES), centring)
    defence: Any = np.asarray(effort.defence, mixture.mean.dtype)
    return Rebased(target, proposal, defence)


def _padded(mixture: StudentMixture, fewest: int) -> StudentMixture:
    """With empty places, where these are cheap."""
    return mixture.with_places(fewest if mixture.mean.shape[1] <= MOST_PADDED else 1)


def _mixtures(key: PRNGKey, given: Given, centring: Centring | None) -> Search:
    """Fits to the cloud and to weighted draws of the fits before, for as long as they get better."""
    target, cloud, _, modes, log_z, effort, story = given
    room = len(cloud) + effort.max_refits * effort.num_draws
    points, weights = np.zeros((room, target.dim), cloud.dtype), np.zeros(room, cloud.dtype)
    points[: len(cloud)], weights[: len(cloud)], filled = _coordinates(cloud, centring), FAITHFUL, len(cloud)
    best, mixture, evaluations, num_nan, left_out = None, None, 0, 0, 0
    for fit in range(effort.max_refits + 1):
        key_fit, key_draw = keys_of(jax.random.fold_in(key, fit), 2)
        mixture = fit_mixture(key_fit, points, weights, mixture)
        if fit == 0 and np.any(missed := _unaccounted(modes, mixture, centring, log_z)):
            left_out = max(int(np.sum(missed)) - MOST_MODES, 0)
            but = f" but {left_out}" if left_out else ""
            story.append(f"{np.sum(missed)} modes that the pilot missed: a component for each{but}")
            mixture = _with_modes(mixture, jax.tree.map(lambda x: x[missed], modes), centring, log_z)
            weights[: len(cloud)] = BIASED
        reference = _reference(target, mixture, centring, effort)
        z, seen = draw(key_draw, reference, effort.num_draws)
        evaluations, num_nan = evaluations + seen.num, num_nan + seen.num_nan
        share, before = seen.effective_share, best.seen.effective_share if best else 0.0
        heavy = "" if seen.behaves else f", but their tail is heavy (Pareto k {seen.pareto_k:.2f})"
        components = f"{len(mixture.log_weight)} components"
        story.append(f"fit {fit + 1}: {components}, {share:.0%} of the draws are effective{heavy}")
        if best is None or seen.fit > best.seen.fit:
            best = Search(reference, z, seen, evaluations, num_nan, left_out)
        is_enough = share >= GOOD_SHARE or share < WORTHWHILE * before
        if (best.seen.behaves and is_enough) or fit == effort.max_refits:
            break
        here = slice(filled, filled + seen.num)
        points[here] = _coordinates(z, centring)
        weights[here], filled = _truncated(seen), here.stop
    assert best is not None
    return best._replace(num_evaluations=evaluations, num_nan=num_nan)


def _with_flow(key: PRNGKey, given: Given, fitted: Search, settings: Flow) -> Search:
    """A flow trained on the cloud, on weighted draws of a mixture and on the target, with the mixture as guard."""
    key_fit, key_draw = keys_of(key, 2)
    points = np.concatenate([given.cloud, fitted.z])
    weights = np.concatenate([np.full(len(given.cloud), FAITHFUL), _truncated(fitted.seen)]).astype(points.dtype)
    flow, evaluations = fit_flow(key_fit, points, weights, given.target, settings)
    proposal = Blend(flow, fitted.reference.proposal, jnp.asarray(GUARD_SHARE, points.dtype))
    reference = Rebased(given.target, proposal, fitted.reference.defence)
    z, seen = draw(key_draw, reference, fitted.seen.num)
    share = seen.effective_share
    given.story.append(f"flow of {settings.num_layers} layers: {share:.0%} of the draws are effective")
    return Search(reference, z, seen, evaluations + seen.num, seen.num_nan, fitted.num_left_out)


def _coordinates(z: np.ndarray, centring: Centring | None) -> np.ndarray:
    """Of points of shape (num, dim)."""
    if centring is None:
        return z
    return np.asarray(parallel.once(coordinates_of, z, centring))


def _modes(key: PRNGKey, target: Tilted, cloud: np.ndarray, num: int, known: Modes | None = None) -> tuple[Modes, int]:
    """Modes by ascents from draws of the reference, and a few from the cloud, until none has been met only once."""
    few = num // 4
    starts = np.concatenate([draw_own(jax.random.fold_in(key, 0), target, num - few), cloud[:few]])
    deviation = spread_of(starts)
    modes, evaluations = find_modes(target, starts, deviation, known)
    for again in range(1, MOST_SEARCHES):
        # Where most have been met only once they are beyond counting, and no search would end.
        if not 0 < modes.num_once < len(modes.z) / 2:
            break
        starts = draw_own(jax.random.fold_in(key, again), target, num)
        modes, more = find_modes(target, starts, deviation, modes)
        evaluations += more
    return modes, evaluations


def _unaccounted(modes: Modes, mixture: StudentMixture, centring: Centring | None, log_z: float) -> np.ndarray:
    """Which modes a mixture gives far less density than they have."""
    if not len(modes.z):
        return np.zeros(0, bool)
    proposal = _placed(_padded(mixture, FEWEST_PLACES), centring)
    parts = parallel.over(_log_density, parallel.split(modes.z, most=len(modes.z)), proposal, hurry=True)
    return modes.log_density - log_z - np.concatenate(parts) > UNACCOUNTED


def _log_density(z: Array, proposal: Proposal) -> Array:
    return proposal.log_density(z)


def _with_modes(mixture: StudentMixture, modes: Modes, centring: Centring | None, log_z: float) -> StudentMixture:
    """A light and a heavy component for each mode, both with its curvature; what it is worth only the weights can tell.

    The curvature of a Student t at its mode is that of a normal distribution with (nu + dim) / nu times its precision.
    """
    mass = np.clip(np.exp(np.clip(modes.log_mass - log_z, -20, 20)), *MASS)[:MOST_MODES]
    num, dim = len(mass), modes.z.shape[1]
    mean, factor, inverse = (np.asarray(x)[:num] for x in (modes.z, modes.scale.factor, modes.scale.inverse))
    if centring is not None:
        parts = parallel.over(_touching, parallel.split((mean, factor), most=num), centring, hurry=True)
        mean, factor, inverse = (np.concatenate(x) for x in zip(*jax.device_get(parts), strict=True))
    log_weight, ones = np.log(mass / mass.sum()).astype(mean.dtype), np.ones(num, mean.dtype)
    wider = math.sqrt((TAILS + dim) / TAILS)
    light = StudentMixture(log_weight, mean, factor, inverse, DEGREES[-1] * ones)
    heavy = StudentMixture(log_weight, mean, factor * wider, inverse / wider, TAILS * ones)
    total = min(mass.sum(), MASS[1])
    return mixture.joined(light.joined(heavy, 0.5), total / (1 + total))


def _touching(mode: tuple[Array, Array], centring: Centring) -> tuple[Array, Array, Array]:
    """A mode and the scale of its curvature, in the coordinates of a centring."""
    z, factor = mode
    turned = jax.jacfwd(lambda z: centring.coordinates(z)[0])(z) @ factor
    scale = DenseScale.of_covariance(turned @ turned.T)
    return centring.coordinates(z)[0], scale.factor, scale.inverse


def _truncated(seen: Weighed) -> np.ndarray:
    """Weights for a fit, the largest cut, that add up to the effective number of draws (Ionides 2008)."""
    weights = np.ravel(seen.relative)
    weights = np.minimum(weights, np.mean(weights) * math.sqrt(len(weights)))
    return weights / np.sum(weights) * seen.effective_share * len(weights)
