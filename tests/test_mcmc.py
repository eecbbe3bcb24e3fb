"""Markov chains: right moments on the problems of the registry, and the promises about starts, states and chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz_stats.base import array_stats
from limits import z_limit
from problems import CHAINS, PROBLEMS

import ebm_ppl as ebm
from ebm_ppl import mcmc, pieces
from ebm_ppl.warmup import windows

SAMPLERS = {"NUTS": ebm.NUTS(), "HMC": ebm.HMC(), "MALA": ebm.MALA(), "MCLMC": ebm.MCLMC()}
NUM_SAMPLES = {"MALA": 2_000, "HMC": 1_000}
"""Of each chain: for MALA a draw is one leapfrog step, for HMC about two on the easier problems."""
PAIRS = [(sampler, name) for name, problem in PROBLEMS.items() for sampler in CHAINS if sampler in problem.samplers]
NUM_SCORES = sum(2 * np.size(mean) for _, name in PAIRS for mean in PROBLEMS[name].means.values())
ALIKE = {"beta_binomial", "gamma_poisson", "absolute_loss", "dynamic_support", "correlation", "constant_partition"}
"""Left to the slow tests where the sampler is another than NUTS: to a kernel a model is its log density."""
SEEDS = range(3)
ENOUGH = 400
"""Effective draws below which an error estimate, and so a score, means little (Vehtari et al. 2021)."""


def is_alike(sampler, name):
    return name in ALIKE and sampler != "NUTS"


@pytest.mark.parametrize(
    ("sampler", "name"),
    [pytest.param(*pair, id="-".join(pair), marks=[pytest.mark.slow] if is_alike(*pair) else []) for pair in PAIRS],
)
def test_moments(sampler, name):
    """Means and variances against the truth, in Monte Carlo standard errors of all chains of all seeds."""
    problem = PROBLEMS[name]
    target = problem.target()
    runs = [
        ebm.sample(
            jax.random.key(seed),
            target,
            SAMPLERS[sampler],
            num_warmup=500,
            num_samples=NUM_SAMPLES.get(sampler, 500),
            progress_bar=False,
            log_likelihood=False,
        )["posterior"]
        for seed in SEEDS
    ]
    limit = z_limit(NUM_SCORES)
    for site, mean in problem.means.items():
        draws = np.concatenate([run[site].values for run in runs])
        draws = draws.reshape(*draws.shape[:2], -1)
        for part, (centre, variance) in enumerate(zip(np.ravel(mean), np.ravel(problem.variances[site]), strict=True)):
            values = draws[:, :, part]
            for moment, truth in ((values, centre), ((values - centre) ** 2, variance)):
                ess = float(array_stats.ess(moment, chain_axis=0, draw_axis=1, method="mean"))
                assert ess > ENOUGH, f"{site}[{part}]: {ess:.0f} effective draws"
                score = (moment.mean() - truth) / (moment.std() / np.sqrt(ess))
                assert abs(score) < limit, f"{site}[{part}]: {score:.2f} standard errors from {truth}"


# Small models for the promises


def _normal(y):
    x = numpyro.sample("x", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


Y = np.array([0.5, -1.0])


def _draws(sampler, *, key=0, num_warmup=100, num_samples=100, **settings):
    return mcmc.run(
        jax.random.key(key),
        ebm.target(_normal, Y),
        sampler,
        num_chains=settings.pop("num_chains", 2),
        num_warmup=num_warmup,
        num_samples=num_samples,
        progress_bar=False,
        **settings,
    )


@pytest.mark.parametrize("name", CHAINS)
def test_returned_state_continues_a_run_bit_identically(name):
    whole, _ = _draws(SAMPLERS[name], num_samples=200)
    first, state = _draws(SAMPLERS[name], num_samples=100)
    second, last = _draws(SAMPLERS[name], num_samples=100, state=state, key=99)
    np.testing.assert_array_equal(np.concatenate([first.z, second.z], axis=1), whole.z)
    for stat, value in whole.stats.items():
        np.testing.assert_array_equal(np.concatenate([first.stats[stat], second.stats[stat]], axis=1), value)
    assert int(last.step) == 300
    assert not np.array_equal(first.z, second.z)


def test_state_is_returned_and_taken_by_sample():
    target = ebm.target(_normal, Y)
    settings = {"num_samples": 100, "num_chains": 2, "progress_bar": False}
    data, state = ebm.sample(jax.random.key(0), target, num_warmup=100, return_state=True, **settings)
    more = ebm.sample(jax.random.key(1), target, state=state, **settings)
    whole = ebm.sample(jax.random.key(0), target, num_warmup=100, **(settings | {"num_samples": 200}))
    both = np.concatenate([data["posterior"]["x"].values, more["posterior"]["x"].values], axis=1)
    np.testing.assert_array_equal(both, whole["posterior"]["x"].values)


def test_a_state_continues_its_own_target_alone():
    _, state = _draws(ebm.NUTS(), num_samples=20)
    short = {"num_warmup": 0, "num_samples": 20, "state": state, "progress_bar": False}
    with pytest.raises(ebm.EnergyError, match="another target"):
        ebm.sample(jax.random.key(0), ebm.target(_normal, Y + 1.0), **short)
    with pytest.raises(ebm.EnergyError, match="another target"):
        ebm.sample(jax.random.key(0), ebm.target(lambda: numpyro.sample("x", dist.Normal(0.0, 1.0))), **short)
    target = ebm.target(_normal, Y)
    with pytest.raises(ebm.EnergyError, match=r"NUTS.* is HMC"):
        ebm.sample(jax.random.key(0), target, ebm.HMC(), **short)
    with pytest.raises(ebm.EnergyError, match="2 chains, and num_chains is 4"):
        ebm.sample(jax.random.key(0), target, num_chains=4, **short)


def test_start_at_given_values():
    given = {"init": {"x": np.array([3.0, -2.0])}, "num_warmup": 0, "num_samples": 1}
    target = ebm.target(_normal, Y)
    state = mcmc.run(jax.random.key(0), target, ebm.MALA(), num_chains=2, progress_bar=False, **given)[1]
    start = mcmc._start(jax.random.key(0), target, ebm.MALA(), 2, 0, given["init"], None)[0]
    np.testing.assert_array_equal(start.parts[0].kernel.position[0], [3.0, -2.0])
    assert state.step == 1
    with pytest.raises(ebm.EnergyError, match="no value for the latent sites 'x'"):
        ebm.sample(jax.random.key(0), target, init={"z": 1.0}, progress_bar=False)


@pytest.mark.parametrize("metric", ["diag", "low_rank"])
def test_other_metrics(metric):
    """Moments of a correlated normal distribution; a low rank finds its one long direction, a diagonal cannot."""
    dim, slope = 20, 6.0

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))
        numpyro.factor("tie", -0.5 * slope**2 * (jnp.sum(x**2) - jnp.sum(x) ** 2 / dim))

    target = ebm.target(model)
    data = ebm.sample(jax.random.key(0), target, ebm.NUTS(metric=metric), progress_bar=False)
    along = data["posterior"]["x"].values.sum(-1) / np.sqrt(dim)
    across = data["posterior"]["x"].values[..., 0] - along / np.sqrt(dim)
    variances = 1.0, (1 - 1 / dim) / (1 + slope**2)
    for values, variance in zip((along, across), variances, strict=True):
        for moment, truth in ((values, 0.0), (values**2, variance)):
            ess = float(array_stats.ess(moment, chain_axis=0, draw_axis=1, method="mean"))
            assert ess > ENOUGH
            assert abs(moment.mean() - truth) < z_limit(2 * 4) * moment.std() / np.sqrt(ess)
    steps = float(data["sample_stats"]["n_steps"].mean())
    assert steps < 8 if metric == "low_rank" else steps > 8


def test_divergences_are_seen():
    """Neal's funnel, whose neck is too narrow for a diagonal metric."""

    def model():
        v = numpyro.sample("v", dist.Normal(0.0, 3.0))
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(v / 2)).expand([9]).to_event(1))

    data = ebm.sample(jax.random.key(0), ebm.target(model), ebm.NUTS(metric="diag"), progress_bar=False)
    diverging = data["sample_stats"]["diverging"]
    assert diverging.dtype == bool and data.attrs["num_divergent"] == int(diverging.sum()) > 0


