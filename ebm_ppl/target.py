"""A NumPyro model as a normalised reference measure tilted by energies, in unconstrained space.

    p(z) = pi_0(z) exp( -sum_k U_k(z) ) / Z

    log pi_0(z)              `Target.log_reference`    latent sites (the base of an `EnergyDistribution`) and Jacobians
    {k: U_k(z)}              `Target.energies`         observed sites, energy factors, tilts of `EnergyDistribution`s
    z ~ pi_0                 `Target.sample_reference`
    z -> sites               `Target.constrain`

`z` is one flat vector; every method is written for one point and batched by its caller. NumPyro's unconstraining
handler emits the Jacobians as hidden factor sites; `spec.py` finds them as the sites that exist only then.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.util import is_identically_one
from numpyro.handlers import seed, substitute, trace, uncondition
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.util import (
    _substitute_default_key,
    _unconstrain_params,
    constrain_fn,
)
from numpyro.primitives import Messenger

from ebm_ppl.distribution import mask_of, over_events, reference_of, tilt_of
from ebm_ppl.spec import Spec, Trace, analyse, unconstrained
from ebm_ppl.typing import (
    Array,
    IntractablePartitionError,
    NoReferenceError,
    PRNGKey,
    Role,
)

Phase = Literal["prior", "data", "joint"]
"""Which energies a path from the reference to the target tempers."""


class Tilted(Protocol):
    """A normalised reference tilted by energies: all that a path from the one to the other asks of a target."""

    @property
    def dim(self) -> int: ...

    @property
    def site_numbers(self) -> np.ndarray: ...

    @property
    def is_logistic(self) -> np.ndarray: ...

    @property
    def is_hierarchical(self) -> bool: ...

    def require_tractable(self) -> None: ...

    def require_reference(self) -> None: ...

    def phases(self) -> list[tuple[Phase, Any]]: ...

    def sample_reference(self, key: PRNGKey) -> Array: ...

    def staged_terms(self, z: Array) -> tuple[Array, Array]: ...


def log_joint(target: Tilted, z: Array) -> Array:
    """`log pi_0(z) - U(z)`, with all energies added up."""
    log_reference, stages = target.staged_terms(z)
    return log_reference - jnp.sum(stages)


class Target(eqx.Module):
    """A NumPyro model split into a normalised reference and energies; made by `target`.

    A pytree: the model's array arguments and parameters are leaves, so that new data of the same shape does not
    retrace. All methods take one point `z` of shape (dim,), in unconstrained space.
    """

    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    constants: dict[str, Any]
    """`numpyro.param`s, mutable state and subsample indices, held at their values."""
    spec: Spec = eqx.field(static=True)

    @property
    def dim(self) -> int:
        return self.spec.dim

    @property
    def site_numbers(self) -> np.ndarray:
        """Which of `latent_names` each coordinate of z belongs to, shape (dim,)."""
        return self.spec.site_numbers

    @property
    def is_logistic(self) -> np.ndarray:
        """Whether each coordinate of z is that of a site with two bounds, shape (dim,)."""
        return self.spec.is_logistic

    @property
    def is_hierarchical(self) -> bool:
        """Whether the prior of one latent site depends on another."""
        return self.spec.is_hierarchical

    @property
    def latent_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.spec.latents)

    @property
    def energy_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.spec.roles)

    def roles(self) -> dict[str, Role]:
        """The role of each energy by its name."""
        return dict(self.spec.roles)

    def terms(self, z: Array) -> tuple[Array, dict[str, Array]]:
        """`(log pi_0(z), {name: U(z)})` from one trace of the model, in nats."""
        if self.spec.discrete:
            return self._enumerated_terms(z)
        references, energies = self.site_terms(z)
        return sum(references.values(), jnp.zeros((), z.dtype)), {name: energies[name] for name in self.energy_names}

    def log_reference(self, z: Array) -> Array:
        """Log density of the reference at `z`, Jacobians included."""
        return self.terms(z)[0]

    def energies(self, z: Array) -> dict[str, Array]:
        """The energies at `z` by name, prior energies first, in nats."""
        return self.terms(z)[1]

    def log_density(self, z: Array) -> Array:
        """`log pi_0(z) - sum_k U_k(z)`: the unnormalised log density that MCMC needs."""
        log_reference, energies = self.terms(z)
        return log_reference - sum(energies.values(), jnp.zeros((), z.dtype))

    def staged_terms(self, z: Array) -> tuple[Array, Array]:
        """`(log pi_0(z), (U_prior, U_data))`: the energies added up by stage of the path, shape (2,)."""
        log_reference, energies = self.terms(z)
        stages = [jnp.zeros((), z.dtype), jnp.zeros((), z.dtype)]
        # With discrete sites summed out the energies are those of the stages already.
        roles = [(name, name) for name in energies] if self.spec.discrete else self.spec.roles
        for name, role in roles:
            stages[role != "prior"] += energies[name]
        return log_reference, jnp.stack(stages)

    def site_terms(self, z: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        """Log reference density and energy of each site: what `terms` adds up."""
        references, energies = self.element_terms(z)
        return _sums(references), _sums(energies)

    def element_terms(self, z: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        """The same for each element of a site, an observation in a plate, say: what `site_terms` adds up."""
        recorded = self._recorded(_unconstrain_params(self._prepared(), self.unravel(z)))
        latents, roles = dict(self.spec.latents), self.roles()
        references, energies = {}, {}
        for name, site in recorded.items():
            if site["type"] != "sample":
                continue
            if name in latents:
                references[name] = _scaled(site, reference_of(site["fn"]).log_prob(site["value"]))
                if name in roles:
                    energies[name] = _scaled(site, tilt_of(site["fn"], site["value"]))
            elif name in self.spec.jacobians:
                references[name] = _scaled(site, site["fn"].log_prob(site["value"]))
            elif name in roles:
                energies[name] = -_scaled(site, site["fn"].log_prob(site["value"]))
        return references, energies

    def _enumerated_terms(self, z: Array) -> tuple[Array, dict[str, Array]]:
        """With discrete sites summed out only whole stages have an energy: differences of marginal log densities."""
        roles = self.roles()
        prior = frozenset(name for name, role in roles.items() if role == "prior")
        reference = self._marginal(z, frozenset())
        tilted = self._marginal(z, prior) if prior else reference
        energies = {"prior": reference - tilted} if prior else {}
        if prior != frozenset(roles):
            energies["data"] = tilted - self._marginal(z, frozenset(roles))
        return reference, energies

    def _marginal(self, z: Array, active: frozenset[str]) -> Array:
        from numpyro.contrib.funsor import config_enumerate, enum, log_density

        model = enum(config_enumerate(self._tempered(active)), -self.spec.plate_depth - 1)
        model = _unconstrain_params(model, self.unravel(z))
        return jnp.asarray(log_density(model, self.args, self.kwargs, {})[0])

    def sample_reference(self, key: PRNGKey) -> Array:
        """One draw `z ~ pi_0`, shape (dim,).

        Raises:
            NoReferenceError: where the latent sites are no normalised measure.
        """
        self.require_reference()
        recorded = self._recorded(seed(_UseReference(self._prepared()), key))
        return self.ravel(unconstrained(recorded, self.latent_names))

    def constrain(self, z: Array) -> dict[str, Array]:
        """Values of the latent and deterministic sites at `z`, in the model's own space."""
        model = self._prepared()
        if self.spec.discrete:
            model = seed(model, jax.random.key(0))
        values = constrain_fn(model, self.args, self.kwargs, self.unravel(z), return_deterministic=True)
        return {name: value for name, value in values.items() if name in dict(self.spec.dims)}

    def unconstrain(self, values: dict[str, Any]) -> Array:
        """The point `z` of given values of all latent sites: the inverse of `constrain`."""
        model = substitute(seed(self._prepared(), jax.random.key(0)), data=values)
        return self.ravel(unconstrained(self._recorded(model), self.latent_names))

    def log_likelihood(self, z: Array) -> dict[str, Array]:
        """Pointwise log density of each observed site (never of a factor), unscaled."""
        recorded = self._recorded(_unconstrain_params(self._prepared(), self.unravel(z)))
        return {name: recorded[name]["fn"].log_prob(recorded[name]["value"]) for name in self.spec.observed}

    def observed_data(self) -> dict[str, Array]:
        """Values of the observed sites."""
        return {name: value for name, (value, _) in self.observations().items()}

    def observations(self) -> dict[str, tuple[Array, Array]]:
        """Values of the observed sites, and how much each of their elements counts: mask times scale, broadcastable."""
        model = substitute(seed(self._prepared(), jax.random.key(0)), substitute_fn=init_to_uniform)
        recorded = self._recorded(model)
        return {name: (recorded[name]["value"], _weights(recorded[name])) for name in self.spec.observed}

    def parameters(self) -> dict[str, Any]:
        """Values of the `numpyro.param`s, at which the model is held."""
        return {name: self.constants[name] for name in self.spec.params}

    def with_parameters(self, values: dict[str, Any]) -> Target:
        """The same model held at other values of them."""
        return dataclasses.replace(self, constants=self.constants | values)

    def parameter_bijections(self) -> dict[str, Any]:
        """NumPyro's transform of each `numpyro.param`, from unconstrained space to what its constraint allows."""
        model = substitute(seed(self._prepared(), jax.random.key(0)), substitute_fn=init_to_uniform)
        recorded = self._recorded(model)
        given = {name: recorded[name]["kwargs"].get("constraint", constraints.real) for name in self.spec.params}
        return {name: biject_to(constraint) for name, constraint in given.items()}

    def unravel(self, z: Array) -> dict[str, Array]:
        """The flat vector as a dictionary of unconstrained sites."""
        sites, offset = {}, 0
        for name, shape in self.spec.latents:
            size = math.prod(shape)
            sites[name] = z[offset : offset + size].reshape(shape)
            offset += size
        return sites

    def ravel(self, sites: dict[str, Any]) -> Array:
        """Unconstrained sites as one flat vector: the inverse of `unravel`."""
        parts = [jnp.ravel(sites[name]) for name in self.latent_names]
        return jnp.concatenate([jnp.zeros(0), *parts]).astype(jnp.result_type(float))

    def phases(self) -> list[tuple[Phase, Target]]:
        """What a path from the reference tempers in turn, prior energies first, each with the target it leads to.

        Both at once where the prior's log Z is known to be zero: a conditional tempered without its partition function
        following suit is a poor path, and there a needless one.
        """
        prior = {name for name, role in self.spec.roles if role == "prior"}
        has_data = len(prior) < len(self.spec.roles)
        if has_data and prior and prior <= self.spec.normalized:
            return [("joint", self)]
        before: list[tuple[Phase, Target]] = [("prior", self.prior())] if prior else []
        return [*before, ("data", self)] if has_data else before

    def prior(self) -> Target:
        """The same model with its data taken away: the tilted prior."""
        kept = tuple((name, role) for name, role in self.spec.roles if role == "prior")
        intractable = tuple(entry for entry in self.spec.intractable if entry[0] not in self.spec.observed)
        spec = dataclasses.replace(self.spec, roles=kept, observed=(), intractable=intractable, unknown_constant=())
        return dataclasses.replace(self, spec=spec)

    def require_tractable(self) -> None:
        """Raises `IntractablePartitionError` where an unknown Z(theta) depends on latent sites."""
        if not self.spec.intractable:
            return
        sites = "; ".join(
            f"'{site}' depends on {', '.join(repr(name) for name in names)}" for site, names in self.spec.intractable
        )
        raise IntractablePartitionError(
            f"The partition function Z(theta) of an EnergyDistribution depends on latent sites, and it is missing "
            f"from the joint density: {sites}. Sampling would give a wrong posterior without a warning. Remedies: "
            "(1) pass log_partition=..., the log of E_base[exp(-beta * energy)] as a function of those sites, in "
            "closed form or by quadrature; (2) fix the sites that it depends on; (3) if the energy is meant to tilt "
            "the joint density, use energy_factor(..., role='prior'); (4) if the missing factor is really wanted, "
            "say so with log_partition='ignore'."
        )

    def require_reference(self) -> None:
        """Raises `NoReferenceError` where the latent sites are no normalised measure."""
        if self.spec.no_reference:
            raise NoReferenceError(
                "log Z and tempering need latent sites that form a normalised reference measure. "
                + " ".join(self.spec.no_reference)
                + " MCMC (NUTS, HMC, MALA, MCLMC) is still possible."
            )

    def require_known_constant(self) -> None:
        """Raises `IntractablePartitionError` where the evidence would lack a constant of an observed site."""
        missing = [*self.spec.unknown_constant, *self.spec.ignored]
        if missing:
            raise IntractablePartitionError(
                f"The evidence needs the partition function of {', '.join(map(repr, missing))}, which was not given: "
                "pass log_partition=... to the EnergyDistribution. Its posterior can be sampled without it."
            )

    def _recorded(self, model: Callable) -> Trace:
        return trace(model).get_trace(*self.args, **self.kwargs)

    def _tempered(self, active: Iterable[str]) -> Callable:
        return _Tempered(self._prepared(), frozenset(active), self.spec.jacobians)

    def _prepared(self) -> Callable:
        return _substitute_default_key(substitute(self.model, data=self.constants))


