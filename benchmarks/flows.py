"""Normalising flows: likelihood and speed beside flowjax's own trainer, modes by energies alone, and neural transport.

likelihood     two moons: test log-likelihood, and steps a second of processor time, of the same untrained flow
modes          three densities of known weights, from their energies: largest error of a weight, smallest share of
               its weight that a mode got; particles and forward KL, and plain reverse KL beside it
transport      least bulk ESS of 4 x 1000 draws, for 1000 gradients of these draws, of NUTS with a diagonal metric
               (plain), as it is by default (it learns to centre) and in the space of a flow; mean and sd of the first
               coordinate say whether draws are right (of the turned funnel, along the axis of the neck); the funnel
               and the banana are one energy each, and the turned funnel one whose scale follows no coordinate
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from densities import DENSITIES
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow, masked_autoregressive_flow
from flowjax.train import fit_to_data
from flowjax.train.losses import MaximumLikelihoodLoss
from jax.scipy.special import logsumexp
from records import timed

import ebm_ppl as ebm

NUM, BATCH, EPOCHS = 10_000, 128, 30
# Each is one object, since flowjax compiles anew for another.
LOSS, ADAM = MaximumLikelihoodLoss(), optax.adam(1e-3)
PLANE = Normal(jnp.zeros(2))
SPLINE = RationalQuadraticSpline(knots=8, interval=4)
FLOWS: dict[str, Callable[[Any], Any]] = {
    "coupling splines": lambda key: coupling_flow(key, base_dist=PLANE, transformer=SPLINE),
    "masked autoregressive": lambda key: masked_autoregressive_flow(key, base_dist=PLANE),
}
CIRCLE, SIDE = np.arange(8) * np.pi / 4, 0.7 * np.arange(-2, 3)
MODES = {
    "8 Gaussians": (1.5 * np.stack([np.cos(CIRCLE), np.sin(CIRCLE)], axis=1), 0.15, np.arange(1.0, 9) / 36),
    "25 Gaussians": (np.stack(np.meshgrid(SIDE, SIDE), axis=-1).reshape(-1, 2), 0.1, np.full(25, 1 / 25)),
    "two modes": (np.array([[-10.0, 0.0], [6.0, 0.0]]), 1.0, np.array([0.25, 0.75])),
}


def likelihood(seed: int) -> None:
    density, rng = DENSITIES["two moons"](), np.random.default_rng(seed)
    data, test = (density.sample(rng, num).astype(np.float32) for num in (NUM, 20_000))
    few = NUM // 10
    each = (NUM - few) // BATCH
    for name, make in FLOWS.items():
        flow, key = make(jax.random.key(seed)), jax.random.key(seed + 1)
        how: dict[str, Any] = {"loss_fn": LOSS, "optimizer": ADAM, "max_patience": EPOCHS, "batch_size": BATCH}

        def theirs(flow: Any = flow, key: Any = key, how: Any = how) -> Any:
            return fit_to_data(key, flow, data, max_epochs=EPOCHS, show_progress=False, **how)[0]

        def ours(flow: Any = flow, key: Any = key) -> Any:
            how: dict[str, Any] = {"held_out": data[:few], "every": each, "averaging": 0.99, "progress_bar": False}
            model, objective, num_steps = ebm.FlowModel(flow), ebm.MaximumLikelihood(), EPOCHS * each
            return ebm.fit(
                key, model, data[few:], objective, num_steps=num_steps, batch_size=BATCH, optimiser=ADAM, **how
            ).energy.flow

        for trainer, work in {"flowjax": theirs, "ebm_ppl": ours}.items():
            work()  # to compile it
            spent, fitted = timed(work)
            value = float(jnp.mean(fitted.log_prob(test)))
            print(f"| {name} | {trainer} | {seed} | {value:.4f} | {EPOCHS * each / spent:.0f} |")
            sys.stdout.flush()
    print(f"| (the density itself) | | {seed} | {np.mean(density.log_density(test)):.4f} | |")


def one_energy(log_density: Callable[[jax.Array], jax.Array], dim: int, scale: float) -> ebm.Target:
    """A normalised density as one energy over a wide normal base, so that log Z = 0."""
    base = dist.Normal(0.0, scale).expand([dim]).to_event(1)

    def model() -> None:
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: base.log_prob(x) - log_density(x), base))

    return ebm.target(model)


def modes(seed: int) -> None:
    for name, (centres, scale, weights) in MODES.items():

        def log_density(x: Any, centres: Any = centres, scale: Any = scale, weights: Any = weights) -> Any:
            squares = jnp.sum((x - centres) ** 2, axis=1)
            return logsumexp(jnp.log(weights) - squares / (2 * scale**2)) - jnp.log(2 * jnp.pi * scale**2)

        target = one_energy(log_density, 2, 8.0 if name == "two modes" else 2.0)
        plain = {"sampler": None, "divergence": "reverse", "num_by_energy": 2000}
        for method, how in {"particles, forward KL": {}, "reverse KL alone": plain}.items():
            fitted = ebm.fit_flow_to(jax.random.key(seed), target, progress_bar=False, **how)
            found = ebm.mode_weights(fitted.flow.sample(jax.random.key(seed + 1), (40_000,)), centres).weight
            error, least = np.max(np.abs(found - weights)), np.min(found / weights)
            share, k = (fitted.log_z.diagnostics[each] for each in ("effective_share", "pareto_k"))
            told = f"{fitted.log_z.value:.3f} ± {fitted.log_z.std_error:.3f} | {len(fitted.log_z.doubts)}"
            print(f"| {name} | {method} | {seed} | {error:.3f} | {least:.2f} | {share:.0%} | {k:.2f} | {told} |")
            sys.stdout.flush()


def funnel(z: jax.Array) -> jax.Array:
    """Neal's, in ten dimensions."""
    return dist.Normal(0.0, 3.0).log_prob(z[0]) + jnp.sum(dist.Normal(0.0, jnp.exp(z[0] / 2)).log_prob(z[1:]))