def test_thinning_keeps_every_third_draw_from_the_third_on():
    dense, _ = _draws(ebm.NUTS(), num_samples=150)
    thinned, _ = _draws(ebm.NUTS(), num_samples=50, thin=3)
    assert thinned.z.shape == (2, 50, 2)
    np.testing.assert_array_equal(thinned.z, dense.z[:, 2::3])
    np.testing.assert_array_equal(thinned.stats["lp"], dense.stats["lp"][:, 2::3])


def test_chunking_changes_nothing(monkeypatch):
    whole, _ = _draws(ebm.NUTS())
    monkeypatch.setattr(pieces, "FIRST", 7)
    monkeypatch.setattr(pieces, "SHORTEST", 1e-4)
    monkeypatch.setattr(pieces, "LONGEST", 1e-4)
    monkeypatch.setattr(mcmc, "LARGEST_RECORD", 24)  # numbers: twelve steps, so that windows are learned in parts
    cut, _ = _draws(ebm.NUTS())
    np.testing.assert_array_equal(cut.z, whole.z)


def test_chains_are_independent_and_reproducible():
    draws, _ = _draws(ebm.HMC(), num_chains=4)
    again, _ = _draws(ebm.HMC(), num_chains=4)
    np.testing.assert_array_equal(draws.z, again.z)
    for first in range(4):
        for second in range(first):
            assert not np.any(np.all(draws.z[first] == draws.z[second], axis=-1))
    # Momenta are drawn by each chain for itself: steps of two chains are no more alike than chance.
    steps = np.diff(draws.z, axis=1).reshape(4, -1)
    correlations = np.corrcoef(steps)[np.triu_indices(4, 1)]
    assert np.max(np.abs(correlations)) * np.sqrt(steps.shape[1]) < z_limit(6)


