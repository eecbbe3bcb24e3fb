"""The default of `log_z`: one opinion where it is clean, else two families, and no small error bar over a gap."""

import jax
import numpyro
import numpyro.distributions as dist
import pytest
from problems import FUNNEL_IN_A_BOX, PROBLEMS, funnel_in_a_box

import ebm_ppl as ebm
from ebm_ppl.logz import consultation
from ebm_ppl.logz.consultation import MOST_COORDINATES, _doubted
from ebm_ppl.logz.fitted import BY_PILOT, IMPORTANCE, SHORT_PATH
from ebm_ppl.logz.integral import Integral

SMALL = ebm.SMC(num_particles=300, target_ess=0.5, num_moves=2)
FIRST = ebm.FittedReference(pilot=SMALL, fallback=SMALL, num_draws=1024, max_draws=4096)
NESTED = ebm.NestedSampling(num_live=60, num_delete=12)


def opinion(value, std_error, *doubts, branch=IMPORTANCE):
    said, diagnostics = (f"said {value}",), {"branch": branch}
    return Integral(value, std_error, num_evaluations=100, story=said, doubts=doubts, diagnostics=diagnostics)


def doubtful(self, key, target, known=None):
    return opinion(-5.0, 0.01, "heavy tails"), "its modes"


def consult(monkeypatch, first, second, **settings):
    """What comes of two given opinions, the second of either family."""
    opinions = iter([first, second])
    monkeypatch.setattr(ebm.FittedReference, "explore", lambda self, key, target, known=None: (next(opinions), known))
    monkeypatch.setattr(ebm.Consultation, "_by_nested", lambda self, key, target, larger, modes: next(opinions))
    return ebm.Consultation(**settings).integrate(jax.random.key(0), PROBLEMS["regression"].target())


def test_a_clean_first_opinion_is_the_answer(monkeypatch):
    found = consult(monkeypatch, opinion(-3.0, 0.01), None)
    assert (found.value, found.std_error, found.num_evaluations, found.doubts) == (-3.0, 0.01, 100, ())
    assert found.story[-1].startswith("clean")


def test_mass_that_the_first_missed_is_in_the_second(monkeypatch):
    found = consult(monkeypatch, opinion(-5.0, 0.01, "heavy tails"), opinion(-3.0, 0.04))
    assert (found.value, found.std_error, found.num_evaluations, found.doubts) == (-3.0, 0.04, 200, ())
    assert "not clean: heavy tails" in found.story and "said -3.0" in found.story


@pytest.mark.parametrize("doubts", [("heavy tails",), ()])
def test_modes_that_the_first_has_met_are_told_to_the_second(monkeypatch, doubts):
    """Of forty modes nested sampling and its ascents missed two, without a doubt, and the first had met them."""
    told = []

    def explore(self, key, target, known=None):
        told.append(known)
        return opinion(-3.0, 0.2, *doubts), "its modes"

    monkeypatch.setattr(ebm.FittedReference, "explore", explore)
    ebm.Consultation(tol=0.1).integrate(jax.random.key(0), PROBLEMS["regression"].target())
    assert told == [None, "its modes"]


def test_a_second_opinion_that_lies_lower_settles_nothing(monkeypatch):
    found = consult(monkeypatch, opinion(-3.0, 0.01, "heavy tails"), opinion(-5.0, 0.04))
    assert found.value == -3.0 and found.std_error >= 2.0
    assert "not both" in found.doubts[0] and "heavy tails" in found.doubts


@pytest.mark.parametrize("second", [-3.5, -4.5])
def test_points_of_nested_sampling_may_make_up_mass(monkeypatch, second):
    """On a lattice of wells they were a nat too high, by four of their own errors."""
    found = consult(monkeypatch, opinion(-4.0, 0.1, "heavy tails"), opinion(second, 0.2, branch=BY_PILOT), tol=1.0)
    assert (found.value, found.doubts) == (-4.0, ()) and 0.5 < found.std_error < 0.6
    assert found.diagnostics == {"branch": IMPORTANCE, "first": -4.0, "second": second}


@pytest.mark.parametrize("second", [-2.0, -6.0])
def test_points_of_nested_sampling_may_contradict_the_first(monkeypatch, second):
    found = consult(monkeypatch, opinion(-4.0, 0.1, "heavy tails"), opinion(second, 0.2, branch=BY_PILOT), tol=1.0)
    assert found.std_error >= 2.0 and "not both" in found.doubts[0]


