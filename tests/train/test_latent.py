"""Maximum marginal likelihood, against models whose marginal likelihood is in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.optimize
from limits import chi2_limits, t_limit
from numpyro.distributions import constraints
from paramax import NonTrainable

import ebm_ppl as ebm
from ebm_ppl.scale import DenseScale
from ebm_ppl.train.latent import Given, Joint, MarginalLikelihood
from ebm_ppl.train.objective import Density
from ebm_ppl.train.walkers import Dynamics

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 2))
Y = X @ [1.5, -0.5] + RNG.normal(size=20)
COUNTS = RNG.poisson(RNG.gamma(1.5, 4.0, size=(8, 1)), size=(8, 4))


def regression(x, y):
    noise = numpyro.param("noise", 2.0, constraint=constraints.positive)
    spread = numpyro.param("spread", 1.0, constraint=constraints.interval(0.0, 5.0))
    weights = numpyro.sample("weights", dist.Normal(0, spread).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ weights, noise).to_event(1), obs=y)


def counts(y):
    shape = numpyro.param("shape", 1.0, constraint=constraints.positive)
    centre = numpyro.param("centre", 5.0, constraint=constraints.positive)
    with numpyro.plate("group", len(y)):
        mean = numpyro.sample("mean", dist.Gamma(shape, shape / centre))
        numpyro.sample("y", dist.Poisson(mean[:, None]).to_event(1), obs=y)


def log_p_of_regression(noise, spread, x=X, y=Y):
    covariance = noise**2 * jnp.eye(len(y)) + spread**2 * x @ x.T
    return dist.MultivariateNormal(jnp.zeros(len(y)), covariance).log_prob(y)


def log_p_of_counts(shape, centre, y=COUNTS):
    """The means integrated out by conjugacy."""
    total, num, gammaln, rate = y.sum(axis=1), y.shape[1], jax.scipy.special.gammaln, shape / centre
    of_groups = shape * jnp.log(rate) - (shape + total) * jnp.log(rate + num) + gammaln(shape + total) - gammaln(shape)
    return jnp.sum(of_groups) - gammaln(y + 1.0).sum()


def best(log_p, start):
    """The most likely parameters, both positive."""
    found = scipy.optimize.minimize(lambda t: -float(log_p(*np.exp(t))), np.log(start), tol=1e-10, method="Nelder-Mead")
    return np.exp(found.x)


def posterior(noise, spread, x=X, y=Y):
    """Mean and covariance of the weights."""
    covariance = np.linalg.inv(x.T @ x / noise**2 + np.eye(x.shape[1]) / spread**2)
    return covariance @ x.T @ y / noise**2, covariance


# A path of parameters, by walkers that start as exact draws


def replicated(objective, path, num_replicas):
    """Gradient and metrics at each of the unconstrained parameters of a path, (step, 2), for independent keys."""
    target = ebm.target(regression, X, Y)
    bijections = target.parameter_bijections()

    def joint_at(values):
        given = Given(target, bijections, *place)
        return Joint({"noise": values[0], "spread": values[1]}, NonTrainable(given))

    place = jnp.zeros(2), DenseScale.of_covariance(jnp.eye(2))
    first = joint_at(path[0]).target().parameters()
    mean, covariance = posterior(first["noise"], first["spread"])
    place = jnp.asarray(mean), DenseScale.of_covariance(covariance)
    log_z = jnp.full(2, log_p_of_regression(first["noise"], first["spread"]))
    objective = dataclasses.replace(objective, log_z=log_z)

    def one(key):
        key_start, key_steps = jax.random.split(key)
        points = jax.random.normal(key_start, (2 * objective.num_walkers, 2))
        parameters, start = objective.init(key, Density(joint_at(path[0]), None, (2,)), points)

        def step(state, at):
            k, values = at

            def loss(values):
                density = Density(joint_at(values), None, (2,))
                return objective.loss(jax.random.fold_in(key_steps, k), density, parameters, state, points[:1])

            (value, (state, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(values)
            return state, (gradient, metrics | {"loss": value})

        return jax.lax.scan(step, start, (jnp.arange(len(path)), path))[1]

    gradients, metrics = jax.device_get(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num_replicas)))

    def log_p(values):
        now = joint_at(values).target().parameters()
        return log_p_of_regression(now["noise"], now["spread"])

    return gradients, metrics, *map(np.asarray, jax.vmap(jax.value_and_grad(log_p))(path))


PATH = jnp.linspace(0, 1, 8)[:, None] * jnp.array([-1.2, 0.8]) + jnp.array([0.7, -1.4])
WAYS = {
    "unadjusted": MarginalLikelihood(256, 0.5, Dynamics(ebm.Langevin(), 1, 0.02)),
    "adjusted": MarginalLikelihood(256, 0.5, Dynamics(ebm.MALA(), 1, 0.3)),
    "resampled": MarginalLikelihood(256, 1.0, Dynamics(ebm.MALA(), 1, 0.3)),
}


@pytest.mark.parametrize("name", WAYS)
def test_log_p_is_unbiased_and_its_gradient_right_while_the_parameters_move(name):
    """E[e^A] = p(y) at every step of eight in which the scale of the noise falls to a third, and its error is known."""
    num = 256
    gradients, metrics, exact, slopes = replicated(WAYS[name], PATH, num)
    assert exact.max() - exact.min() > 5
    limit = t_limit(3 * (2 * 7 + 1 + 2), num - 1)
    for population in ("log_z", "log_z_of_driver"):  # which has no say here either
        ratios = np.exp(metrics[population] - exact)
        scores = (ratios.mean(axis=0) - 1)[1:] / (ratios.std(axis=0, ddof=1)[1:] / np.sqrt(num))
        assert np.max(np.abs(scores)) < limit, scores
        np.testing.assert_allclose(metrics[population][:, 0], exact[0], rtol=1e-12)
        if population == "log_z":
            excess = (ratios[:, -1] - 1) ** 2 - (ratios[:, -1] * metrics["log_z_std_error"][:, -1]) ** 2
            assert abs(excess.mean()) < limit * excess.std(ddof=1) / np.sqrt(num)
    assert 0.001 < ratios.std(axis=0)[-1] < 0.3
    off = gradients[:, -1] + slopes[-1]  # of minus the log likelihood
    scores = off.mean(axis=0) / (off.std(axis=0, ddof=1) / np.sqrt(num))
    assert np.max(np.abs(scores)) < limit, scores
    assert np.all(off.std(axis=0) / np.sqrt(num) < 0.1 * np.abs(slopes[-1]))  # so that the scores mean something
    np.testing.assert_allclose(metrics["loss"], -metrics["log_z_of_driver"], rtol=1e-12)


def test_driver_and_witness_have_noise_of_their_own():
    """From the same points, which they resample and move."""
    objective = MarginalLikelihood(16, 1.0, Dynamics(ebm.MALA(), 1, 0.3))
    density = Density(ebm.QuadraticEnergy(jnp.eye(2)), None, (2,))
    points = jnp.tile(jax.random.normal(jax.random.key(0), (16, 2)), (2, 1))
    state, _ = objective.weighed(objective.start(density, points, jnp.zeros(32), jnp.zeros(2)), density)
    (driver, witness, _), _ = objective.moved(jax.random.key(1), state, density)
    assert not np.any(driver.points == witness.points)


# Whole fits


@pytest.fixture(scope="module")
def optimiser():
    """One for all, so that all run by the same programs: of 20 steps, whatever their number."""
    return optax.adam(0.05)


def reckless(step):
    """A rate that the walkers can hardly follow, and from the second step on nothing can."""
    return jnp.where(step == 0, 0.5, 1e3)


RECKLESS = {
    "optimiser": optax.chain(optax.add_decayed_weights(0.5), optax.sgd(reckless)),
    "every": 1,
    "averaging": 0.0,
}


SAMPLER = ebm.SMC(num_particles=128)


def fit(model, *args, seed=0, optimiser=None, **settings):
    settings = {"num_steps": 300, "every": 20, "averaging": 0.95, "progress_bar": False} | settings
    target = ebm.target(model, *args)
    return ebm.fit_latent(jax.random.key(seed), target, SAMPLER, optimiser=optimiser, **settings)


PROBLEMS = {"regression": (regression, (X, Y), log_p_of_regression), "counts": (counts, (COUNTS,), log_p_of_counts)}


@pytest.mark.parametrize("name", ["regression", pytest.param("counts", marks=pytest.mark.slow)])
def test_the_most_likely_parameters_are_found_and_log_p_is_known_there(name, optimiser):
    model, args, log_p = PROBLEMS[name]
    num, names = 8, ebm.target(model, *args).spec.params
    fits = [fit(model, *args, seed=seed, optimiser=optimiser) for seed in range(num)]
    found = np.array([[each.parameters[name] for name in names] for each in fits])
    at_best = best(log_p, found[0])
    scores = (found.mean(axis=0) - at_best) / (found.std(axis=0, ddof=1) / np.sqrt(num))
    assert np.max(np.abs(scores)) < t_limit(4, num - 1), (found, at_best)
    assert float(log_p(*at_best)) - min(float(log_p(*each)) for each in found) < 0.05
    errors = np.array([each.log_z.value - float(log_p(*at)) for each, at in zip(fits, found, strict=True)])
    stated = np.array([each.log_z.std_error for each in fits])
    low, high = chi2_limits(2, num)
    assert low < np.sum((errors / stated) ** 2) < high, (errors, stated)
    assert np.all(stated < 0.5) and not any(each.log_z.doubts for each in fits)


def test_the_result_is_the_model_at_its_best_parameters(optimiser):
    """Draws of the posterior there, and a target for whatever else is asked of it."""
    fitted = fit(regression, X, Y, optimiser=optimiser)
    noise, spread = (float(fitted.parameters[name]) for name in ("noise", "spread"))
    mean, covariance = posterior(noise, spread)
    draws = fitted.posterior["posterior"]["weights"].values
    assert draws.shape == (2, 128, 2)
    scores = (draws.mean(axis=(0, 1)) - mean) / np.sqrt(np.diag(covariance) / 50)  # 256 of them, not independent
    assert np.max(np.abs(scores)) < t_limit(2, 50), scores
    np.testing.assert_allclose(draws.std(axis=(0, 1)), np.sqrt(np.diag(covariance)), rtol=0.3)
    weights = np.exp(fitted.posterior["particles"]["log_weight"].values)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    assert {"log_likelihood", "observed_data"} <= set(fitted.posterior.children)
    training = fitted.record["training"]
    assert training.sizes["step"] == 300 and training["log_z"].values[-1] > training["log_z"].values[0] + 1
    with pytest.warns(ebm.EnergyWarning, match="does not know its own error"):
        again = ebm.log_z(jax.random.key(1), fitted.target, ebm.Laplace())  # exact, for the posterior is normal
    assert again.value == pytest.approx(float(log_p_of_regression(noise, spread)), abs=1e-6)
    difference = fitted.log_z - again  # of the same data, or it would be refused
    assert abs(difference.value) < t_limit(1, 50) * fitted.log_z.std_error
    np.testing.assert_array_equal(fitted.target.args[1], Y)


def test_new_data_are_fitted_by_the_same_programs(optimiser):
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    settings = {"num_steps": 20, "optimiser": optimiser}
    for seed in range(2):  # two, since not every run of SMC needs all kinds of stages
        fit(regression, X, Y + 0.1 * seed, seed=seed, **settings)
    target = ebm.target(regression, X, Y + 0.2)  # which compiles how its parameters start
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        settings |= {"every": 20, "averaging": 0.95, "progress_bar": False}
        ebm.fit_latent(jax.random.key(0), target, SAMPLER, **settings)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_fit_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, optimiser):
    settings = {"optimiser": optimiser, "num_steps": 40}
    whole = fit(regression, X, Y, **settings)
    fit(regression, X, Y, **settings | {"num_steps": 20, "checkpoint": tmp_path / "a"})
    resumed = fit(regression, X, Y, **settings, checkpoint=tmp_path / "a")
    assert resumed.parameters == whole.parameters and resumed.log_z == whole.log_z
    assert resumed.record.identical(whole.record)
    with pytest.raises(ebm.CheckpointError, match=r"belongs to another run: .*data"):
        fit(regression, X, Y + 1, **settings, checkpoint=tmp_path / "a")


def test_weight_decay_leaves_the_data_alone():
    with pytest.warns(ebm.EnergyWarning, match="the parameters outran them"):
        fitted = fit(regression, X, Y, num_steps=1, **RECKLESS)
    np.testing.assert_array_equal(fitted.target.args[0], X)
    np.testing.assert_array_equal(fitted.target.args[1], Y)


def test_discrete_sites_are_summed_out():
    """A mixture of two regressions, whose marginal likelihood is a sum over two models."""

    def model(x, y):
        share = numpyro.param("share", 0.5, constraint=constraints.unit_interval)
        which = numpyro.sample("which", dist.Bernoulli(share))
        weights = numpyro.sample("weights", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ weights, 1.0 + jnp.expand_dims(which, -1)).to_event(1), obs=y)

    fitted = fit(model, X, Y, num_steps=40, optimiser=optax.adam(0.05))
    share, each = fitted.parameters["share"], [float(log_p_of_regression(1.0 + k, 1.0)) for k in (0, 1)]
    exact = np.logaddexp(np.log1p(-share) + each[0], np.log(share) + each[1])
    assert abs(fitted.log_z.value - exact) < t_limit(1, 50) * fitted.log_z.std_error
    assert (share > 0.55) == (each[1] > each[0]) and abs(share - 0.5) > 0.05


def test_single_precision_gives_the_same_answer(run_in_float32):
    printed = run_in_float32(
        """
        import sys; sys.path[:0] = ["tests", "tests/train"]
        import jax, optax, test_latent as here
        fitted = here.fit(here.regression, here.X, here.Y, optimiser=optax.adam(0.05))
        noise, spread = (fitted.parameters[name] for name in ("noise", "spread"))
        assert noise.dtype == "float32"
        print(noise, spread, fitted.log_z.value, fitted.log_z.std_error)
        """
    )
    noise, spread, value, std_error = map(float, printed.split())
    exact = float(log_p_of_regression(noise, spread))
    assert abs(value - exact) < t_limit(1, 50) * std_error
    assert float(log_p_of_regression(*best(log_p_of_regression, [1.0, 1.0]))) - exact < 0.05


# What is refused


def observed(model):
    """With an observation of the regression's data."""

    def whole(y):
        numpyro.sample("y", dist.Normal(model(), 1.0), obs=y)

    return whole