def test_progress_bar_changes_nothing(capsys):
    target = ebm.target(_normal, Y)
    settings = {"num_warmup": 100, "num_samples": 100, "num_chains": 2}
    shown = ebm.sample(jax.random.key(0), target, ebm.NUTS(), progress_bar=True, **settings)
    text = capsys.readouterr().err
    assert "NUTS" in text and "200/200" in text and "leapfrogs a draw" in text
    hidden = ebm.sample(jax.random.key(0), target, ebm.NUTS(), progress_bar=False, **settings)
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(shown["posterior"]["x"].values, hidden["posterior"]["x"].values)


@pytest.mark.parametrize("name", CHAINS)
def test_sample_stats_have_the_names_of_arviz(name):
    data = ebm.sample(
        jax.random.key(0),
        ebm.target(_normal, Y),
        SAMPLERS[name],
        num_chains=2,
        num_warmup=100,
        num_samples=100,
        progress_bar=False,
    )
    stats = data["sample_stats"]
    expected = {"acceptance_rate", "diverging", "energy", "lp", "n_steps", "step_size"}
    if name == "NUTS":
        expected |= {"tree_depth", "reached_max_treedepth"}
        assert np.all(stats["n_steps"].values < 2 ** stats["tree_depth"].values)
    assert expected <= set(stats.data_vars)
    assert stats["diverging"].dtype == bool and not stats["diverging"].values.any()
    assert stats.sizes == {"chain": 2, "draw": 100}
    assert np.all((stats["acceptance_rate"].values >= 0) & (stats["acceptance_rate"].values <= 1))
    assert len(np.unique(stats["step_size"].values)) == 1, "the step size changes after the warm-up"
    # lp is the log density of the draw itself
    x = data["posterior"]["x"].values
    truth = -0.5 * np.sum(x**2 / 4 + (x - Y) ** 2, axis=-1) - np.log(2 * np.pi) * 2 - np.log(2.0) * 2
    np.testing.assert_allclose(stats["lp"].values, truth, rtol=1e-10)
    assert data.attrs["adjusted"] == 1


def test_unadjusted_mclmc_is_marked_and_warns():
    with pytest.warns(ebm.EnergyWarning, match="Unadjusted MCLMC is biased"):
        data = ebm.sample(
            jax.random.key(0),
            ebm.target(_normal, Y),
            ebm.MCLMC(adjusted=False),
            num_warmup=500,
            num_samples=200,
            num_chains=2,
            progress_bar=False,
        )
    assert data.attrs["adjusted"] == 0
    assert data["posterior"].attrs["adjusted"] == 0
    assert np.all(np.isfinite(data["posterior"]["x"].values))


# Starting points


def test_start_is_tried_again_where_the_density_is_zero():
    """A hard constraint that one try in ten meets: each chain still finds its start, and stays."""

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("wall", jnp.where(jnp.abs(x - 1.5) < 0.2, 0.0, jnp.inf))

    data = ebm.sample(
        jax.random.key(0), ebm.target(model), num_chains=8, num_warmup=0, num_samples=20, progress_bar=False
    )
    x = data["posterior"]["x"].values
    assert np.all(np.abs(x - 1.5) < 0.2)
    assert len(np.unique(x[:, 0])) == 8


