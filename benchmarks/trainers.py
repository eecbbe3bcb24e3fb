"""How each tool trains an energy on the plane: our objectives, and their equivalents in ebmkit and torchebm.

    TOOLS[tool].objectives                 names of what it has; equal names are equal work
    trainer = TOOLS[tool](objective)       once a process and objective
    run = trainer.train(seed, data, steps)
    run.energy(points)                     of the trained network, by the tool's own library; ours with its base

The same for all: a perceptron of `DEPTH` hidden layers of `WIDTH` units with SiLU (the network of ebmkit's README; each
library starts its weights in its own way), batches of `BATCH`, Adam whose rate falls from `RATE` to zero along a
cosine, `MOVES` Langevin moves of step size `STEP_SIZE`, one noise level, one noise distribution to contrast with.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

WIDTH, DEPTH, BATCH = 128, 2, 256
RATE = 5e-3
MOVES, STEP_SIZE = 10, 0.01
WALKERS = 4096
"""In a replay buffer."""
RESTART = 0.05
"""Share of the walkers of a step that start anew: the default of ebmkit."""
SIGMA = 0.1
"""Of denoising score matching; the default of ebmkit and of ours."""
WIDE = 1.5
"""Standard deviation of the normal distribution that data are told from, and of our base."""
NEAR = 0.3
"""Noise of energy discrepancy."""
NEIGHBOURS = 4
"""Of each point in energy discrepancy; the default of ebmkit. Ours is 16, which has a row of its own."""
DRAWS = 4096
"""Of the base in each step of the Monte Carlo likelihood."""
CHUNK = 100
"""Steps of a compiled program of ours."""

SCORE, SLICED, DENOISING = "score matching", "sliced score matching", "denoising score matching"
NOISE, DISCREPANCY, NEIGHBOURLY = "noise contrast", "energy discrepancy", "energy discrepancy, 16 neighbours"
CD, PCD, ADJUSTED, JARZYNSKI = "CD-10", "PCD-10", "PCD-5, MALA", "Jarzynski, MALA"
LIKELIHOOD = "Monte Carlo likelihood"
OBJECTIVES = SCORE, SLICED, DENOISING, NOISE, DISCREPANCY, NEIGHBOURLY, LIKELIHOOD, CD, PCD, ADJUSTED, JARZYNSKI


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained energy.

    Attributes:
        energy: of points in single precision, shape (num, 2).
        seconds: of all steps.
        processor_seconds: the same on the clock of the process, which other processes do not disturb.
        compilation: seconds of the first steps, where programs were compiled for them; else zero.
    """

    energy: Callable[[np.ndarray], np.ndarray]
    seconds: float
    processor_seconds: float
    compilation: float = 0.0


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, its seconds, and those of the processor."""
    start, processor = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - start, time.process_time() - processor


class EbmPpl:
    """Ours, with a wide normal base."""

    objectives = OBJECTIVES

    def __init__(self, objective: str):
        import equinox as eqx
        import jax
        import numpyro.distributions as dist

        import ebm_ppl as ebm
        from ebm_ppl.train.walkers import Dynamics

        self.base = dist.Normal(0.0, WIDE).expand([2]).to_event(1)
        moves = Dynamics(num_moves=MOVES, step_size=STEP_SIZE)
        self.objective = {
            SCORE: lambda: ebm.ScoreMatching(),
            SLICED: lambda: ebm.ScoreMatching(num_slices=1),
            DENOISING: lambda: ebm.DenoisingScoreMatching(SIGMA),
            NOISE: lambda: ebm.NoiseContrast(),
            DISCREPANCY: lambda: ebm.EnergyDiscrepancy(NEAR, NEIGHBOURS),
            NEIGHBOURLY: lambda: ebm.EnergyDiscrepancy(NEAR),
            LIKELIHOOD: lambda: ebm.MonteCarloLikelihood(DRAWS),
            CD: lambda: ebm.ContrastiveDivergence(moves),
            PCD: lambda: ebm.PersistentContrastiveDivergence(WALKERS, RESTART, moves),
            ADJUSTED: lambda: ebm.PersistentContrastiveDivergence(WALKERS, RESTART, Dynamics(ebm.MALA(), MOVES // 2)),
            JARZYNSKI: lambda: ebm.Jarzynski(dynamics=Dynamics(ebm.MALA(), 1)),
        }[objective]()
        self.optimisers: dict[int, Any] = {}
        self.energies = eqx.filter_jit(lambda energy, x: jax.vmap(energy)(x) - self.base.log_prob(x))

    def train(self, seed: int, data: np.ndarray, steps: int) -> Run:
        import jax
        import optax

        import ebm_ppl as ebm

        # One optimiser for all runs: programs are compiled for the functions in it.
        is_first = steps not in self.optimisers
        optimiser = self.optimisers.setdefault(steps, optax.adam(optax.cosine_decay_schedule(RATE, steps)))
        energy = ebm.MLPEnergy(jax.random.key(seed), 2, WIDTH, DEPTH, jax.nn.silu)

        def fit(num_steps: int) -> Any:
            settings: dict[str, Any] = {"batch_size": BATCH, "every": CHUNK, "progress_bar": False}
            return ebm.fit(
                jax.random.key(seed + 1),
                energy,
                data,
                self.objective,
                base=self.base,
                optimiser=optimiser,
                num_steps=num_steps,
                **settings,
            )

        compilation = timed(lambda: fit(CHUNK))[1] if is_first else 0.0
        fitted, *seconds = timed(lambda: fit(steps))
        return Run(lambda x: np.asarray(self.energies(fitted.energy, x)), *seconds, compilation)


class EbmKit:
    """ebmkit by its `Trainer`; contrastive divergence with its replay buffer, as its README has it."""

    objectives = SCORE, SLICED, DENOISING, NOISE, DISCREPANCY, PCD

    def __init__(self, objective: str):
        self.objective = objective

    def _loss(self) -> Any:
        import ebm
        import torch
        from torch.distributions import Independent, Normal

        noise = Independent(Normal(torch.zeros(2), torch.full((2,), WIDE)), 1)
        return {
            SCORE: lambda: ebm.losses.ExactScoreMatching(),
            SLICED: lambda: ebm.losses.SlicedScoreMatching(),
            DENOISING: lambda: ebm.losses.DenoisingScoreMatching(SIGMA),
            NOISE: lambda: ebm.losses.NoiseContrastiveEstimation(noise),
            DISCREPANCY: lambda: ebm.losses.EnergyDiscrepancy(NEAR, NEIGHBOURS),
            PCD: lambda: ebm.ContrastiveDivergence(
                ebm.LangevinDynamics(STEP_SIZE, MOVES), ebm.ReplayBuffer(WALKERS, (2,), RESTART)
            ),
        }[self.objective]()

    def train(self, seed: int, data: np.ndarray, steps: int) -> Run:
        import ebm
        import torch

        torch.manual_seed(seed)
        energy, loss, points = ebm.nets.MLPEnergy(2, (WIDTH,) * DEPTH), self._loss(), torch.as_tensor(data)
        optimiser, schedule = adam([*energy.parameters(), *loss.parameters()], steps)
        trainer = ebm.Trainer(energy, loss, optimiser, callback=lambda step, out: schedule.step())
        _, *seconds = timed(lambda: trainer.fit(points, steps, BATCH, verbose=False))
        return Run(evaluated(energy), *seconds)


class TorchEbm:
    """torchebm in the loop of its README; its losses with the settings of their documentation."""

    objectives = SCORE, SLICED, DENOISING, CD, PCD

    def __init__(self, objective: str):
        self.objective = objective

    def _loss(self, model: Any) -> Any:
        from torchebm import losses
        from torchebm.samplers import LangevinDynamics

        sampler = LangevinDynamics(model, step_size=STEP_SIZE, noise_scale=1.0)
        return {
            SCORE: lambda: losses.ScoreMatching(model, hessian_method="exact"),
            SLICED: lambda: losses.SlicedScoreMatching(model, n_projections=1),
            DENOISING: lambda: losses.DenoisingScoreMatching(model, noise_scale=SIGMA),
            CD: lambda: losses.ContrastiveDivergence(model, sampler, k_steps=MOVES),
            PCD: lambda: losses.ContrastiveDivergence(
                model, sampler, k_steps=MOVES, persistent=True, buffer_size=WALKERS
            ),
        }[self.objective]()

    def train(self, seed: int, data: np.ndarray, steps: int) -> Run:
        import torch
        from torch import nn
        from torchebm.core import BaseModel

        class Energy(BaseModel):
            def __init__(self):
                super().__init__()
                widths = (2, *(WIDTH,) * DEPTH)
                hidden = [[nn.Linear(a, b), nn.SiLU()] for a, b in itertools.pairwise(widths)]
                self.net = nn.Sequential(*(layer for pair in hidden for layer in pair), nn.Linear(WIDTH, 1))

            def forward(self, x: Any) -> Any:
                return self.net(x).squeeze(-1)

        torch.manual_seed(seed)
        energy, points = Energy(), torch.as_tensor(data)
        loss_of = self._loss(energy)
        optimiser, schedule = adam(energy.parameters(), steps)

        def loop() -> None:
            for _ in range(steps):
                loss: Any = loss_of(points[torch.randint(len(points), (BATCH,))])
                loss = loss[0] if isinstance(loss, tuple) else loss
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()

        _, *seconds = timed(loop)
        return Run(evaluated(energy), *seconds)


def adam(parameters: Any, steps: int) -> tuple[Any, Any]:
    """Adam and its schedule, in PyTorch."""
    import torch

    optimiser = torch.optim.Adam(parameters, lr=RATE)
    return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)


def evaluated(energy: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A network of PyTorch as a function of arrays."""
    import torch

    def energies(points: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return energy(torch.as_tensor(points)).numpy()

    return energies


TOOLS: dict[str, Any] = {"ebm_ppl": EbmPpl, "ebmkit": EbmKit, "torchebm": TorchEbm}
OURS = "ebm_ppl"
