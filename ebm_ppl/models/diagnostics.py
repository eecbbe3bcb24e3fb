"""What the latents of a model with an encoder are worth: what each says of the data, and whether the prior fits them.

    information    I_i = mean_x KL( q(z_i | x) || N(m_i, v_i) )      m_i, v_i: of z_i over all data; 0 where z_i is dead
    rate           mean_x KL( q(z | x) || p(z) )                      nats that all latents take together
    active         variance over the data of E_q[z_i | x] > .01
    prior hole     area under the curve of a classifier of z ~ q(z | x), x of the data, from z ~ p(z)
                   1/2 where the prior is the aggregate posterior; near 1 where draws of it are unlike all data

I_i is an upper bound of the mutual information of x and z_i, whatever the prior. R-hat and effective sizes of latents
that were sampled are ArviZ's, of what `ebm_ppl.sample` returns.

References:
    Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders; Hoffman and Johnson (2016), ELBO surgery;
    Rosca, Lakshminarayanan and Mohamed (2018), Distribution matching in variational inference; Aneja, Schwing, Kautz
    and Vahdat (2021), A contrastive learning approach for training variational autoencoder priors.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.evaluate.two_sample import classifier_auc
from ebm_ppl.models.latent import LatentModel
from ebm_ppl.typing import Array, ArrayLike, EnergyShapeError, EnergyWarning, PRNGKey, as_key

if TYPE_CHECKING:
    import xarray as xr

ACTIVE = 0.01
"""Variance of a mean, in units of the prior's, above which a latent is active."""


def latent_diagnostics(key: PRNGKey, model: LatentModel, data: ArrayLike) -> xr.DataTree:
    """What each latent says of the data, and whether the prior has holes; see the module docstring.

    Dead latents are warned of.

    Args:
        model: with an encoder.
        data: events that it was not trained on, shape (num, *event_shape).

    Returns:
        A DataTree with the groups

        - `latents`: (latent) `information` in nats, `variance_of_mean`, `active`; and `rate`, without log Z of a tilted
          prior where it is not known;
        - `prior_hole`: `auc` and its `std_error`;
        - `posterior`, `prior`: (chain, draw) z, a draw of the encoder for each event and as many of the prior.

    Raises:
        EnergyShapeError: for events of another shape than the model's.
        EnergyError: for a model without an encoder.

    References: Burda et al. (2016); Hoffman and Johnson (2016).

    Example:
        >>> tree = ebm_ppl.latent_diagnostics(jax.random.key(0), fitted.energy, held_out)
        >>> tree["prior_hole"]["auc"].item(), tree["latents"]["active"].sum().item()
    """
    import xarray as xr
    from arviz_base import from_dict

    key_guess, key_prior, key_classifier = jax.random.split(as_key(key), 3)
    data = jnp.asarray(data)
    if data.shape[1:] != model.event_shape:
        raise EnergyShapeError(f"data has shape {data.shape}; an event of the model has shape {model.event_shape}.")
    z, rate, mean, variance = (np.asarray(each) for each in _guesses(key_guess, model, data))
    prior = np.asarray(model.sample_latents(key_prior, len(data)))
    spread = np.var(mean, axis=0)
    overall = spread + np.mean(variance, axis=0)
    information = np.mean(np.log(overall / variance), axis=0) / 2
    active = spread > ACTIVE
    if not np.all(active):
        warnings.warn(
            f"{np.sum(~active)} of {len(active)} latents say nothing of the data (posterior collapse): "
            f"{np.flatnonzero(~active).tolist()}. Fewer latents, a smaller beta or a weaker decoder help.",
            EnergyWarning,
            stacklevel=2,
        )
    area = classifier_auc(key_classifier, prior, z)
    tree = from_dict({"posterior": {"z": z[None]}, "prior": {"z": prior[None]}})
    columns = {"information": information, "variance_of_mean": spread, "active": active}
    latents = {name: ("latent", each) for name, each in columns.items()}
    tree["latents"] = xr.DataTree(xr.Dataset(latents | {"rate": float(np.mean(rate))}))
    tree["prior_hole"] = xr.DataTree(xr.Dataset({"auc": area.value, "std_error": area.std_error}))
    return tree


@eqx.filter_jit
def _guesses(key: PRNGKey, model: LatentModel, data: Array) -> tuple[Array, Array, Array, Array]:
    """A draw for each event, its log q(z | x) - log p(z), and means and variances of the guess."""
    guess: Any = model.posterior_guess(data)
    z = guess.sample(key)
    return z, guess.log_prob(z) - model.prior.log_prob(z), guess.mean, guess.variance
