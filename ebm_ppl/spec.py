"""What is static about a model: read off abstract traces of it, before anything is computed.

    latent sites         names and unconstrained shapes, the layout of the flat vector z
    energies             names and roles; prior energies first
    Jacobians            factor sites that exist only while NumPyro unconstrains
    Z(theta)             which unknown partition functions depend on which latent sites

This and `target.py` touch NumPyro's internals; `distribution.py` reads its stack of handlers.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to
from numpyro.distributions.util import is_identically_one
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.util import (
    _guess_max_plate_nesting,
    _substitute_default_key,
    _unconstrain_params,
    helpful_support_errors,
)

from ebm_ppl.dependence import dependencies
from ebm_ppl.distribution import ROLE_KEY, WRAPPERS, EnergyDistribution, reference_of, tilted_parts
from ebm_ppl.typing import Array, EnergyError, EnergyWarning, PRNGKey, Role

Trace = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static about a target: names, shapes, roles, and why some questions have no answer."""

    latents: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and unconstrained shape of each continuous latent site, in the order in which they fill `z`."""
    roles: tuple[tuple[str, Role], ...]
    """Name and role of each energy, prior energies first."""
    observed: tuple[str, ...]
    params: tuple[str, ...]
    """`numpyro.param` sites."""
    subsampled: tuple[str, ...]
    """Plates with a fixed part of their elements."""
    discrete: tuple[str, ...]
    """Discrete latent sites, summed out by enumeration."""
    intervals: frozenset[str]
    """Latent sites whose values lie between two bounds, at a place that is logistic in their coordinates."""
    jacobians: frozenset[str]
    dims: tuple[tuple[str, tuple[str | None, ...]], ...]
    """Names of the plates along the dimensions of each site's value."""
    plate_depth: int
    normalized: frozenset[str]
    """Latent `EnergyDistribution` sites whose log partition function was given."""
    is_hierarchical: bool
    """Whether the prior of a latent site, or a prior energy, depends on other latent sites."""
    intractable: tuple[tuple[str, tuple[str, ...]], ...]
    """Sites with an unknown Z(theta), each with the latent sites that it depends on."""
    ignored: tuple[str, ...]
    no_reference: tuple[str, ...]
    """Sentences: why the latent sites are no normalised measure."""
    unknown_constant: tuple[str, ...]
    """Observed `EnergyDistribution` sites with no log partition: the evidence lacks a constant."""

    @property
    def dim(self) -> int:
        return sum(math.prod(shape) for _, shape in self.latents)

    @property
    def site_numbers(self) -> np.ndarray:
        """Which of the latents each coordinate belongs to, shape (dim,)."""
        return np.repeat(np.arange(len(self.latents)), [math.prod(shape) for _, shape in self.latents])

    @property
    def is_logistic(self) -> np.ndarray:
        """Whether each coordinate is that of a site with two bounds, shape (dim,)."""
        return np.array([name in self.intervals for name, _ in self.latents], bool)[self.site_numbers]


def variable(name: str) -> str:
    """What a site is called in results, where `/` would be a path."""
    return name.replace("/", ".")


def analyse(model: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Spec, dict[str, Any]]:
    """Reads off a model's static description from abstract traces; only parameters are ever computed."""
    dynamic, static = eqx.partition((args, kwargs), eqx.is_array)
    key = jax.random.key(0)
    found: dict[str, Any] = {}

    def run(key: PRNGKey, dynamic: Any) -> tuple[dict[str, Any], dict[str, Array]]:
        args, kwargs = eqx.combine(dynamic, static)
        initialised = substitute(seed(model, key), substitute_fn=init_to_uniform)
        recorded = trace(initialised).get_trace(*args, **kwargs)
        found.update(_describe(recorded))
        constants = {
            name: site["value"]
            for name, site in recorded.items()
            if site["type"] in ("param", "mutable") or (site["type"] == "plate" and _is_subsampled(site))
        }
        values = {name: recorded[name]["value"] for name in (*found["latent_names"], *found["discrete"])}
        return constants, values

    constants, values = eqx.filter_eval_shape(run, key, dynamic)
    if constants:
        constants = eqx.filter_jit(lambda: run(key, dynamic)[0])()
    model = _substitute_default_key(substitute(model, data=constants))

    jacobians, shapes = _jacobian_sites(model, args, kwargs, found["latent_names"], values)
    depends = _dependent_partitions(model, dynamic, static, found.pop("partitions"), values)
    names = found.pop("latent_names")
    prior = frozenset(name for name, role in found["roles"] if role == "prior")
    intractable = tuple((site, latents) for site, latents in depends if site not in found["ignored"])
    spec = Spec(
        latents=tuple((name, shapes[name]) for name in names),
        jacobians=jacobians,
        is_hierarchical=_is_hierarchical(model, dynamic, static, names, prior, values),
        intractable=intractable,
        **found,
    )
    return spec, constants


def _is_subsampled(site: dict[str, Any]) -> bool:
    size, subsample_size = site["args"]
    return subsample_size is not None and subsample_size != size


