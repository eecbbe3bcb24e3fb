"""How far two samples are apart by the means and covariances of their features.

    d^2 = |m_x - m_y|^2 + tr( C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2 )

is the squared Wasserstein distance of two normal distributions with these moments. With features of a network that was
trained to tell images it is what is called the Frechet inception distance. It is biased upwards at finitely many
points, so that only distances of samples of the same sizes compare; and blind to all that moments do not show.

References:
    Dowson and Landau (1982), The Frechet distance between multivariate normal distributions; Heusel, Ramsauer,
    Unterthiner, Nessler and Hochreiter (2017), GANs trained by a two time-scale update rule; Chong and Forsyth (2020),
    Effectively unbiased FID and inception score and where to find them.
"""

from __future__ import annotations

import numpy as np

from ebm_ppl.train.objective import flat_pair
from ebm_ppl.typing import ArrayLike, EnergyError


def frechet_distance(x: ArrayLike, y: ArrayLike) -> float:
    """The squared Frechet distance of two samples of features.

    Args:
        x, y: features of events, shapes (num_x, num_features) and (num_y, num_features), in units of their own.

    Raises:
        EnergyShapeError: for features of different numbers.
        EnergyError: for fewer than two events, or features that are not finite.

    References: Dowson and Landau (1982); Heusel et al. (2017).

    Example:
        >>> ebm_ppl.frechet_distance(jax.vmap(features)(digits), jax.vmap(features)(draws))
    """
    x, y, _ = flat_pair(x, y)
    if min(len(x), len(y)) < 2:
        raise EnergyError(f"A covariance takes two events at least; got {len(x)} and {len(y)}.")
    samples = [np.asarray(each, float) for each in (x, y)]
    mean_x, mean_y = (np.mean(each, axis=0) for each in samples)
    of_x, of_y = (np.atleast_2d(np.cov(each, rowvar=False)) for each in samples)
    values, vectors = np.linalg.eigh(of_x)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    common = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ of_y @ root), 0.0))
    return float(np.sum((mean_x - mean_y) ** 2) + np.trace(of_x) + np.trace(of_y) - 2 * np.sum(common))