def test_site_that_is_never_finite_is_named():
    def model(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ebm.energy_factor("good", x**2)
        ebm.energy_factor("broken", jnp.sqrt(-1.0 - x**2))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    with pytest.raises(ebm.NonFiniteEnergyError) as caught:
        ebm.sample(jax.random.key(0), ebm.target(model, 0.3), num_warmup=10, num_samples=10, progress_bar=False)
    message = str(caught.value)
    assert "'broken' (energy nan)" in message
    assert "'good'" not in message and "'y'" not in message
    assert "Example point: {'x':" in message


def test_start_from_the_reference_has_its_distribution():
    """Without energies the reference is the target: the very first draw already has its moments."""

    def model():
        numpyro.sample("x", dist.Normal(50.0, 20.0))

    draws, _ = mcmc.run(
        jax.random.key(0),
        ebm.target(model),
        ebm.HMC(),
        init="reference",
        num_chains=4_000,
        num_warmup=0,
        num_samples=1,
        progress_bar=False,
    )
    x = np.asarray(draws.z).ravel()
    scores = (
        (x.mean() - 50.0) / (20.0 / np.sqrt(len(x))),
        (((x - 50.0) ** 2).mean() - 400.0) / (400.0 * np.sqrt(2 / len(x))),
    )
    assert np.max(np.abs(scores)) < z_limit(2)


# Compilation and precision


@pytest.mark.parametrize("name", ["NUTS", "MCLMC"])
def test_new_data_of_the_same_shape_is_not_traced_again(name):
    traces = 0

    def model(y):
        nonlocal traces
        traces += 1
        x = numpyro.sample("x", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    def run(y):
        target = ebm.target(model, y)
        before = traces
        draws, _ = mcmc.run(
            jax.random.key(0),
            target,
            SAMPLERS[name],
            num_chains=2,
            num_warmup=100,
            num_samples=100,
            progress_bar=False,
        )
        return draws.z, traces - before

    first, cold = run(np.array([0.5, -1.0]))
    second, warm = run(np.array([5.0, -1.0]))
    assert cold > 0 and warm == 0
    assert not np.array_equal(first, second)


def test_single_precision(run_in_float32):
    printed = run_in_float32(
        """
        import jax, numpy as np, numpyro, numpyro.distributions as dist
        import ebm_ppl as ebm
        from arviz_stats.base import array_stats

        def model(y):
            x = numpyro.sample("x", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

        y = np.array([1.5, 1.5], np.float32)
        for sampler in (ebm.NUTS(), ebm.HMC(), ebm.MALA(), ebm.MCLMC()):
            data = ebm.sample(jax.random.key(0), ebm.target(model, y), sampler, num_warmup=300,
                              num_samples=1000, progress_bar=False)
            x = data["posterior"]["x"].values
            assert x.dtype == np.float32
            assert data["sample_stats"]["lp"].dtype == np.float32
            x = x[..., 0].astype(float)
            for values, truth in ((x, 1.2), ((x - 1.2) ** 2, 0.8)):
                ess = float(array_stats.ess(values, chain_axis=0, draw_axis=1, method="mean"))
                print((values.mean() - truth) / (values.std() / np.sqrt(ess)))
        """
    )
    scores = np.array(printed.split(), float)
    assert len(scores) == 8
    assert np.max(np.abs(scores)) < z_limit(8)


@pytest.mark.parametrize("num_warmup", [1, 10, 50, 89, 100, 500])
def test_stretches_of_the_warm_up_make_it_whole(num_warmup):
    stretches = windows(num_warmup)
    assert sum(length for length, _ in stretches) == num_warmup
    assert not stretches[-1][1]  # the step size has a stretch of its own after the last metric


def test_a_short_warm_up_finds_the_step_size():
    """A last stretch of five steps once left an acceptance of .2."""
    target = ebm.target(lambda: numpyro.sample("x", dist.Normal(0, 1).expand([5]).to_event(1)))
    for seed in range(3):
        settings = {"num_chains": 2, "num_warmup": 50, "num_samples": 100, "progress_bar": False}
        data = ebm.sample(jax.random.key(seed), target, ebm.NUTS(), **settings)
        assert 0.65 < float(data["sample_stats"]["acceptance_rate"].mean()) < 0.97