def banana(z: jax.Array) -> jax.Array:
    """Haario's, with b = .1."""
    return dist.Normal(0.0, 10.0).log_prob(z[0]) + dist.Normal(0.1 * (z[0] ** 2 - 100.0), 1.0).log_prob(z[1])


def transport(seed: int) -> None:
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 10)))[0].astype(np.float32)
    reverse = {"divergence": "reverse"}
    # The last is what the coordinate that tells of the draws is along.
    problems = {
        "banana, 2-d (0, 10)": (banana, 2, 20.0, {}, np.eye(2)[0]),
        "funnel, 10-d (0, 3)": (funnel, 10, 10.0, reverse, np.eye(10)[0]),
        "turned funnel, 10-d (0, 3)": (lambda z: funnel(turn.T @ z), 10, 10.0, reverse, turn[:, 0]),
    }
    for name, (log_density, dim, scale, how, axis) in problems.items():
        target, flow = one_energy(log_density, dim, scale), ebm.affine_coupling_flow(dim)
        fitted = ebm.fit_flow_to(jax.random.key(seed), target, flow, progress_bar=False, **how)
        trained = fitted.log_z.diagnostics["num_evaluations"]
        moved = ebm.transported(target, fitted.flow)
        runs = {
            "plain": (target, ebm.NUTS(metric="diag")),
            "by default": (target, ebm.NUTS()),
            "in the flow's space": (moved, ebm.NUTS()),
            "the same, target_accept=.95": (moved, ebm.NUTS(target_accept=0.95)),
        }
        for method, (each, sampler) in runs.items():
            try:
                data = ebm.sample(jax.random.key(seed + 1), each, sampler, progress_bar=False)
            except ebm.EnergyError as error:  # where the flow has run off
                print(f"| {name} | {method} | {seed} | {str(error).split('.')[0]} ||||||", flush=True)
                continue
            effective, told = judged(data, axis)
            gradients, divergent = int(data["sample_stats"]["n_steps"].sum()), data.attrs["num_divergent"]
            cost = f"{trained:.0f}" if each is moved else ""
            rate = f"{effective:.0f} | {1000 * effective / gradients:.2f}"
            print(f"| {name} | {method} | {seed} | {rate} | {told} | {divergent} | {cost} |")
            sys.stdout.flush()


def judged(data: Any, axis: np.ndarray) -> tuple[float, str]:
    """The least bulk ESS of a coordinate; mean and sd along an axis, with their Monte Carlo errors."""
    from arviz_stats import ess, mcse

    draws: Any = data["posterior"].to_dataset()
    effective: Any = ess(draws, method="bulk")
    along = draws.assign(along=(("chain", "draw"), draws["x"].values @ axis))[["along"]]
    values = along["along"].values
    errors: list[float] = [float(mcse(along, method=kind)["along"]) for kind in ("mean", "sd")]  # pyright: ignore
    told = f"{values.mean():.2f} ± {errors[0]:.2f} | {values.std():.2f} ± {errors[1]:.2f}"
    return float(effective["x"].min()), told


TABLES = {
    "likelihood": (
        likelihood,
        "| flow | trainer | seed | test log-likelihood | steps a second |\n|---|---|---|---|---|",
    ),
    "modes": (
        modes,
        "| density | method | seed | largest error | least share | effective | Pareto k | log Z (exact 0) | doubts |\n"
        "|---|---|---|---|---|---|---|---|---|",
    ),
    "transport": (
        transport,
        "| target (mean, sd) | NUTS | seed | least bulk ESS | for 1000 gradients | mean | sd | divergences "
        "| evaluations to train |\n|---|---|---|---|---|---|---|---|---|",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore", ebm.EnergyWarning)  # they are in the tables, as doubts and divergences
    for name in options.tables:
        run, head = TABLES[name]
        print(f"\n{name}\n\n{head}")
        for seed in range(options.seeds):
            run(seed)


if __name__ == "__main__":
    main()
