"""An energy by contrast with draws of something known: no sampling of the model.

    noise contrast          a classifier of data from draws of a density n that is known:
                            G(x) = -V(x) - c - log n(x) - log(ratio)       c is learned with the energy, and is log Z
    energy discrepancy      data against their own neighbours x + sqrt(t) (e + e'_j):
                            E log( w/M + 1/M sum_j exp(V(x) - V(x_j)) )     likelihood where t is large, score matching
                                                                            where it is small

Noise contrast is as good as its noise is near the data: where a classifier has no error left, there is nothing to
learn.

References:
    Gutmann and Hyvarinen (2012), Noise-contrastive estimation of unnormalized statistical models; Schroder, Ou, Lim,
    Li, Vollmer and Duncan (2023), Energy discrepancies: a score-independent loss for energy-based models.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import logsumexp

from ebm_ppl.train.objective import Density, Metrics, Objective, check_base, log_prob
from ebm_ppl.typing import Array, EnergyError, PRNGKey


class NoiseContrast(Objective):
    """Noise-contrastive estimation: the energy and its log Z, by telling data from noise.

    The normaliser that is learned is that of `base(x) exp(-U(x))`, or of `exp(-U(x))` without a base: `log_z` in the
    record by step, and `parameters["log_z"]` of the result, which belongs to its energy.

    Where neither data nor noise ever are, nothing holds the energy: a noise that is narrower than the base leaves the
    tails of the density to chance. Without `noise` the base is both; a flow fitted to the data is the best of those.

    Args:
        noise: a NumPyro distribution of events with `sample` and `log_prob`, a `FlowDistribution`, say; the base where
            None.
        ratio: draws of the noise for each point of data.

    Reference: Gutmann and Hyvarinen (2012).
    """

    noise: dist.Distribution | None = None
    ratio: int = 1
    name = "noise contrast"
    is_comparable = True

    def __check_init__(self):
        if self.ratio < 1:
            raise EnergyError(f"ratio is a number of draws, at least 1; got {self.ratio}.")

    def init(self, key: PRNGKey, density: Density, data: Array) -> tuple[Any, Any]:
        if self._noise(density) is None:
            raise EnergyError("NoiseContrast needs noise to tell data from: pass noise=..., or base=... to fit.")
        check_base(self.noise, density.event_shape, "data", "noise")
        return {"log_z": jnp.zeros((), data.dtype)}, ()

    def _noise(self, density: Density) -> Any:
        return density.base if self.noise is None else self.noise

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        noise, num = self._noise(density), len(batch)
        drawn = noise.sample(key, (self.ratio * num,)).reshape(self.ratio * num, -1).astype(batch.dtype)

        def logit(x: Array) -> Array:
            log_noise = log_prob(noise, x.reshape(density.event_shape))
            return -density.total(x) - parameters["log_z"] - log_noise - jnp.log(float(self.ratio))

        of_data, of_noise = jax.vmap(logit)(batch), jax.vmap(logit)(drawn)
        loss = jnp.mean(jax.nn.softplus(-of_data)) + self.ratio * jnp.mean(jax.nn.softplus(of_noise))
        accuracy = (jnp.sum(of_data > 0) + jnp.sum(of_noise < 0)) / (num + len(drawn))
        return loss, (state, {"log_z": parameters["log_z"], "accuracy": accuracy.astype(batch.dtype)})


class EnergyDiscrepancy(Objective):
    """Energy discrepancy: the energy of data against that of their neighbours.

    Args:
        noise: standard deviation sqrt(t) of both steps to a neighbour, in units of the data.
        num_neighbours: M, for each point of data.
        stability: w, which keeps the loss finite where all neighbours lie higher.

    Reference: Schroder et al. (2023).
    """

    noise: float = 0.5
    num_neighbours: int = 16
    stability: float = 1.0
    name = "energy discrepancy"
    is_comparable = True
    is_continuous = True

    def __check_init__(self):
        if not self.noise > 0 or self.num_neighbours < 1 or not self.stability >= 0:
            raise EnergyError(f"noise is positive, num_neighbours 1 at least, stability not negative; got {self}.")

    def loss(
        self, key: PRNGKey, density: Density, parameters: Any, state: Any, batch: Array
    ) -> tuple[Array, tuple[Any, Metrics]]:
        key_there, key_back = jax.random.split(key)
        away = batch + self.noise * jax.random.normal(key_there, batch.shape, batch.dtype)
        shape = (self.num_neighbours, *batch.shape)
        neighbours = away + self.noise * jax.random.normal(key_back, shape, batch.dtype)
        # All points as one batch: of a batch of batches XLA makes products of matrices that take twice as long.
        points = jnp.concatenate([batch, neighbours.reshape(-1, batch.shape[1])])
        energies = jax.vmap(density.total)(points).reshape(-1, len(batch))
        gaps = energies[0] - energies[1:]
        if self.stability > 0:
            kept = jnp.full((1, len(batch)), jnp.log(self.stability), gaps.dtype)
            gaps = jnp.concatenate([gaps, kept])
        loss = jnp.mean(logsumexp(gaps, axis=0)) - jnp.log(float(self.num_neighbours))
        return loss, (state, {})
