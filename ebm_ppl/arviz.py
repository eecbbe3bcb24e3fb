"""Draws as an ArviZ-schema `xarray.DataTree`: the one form of every result.

    posterior          (chain, draw)      constrained latent and deterministic sites, equally weighted
    sample_stats       (chain, draw)      statistics of the sampler, and `energy_<name>` of each energy term
    log_likelihood     (chain, draw)      observed sites only, pointwise; never a factor
    observed_data                         observed values
    particles          (chain, particle)  weighted originals of a particle method, with `log_weight`
    smc                (chain, stage)     its path: beta, ess, accept_rate, ..., padded with NaN; at every stage what is
                                          known of log Z of the phase: log_z, log_z_std_error, total_evaluations
    log_z              (chain)            estimate and cost of each independent run, by phase; see `LogZ.runs`
    history            (run)              of `log_z_to_datatree`: what was known after each run
    tempering          (rung)             the ladder of parallel tempering: beta, rejection_rate, accept_rate, ...

A site whose log Z is missing has no log likelihood. Of draws of the prior the groups are `prior`, `sample_stats_prior`
and so on, so that both fit into one tree.

Names of dimensions come from the plates of the model, or from the user's `dims`. A tree takes `/` for a path: the
variable of a site `network/weight` is `network.weight`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import numpy as np

from ebm_ppl import parallel
from ebm_ppl.spec import variable
from ebm_ppl.target import Target
from ebm_ppl.typing import Array, Draws, LogZ

if TYPE_CHECKING:
    import xarray as xr

Dims = Mapping[str, Sequence[str]]
Coords = Mapping[str, Any]


def to_datatree(
    target: Target,
    draws: Draws,
    *,
    group: str = "posterior",
    coords: Coords | None = None,
    dims: Dims | None = None,
    log_likelihood: bool = True,
) -> xr.DataTree:
    """A DataTree of the draws of a target.

    Args:
        group: `"posterior"` or `"prior"`, which says what the others are called, too.
        coords, dims: as in ArviZ, by name of dimension and of variable; they win over the names of plates.
        log_likelihood: whether to evaluate the pointwise log likelihood of the observed sites.
    """
    values, energies, likelihood = _read(target, draws.z, log_likelihood)
    stats = {name: np.asarray(value) for name, value in draws.stats.items()}
    stats |= {f"energy_{name}": value for name, value in energies.items()}
    suffix = "_prior" if group == "prior" else ""
    groups = {group: values, f"sample_stats{suffix}": stats, "log_likelihood": likelihood}
    observations = _observations(target)
    groups["observed_data"] = {name: value for name, (value, _) in observations.items()}
    tree = from_groups(target, groups, coords=coords, dims=dims)
    tree.attrs.update(draws.attrs)
    for name in (group, f"sample_stats{suffix}"):
        if name in tree:
            tree[name].attrs.update(draws.attrs)
    if observations:
        tree.attrs["data_id"] = _fingerprint(observations)
    _add_path(tree, target, draws, suffix, coords, dims)
    return tree


def from_groups(
    target: Target,
    groups: Mapping[str, Mapping[str, Any]],
    *,
    coords: Coords | None = None,
    dims: Dims | None = None,
) -> xr.DataTree:
    """ArviZ groups from dictionaries of arrays, with the names of dimensions that the model knows."""
    from arviz_base import from_dict

    known = {
        group: {variable(name): value for name, value in values.items()} for group, values in groups.items() if values
    }
    shapes = {
        name: np.shape(value)[0 if group == "observed_data" else 2 :]
        for group, values in known.items()
        for name, value in values.items()
    }
    return from_dict(known, coords=dict(coords or {}), dims=_dims(target, shapes, dims or {}))


def _dims(target: Target, shapes: Mapping[str, tuple[int, ...]], wanted: Dims) -> dict[str, list[str]]:
    """Names of dimensions of each variable: the user's, else the plate's, else ArviZ's default."""
    plates = {variable(name): names for name, names in target.spec.dims}
    wanted = {variable(name): names for name, names in wanted.items()}
    named = {}
    for name, shape in shapes.items():
        if name in wanted:
            named[name] = list(wanted[name])
            continue
        known = plates.get(name, ())[: len(shape)]
        known = known + (None,) * (len(shape) - len(known))
        named[name] = [_safe(plate, shapes) or f"{name}_dim_{axis}" for axis, plate in enumerate(known)]
    return named


def _safe(plate: str | None, variables: Mapping[str, Any]) -> str | None:
    """xarray cannot have a dimension with the name of a variable."""
    plate = plate and variable(plate)
    return f"{plate}_dim" if plate in variables or plate in ("chain", "draw") else plate


def prepare(target: Target, z: Any, log_likelihood: bool) -> None:
    """Whatever takes long in `to_datatree` before there are draws: `z` is any array of their shape."""
    import arviz_base  # noqa: F401

    parallel.prepare_over(_read_off, parallel.split(z)[0], target, log_likelihood)


def _read(target: Target, z: Any, log_likelihood: bool) -> tuple[dict, dict, dict]:
    """Constrained values, energies and log likelihoods of draws of shape (chain, draw, dim)."""
    parts = jax.device_get(parallel.over(_read_off, parallel.split(z), target, log_likelihood))
    return jax.tree.map(lambda *chains: np.concatenate(chains), *parts)