def _describe(recorded: Trace) -> dict[str, Any]:
    """The static facts of one trace."""
    _check_names(recorded)
    latents, discrete, observed, dims = [], [], [], {}
    params = [name for name, site in recorded.items() if site["type"] == "param"]
    subsampled = [name for name, site in recorded.items() if site["type"] == "plate" and _is_subsampled(site)]
    roles: list[tuple[str, Role]] = []
    normalized, intervals, ignored, no_reference, unknown_constant, partitions = set(), set(), [], [], [], []
    for name, site in recorded.items():
        if site["type"] == "plate" and _is_subsampled(site):
            size, subsample_size = site["args"]
            warnings.warn(
                f"Plate '{name}' is subsampled ({subsample_size} of {size}): the target holds one fixed subsample, "
                "and its posterior is not that of the full data.",
                EnergyWarning,
                stacklevel=2,
            )
        if site["type"] == "deterministic":
            dims[name] = _dim_names(site, jnp.ndim(site["value"]))
        if site["type"] != "sample":
            continue
        fn = site["fn"]
        tilts = tilted_parts(fn)
        partitions += [name] if any(not tilt.is_normalized for tilt in tilts) else []
        ignored += [name] if any(tilt.ignores_partition for tilt in tilts) else []
        if site["is_observed"]:
            dims[name] = _dim_names(site, jnp.ndim(site["value"]))
            if _is_factor(fn):
                roles.append((name, site["infer"].get(ROLE_KEY, "loss")))
                continue
            _check_observed(name, fn, tilts)
            roles.append((name, "data"))
            observed.append(name)
            unknown_constant += [name] if partitions and partitions[-1] == name else []
            continue
        reference = reference_of(fn)
        if fn.support.is_discrete:
            _check_enumerable(name, site)
            discrete.append(name)
        else:
            _check_latent(name, fn)
            latents.append(name)
            intervals |= {name} if _is_interval(fn.support) else set()
            dims[name] = _dim_names(site, jnp.ndim(site["value"]))
        if tilts:
            roles.append((name, "prior"))
            normalized |= {name} if all(tilt.is_normalized for tilt in tilts) else set()
        no_reference += _why_no_reference(name, site, reference)
    roles.sort(key=lambda entry: entry[1] != "prior")
    return {
        "latent_names": tuple(latents),
        "discrete": tuple(discrete),
        "observed": tuple(observed),
        "params": tuple(params),
        "subsampled": tuple(subsampled),
        "roles": tuple(roles),
        "dims": tuple(dims.items()),
        "plate_depth": _guess_max_plate_nesting(recorded),
        "normalized": frozenset(normalized),
        "intervals": frozenset(intervals),
        "ignored": tuple(ignored),
        "no_reference": tuple(no_reference),
        "unknown_constant": tuple(name for name in unknown_constant if name not in ignored),
        "partitions": tuple(partitions),
    }


def _check_names(recorded: Trace) -> None:
    first: dict[str, str] = {}
    for name in recorded:
        other = first.setdefault(variable(name), name)
        if other != name:
            raise EnergyError(f"Sites '{other}' and '{name}' would be one variable of the results: rename one.")


def _is_factor(fn: dist.Distribution) -> bool:
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return isinstance(fn, dist.Unit)


def _dim_names(site: dict[str, Any], ndim: int) -> tuple[str | None, ...]:
    """Names of the plates along each dimension of a site's value, None for dimensions of an event."""
    event_dim = site["fn"].event_dim if site["type"] == "sample" else 0
    names: list[str | None] = [None] * ndim
    for frame in site.get("cond_indep_stack", ()):
        position = ndim - event_dim + frame.dim
        if 0 <= position < ndim:
            names[position] = frame.name
    return tuple(names)


def _check_observed(name: str, fn: dist.Distribution, tilts: list[EnergyDistribution]) -> None:
    while isinstance(fn, (*WRAPPERS, dist.TransformedDistribution)):
        fn = fn.base_dist
    if all(tilt.is_normalized for tilt in tilts) or isinstance(fn, EnergyDistribution):
        return
    raise EnergyError(
        f"Observed site '{name}' has an EnergyDistribution without log_partition inside {type(fn).__name__}: what the "
        "rest of that weighs beside it depends on the missing partition function, and so would the posterior. Pass "
        "log_partition=..., or observe the EnergyDistribution at a site of its own."
    )


def _check_enumerable(name: str, site: dict[str, Any]) -> None:
    fn = site["fn"]
    if not fn.has_enumerate_support:
        raise EnergyError(
            f"Discrete latent site '{name}' ({type(fn).__name__}) cannot be enumerated, so there is no density over "
            "the continuous sites. Give it a finite support (Categorical, Bernoulli, Binomial), or observe it."
        )
    try:
        import numpyro.contrib.funsor  # noqa: F401
    except ImportError as error:
        raise EnergyError(
            f"Discrete latent site '{name}' is summed out by enumeration, which needs the package funsor."
        ) from error


