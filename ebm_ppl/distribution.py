"""Energies inside a NumPyro model: a factor that tilts the joint, and a distribution that is tilted by itself.

    joint       p(z) = pi_0(z) exp(-beta U(z)) / Z               `energy_factor`: one Z for the whole model
    conditional p(x | t) = base(x) exp(-beta U(x)) / Z(t)        `EnergyDistribution`: Z depends on its parameters

This difference is the heart of the package: a factor's partition function is one number, an `EnergyDistribution`'s is
a function of whatever its parameters depend on.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.primitives import _PYRO_STACK

from ebm_ppl.energy import as_energy_values, check_inverse_temperature
from ebm_ppl.typing import Array, ArrayLike, EnergyError, EnergyShapeError, PRNGKey

ROLE_KEY = "energy_role"
"""The entry of a site's `infer` dictionary that holds the role of an energy factor."""


def energy_factor(
    name: str,
    energy: ArrayLike,
    *,
    role: Literal["prior", "loss"] = "prior",
    beta: ArrayLike = 1.0,
) -> None:
    """Tilts the joint density of a NumPyro model by `exp(-beta * energy)`.

    It is a `numpyro.factor` underneath, so that every NumPyro algorithm sees it.

    Args:
        name: name of the site.
        energy: the energy's value in nats: a scalar, or one number for each element of the surrounding plates.
        role: `"prior"` reshapes the prior (smoothness, repulsion, a trained network, a constraint); its own partition
            function is then part of the evidence. `"loss"` is a generalised-Bayes misfit to data with learning rate
            `beta` (a Gibbs posterior); it counts as data.
        beta: inverse temperature, non-negative, broadcastable to `energy`.

    Raises:
        EnergyShapeError: where the shape is not that of the surrounding plates, with both shapes.
        EnergyError: for an unknown role, a negative `beta`, or booleans and complex numbers.

    References:
        Bissiri, Holmes and Walker (2016), A general framework for updating belief distributions.

    Example:
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        ...     ebm_ppl.energy_factor("smooth", 0.5 * jnp.sum(jnp.diff(x) ** 2))
    """
    if role not in ("prior", "loss"):
        raise EnergyError(f"energy_factor '{name}' has role {role!r}; it is either 'prior' or 'loss'.")
    source = f"energy_factor '{name}'"
    check_inverse_temperature(beta, source)
    log_factor = -jnp.asarray(beta) * as_energy_values(energy, jnp.shape(energy), source)
    _check_plates(jnp.shape(log_factor), source)
    factor = dist.Unit(log_factor)
    numpyro.sample(name, factor, obs=factor.sample(None), infer={"is_auxiliary": True, ROLE_KEY: role})


def _check_plates(shape: tuple[int, ...], source: str) -> None:
    """A factor must vary over exactly the plates around it: NumPyro would silently repeat or sum it otherwise."""
    sizes = {handler.dim: handler.subsample_size for handler in _handlers("plate")}
    depth = max((-dim for dim in sizes), default=0)
    expected = tuple(sizes.get(dim, 1) for dim in range(-depth, 0))
    if _handlers("enum"):  # enumerated sites add dimensions on the left
        shape = shape[max(len(shape) - depth, 0) :]
    if shape != expected:
        raise EnergyShapeError(
            f"{source} has shape {shape}, but the plates around it have shape {expected}. Sum the energy to one "
            "number, or give one number for each element of the plates."
        )


def _handlers(kind: str) -> list[Any]:
    """Active handlers by the name of their class: enumeration has a `plate` of its own."""
    return [handler for handler in _PYRO_STACK if type(handler).__name__ == kind]


class Static:
    """Hashable holder of the parts of an energy, or a flow, that are not arrays, compared by what they hold."""

    def __init__(self, tree: Any):
        self.tree = tree
        leaves, self.structure = jax.tree.flatten(tree)
        self.leaves = tuple(leaves)

    def __hash__(self) -> int:
        return hash((self.leaves, self.structure))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.leaves == other.leaves and self.structure == other.structure