def target(model: Callable, *args: Any, **kwargs: Any) -> Target:
    """Splits a NumPyro model into a normalised reference measure and energies.

    Args:
        model: any callable with NumPyro primitives, handlers around it included.
        args, kwargs: the model's arguments. Arrays become leaves of the result, so that a target of new data with
            the same shapes causes no retrace. Where the model needs concrete values (`int(x.max())`), all arguments
            are frozen into the model instead, and new data does retrace.

    Returns:
        A `Target`.

    Raises:
        EnergyError: for a latent `Delta`, discrete latents that cannot be enumerated, and an `EnergyDistribution`
            inside a wrapper that cannot be split.
        EnergyShapeError: where an energy has the wrong shape.

    Example:
        >>> t = ebm_ppl.target(model, x, y=y)
        >>> t.energies(jnp.zeros(t.dim))
    """
    args, kwargs = jax.tree.map(_as_array, (args, kwargs))
    try:
        spec, constants = analyse(model, args, kwargs)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        model, args, kwargs = functools.partial(model, *args, **kwargs), (), {}
        spec, constants = analyse(model, args, kwargs)
    return Target(model, args, kwargs, constants, spec)


def predictive_model(target: Target) -> Callable:
    """The model with its observed sites sampled instead of conditioned on."""
    # Not `_prepared`: `uncondition` asks for keys, and the default one would give all draws the same noise.
    return uncondition(substitute(target.model, data=target.constants))