def _is_interval(support: Any) -> bool:
    """Whether `biject_to` takes a logistic function of each coordinate for this support."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, constraints.interval)


def _check_latent(name: str, fn: dist.Distribution) -> None:
    if any(isinstance(node, dist.Delta) for node in _nodes(fn)):
        raise EnergyError(f"Latent site '{name}' is a Delta; use `numpyro.deterministic` for a known value.")


def _why_no_reference(name: str, site: dict[str, Any], fn: dist.Distribution) -> Iterator[str]:
    nodes = list(_nodes(fn))
    if any(isinstance(node, dist.ImproperUniform) for node in nodes):
        yield f"Site '{name}' is improper: give it a proper prior."
    if any(isinstance(node, dist.MaskedDistribution) and node._mask is not True for node in nodes):
        yield f"Latent site '{name}' is masked: mask the observed sites instead."
    if site["scale"] is not None and not is_identically_one(site["scale"]):
        yield f"Latent site '{name}' is scaled (by `handlers.scale` or a subsampled plate): scale observed sites only."


def _nodes(fn: dist.Distribution) -> Iterator[dist.Distribution]:
    """A distribution and all distributions that it is made of."""
    yield fn
    for child in jax.tree.leaves(fn, is_leaf=lambda node: isinstance(node, dist.Distribution) and node is not fn):
        if isinstance(child, dist.Distribution):
            yield from _nodes(child)


def _jacobian_sites(
    model: Callable, args: tuple, kwargs: dict[str, Any], names: tuple[str, ...], values: dict[str, Any]
) -> tuple[frozenset[str], dict[str, tuple[int, ...]]]:
    """Names of the factor sites that exist only while unconstraining, and the unconstrained shapes."""
    dynamic, static = eqx.partition((args, kwargs), eqx.is_array)
    seen: set[str] = set()

    def point(values: dict[str, Array], dynamic: Any) -> dict[str, Array]:
        recorded = _recorded_at(model, dynamic, static, values)
        seen.update(recorded)
        return unconstrained(recorded, names)

    def jacobians(params: dict[str, Array], values: dict[str, Array], dynamic: Any) -> None:
        args, kwargs = eqx.combine(dynamic, static)
        others = {name: value for name, value in values.items() if name not in params}
        fixed = substitute(seed(model, jax.random.key(0)), data=others)
        recorded = trace(_unconstrain_params(fixed, params)).get_trace(*args, **kwargs)
        extra.update(name for name, site in recorded.items() if site["type"] == "sample" and name not in seen)

    extra: set[str] = set()
    params = jax.eval_shape(point, values, dynamic)
    jax.eval_shape(jacobians, params, values, dynamic)
    return frozenset(extra), {name: params[name].shape for name in names}


def _dependent_partitions(
    model: Callable, dynamic: Any, static: Any, sites: tuple[str, ...], values: dict[str, Any]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Sites whose unknown partition function depends on latent sites, with those sites."""
    if not sites:
        return

    def parameters(values: dict[str, Array], dynamic: Any, probe: Array) -> dict[str, Any]:
        """All that Z is a function of: the energy and the base at points that do not depend on any site."""
        recorded = _recorded_at(model, dynamic, static, values)
        found = {}
        for name in sites:
            tilts = [tilt for tilt in tilted_parts(recorded[name]["fn"]) if not tilt.is_normalized]
            points = [jnp.full(tilt.shape(), probe, int if tilt.support.is_discrete else float) for tilt in tilts]
            with numpyro.validation_enabled(False):
                found[name] = [(tilt.tilt(x), tilt.base.log_prob(x)) for tilt, x in zip(tilts, points, strict=True)]
        return found

    for name, latents in dependencies(parameters, values, dynamic, jnp.zeros(())).items():
        if latents:
            yield name, tuple(sorted(latents))


def _recorded_at(model: Callable, dynamic: Any, static: Any, values: dict[str, Array]) -> Trace:
    """The model's trace at given values of its sites."""
    args, kwargs = eqx.combine(dynamic, static)
    return trace(substitute(seed(model, jax.random.key(0)), data=values)).get_trace(*args, **kwargs)


def _is_hierarchical(
    model: Callable, dynamic: Any, static: Any, names: tuple[str, ...], prior: frozenset[str], values: dict[str, Any]
) -> bool:
    """Whether a log density of the prior's joins two of the named sites."""

    def log_priors(values: dict[str, Array], dynamic: Any) -> dict[str, Array]:
        recorded = _recorded_at(model, dynamic, static, values)
        with numpyro.validation_enabled(False):
            return {name: recorded[name]["fn"].log_prob(recorded[name]["value"]) for name in {*names, *prior}}

    if len(names) < 2:
        return False
    found = dependencies(log_priors, values, dynamic).values()
    return any(len(joined & set(names)) > 1 for joined in found)


def unconstrained(recorded: Trace, names: tuple[str, ...]) -> dict[str, Array]:
    """Values of recorded sites in unconstrained space."""
    values = {}
    for name in names:
        with helpful_support_errors(recorded[name]):
            values[name] = biject_to(recorded[name]["fn"].support).inv(recorded[name]["value"])
    return values