class EnergyDistribution(dist.Distribution):
    """A normalised base distribution tilted by an energy: `log p(x) = log base(x) - beta U(x) - log Z`.

    The base gives the support, the shapes, starting points and the first rung of every annealing path, and makes `Z`
    finite whenever the energy is bounded below. The energy sees **one** event of shape `base.event_shape` and
    returns a scalar; batches, plates and `expand` are mapped over it.

    Because the distribution is conditional, `Z = E_base[exp(-beta U)]` depends on whatever its parameters depend on.
    Where that includes a latent site and no `log_partition` is given, every sampler of this package raises
    `IntractablePartitionError` before the first draw.

    Args:
        energy: callable on one event, in nats. A plain function, a lambda or an `equinox.Module`; use a module where
            the distribution must pass through `jax.jit`, `lax.scan` or NumPyro's `scan`. One that has a method
            `draw_tilted(key, num)`, of draws of base(x) exp(-U(x)), is drawn by it, at an inverse temperature of one;
            one that has a method `check_base(base)` may refuse the base.
        base: any normalised NumPyro distribution, a flow included.
        beta: inverse temperature, broadcastable with `base.batch_shape`.
        log_partition: `log Z` in nats for each element of the batch, where it is known in closed form or otherwise;
            `"ignore"` says that the missing `Z(theta)` is wanted as it is (the density is then a joint tilt).

    Raises:
        EnergyShapeError: where the energy of one event is not a scalar.
        EnergyError: for a negative `beta`, or a base that is itself an `EnergyDistribution`.

    Example:
        >>> quartic = ebm_ppl.EnergyDistribution(lambda x: x**4, dist.Normal(0.0, 1.0))
        >>> quartic.log_prob(jnp.array(1.0))
    """

    pytree_data_fields = ("base", "beta", "log_partition", "_energy_arrays")
    pytree_aux_fields = ("ignores_partition", "_energy_static", "_energy_axes")

    def __init__(
        self,
        energy: Callable[[Array], Array],
        base: dist.Distribution,
        *,
        beta: ArrayLike = 1.0,
        log_partition: ArrayLike | Literal["ignore"] | None = None,
        validate_args: bool | None = None,
    ):
        if not callable(energy):
            raise EnergyError(f"EnergyDistribution takes a callable energy; got {type(energy).__name__}.")
        if tilted_parts(base):
            raise EnergyError("The base of an EnergyDistribution must be normalised: add the energies instead.")
        check_inverse_temperature(beta, _describe(energy))
        check_base: Any = getattr(energy, "check_base", None)
        if check_base is not None:
            check_base(base)
        self.ignores_partition = isinstance(log_partition, str)
        if self.ignores_partition and log_partition != "ignore":
            raise EnergyError(f"log_partition is an array, None or 'ignore'; got {log_partition!r}.")
        self.log_partition: Any = None if self.ignores_partition else log_partition
        self.beta = beta
        self._energy_arrays, static = eqx.partition(energy, eqx.is_array)
        self._energy_static = Static(static)
        self._energy_axes = 0
        batch_shape = jnp.broadcast_shapes(
            base.batch_shape, jnp.shape(beta), jnp.shape(self.log_partition) if self.is_normalized else ()
        )
        self.base = base.expand(batch_shape)
        event = jax.ShapeDtypeStruct(base.event_shape, jnp.result_type(int if base.is_discrete else float))
        jax.eval_shape(lambda x: as_energy_values(energy(x), (), _describe(energy)), event)
        super().__init__(batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def energy(self) -> Callable[[Array], Array]:
        return eqx.combine(self._energy_arrays, self._energy_static.tree)

    @property
    def is_normalized(self) -> bool:
        """Whether `log_partition` was given, so that `log_prob` is a normalised log density."""
        return self.log_partition is not None

    @property
    def support(self) -> Any:
        return self.base.support

    @property
    def has_rsample(self) -> bool:
        return False

    @property
    def has_enumerate_support(self) -> bool:
        return self.base.has_enumerate_support

    def enumerate_support(self, expand: bool = True) -> Array:
        return self.base.enumerate_support(expand)

    def sample(self, key: PRNGKey | None, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = tuple(sample_shape) + self.batch_shape
        draw = getattr(self.energy, "draw_tilted", None)
        if key is not None and draw is not None and isinstance(self.beta, float) and self.beta == 1:
            return draw(key, math.prod(shape)).reshape(shape + self.event_shape)
        if key is None or not self.has_enumerate_support or self.event_shape:
            # NumPyro's initialisation strategies fall back on exactly this exception.
            raise NotImplementedError
        values = self.enumerate_support()
        chosen = jax.random.categorical(key, self.log_prob(values), axis=0, shape=shape)
        values = jnp.broadcast_to(jnp.expand_dims(values, range(1, 1 + len(sample_shape))), (len(values), *shape))
        return jnp.take_along_axis(values, chosen[None], axis=0)[0]

    def tilt(self, value: Array) -> Array:
        """The energy of each event relative to the base, `beta U(x) + log Z`, where log Z is given."""
        lead = jnp.shape(value)[: jnp.ndim(value) - self.event_dim]
        source = _describe(self.energy)

        def one(arrays: Any, x: Array) -> Array:
            return as_energy_values(eqx.combine(arrays, self._energy_static.tree)(x), (), source)

        stacked = range(len(lead) - len(self.batch_shape), len(lead) - len(self.batch_shape) + self._energy_axes)
        for axis in reversed(range(len(lead))):
            one = jax.vmap(one, (0 if axis in stacked else None, 0))
        energies = self.beta * one(self._energy_arrays, value)
        return jnp.asarray(energies + self.log_partition if self.is_normalized else energies)

    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        return jnp.asarray(self.base.log_prob(value)) - self.tilt(value)

    def expand(self, batch_shape) -> EnergyDistribution:
        # Keeping the energy outermost lets a plate be split into reference and energy without unwrapping.
        if tuple(batch_shape) == self.batch_shape:
            return self
        return EnergyDistribution(
            self.energy,
            self.base.expand(batch_shape),
            beta=self.beta,
            log_partition="ignore" if self.ignores_partition else self.log_partition,
        )


@promote_batch_shape.register  # pyright: ignore
def _promote_batch_shape(fn: EnergyDistribution) -> EnergyDistribution:
    """NumPyro's scan stacks all leaves of a distribution along new axes on the left of its batch."""
    promoted = copy.copy(fn)
    promoted.base = promote_batch_shape(fn.base)
    promoted._batch_shape = promoted.base.batch_shape
    promoted._energy_axes = len(promoted.batch_shape) - len(fn.batch_shape) + fn._energy_axes

    def aligned(leaf: ArrayLike) -> Array:
        new, old = jnp.shape(leaf)[: promoted._energy_axes], jnp.shape(leaf)[promoted._energy_axes :]
        return jnp.reshape(leaf, new + (1,) * (len(fn.batch_shape) - len(old)) + old)

    promoted.beta, promoted.log_partition = jax.tree.map(aligned, (fn.beta, fn.log_partition))
    return promoted


def _describe(energy: Callable) -> str:
    name = getattr(energy, "__name__", type(energy).__name__)
    return f"The energy {name!r} of an EnergyDistribution"


WRAPPERS = (dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution)
"""What changes the shape of a distribution, or masks it, and no more."""


def tilted_parts(fn: dist.Distribution) -> list[EnergyDistribution]:
    """Every `EnergyDistribution` inside a distribution, however deeply it is wrapped."""
    leaves = jax.tree.leaves(fn, is_leaf=lambda node: isinstance(node, EnergyDistribution))
    return [leaf for leaf in leaves if isinstance(leaf, EnergyDistribution)]


def reference_of(fn: dist.Distribution) -> dist.Distribution:
    """The normalised reference of a distribution: its base where it is an `EnergyDistribution`, else itself.

    Raises:
        EnergyError: where an `EnergyDistribution` sits inside a wrapper that cannot be split, such as a mixture.
    """
    if isinstance(fn, EnergyDistribution):
        return fn.base
    if not tilted_parts(fn):
        return fn
    if isinstance(fn, WRAPPERS):
        return _rewrap(fn, reference_of(fn.base_dist))
    raise EnergyError(
        f"An EnergyDistribution inside {type(fn).__name__} cannot be split into a reference and an energy; "
        "sample the EnergyDistribution at a site of its own and transform its value with `numpyro.deterministic`."
    )


def tilt_of(fn: Any, value: Array) -> Any:
    """The energy of a value relative to `reference_of(fn)`: `log reference(x) - log p(x)` in the shape of log_prob."""
    if isinstance(fn, EnergyDistribution):
        return fn.tilt(value)
    if not tilted_parts(fn):
        return 0.0
    tilt = tilt_of(fn.base_dist, value)
    if isinstance(fn, dist.Independent):
        return functools.reduce(lambda total, _: total.sum(-1), range(fn.reinterpreted_batch_ndims), tilt)
    if isinstance(fn, dist.MaskedDistribution):
        return jnp.where(fn._mask, tilt, 0.0)
    return tilt


def mask_of(fn: Any) -> Array:
    """Which elements of a value count in its log density, in a shape that broadcasts to the value's."""
    mask = jnp.ones((), bool)
    while isinstance(fn, WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution):
            mask = mask & over_events(fn._mask, fn)
        fn = fn.base_dist
    return mask


def over_events(x: ArrayLike, fn: dist.Distribution) -> Array:
    """What is said of each event of a distribution, in a shape that broadcasts to the elements of its value."""
    return jnp.reshape(x, jnp.shape(x) + (1,) * fn.event_dim)


def _rewrap(fn: Any, base: dist.Distribution) -> dist.Distribution:
    if isinstance(fn, dist.Independent):
        return base.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return dist.MaskedDistribution(base, fn._mask)
    return base.expand(fn.batch_shape)