def test_two_doubtful_opinions_make_no_answer(monkeypatch):
    found = consult(monkeypatch, opinion(-5.0, 0.01, "heavy tails"), opinion(-3.0, 0.04, "memory"))
    assert found.value == -3.0 and found.std_error >= 2.0
    assert found.doubts[1:] == ("heavy tails", "memory")


def test_two_clean_opinions_must_agree(monkeypatch):
    agreed = consult(monkeypatch, opinion(-3.0, 0.2), opinion(-3.1, 0.04))
    assert (agreed.value, agreed.std_error, agreed.doubts) == (-3.1, 0.04, ())
    apart = consult(monkeypatch, opinion(-3.0, 0.2), opinion(-5.0, 0.04))
    assert apart.std_error >= 2.0 and apart.doubts


def test_an_error_above_the_one_wanted_is_a_doubt(monkeypatch):
    found = consult(monkeypatch, opinion(-5.0, 0.01, "heavy tails"), opinion(-3.0, 0.2), budget=250.0)
    assert (found.value, found.std_error) == (-3.0, 0.2)
    assert found.doubts == ("The standard error is 0.200, where 0.05 was wanted: raise budget.",)


def test_the_second_opinion_grows_as_far_as_the_budget_allows(monkeypatch):
    sizes = []

    def by_nested(self, key, target, larger, modes):
        sizes.append(larger)
        return opinion(-3.0, 0.1 / larger**0.5)

    monkeypatch.setattr(ebm.FittedReference, "explore", doubtful)
    monkeypatch.setattr(ebm.Consultation, "_by_nested", by_nested)
    found = ebm.Consultation().integrate(jax.random.key(0), PROBLEMS["regression"].target())
    assert sizes == [1.0, pytest.approx(4 * consultation.MARGIN)]
    assert found.std_error < 0.05 and not found.doubts and found.num_evaluations == 300


def test_a_second_opinion_that_fails_leaves_the_doubts(monkeypatch):
    def fails(self, key, target, larger, modes):
        raise ebm.EnergyError("flat")

    monkeypatch.setattr(ebm.FittedReference, "explore", doubtful)
    monkeypatch.setattr(ebm.Consultation, "_by_nested", fails)
    found = ebm.Consultation().integrate(jax.random.key(0), PROBLEMS["regression"].target())
    assert found.value == -5.0 and found.doubts[0] == "heavy tails" and "flat" in found.doubts[1]
    assert "not counted: flat" in found.story[-1]


def test_a_larger_second_opinion_that_fails_leaves_the_smaller(monkeypatch):
    def by_nested(self, key, target, larger, modes):
        if larger > 1:
            raise ebm.EnergyError("flat")
        return opinion(-3.0, 0.1)

    monkeypatch.setattr(ebm.FittedReference, "explore", doubtful)
    monkeypatch.setattr(ebm.Consultation, "_by_nested", by_nested)
    found = ebm.Consultation().integrate(jax.random.key(0), PROBLEMS["regression"].target())
    assert (found.value, found.std_error, found.num_evaluations) == (-3.0, 0.1, 200)
    assert "not counted: flat" in found.story[-2] and "where 0.05 was wanted" in found.doubts[0]


def test_a_first_opinion_that_fails_leaves_the_second(monkeypatch):
    def fails(self, key, target, known=None):
        raise ebm.TemperingStalledError("stalled")

    def consulted():
        return ebm.Consultation().integrate(jax.random.key(0), PROBLEMS["regression"].target())

    monkeypatch.setattr(ebm.FittedReference, "explore", fails)
    with pytest.raises(ebm.TemperingStalledError, match="stalled") as raised:  # by its nested sampling just so
        consulted()
    assert isinstance(raised.value.__cause__, ebm.TemperingStalledError)
    monkeypatch.setattr(ebm.Consultation, "_by_nested", lambda self, key, target, larger, modes: opinion(-3.0, 0.04))
    found = consulted()
    assert (found.value, found.std_error, found.doubts) == (-3.0, 0.04, ())
    assert found.story == ("no first opinion (what it took until it failed is not counted: stalled)", "said -3.0")


def test_nested_sampling_alone_is_in_doubt(monkeypatch):
    def fails(self, key, target, known=None):
        raise ebm.TemperingStalledError("stalled")

    by_points = opinion(-3.0, 0.04, branch=BY_PILOT)
    monkeypatch.setattr(ebm.FittedReference, "explore", fails)
    monkeypatch.setattr(ebm.Consultation, "_by_nested", lambda self, key, target, larger, modes: by_points)
    found = ebm.Consultation().integrate(jax.random.key(0), PROBLEMS["regression"].target())
    assert found.value == -3.0 and "Nothing confirms" in found.doubts[0]


