"""The tilted distribution by itself: densities, wrappers, pytrees, plates."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from limits import z_limit
from numpyro.handlers import seed
from numpyro.infer.util import log_density
from scipy.integrate import quad
from scipy.special import logsumexp

import ebm_ppl
from ebm_ppl.distribution import reference_of, tilt_of, tilted_parts


def quartic(x):
    return x**4


def vector_quartic(x):
    return jnp.sum(x**4)


X = jnp.array([-0.4, 0.3, 1.2])


def test_log_prob_is_base_minus_energy():
    tilted = ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 2.0), beta=0.5)
    np.testing.assert_allclose(tilted.log_prob(X), dist.Normal(0.0, 2.0).log_prob(X) - 0.5 * X**4, rtol=1e-14)
    assert tilted.log_prob(jnp.array(0.3)).shape == ()
    assert not tilted.is_normalized and not tilted.has_rsample


def gaussian_log_partition(beta, scale):
    """log E[exp(-beta x^2 / 2)] for x ~ N(0, scale^2)."""
    return -0.5 * jnp.log1p(beta * scale**2)


@pytest.mark.parametrize(
    ("tilted", "bounds"),
    [
        pytest.param(
            ebm_ppl.EnergyDistribution(
                lambda x: 0.5 * x**2,
                dist.Normal(0.0, 2.0),
                beta=3.0,
                log_partition=gaussian_log_partition(3.0, 2.0),
            ),
            (-np.inf, np.inf),
            id="normal",
        ),
        pytest.param(
            ebm_ppl.EnergyDistribution(lambda x: x, dist.Exponential(2.0), beta=0.7, log_partition=np.log(2.0 / 2.7)),
            (0.0, np.inf),
            id="exponential",
        ),
        pytest.param(
            ebm_ppl.EnergyDistribution(lambda x: -jnp.log(x), dist.Beta(2.0, 3.0), log_partition=np.log(2.0 / 5.0)),
            (0.0, 1.0),
            id="beta",
        ),
    ],
)
def test_with_its_log_partition_the_density_integrates_to_one(tilted, bounds):
    density = jax.jit(lambda x: jnp.exp(tilted.log_prob(x)))
    total, error = quad(density, *bounds, epsabs=1e-10)
    assert abs(total - 1) < 10 * error + 1e-9
    without = ebm_ppl.EnergyDistribution(tilted.energy, tilted.base, beta=tilted.beta)
    assert tilted.is_normalized and not without.is_normalized
    partition, _ = quad(jax.jit(lambda x: jnp.exp(without.log_prob(x))), *bounds)
    np.testing.assert_allclose(np.log(partition), tilted.log_partition, atol=1e-8)


def test_support_and_shapes_are_those_of_the_base():
    base = dist.Dirichlet(jnp.ones((5, 3)))
    tilted = ebm_ppl.EnergyDistribution(vector_quartic, base)
    assert (tilted.batch_shape, tilted.event_shape) == ((5,), (3,))
    assert tilted.support is dist.constraints.simplex


def test_beta_and_log_partition_extend_the_batch():
    tilted = ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 1.0), beta=jnp.array([0.0, 1.0, 2.0]))
    assert tilted.batch_shape == (3,)
    np.testing.assert_allclose(
        tilted.log_prob(0.5), dist.Normal(0.0, 1.0).log_prob(0.5) - jnp.arange(3) * 0.5**4, rtol=1e-14
    )
    shifted = ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 1.0), log_partition=jnp.array([1.0, 2.0]))
    assert shifted.batch_shape == (2,)
    np.testing.assert_allclose(shifted.log_prob(0.0) - dist.Normal(0.0, 1.0).log_prob(0.0), [-1.0, -2.0])


@pytest.mark.parametrize("log_partition", [None, "ignore", -0.3])
def test_expand(log_partition):
    tilted = ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 2.0), beta=0.5, log_partition=log_partition)
    expanded = tilted.expand([2, 3])
    assert isinstance(expanded, ebm_ppl.EnergyDistribution) and expanded.batch_shape == (2, 3)
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    np.testing.assert_allclose(expanded.log_prob(x), tilted.log_prob(x), rtol=1e-14)
    assert expanded.is_normalized == tilted.is_normalized
    assert expanded.ignores_partition == tilted.ignores_partition
    assert tilted.expand(()) is tilted


def test_expand_of_a_batched_beta():
    tilted = ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 1.0), beta=jnp.array([1.0, 2.0, 3.0]))
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    np.testing.assert_allclose(tilted.expand([2, 3]).log_prob(x), tilted.log_prob(x), rtol=1e-14)


@pytest.mark.parametrize("num_events", [1, 2])
def test_to_event(num_events):
    tilted = ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 2.0)).expand([2, 3])
    event = tilted.to_event(num_events)
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    exact = tilted.log_prob(x).sum(tuple(range(-num_events, 0)))
    np.testing.assert_allclose(event.log_prob(x), exact, rtol=1e-14)
    np.testing.assert_allclose(reference_of(event).log_prob(x) - tilt_of(event, x), exact, rtol=1e-14)
    assert reference_of(event).event_shape == event.event_shape


def test_mask():
    mask = jnp.array([True, False, True])
    masked = ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 2.0)).expand([3]).mask(mask)
    exact = jnp.where(mask, dist.Normal(0.0, 2.0).log_prob(X) - X**4, 0.0)
    np.testing.assert_allclose(masked.log_prob(X), exact, rtol=1e-14)
    np.testing.assert_allclose(reference_of(masked).log_prob(X) - tilt_of(masked, X), exact, rtol=1e-14)


def test_wrapped_in_all_three():
    tilted = ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 2.0)).expand([3]).to_event(1)
    wrapped = tilted.expand([2]).mask(jnp.array([True, False]))
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    np.testing.assert_allclose(reference_of(wrapped).log_prob(x) - tilt_of(wrapped, x), wrapped.log_prob(x), rtol=1e-14)
    assert wrapped.log_prob(x)[1] == 0 and wrapped.log_prob(x)[0] != 0
    assert len(tilted_parts(wrapped)) == 1


def test_plain_distributions_are_their_own_reference():
    base = dist.Normal(0.0, 1.0)
    assert reference_of(base) is base and tilt_of(base, X) == 0.0 and not tilted_parts(base)


def test_inside_a_mixture_it_cannot_be_split():
    tilted = ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 1.0))
    mixture = dist.MixtureGeneral(dist.Categorical(jnp.ones(2) / 2), [tilted, dist.Normal(0.0, 1.0)])
    with pytest.raises(ebm_ppl.EnergyError, match="Mixture"):
        reference_of(mixture)


def test_a_tilted_base_is_refused():
    inner = ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 1.0))
    with pytest.raises(ebm_ppl.EnergyError, match="normalised"):
        ebm_ppl.EnergyDistribution(quartic, inner)


def test_arguments_are_checked():
    with pytest.raises(ebm_ppl.EnergyError, match="callable"):
        ebm_ppl.EnergyDistribution(jnp.ones(3), dist.Normal(0.0, 1.0))
    with pytest.raises(ebm_ppl.EnergyError, match="'drop'"):
        ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 1.0), log_partition="drop")
    with pytest.raises(ebm_ppl.EnergyShapeError, match=r"\(3,\); expected \(\)"):
        ebm_ppl.EnergyDistribution(quartic, dist.Normal(jnp.zeros(3), 1.0).to_event(1))


def test_no_sampler():
    with pytest.raises(NotImplementedError):
        ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 1.0)).sample(jax.random.key(0))


LEVELS = jnp.array([0.3, -1.0, 2.0])
LOOKUP = ebm_ppl.EnergyDistribution(lambda k: LEVELS[k], dist.Categorical(probs=jnp.array([0.2, 0.5, 0.3])))


@pytest.mark.parametrize("shape", [(), (2,)])
def test_on_a_finite_support_it_is_drawn_from(shape):
    tilted, num = LOOKUP.expand(shape), 20_000
    draws = np.asarray(tilted.sample(jax.random.key(0), (num,)))
    share = np.array([0.2, 0.5, 0.3]) * np.exp(-LEVELS)
    share = share / share.sum()
    assert draws.shape == (num, *shape) and draws.dtype.kind == "i"
    counts = np.apply_along_axis(np.bincount, 0, draws, minlength=3).T / num
    assert np.all(np.abs(counts - share) < z_limit(2 * 3) * np.sqrt(share * (1 - share) / num))


def test_on_a_finite_support_a_latent_one_is_summed_out():
    """The energies of the prior and of the data against sums by hand."""

    def model():
        k = numpyro.sample("k", LOOKUP)
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x + k, 0.5), obs=1.5)

    target, x = ebm_ppl.target(model), 0.4
    log_reference, energies = target.terms(jnp.array([x]))
    share = np.array([0.2, 0.5, 0.3])
    log_prior = np.log(share) - LEVELS
    log_joint = log_prior + dist.Normal(x + np.arange(3), 0.5).log_prob(1.5)
    assert log_reference == pytest.approx(float(dist.Normal(0.0, 1.0).log_prob(x)), abs=1e-12)
    assert energies["prior"] == pytest.approx(-float(logsumexp(log_prior)), abs=1e-12)
    assert energies["data"] == pytest.approx(float(logsumexp(log_prior) - logsumexp(log_joint)), abs=1e-12)


# Pytrees and jit


class Power(eqx.Module):
    coefficient: jax.Array
    power: int = eqx.field(static=True)

    def __call__(self, x):
        return self.coefficient * x**self.power


@pytest.mark.parametrize("log_partition", [None, "ignore", 0.2])
@pytest.mark.parametrize("energy", [quartic, Power(jnp.array(2.0), 4)], ids=["function", "module"])
def test_pytree_round_trip(energy, log_partition):
    tilted = ebm_ppl.EnergyDistribution(energy, dist.Normal(jnp.zeros(3), 1.0), beta=0.5, log_partition=log_partition)
    leaves, structure = jax.tree.flatten(tilted)
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(again.log_prob(X), tilted.log_prob(X))
    assert (again.batch_shape, again.event_shape) == ((3,), ())
    assert (again.is_normalized, again.ignores_partition) == (tilted.is_normalized, tilted.ignores_partition)
    assert jax.tree.structure(again) == structure


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda scale: quartic, id="function"),
        pytest.param(lambda scale: Power(jnp.asarray(scale), 4), id="module"),
        pytest.param(lambda scale: scale * ebm_ppl.FunctionEnergy(quartic), id="scaled"),
        pytest.param(lambda scale: ebm_ppl.FunctionEnergy(quartic) + Power(jnp.asarray(scale), 2), id="sum"),
        pytest.param(lambda scale: Power(np.asarray(scale), 4), id="numpy leaf"),
    ],
)
def test_a_stable_energy_traces_once(make):
    traces = []

    @jax.jit
    def log_prob(tilted, x):
        traces.append(1)
        return tilted.log_prob(x)

    for scale in (1.0, 2.0, 3.0):
        energy = make(jnp.asarray(scale))
        tilted = ebm_ppl.EnergyDistribution(energy, dist.Normal(scale, 1.0), beta=scale)
        exact = dist.Normal(scale, 1.0).log_prob(0.7) - scale * energy(0.7)
        np.testing.assert_allclose(log_prob(tilted, 0.7), exact, rtol=1e-13)
    assert len(traces) == 1


def test_a_fresh_function_traces_again():
    traces = []

    @jax.jit
    def log_prob(tilted):
        traces.append(1)
        return tilted.log_prob(0.7)

    for power in (2, 4):
        tilted = ebm_ppl.EnergyDistribution(lambda x, power=power: x**power, dist.Normal(0.0, 1.0))
        np.testing.assert_allclose(log_prob(tilted), tilted.log_prob(0.7))
    assert len(traces) == 2


# Plates


@pytest.mark.parametrize("plates", [((3, -1),), ((2, -2), (3, -1))])
def test_in_plates(plates):
    shape = tuple(size for size, _ in plates)

    def model(x=None):
        from contextlib import ExitStack

        with ExitStack() as stack:
            for size, dim in plates:
                stack.enter_context(numpyro.plate(f"p{dim}", size, dim=dim))
            numpyro.sample("x", ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 2.0)), obs=x)

    x = jnp.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    value, recorded = log_density(model, (x,), {}, {})
    assert isinstance(recorded["x"]["fn"], ebm_ppl.EnergyDistribution)
    np.testing.assert_allclose(value, jnp.sum(dist.Normal(0.0, 2.0).log_prob(x) - x**4), rtol=1e-13)


def test_in_a_subsampled_plate_it_is_scaled():
    def model(x):
        with numpyro.plate("n", 12, subsample_size=3) as index:
            numpyro.sample("x", ebm_ppl.EnergyDistribution(quartic, dist.Normal(0.0, 2.0)), obs=x[index])

    x = jnp.linspace(-1, 1, 12)
    value, recorded = log_density(seed(model, 0), (x,), {}, {})
    kept = x[recorded["n"]["value"]]
    assert kept.shape == (3,)
    np.testing.assert_allclose(value, 4.0 * jnp.sum(dist.Normal(0.0, 2.0).log_prob(kept) - kept**4), rtol=1e-13)
