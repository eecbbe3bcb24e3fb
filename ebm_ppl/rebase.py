"""The same density by another path or over another reference: what an estimator starts from is a choice.

`Joint` tempers all energies of a target at once. `Rebased` does so from a reference of one's own,

    p(z) = pi_0(z) exp(-U(z)) / Z  =  q(z) exp(-U_q(z)) / Z          U_q = log q - log pi_0 + U

Z is that of the target, whatever the normalised density q; a q near p makes U_q nearly constant, and Z easy to find.
A share of the old reference stays in q, so that no part of it is lost and the weights p / q stay bounded by theirs:

    q(z) = (1 - defence) proposal(z) + defence pi_0(z)

and `Blend` lets two proposals share that place in the same way.

References:
    Hesterberg (1995), Weighted average importance sampling and defensive mixture distributions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.target import Phase, Tilted
from ebm_ppl.typing import Array, PRNGKey

Draw = Callable[[PRNGKey], Array]


class Proposal(Protocol):
    """A normalised density on unconstrained space; methods take one point."""

    def sample(self, key: PRNGKey) -> Array: ...

    def log_density(self, z: Array) -> Array: ...

    def from_cube(self, u: np.ndarray) -> np.ndarray:
        """Draws from points of the unit cube, of two dimensions more, on the host."""
        ...


def _either(key: PRNGKey, share: Array, main: Draw, guard: Draw) -> Array:
    """A draw of the guard with probability `share`, else of the main one."""
    key_which, key_main, key_guard = jax.random.split(key, 3)
    return jnp.where(jax.random.uniform(key_which) < share, guard(key_guard), main(key_main))


def _log_density_of_both(share: Array, main: Array, guard: Array) -> Array:
    """Of such draws, from the log densities of the two."""
    return jnp.logaddexp(jnp.log1p(-share) + main, jnp.log(share) + guard)


class Blend(eqx.Module):
    """`(1 - share) main + share guard`: a proposal whose weights are bounded by those of its guard."""

    main: Proposal
    guard: Proposal
    share: Array

    def sample(self, key: PRNGKey) -> Array:
        """One draw, shape (dim,)."""
        return _either(key, self.share, self.main.sample, self.guard.sample)

    def log_density(self, z: Array) -> Array:
        """Log density at a point of shape (dim,), in nats."""
        return _log_density_of_both(self.share, self.main.log_density(z), self.guard.log_density(z))

    def from_cube(self, u: np.ndarray) -> np.ndarray:
        """Points of the unit cube as draws; the first coordinate also says which of the two they come from."""
        share = float(self.share)
        guarded, first = u[:, 0] < share, u[:, 0]
        stretched = np.where(guarded, first / share, (first - share) / (1 - share))
        u = np.column_stack([stretched, u[:, 1:]])
        z = self.main.from_cube(u)
        z[guarded] = self.guard.from_cube(u[guarded])
        return z


class Joint(eqx.Module):
    """A target whose energies are tempered all at once, whatever phases it has."""

    target: Tilted

    @property
    def dim(self) -> int:
        return self.target.dim

    @property
    def site_numbers(self) -> np.ndarray:
        return self.target.site_numbers

    @property
    def is_logistic(self) -> np.ndarray:
        return self.target.is_logistic

    @property
    def is_hierarchical(self) -> bool:
        return self.target.is_hierarchical

    def phases(self) -> list[tuple[Phase, Joint]]:
        """As `Target.phases`: all energies at once."""
        return [("joint", self)]

    def require_tractable(self) -> None:
        self.target.require_tractable()

    def require_reference(self) -> None:
        self.target.require_reference()

    def sample_reference(self, key: PRNGKey) -> Array:
        return self.target.sample_reference(key)

    def staged_terms(self, z: Array) -> tuple[Array, Array]:
        return self.target.staged_terms(z)


class Rebased(Joint):
    """A target over the reference q; it stands wherever a target of one phase does."""

    proposal: Proposal
    defence: Array
    """Share of the target's own reference in q."""

    def sample_reference(self, key: PRNGKey) -> Array:
        """One draw `z ~ q`, shape (dim,)."""
        return _either(key, self.defence, self.proposal.sample, self.target.sample_reference)

    def staged_terms(self, z: Array) -> tuple[Array, Array]:
        """`(log q(z), (0, U_q(z)))`, as `Target.staged_terms`."""
        log_reference, stages = self.target.staged_terms(z)
        log_q = _log_density_of_both(self.defence, self.proposal.log_density(z), log_reference)
        energy = log_q - log_reference + jnp.sum(stages)
        return log_q, jnp.stack([jnp.zeros_like(energy), energy])
