"""The independence sampler, which moves particles: a proposal fitted to other particles, then a local step.

    q(z)        Student t distribution about `tuning.centre`, with the matrix of `tuning.scale`, in its coordinates
    jump        to a draw of q, with the probability of Metropolis and Hastings
    local       a step of one of the samplers of `kernels.py`

By jumps alone particles stay forever where q hardly ever goes, and SMC loses what lies there without a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from blackjax.mcmc import random_walk

from ebm_ppl.kernels import HMC, MALA, MCLMC, Kernel, LogDensity, Metric, State, Stats, Tuning, require_adjusted
from ebm_ppl.typing import Array, EnergyError, PRNGKey


@dataclasses.dataclass(frozen=True)
class Independence:
    """The independence sampler from a Student t distribution fitted to particles, in turn with a local kernel.

        q(z) = t_nu(z; m, C)        accepted with probability min(1, p(z') q(z) / ( p(z) q(z') ))

    It moves particles, `SMC(kernel=Independence())`: m and C are mean and covariance of the other half of them. (C is
    the matrix of the t distribution, whose own covariance is larger.) Where q fits, a particle forgets at once where it
    was, also between modes. Where q hardly ever proposes a part of p (a small separate mode, the neck of a funnel),
    particles there would never move by q alone; so each proposal, of one evaluation, is followed by a local step.

    Args:
        degrees: of freedom, a whole number nu: few for heavy tails of p, in which a particle would stay for long; many
            where p is nearly normal.
        local: the kernel of the step that follows each proposal; its metric says in which coordinates q is fitted.

    Raises:
        EnergyError: for degrees of freedom that are no positive whole number, and for unadjusted MCLMC.

    References:
        Tierney (1994), Markov chains for exploring posterior distributions; Chopin (2002), A sequential particle filter
        method for static models.
    """

    degrees: int = 5
    local: HMC | MALA | MCLMC = dataclasses.field(default_factory=lambda: HMC(max_leapfrogs=64))
    name = "Independence"

    def __post_init__(self):
        if not isinstance(self.degrees, int) or self.degrees < 1:
            raise EnergyError(f"degrees of freedom are a positive whole number; got {self.degrees}.")
        require_adjusted(self.local, self.name)

    @property
    def target_accept(self) -> float:
        return self.local.target_accept

    @property
    def metric(self) -> Metric:
        return self.local.metric

    def kernel(self) -> Kernel:
        local = self.local.kernel()

        def step(
            key: PRNGKey, state: State, log_density: LogDensity, tuning: Tuning, num_steps: Array
        ) -> tuple[State, Stats]:
            key_jump, key_proposal, key_local = jax.random.split(key, 3)
            there = local.init(self._draw(key_proposal, tuning), log_density)
            jumped, jump_rate = self._jumps(key_jump, state, there, tuning)
            state = jax.tree.map(lambda new, old: jnp.where(jumped, new, old), there, state)
            state, stats = local.step(key_local, state, log_density, tuning, num_steps)
            return state, stats | {
                "jump_rate": jump_rate,
                "nan_energy": stats["nan_energy"] | jnp.isnan(there.logdensity),
                "infinite_density": stats["infinite_density"] | (there.logdensity == jnp.inf),
            }

        return Kernel(local.init, step, local.length, jumps=1)

    def _jumps(self, key: PRNGKey, here: State, there: State, tuning: Tuning) -> tuple[Array, Array]:
        """Whether a proposal is accepted, and with which probability; one without a number never is."""

        def log_proposal(_: State, to: State) -> Array:
            return self._log_density(to.position, tuning)

        # Drawn and evaluated by the caller, since BlackJAX tells of the accepted state alone.
        start = random_walk.RWState(here.position, here.logdensity)
        blackjax_kernel: Callable = random_walk.build_irmh()
        _, info = blackjax_kernel(key, start, lambda _: there.logdensity, lambda _: there.position, log_proposal)
        return info.is_accepted, info.acceptance_rate

    def _draw(self, key: PRNGKey, tuning: Tuning) -> Array:
        """A point z of the proposal: normal numbers over the root mean square of nu others."""
        dim = tuning.centre.size
        normal = jax.random.normal(key, (dim + self.degrees,), tuning.centre.dtype)
        u = tuning.centre + tuning.scale.times(normal[:dim] / jnp.sqrt(jnp.mean(normal[dim:] ** 2)))
        return u if tuning.centring is None else tuning.centring.place(u)[0]

    def _log_density(self, z: Array, tuning: Tuning) -> Array:
        """Of the proposal at z, up to a constant."""
        u, log_det = (z, 0.0) if tuning.centring is None else tuning.centring.coordinates(z)
        x = tuning.scale.whitened(u - tuning.centre)
        return log_det - (self.degrees + x.size) / 2 * jnp.log1p(x @ x / self.degrees)


Mover = HMC | MALA | MCLMC | Independence
"""What may move particles: kernels that leave their target invariant (MCLMC where it is adjusted)."""


def require_chains(sampler: object, what: str) -> None:
    """Raises for a kernel that only particles can be moved by."""
    if isinstance(sampler, Independence):
        raise EnergyError(
            f"Independence proposes from a density fitted to particles, which {what} does not have: use it as "
            "SMC(kernel=Independence()), or another kernel here."
        )
