"""The loop of training: a run that was killed goes on as if it had not been, and nothing wrong goes on in silence."""

import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from train_problems import BASE, two_modes

import ebm_ppl as ebm
from ebm_ppl.train.walkers import Dynamics

OBJECTIVES = {
    "score": ebm.ScoreMatching(),
    "noise": ebm.NoiseContrast(),
    "likelihood": ebm.MonteCarloLikelihood(64),
    "persistent": ebm.PersistentContrastiveDivergence(64, 0.1, Dynamics(ebm.MALA(), 2)),
    "jarzynski": ebm.Jarzynski(64),
}


def fit(objective, data=None, seed=0, **settings):
    energy = ebm.MLPEnergy(jax.random.key(0), 1, width=8)
    settings = {"num_steps": 40, "every": 10, "batch_size": 32, "progress_bar": False, "averaging": 0.9} | settings
    data = two_modes(200) if data is None else data
    return ebm.fit(jax.random.key(seed), energy, data, objective, **{"base": BASE} | settings)


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


def assert_identical(first, second):
    for x, y in zip(arrays(first[0]), arrays(second[0]), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(arrays(first[2:]), arrays(second[2:]), strict=True):
        np.testing.assert_array_equal(x, y)
    assert first.record.identical(second.record)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(name, tmp_path):
    """Bit by bit: parameters, walkers, and the record of the steps before."""
    whole = fit(OBJECTIVES[name])
    for killed in (10, 30):
        path = tmp_path / f"{killed}.npz"
        fit(OBJECTIVES[name], num_steps=killed, checkpoint=path)
        assert_identical(fit(OBJECTIVES[name], checkpoint=path), whole)
        assert_identical(fit(OBJECTIVES[name], checkpoint=path), whole)  # and is not run again where it is done


def test_what_an_objective_is_made_of_may_be_elsewhere_in_memory(tmp_path):
    """As it is in the process that goes on with a run."""

    def run():
        noise = dist.Normal(0.0, 3.0).expand([1]).to_event(1)
        return fit(ebm.NoiseContrast(noise), checkpoint=tmp_path / "a")

    assert_identical(run(), run())


def test_what_was_best_is_in_the_checkpoint_too(tmp_path):
    settings = {"held_out": two_modes(100, seed=1), "patience": 2, "optimiser": optax.adam(0.05), "num_steps": 400}
    whole = fit(ebm.ScoreMatching(), **settings)
    losses = whole.record["held_out"]["loss"].values
    assert len(losses) < 40 and np.argmin(losses) == len(losses) - 3
    fit(ebm.ScoreMatching(), **settings | {"num_steps": 20, "checkpoint": tmp_path / "a"})
    assert_identical(fit(ebm.ScoreMatching(), **settings | {"checkpoint": tmp_path / "a"}), whole)


def damaged(kind, path):
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "altered":
        with np.load(path) as file:
            stored = {name: file[name] for name in file.files}
        stored["array_1"] = stored["array_1"] + 1
        with path.open("wb") as file:
            np.savez(file, **stored)
    elif kind == "pickled":
        path.write_bytes(pickle.dumps(Dangerous()))
    elif kind == "pickled inside":
        with path.open("wb") as file:
            np.savez(file, description=np.array(Dangerous(), dtype=object))
    else:
        path.write_bytes(b"")


class Dangerous:
    def __reduce__(self):
        return pytest.fail, ("a checkpoint was executed",)


@pytest.mark.parametrize("kind", ["truncated", "altered", "pickled", "pickled inside", "empty"])
def test_a_damaged_checkpoint_is_refused_and_not_executed(kind, tmp_path):
    path = tmp_path / "run.npz"
    fit(ebm.ScoreMatching(), checkpoint=path)
    damaged(kind, path)
    with pytest.raises(ebm.CheckpointError, match=r"run.npz (is no checkpoint|was altered)"):
        fit(ebm.ScoreMatching(), checkpoint=path)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "key"),
        ({"data": two_modes(200, seed=5)}, "data"),
        ({"batch_size": 16}, "batch_size"),
        ({"averaging": 0.0}, "averaging"),
        ({"optimiser": optax.sgd(0.1)}, "structure|shapes"),
        ({"base": dist.Normal(0.0, 5.0).expand([1]).to_event(1)}, "base"),
        ({"held_out": two_modes(20)}, "held_out"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_the_checkpoint_of_another_run_is_refused(changed, named, tmp_path):
    fit(ebm.ScoreMatching(), checkpoint=tmp_path / "run.npz")
    with pytest.raises(ebm.CheckpointError, match=f"belongs to another run: .*({named})"):
        fit(ebm.ScoreMatching(), **{"checkpoint": tmp_path / "run.npz"} | changed)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(tmp_path):
    with pytest.raises(ebm.NonFiniteEnergyError, match=r"loss of score matching is .* at step \d+"):
        fit(ebm.ScoreMatching(), optimiser=optax.sgd(1e200), checkpoint=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_average_of_parameters_is_theirs_over_the_steps():
    """With a decay so near to one that it is the plain mean."""
    met = []

    class Still(ebm.ScoreMatching):
        def loss(self, key, density, parameters, state, batch):
            return density.energy.weight * 1.0, (state, {"weight": density.energy.weight})

    class Line(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            return self.weight * x[0]

    fitted = ebm.fit(
        jax.random.key(0),
        Line(jnp.zeros(())),
        two_modes(64),
        Still(),
        optimiser=optax.sgd(1.0),
        num_steps=5,
        averaging=0.999999,
        progress_bar=False,
    )
    met = -np.arange(1.0, 6.0)
    assert float(fitted.energy.weight) == pytest.approx(np.mean(met))
    np.testing.assert_allclose(fitted.record["training"]["weight"], met + 1)


@pytest.mark.parametrize(
    "settings", [{"averaging": 0.9}, {"held_out": two_modes(10), "every": 1}], ids=["average", "best"]
)
def test_the_parameters_of_the_objective_are_those_that_belong_to_the_energy(settings):
    """Both take the same steps here, there and back again: the best is not the last."""

    class Both(ebm.ScoreMatching):
        def init(self, key, density, data):
            return jnp.zeros(()), ()

        def loss(self, key, density, parameters, state, batch):
            weight = density.energy.factor
            return ((weight - 2.0) ** 2 + (parameters - 2.0) ** 2) / 2, (state, {})

    fitted = ebm.fit(
        jax.random.key(0),
        ebm.ScaledEnergy(lambda x: x[0], jnp.zeros(())),
        two_modes(64),
        Both(),
        optimiser=optax.sgd(1.8),
        num_steps=5,
        progress_bar=False,
        **settings,
    )
    assert float(fitted.energy.factor) == float(fitted.parameters) != 0
    assert abs(float(fitted.parameters) - 2) < 2


def test_every_point_is_taken_once_in_an_epoch():
    class Seen(ebm.ScoreMatching):
        def loss(self, key, density, parameters, state, batch):
            told = {"sum": jnp.sum(batch), "number": jax.random.uniform(key)}
            return 0.0 * density.energy.network.layers[0].bias.sum(), (state, told)

    data = 2.0 ** np.arange(43)[:, None] / 2**20
    told = fit(Seen(), data, batch_size=10, num_steps=12, every=5).record["training"]
    sums = told["sum"].values
    seen = np.round(sums.reshape(3, 4).sum(axis=1) * 2**20).astype(int)
    assert all(bin(each).count("1") == 40 for each in seen)  # each once, and three that wait for another epoch
    assert len(np.unique(sums)) == 12  # in another order each time
    assert len(np.unique(told["number"].values)) == 12  # each step with a key of its own


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_steps": 0}, ebm.EnergyError, "num_steps is 1 at least"),
        ({"averaging": 1.0}, ebm.EnergyError, "averaging is a decay"),
        ({"patience": 3}, ebm.EnergyError, "held_out"),
        ({"data": np.array([[0.0], [np.nan]])}, ebm.EnergyError, "1 of 2 events that are not finite, the first at 1"),
        ({"data": np.zeros((3, 2))}, ebm.EnergyShapeError, "base has event shape .1,."),
        ({"held_out": np.zeros((3, 2))}, ebm.EnergyShapeError, r"held_out has shape \(2,\), one of data \(1,\)"),
    ],
)
def test_bad_input_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        fit(ebm.ScoreMatching(), **settings)


def test_what_cannot_be_compared_judges_nothing():
    with pytest.raises(ebm.EnergyError, match="cannot be compared"):
        fit(ebm.ContrastiveDivergence(), held_out=two_modes(10))


def test_an_energy_without_parameters_is_refused():
    with pytest.raises(ebm.EnergyError, match="no floating-point arrays"):
        ebm.fit(jax.random.key(0), lambda x: x[0], two_modes(10), ebm.ScoreMatching())


def test_data_outside_of_the_base_are_told_of():
    energy, data = ebm.MLPEnergy(jax.random.key(0), 1, width=8), np.array([[0.1], [0.5], [1.2], [-0.1]])
    base = dist.Uniform(0, 1).expand([1]).to_event(1)
    with pytest.raises(ebm.EnergyError, match=r"2 of 4 events .* the first at 2: take a wider base"):
        ebm.fit(jax.random.key(0), energy, data, ebm.ScoreMatching(), base=base)


def test_data_where_the_energy_is_not_finite_are_told_of():
    class Log(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            return self.weight * jnp.log(x[0])

    with pytest.raises(ebm.NonFiniteEnergyError, match=r"not finite at 1 of the first 2 events .* at event 1"):
        ebm.fit(jax.random.key(0), Log(jnp.ones(())), np.array([[1.0], [-1.0]]), ebm.ScoreMatching(), base=BASE)


@pytest.mark.parametrize("gap", [-11.0, 9.0, 11.0])
def test_walkers_that_have_lost_the_model_are_warned_of(gap):
    """Ten nats for each dimension, of which there is one."""

    class Lost(ebm.ScoreMatching):
        def loss(self, key, density, parameters, state, batch):
            loss, (state, _) = super().loss(key, density, parameters, state, batch)
            return loss, (state, {"energy_gap": jnp.asarray(gap)})

    if abs(gap) < 10:
        fit(Lost())
        return
    with pytest.warns(ebm.EnergyWarning, match=r"walkers lie 11 nats (above|below) the data"):
        fit(Lost())
