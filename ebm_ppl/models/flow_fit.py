"""A flow that looks like a target, learned from its energies alone: a Boltzmann generator.

    z = m + F T(u)                                          m and F from the points below: T is near the identity
    1   points     z_i ~ p by tempered SMC                  from the reference on (`smc.py`)
    2   example    max_T  mean_i log q(z_i)                 KL(p || q): covers all modes that there are points of
    3   energy     max_T  sum_i w_i log q(z_i)              the same, by draws of q, w ~ p / q        `ForwardKL`
                   min_T  E_q[log q(z) - log p(z)]          or KL(q || p), by gradients of p          `ReverseKL`
    4   weights    w = p / q of fresh draws                 how good q is, and log Z

KL(q || p) by itself, the usual variational inference, is content with a mode or two: where q has no mass p does not
count. What is more, it leaves modes that it was started with. KL(p || q) cannot: where q has too little of a mode, the
few draws there have large weights. It has to see the mode once, which is what the particles are for; then the third
step, whose draws have no end, corrects the shares of the modes, too. KL(q || p) has gradients of p in return, which go
through the draws alone (Roeder et al.) and so have no noise where q is p: of use with one mode in many dimensions.

Weights of q's draws alone know nothing of modes that q has lost, so that a share `DEFENCE` of the draws are the
reference's, in the third step and the fourth: a mode that only these find has large weights. A log Z of the particles
that contradicts that of the weights is a doubt, too.

References:
    Noe, Olsson, Koehler and Wu (2019), Boltzmann generators: Sampling equilibrium states of many-body systems with deep
    learning; Roeder, Wu and Duvenaud (2017), Sticking the landing; Midgley, Stimper, Simm, Schoelkopf and
    Hernandez-Lobato (2023), Flow annealed importance sampling bootstrap; Arbel, Matthews and Doucet (2021), Annealed
    flow transport Monte Carlo; Hesterberg (1995), Weighted average importance sampling and defensive mixture
    distributions.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc.ess import log_ess

from ebm_ppl.arviz import data_id
from ebm_ppl.evidence import weigh
from ebm_ppl.flow import optimiser, reverse_divergence
from ebm_ppl.logz.importance import BLOCKS, FAIR_SHARE, Weighed, draw_own, weighed
from ebm_ppl.logz.integral import CONTRADICTION, LARGEST_K, Opinion, draw_reference, draws_of_reference, opinion_of
from ebm_ppl.models.flow_model import FlowModel
from ebm_ppl.probe import check_tails
from ebm_ppl.rebase import Rebased
from ebm_ppl.scale import location_and_scale
from ebm_ppl.smc import SMC
from ebm_ppl.target import Target, log_joint
from ebm_ppl.train.fit import Fitted, fit
from ebm_ppl.train.likelihood import MaximumLikelihood
from ebm_ppl.train.objective import Density, Metrics, Objective, without_gradient
from ebm_ppl.typing import Array, EnergyError, EnergyShapeError, EnergyWarning, LogZ, PRNGKey, as_key, with_error

if TYPE_CHECKING:
    import xarray as xr

METHOD = "importance sampling from a flow"
DEFENCE = 0.05
"""Share of the reference in the draws that are weighed."""
NUM_POINTS = 2048
"""Draws of the reference that tell mean and scale where there are no particles."""
HELD_OUT, EVERY, PATIENCE = 0.1, 100, 5
"""Share of the particles that judges the likelihood, steps between judgements, and how many without a gain end it."""
AVERAGING = 0.99
"""Decay of the average of the parameters over steps."""
LAYERS, WIDTH, KNOTS, INTERVAL = 8, 64, 8, 4.0
"""Of the flow where none is given: its splines are the identity beyond four standard deviations."""


class FittedFlow(NamedTuple):
    """A flow that looks like a target."""

    flow: Any
    """Of flowjax, of points in unconstrained space, shape (dim,): for `transported`, `FlowModel`, ..."""
    log_z: LogZ
    """Of all energies at once, by weighted draws; in `diagnostics` `effective_share`, which is 1 at most less the share
    of draws of the reference, `pareto_k`, and `num_evaluations` of the log density in all."""
    record: xr.DataTree
    """Groups `example` and `energy`: loss and gradient norm of each step, and `example_held_out`."""


class Divergence(Objective):
    """Of a `FlowModel` from a target, by its own draws: the batch of data has no say in it.

    Args:
        target: p, up to its log Z, of points of shape (dim,).
        num_draws: of a step, each an evaluation of the target.
    """

    target: Target
    num_draws: int = 256
    is_comparable = False


class ForwardKL(Divergence):
    """`-E_p[log q]`, by weighted draws of the model and of the reference: Midgley et al. (2023)."""

    name = "forward KL"

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        model: Any = density.energy
        reference = without_gradient(_rebased(self.target, model))
        z, energies = jax.vmap(lambda key: draw_reference(key, reference))(jax.random.split(key, self.num_draws))
        log_weights = jnp.where(jnp.isnan(energies), -jnp.inf, -energies)
        weights = jax.nn.softmax(log_weights)
        of_model = jnp.where(weights > 0, weights * jax.vmap(model)(z), 0.0)
        return jnp.sum(of_model), (state, {"effective_share": jnp.exp(log_ess(log_weights)) / self.num_draws})


class ReverseKL(Divergence):
    """`E_q[log q - log p]`, by draws of the model: Roeder, Wu and Duvenaud (2017)."""

    name = "reverse KL"

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        model: Any = density.energy
        fixed, target = without_gradient((model, self.target))
        value = reverse_divergence(model.sample(key, self.num_draws), lambda z: -fixed(z) - log_joint(target, z))
        return value, (state, {})


def fit_flow_to(
    key: PRNGKey,
    target: Target,
    flow: Any = None,
    sampler: SMC | None = SMC(num_particles=4096),  # noqa: B008  # frozen
    *,
    divergence: Literal["forward", "reverse"] = "forward",
    num_by_example: int = 3000,
    num_by_energy: int = 1000,
    batch_size: int = 256,
    num_draws: int = 2**14,
    progress_bar: bool = True,
) -> FittedFlow:
    """Fits a flow to a target, by particles of tempered SMC and by its energies, and says how good it is.

    Args:
        target: from `ebm_ppl.target`.
        flow: to start from, of flowjax, of points of shape (dim,) in coordinates where the target has about unit scale;
            a coupling flow of splines by default. Both directions are taken: coupling flows are the fast ones.
        sampler: of the particles; None leaves them and `num_by_example` away. With `divergence="reverse"` that is plain
            variational inference, which loses modes.
        divergence: of the steps by energy: `"forward"`, which keeps to all modes, or `"reverse"`, which keeps to some
            and is the more precise one where there is one mode in many dimensions.
        num_by_example: steps of maximum likelihood at most; they end where particles held out gain nothing more.
        num_by_energy: steps by energy, of `batch_size` evaluations of the log density each, with its gradient for the
            reverse divergence.
        batch_size: particles, and draws, of a step.
        num_draws: that are weighed, a multiple of 16.
        progress_bar: whether to show progress.

    Raises:
        NoReferenceError, IntractablePartitionError: where log Z has no meaning for the model.
        EnergyError, EnergyShapeError: for another flow, or settings out of range.
        NonFiniteEnergyError: where the training runs off, with the step.

    Warns:
        EnergyWarning: where the weights say that flow and target differ, or log Z is not that of the particles.

    References: Noe et al. (2019); Roeder et al. (2017).

    Example:
        >>> fitted = ebm_ppl.fit_flow_to(jax.random.key(0), ebm_ppl.target(model, y=y))
        >>> fitted.log_z.diagnostics["effective_share"]
        >>> data = ebm_ppl.sample(jax.random.key(1), ebm_ppl.transported(target, fitted.flow))
    """
    _check_settings(divergence, num_by_example, num_by_energy, num_draws, sampler is None)
    key_flow, key_points, key_example, key_energy, key_weights = jax.random.split(as_key(key), 5)
    target.require_tractable()
    target.require_reference()
    check_tails(target, needs_normalisation=True)
    flow = _splines(key_flow, target.dim) if flow is None else flow
    if getattr(flow, "shape", None) != (target.dim,):
        raise EnergyShapeError(f"The flow is of points of shape {getattr(flow, 'shape', None)}, not ({target.dim},).")
    opinion = None
    if sampler is None:
        points = draw_own(key_points, target, NUM_POINTS)
    else:
        draws = weigh(key_points, target, sampler, 1, progress_bar)
        points, opinion = np.asarray(draws.z[0]), opinion_of(draws)
    model, records = FlowModel(_placed(flow, points)), {}
    how: dict[str, Any] = {"averaging": AVERAGING, "every": EVERY, "progress_bar": progress_bar}
    if sampler is not None and num_by_example:
        # The particles lie in the order of their ancestors.
        points = np.random.default_rng(np.asarray(jax.random.key_data(key_example))).permutation(points)
        few = max(int(HELD_OUT * len(points)), 1)
        how_long = {
            "num_steps": num_by_example,
            "batch_size": batch_size,
            "held_out": points[:few],
            "patience": PATIENCE,
        }
        found = fit(key_example, model, points[few:], MaximumLikelihood(), optimiser=optimiser(0), **how_long, **how)
        model, records["example"] = found.energy, found
    if num_by_energy:
        objective = (ForwardKL if divergence == "forward" else ReverseKL)(target, batch_size)
        how_long = {"num_steps": num_by_energy, "batch_size": 1}
        found = fit(key_energy, model, points, objective, optimiser=optimiser(num_by_energy), **how_long, **how)
        model, records["energy"] = found.energy, found
    final = _weights(key_weights, target, model, num_draws)
    doubts = tuple(_doubts(final, opinion))
    for doubt in doubts:
        warnings.warn(doubt, EnergyWarning, stacklevel=2)
    spent = num_by_energy * batch_size + num_draws + (0.0 if opinion is None else opinion.num_evaluations)
    diagnostics = {"effective_share": final.effective_share, "pareto_k": final.pareto_k, "num_evaluations": spent}
    log_z = LogZ(final.value, final.std_error, METHOD, data_id=data_id(target), diagnostics=diagnostics, doubts=doubts)
    return FittedFlow(model.flow, log_z, _joined(records))


def _check_settings(divergence: str, num_by_example: int, num_by_energy: int, num_draws: int, by_itself: bool) -> None:
    if divergence not in ("forward", "reverse"):
        raise EnergyError(f"divergence is 'forward' or 'reverse'; got {divergence!r}.")
    if num_draws < BLOCKS or num_draws % BLOCKS or num_by_example < 0 or num_by_energy < 0:
        raise EnergyError(
            f"num_draws is a multiple of {BLOCKS}, num_by_example and num_by_energy are not negative; got {num_draws}, "
            f"{num_by_example} and {num_by_energy}."
        )
    if by_itself and not num_by_energy:
        raise EnergyError("sampler=None leaves num_by_energy alone to train by, and it is zero.")


def _splines(key: PRNGKey, dim: int) -> Any:
    """A flow of coupling layers, each of which bends half of the coordinates by splines that depend on the others."""
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    transformer = RationalQuadraticSpline(knots=KNOTS, interval=INTERVAL)
    base = Normal(jnp.zeros(dim))
    return coupling_flow(
        key, base_dist=base, transformer=transformer, flow_layers=LAYERS, nn_width=WIDTH, nn_activation=jax.nn.silu
    )


def _placed(flow: Any, points: np.ndarray) -> Any:
    """The flow moved to where points are, with their scale."""
    from flowjax.bijections import TriangularAffine
    from flowjax.distributions import Transformed
    from paramax import non_trainable

    mean, scale = location_and_scale(jnp.asarray(points), jnp.ones(len(points), points.dtype))
    return Transformed(flow, non_trainable(TriangularAffine(mean, scale.factor)))


def _rebased(target: Target, model: FlowModel) -> Rebased:
    """The target over the flow, and a share of its own reference."""
    proposal: Any = _Proposal(model)
    return Rebased(target, proposal, jnp.asarray(DEFENCE))


class _Proposal(eqx.Module):
    """The density of a flow, one point at a time."""

    model: FlowModel

    def sample(self, key: PRNGKey) -> Array:
        return self.model.flow.sample(key)

    def log_density(self, z: Array) -> Array:
        return -self.model(z)


def _weights(key: PRNGKey, target: Target, model: FlowModel, num: int) -> Weighed:
    """What draws of the flow, and a few of the reference, weigh."""
    reference = _rebased(target, model)
    return weighed([draws_of_reference(key, reference, num)[1]])


def _doubts(final: Weighed, opinion: Opinion | None) -> list[str]:
    """What says that flow and target differ."""
    doubts = []
    if final.effective_share < FAIR_SHARE or final.pareto_k > LARGEST_K:
        doubts.append(
            f"The flow is not the target: {final.effective_share:.1%} of the weighted draws are effective, Pareto k "
            f"{final.pareto_k:.2f}. It has lost a mode or a tail, or is too small or too little trained: "
            "particles (sampler=SMC(...)), more steps or a larger flow help."
        )
    if opinion is not None:
        gap = abs(final.value - opinion.value)
        if gap > CONTRADICTION * math.hypot(final.std_error, opinion.std_error):
            doubts.append(
                f"log Z by the flow, {with_error(final.value, final.std_error)}, contradicts that of the particles, "
                f"{with_error(opinion.value, opinion.std_error)}: one of them has missed part of the target. More "
                "particles, or more moves of them, help."
            )
    return doubts


def _joined(records: dict[str, Fitted]) -> xr.DataTree:
    import xarray as xr

    groups = {}
    for name, found in records.items():
        groups[name] = found.record["training"].to_dataset()
        if "held_out" in found.record:
            groups[f"{name}_held_out"] = found.record["held_out"].to_dataset()
    return xr.DataTree.from_dict(groups)