def _as_array(leaf: Any) -> Any:
    """Containers of numbers from other libraries (a pandas column, say) as arrays; all else as it is."""
    return np.asarray(leaf) if hasattr(leaf, "__array__") and not isinstance(leaf, jax.Array) else leaf


def energies_model(target: Target) -> Callable:
    """The model with the energies of this target and no others: `target.prior()` forgets the observed values."""
    return target._tempered(target.energy_names)


class _UseReference(Messenger):
    """Replaces the distribution of each latent site by its normalised reference."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["fn"] = reference_of(msg["fn"])


class _Tempered(Messenger):
    """Keeps only the `active` energies: others are masked, and latent sites fall back to their reference."""

    def __init__(self, fn: Callable, active: frozenset[str], always: frozenset[str]):
        self.active, self.always = active, always
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["name"] in self.active | self.always:
            return
        msg["fn"] = msg["fn"].mask(False) if msg["is_observed"] else reference_of(msg["fn"])


def _scaled(site: dict[str, Any], log_prob: Any) -> Array:
    scale = site["scale"]
    return jnp.asarray(log_prob if scale is None or is_identically_one(scale) else scale * log_prob)


def _weights(site: dict[str, Any]) -> Array:
    """How much each element of a site's value counts in the log density."""
    scale = 1.0 if site["scale"] is None else site["scale"]
    return over_events(scale, site["fn"]) * mask_of(site["fn"])


def _sums(terms: dict[str, Array]) -> dict[str, Array]:
    return {name: jnp.sum(elements) for name, elements in terms.items()}