def test_a_clean_first_opinion_is_asked_again_within_the_budget(monkeypatch):
    asked = []

    def again(self, key, target, known=None):
        asked.append(self)
        return opinion(-3.0, 0.2 if len(asked) == 1 else 0.1), None

    def consulted(budget):
        asked.clear()
        return ebm.Consultation(budget=budget).integrate(jax.random.key(0), PROBLEMS["regression"].target())

    monkeypatch.setattr(ebm.FittedReference, "explore", again)
    found = consulted(10_000)
    assert [(each.tol, each.max_draws) for each in asked] == [(None, 2**20), (0.05, 2**13)]
    assert found.std_error == 0.1 and found.doubts == (
        "The standard error is 0.100, where 0.05 was wanted: raise budget.",
    )
    found = consulted(1000)
    assert len(asked) == 1 and "used up" in found.story[-1]
    assert found.doubts == ("The standard error is 0.200, where 0.05 was wanted: raise budget.",)


def test_infinite_density_met_by_the_second_opinion_is_an_error(monkeypatch):
    def fails(self, key, target, larger, modes):
        raise ebm.NonFiniteEnergyError("an energy is -inf")

    monkeypatch.setattr(ebm.FittedReference, "explore", doubtful)
    monkeypatch.setattr(ebm.Consultation, "_by_nested", fails)
    with pytest.raises(ebm.NonFiniteEnergyError, match="-inf"):
        ebm.Consultation().integrate(jax.random.key(0), PROBLEMS["regression"].target())


def test_no_second_opinion_beyond_the_budget(monkeypatch):
    found = consult(monkeypatch, opinion(-5.0, 0.01, "heavy tails"), None, budget=50.0)
    assert found.value == -5.0 and found.doubts[0] == "heavy tails" and "used up" in found.doubts[1]


@pytest.mark.slow
def test_default_of_log_z():
    problem = PROBLEMS["regression"]
    found = ebm.log_z(jax.random.key(0), problem.target())
    assert found.method == "consultation" and not found.doubts
    assert abs(found.value - problem.log_z) < 4 * found.std_error < 4 * 0.05


@pytest.mark.slow
def test_a_funnel_is_right_or_in_doubt():
    """The particles of SMC miss the neck by more than a nat, nested sampling goes there."""
    found = ebm.Consultation(first=FIRST, nested=NESTED).integrate(jax.random.key(0), ebm.target(funnel_in_a_box))
    assert abs(found.value - FUNNEL_IN_A_BOX) < 4 * found.std_error
    assert any("live points" in line for line in found.story)
    assert found.diagnostics["first"] < FUNNEL_IN_A_BOX - 0.3  # so that there was something to mend


def test_many_coordinates_get_a_second_opinion_by_tempering():
    def model():
        x = numpyro.sample("x", dist.Normal(0, 1).expand([MOST_COORDINATES + 1]).to_event(1))
        ebm.energy_factor("observed", 0.5 * (x**2).sum(), role="loss")

    method = ebm.Consultation(tempered=ebm.SMC(num_particles=200))
    found = method._second(jax.random.key(0), ebm.target(model), method.budget, None)
    exact = -(MOST_COORDINATES + 1) / 2 * 0.6931471805599453
    assert abs(found.value - exact) < 4 * found.std_error and "own reference" in found.story[-1]
    assert "times larger" in found.story[1]


@pytest.mark.parametrize(
    ("dim", "drift", "is_clean"),
    [(MOST_COORDINATES + 1, 2.0, True), (MOST_COORDINATES + 1, 9.0, False), (MOST_COORDINATES, 2.0, False)],
)
def test_in_many_dimensions_a_pilot_that_keeps_up_is_the_second_opinion(dim, drift, is_clean):
    diagnostics = {"branch": SHORT_PATH, "fit": 0.01, "drift_of_pilot": drift}
    first = Integral(-3.0, 0.02, num_evaluations=100, diagnostics=diagnostics)
    assert _doubted(first, dim).doubts == first.doubts if is_clean else "does not fit" in _doubted(first, dim).doubts[0]


@pytest.mark.parametrize("settings", [{"tol": 0.0}, {"budget": -1.0}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ebm.EnergyError, match=next(iter(settings))):
        ebm.Consultation(**settings)
