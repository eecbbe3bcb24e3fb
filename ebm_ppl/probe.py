"""A look at the tails before a run: does each energy rise outwards, and does the density fall?

Along random rays `z = r d` in unconstrained space, at growing radii r:

    log p(z) never falls                     Z is infinite: log Z is refused
    U falls ever faster                      the sign is probably flipped; where U tilts a base, only if it falls faster
                                             than in proportion to r, as networks may (whose density is looked at above)
    U flat, non-negative, below its centre   a density was probably passed instead of an energy
    U NaN at all of them                     and at draws of the reference, too: log Z is refused

This is a heuristic on a few rays. It misses what happens off those rays or beyond the last radius: an energy that
falls in a narrow cone or only logarithmically, one that oscillates, and a flipped sign that the base outweighs. It
looks at factors and latent sites alone, not at an `EnergyDistribution` that is observed (whose value no ray changes),
and not at models with discrete latent sites.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl import parallel
from ebm_ppl.starts import explain
from ebm_ppl.target import Target
from ebm_ppl.typing import Array, EnergyWarning, NonFiniteEnergyError, NoReferenceError

NUM_RAYS = 24
RADII = (0.0, 3.0, 10.0, 30.0, 90.0)
FAR = (270.0, 810.0)
"""Radii that may contradict a rise so far: in a box, say, where a ray comes to its walls in one site after another."""
FASTER, FASTER_THAN_LINEAR = 1.5, 4.5
"""Of the last two steps of U, between radii that grow threefold: how many times the one before the last is. Linear
falls make 3 of it, quadratic ones 9."""
ROUNDING = 8.0
MOST = 0.75
NUM_DRAWS = 4096
"""Of the reference, where an energy is NaN along all rays, since those may have missed where it is not."""


def check_tails(target: Target, *, needs_normalisation: bool) -> None:
    """Warns of energies that look wrong in the tails; for log Z refuses a density that grows there.

    Raises:
        NoReferenceError: where the log density nowhere falls along a ray and log Z is wanted.
        NonFiniteEnergyError: where an energy is NaN everywhere and log Z is wanted.
    """
    suspects = [name for name, role in target.spec.roles if role != "data"]
    if not suspects or not target.dim or target.spec.discrete:
        return
    log_density, energies = jax.device_get(parallel.once(_along_rays, target))
    for name in suspects:
        if needs_normalisation and np.all(np.isnan(energies[name])):
            _check_draws(name, target)
        pace = FASTER_THAN_LINEAR if name in target.latent_names else FASTER
        _check_energy(name, energies[name][:, : len(RADII)], pace)
    with np.errstate(invalid="ignore"):  # a NaN far out contradicts nothing
        steps = np.diff(log_density[:, 2:], axis=1)
        size = np.abs(log_density) + sum(np.abs(energy) for energy in energies.values())
        rounding = ROUNDING * np.finfo(log_density.dtype).eps * size[:, 3:]
    near, far = slice(None, len(RADII) - 3), slice(len(RADII) - 3, None)
    ok = np.all(np.isfinite(steps[:, near]) & (steps[:, near] > -rounding[:, near]), axis=1)
    rising = ok & ~np.any(steps[:, far] < -rounding[:, far], axis=1)
    if np.any(rising):
        message = (
            f"The log density does not fall, out to distance {FAR[-1]:g}, along {rising.sum()} of {NUM_RAYS} rays in "
            f"unconstrained space: it cannot be normalised. Energies in the model: {', '.join(map(repr, suspects))}. "
            "Is the sign of one flipped (an energy is low where probability is high)? Otherwise bound it from below, "
            "or give the latent sites a base that falls faster."
        )
        if needs_normalisation:
            raise NoReferenceError(message + " log Z is refused.")
        warnings.warn(message, EnergyWarning, stacklevel=4)


def _along_rays(target: Target) -> tuple[Array, dict[str, Array]]:
    directions = jax.random.normal(jax.random.key(0), (NUM_RAYS, target.dim))
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    points = directions[:, None, :] * jnp.asarray(RADII + FAR)[:, None]

    def at(z: Array) -> tuple[Array, dict[str, Array]]:
        log_reference, energies = target.terms(z)
        return log_reference - sum(energies.values(), jnp.zeros(())), energies

    return jax.vmap(jax.vmap(at))(points)


def _check_draws(name: str, target: Target) -> None:
    """Refuses an energy that is NaN at all draws of the reference."""
    z, energies = jax.device_get(parallel.once(_at_draws, target))
    if np.all(np.isnan(energies[name])):
        raise NonFiniteEnergyError(
            f"Energy '{name}' is NaN at all of {NUM_DRAWS} draws of the reference. {explain(target, jnp.asarray(z[0]))}"
        )


def _at_draws(target: Target) -> tuple[Array, dict[str, Array]]:
    z = jax.vmap(target.sample_reference)(jax.random.split(jax.random.key(0), NUM_DRAWS))
    return z, jax.vmap(target.energies)(z)


def _check_energy(name: str, energy: np.ndarray, pace: float) -> None:
    """Warnings about one energy along rays, shape (ray, radius), whose fall is suspect at that pace."""
    outer = energy[:, 1:]
    ok = np.all(np.isfinite(outer), axis=1)
    if not np.any(ok):
        return
    steps = np.diff(outer[ok], axis=1)
    falling = np.all(steps < 0, axis=1) & (steps[:, -1] < pace * steps[:, -2]) & (steps[:, -1] < -1.0)
    if np.mean(falling) >= MOST:
        warnings.warn(
            f"Energy '{name}' falls without bound along most rays from the origin: an energy is low where probability "
            "is high, so this density grows in its tails. Is its sign flipped (a log density passed as an energy)?",
            EnergyWarning,
            stacklevel=5,
        )
        return
    scale = np.abs(energy).max(initial=1e-12, where=np.isfinite(energy))
    flat = np.all(np.abs(steps[:, 1:]) < 1e-3 * scale, axis=1)
    centre = energy[ok, 0]
    below = np.isfinite(centre) & (centre - outer[ok, -1] > 1e-3 * scale)
    if np.mean(flat & below) >= MOST and np.all(energy[ok] >= 0):
        warnings.warn(
            f"Energy '{name}' is non-negative, highest in the middle and flat in its tails, as a density is. An energy "
            "is minus a log density, in nats: was a density passed instead?",
            EnergyWarning,
            stacklevel=5,
        )