def no_parameters():
    return numpyro.sample("z", dist.Normal(0, 1))


def no_latent_sites():
    return numpyro.param("t", 0.0)


def improper_prior():
    return numpyro.param("t", 0.0) + numpyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))


def prior_energy():
    t, z = numpyro.param("t", 0.0), numpyro.sample("z", dist.Normal(0, 1))
    ebm.energy_factor("tilt", (z - t) ** 2)
    return z


def unknown_partition():
    t = numpyro.param("t", 0.0)
    return numpyro.sample("z", ebm.EnergyDistribution(lambda z: (z - t) ** 4, dist.Normal(0, 1)))


def on_the_edge():
    t = numpyro.param("t", 0.0, constraint=constraints.positive)
    return t * numpyro.sample("z", dist.Normal(0, 1))


REFUSED = {
    no_parameters: (ebm.EnergyError, "no parameters to fit: numpyro.param"),
    no_latent_sites: (ebm.EnergyError, "no continuous latent site"),
    improper_prior: (ebm.NoReferenceError, "'z' is improper"),
    prior_energy: (ebm.EnergyError, "'tilt' have a log Z of their own"),
    unknown_partition: (ebm.EnergyError, "'z' have a log Z of their own"),
    on_the_edge: (ebm.EnergyError, "'t' starts at 0.0, which is on the edge"),
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_models_whose_likelihood_would_be_wrong_are_refused(model):
    error, message = REFUSED[model]
    with pytest.raises(error, match=message):
        fit(observed(model), Y)


def test_models_without_data_are_refused():
    with pytest.raises(ebm.EnergyError, match="no data"):
        fit(lambda: numpyro.sample("z", dist.Normal(numpyro.param("t", 0.0), 1)))


def test_subsampled_plates_are_refused():
    def model(y):
        z = numpyro.sample("z", dist.Normal(numpyro.param("t", 0.0), 1))
        with numpyro.plate("rows", len(y), subsample_size=5) as rows:
            numpyro.sample("y", dist.Normal(z, 1), obs=jnp.asarray(y)[rows])

    with pytest.warns(ebm.EnergyWarning, match="subsampled"), pytest.raises(ebm.EnergyError, match="'rows' are subsam"):
        fit(model, Y)


def test_a_likelihood_that_is_not_finite_ends_the_fit_with_its_step():
    with pytest.raises(ebm.NonFiniteEnergyError, match=r"loss of marginal likelihood is nan.* at step \d"):
        fit(regression, X, Y, num_steps=20, **RECKLESS)


def test_parameters_that_outrun_the_walkers_are_told_of():
    with pytest.warns(ebm.EnergyWarning, match="the parameters outran them"):
        fitted = fit(regression, X, Y, num_steps=1, **RECKLESS)
    assert fitted.log_z.doubts