def _read_off(z: Array, target: Target, log_likelihood: bool) -> tuple[dict, dict, dict]:
    """All that is read off the draws of one chain."""
    factors = [name for name, role in target.spec.roles if role != "data"]
    known = set(target.spec.observed) - {*target.spec.unknown_constant, *target.spec.ignored}
    wants_likelihood = log_likelihood and bool(known) and not target.spec.discrete

    def one(z: Array) -> tuple[dict, dict, dict]:
        energies = {}
        if factors and not target.spec.discrete:
            energies = {name: energy for name, energy in target.energies(z).items() if name in factors}
        likelihood = target.log_likelihood(z) if wants_likelihood else {}
        likelihood = {name: value for name, value in likelihood.items() if name in known}
        return target.constrain(z), energies, likelihood

    return jax.vmap(one)(z)


def _observations(target: Target) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Observed values, and how much each of their elements counts."""
    return jax.device_get(_compiled_observations(target)) if target.spec.observed else {}


@eqx.filter_jit
def _compiled_observations(target: Target) -> dict[str, tuple[Array, Array]]:
    return target.observations()


def data_id(target: Target) -> str | None:
    """Fingerprint of the observed values, whatever their sites are called, with how much each of them counts.

    Values that a mask hides are no part of it. None without observed sites.
    """
    observations = _observations(target)
    return _fingerprint(observations) if observations else None


def model_id(target: Target) -> str:
    """Fingerprint of the sites of a model and of their roles; it does not see the numbers in it."""
    spec = target.spec
    facts = repr((spec.latents, spec.roles, spec.observed, spec.discrete))
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def log_z_to_datatree(log_z: LogZ) -> xr.DataTree:
    """A `LogZ` as a DataTree, which a netCDF file takes and `read_log_z` reads.

    Its group `log_z` has `value` and `std_error` in nats, `lower` and `upper` where the method brackets log Z, and by
    `chain` what each independent run says (`LogZ.runs`); `method`, `story` and `doubts`, a line for each sentence, and
    `diagnostics`, in JSON, are attributes. Its group `history` has by `run` what was known after each.

    Args:
        log_z: what `log_z` or `log_z_stream` returned, or a sum or difference, which has no runs.

    Example:
        >>> ebm_ppl.log_z_to_datatree(found).to_netcdf("log_z.nc", engine="h5netcdf")
    """
    import xarray as xr

    parts = "value", "std_error", "lower", "upper"
    group = xr.Dataset({name: part for name in parts if (part := getattr(log_z, name)) is not None})
    group = group.assign({name: ("chain", each) for name, each in log_z.runs.items()})
    group.attrs = {
        "method": log_z.method,
        **{name: as_lines(getattr(log_z, name)) for name in ("story", "doubts")},
        "diagnostics": json.dumps(dict(log_z.diagnostics), default=lambda x: np.asarray(x).tolist()),
    }
    groups = {"log_z": group} | ({"history": xr.Dataset.from_dataframe(log_z.history)} if log_z.runs else {})
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {"inference_library": "ebm_ppl"} | ({"data_id": log_z.data_id} if log_z.data_id else {})
    return tree


def as_lines(sentences: Sequence[str]) -> str:
    """Sentences as an attribute of a group, a line for each."""
    return "\n".join(" ".join(sentence.split()) for sentence in sentences)


def _fingerprint(observations: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    digests = sorted(_digest(*each) for each in observations.values())
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _digest(value: np.ndarray, weight: np.ndarray) -> str:
    """Of the numbers of one site, in whatever type they are held."""
    parts = [value]
    if not np.all(weight == 1):
        value, weight = np.broadcast_arrays(value, weight)
        parts = [np.where(weight == 0, 0, value).astype(value.dtype), weight]
    numbers = [_same_for_any_type(part) for part in parts]
    return hashlib.sha256(repr([np.shape(part) for part in parts]).encode() + b"".join(numbers)).hexdigest()


def _same_for_any_type(x: np.ndarray) -> bytes:
    """Double precision, with what it leaves of long integers; one zero and one NaN."""
    x = np.asarray(x)
    numbers = x.astype(np.float64) + 0.0
    left = x - numbers.astype(x.dtype) if np.issubdtype(x.dtype, np.integer) else np.zeros(())
    return np.where(np.isnan(numbers), np.nan, numbers).tobytes() + (left.tobytes() if np.any(left) else b"")


def _add_path(
    tree: xr.DataTree, target: Target, draws: Draws, suffix: str, coords: Coords | None, dims: Dims | None
) -> None:
    """The groups of tempered methods, rectangular and safe for netCDF."""
    import xarray as xr

    if draws.particles is not None:
        values, _, _ = _read(target, draws.particles["z"], False)
        values["log_weight"] = np.asarray(draws.particles["log_weight"])
        weighted = from_groups(target, {"posterior": values}, coords=coords, dims=dims)["posterior"].to_dataset()
        tree[f"particles{suffix}"] = xr.DataTree(weighted.rename(draw="particle"))
    if draws.stages is not None:
        each = draws.stages["num_evaluations"].astype(float)
        so_far = {"total_evaluations": np.where(np.isnan(each), np.nan, np.nancumsum(each, axis=1))}
        path = {
            name: (("chain", "stage")[2 - np.ndim(value) :], np.asarray(value))
            for name, value in (draws.stages | so_far).items()
        }
        tree[f"smc{suffix}"] = xr.DataTree(xr.Dataset(path))
    if draws.log_z is not None:
        runs = {name: ("chain", value) for name, value in draws.log_z.items()}
        tree[f"log_z{suffix}"] = xr.DataTree(xr.Dataset(runs))
    if draws.tempering is not None:
        rungs = {name: ("rung", value) for name, value in draws.tempering.items()}
        tree[f"tempering{suffix}"] = xr.DataTree(xr.Dataset(rungs))
