"""Models by their evidence: probabilities whose errors are those of the log evidences."""

import dataclasses

import numpy as np
import pytest
import scipy.stats as st
import xarray as xr
from limits import z_limit
from scipy.special import expit, softmax

import ebm_ppl as ebm
from ebm_ppl.compare import NUM_DRAWS


def log_z(value, std_error=0.1, data_id="data", **facts):
    return ebm.LogZ(value, std_error, data_id=data_id, **facts)


def test_table_has_the_best_model_first():
    table = ebm.compare({"a": log_z(-12.0, 0.3), "b": log_z(-10.0, 0.4), "c": log_z(-11.0, 0.0)})
    assert list(table.index) == ["b", "c", "a"]
    np.testing.assert_array_equal(table["rank"], [0, 1, 2])
    np.testing.assert_allclose(table["log_bf"], [0.0, -1.0, -2.0])
    np.testing.assert_allclose(table["dse"], [0.0, 0.4, 0.5])
    np.testing.assert_allclose(table["probability"], softmax([0.0, -1.0, -2.0]))
    np.testing.assert_array_equal(table["prior"], 1 / 3)
    assert np.all((table["eti89_lb"] < table["probability"]) & (table["probability"] < table["eti89_ub"]))
    again = ebm.compare({"c": log_z(-11.0, 0.0), "a": log_z(-12.0, 0.3), "b": log_z(-10.0, 0.4)})
    assert list(again.index) == list(table.index)


def test_prior_probabilities_count():
    models = {"a": log_z(-10.0), "b": log_z(-11.0)}
    table = ebm.compare(models, {"b": 0.9, "a": 0.1})
    np.testing.assert_allclose(table["prior"], [0.1, 0.9])
    np.testing.assert_allclose(table["probability"], softmax([np.log(0.1), np.log(0.9) - 1.0]))


@pytest.mark.parametrize("factor", [0.3, 4.0, 30.0])
@pytest.mark.parametrize("ci_prob", [0.5, 0.94])
def test_interval_of_two_models_is_exact(factor, ci_prob):
    """There p = expit(log Bayes factor), which is normal: quantiles are carried through, out to the tails."""
    table = ebm.compare({"a": log_z(0.0, 0.8), "b": log_z(-factor, 0.6)}, ci_prob=ci_prob)
    tail = (1 - ci_prob) / 2
    # What random draws would have; evenly spread ones have less.
    error = np.sqrt(tail * (1 - tail) / NUM_DRAWS) / st.norm.pdf(st.norm.ppf(tail))
    percent = int(ci_prob * 100)
    for name, sign in (("a", 1.0), ("b", -1.0)):
        for end, quantile in (("lb", tail), ("ub", 1 - tail)):
            found = table.loc[name, f"eti{percent}_{end}"]
            if found > 1 - 1e-9:  # one, to what a number can hold
                assert name == "a" and factor == 30.0
                continue
            score = (np.log(found / (1 - found)) - sign * factor) / 1.0
            assert abs(score - st.norm.ppf(quantile)) < z_limit(24) * error


def test_interval_covers_the_true_probability():
    """Noisy log evidences of three models whose true ones are known; by the delta method it would be symmetric."""
    truth, errors, num = np.array([0.0, -1.0, -4.0]), np.array([0.6, 0.3, 0.9]), 300
    rng = np.random.default_rng(0)
    covered = np.zeros(3)
    for values in truth + errors * rng.normal(size=(num, 3)):
        pairs = zip("abc", values, errors, strict=True)
        table = ebm.compare({name: log_z(*pair) for name, *pair in pairs}).loc[list("abc")]
        covered += (table["eti89_lb"] < softmax(truth)) & (softmax(truth) < table["eti89_ub"])
    scores = (covered / num - 0.89) / np.sqrt(0.89 * 0.11 / num)
    assert np.max(np.abs(scores)) < z_limit(3), covered / num


def test_spread_is_that_of_the_delta_method_where_that_holds():
    table = ebm.compare({"a": log_z(0.0, 0.01), "b": log_z(-0.5, 0.02)})
    p = expit(0.5)
    delta = p * (1 - p) * np.hypot(0.01, 0.02)
    np.testing.assert_allclose(table["probability_se"], delta, rtol=z_limit(1) / np.sqrt(2 * NUM_DRAWS))


def test_doubts_are_carried_along():
    models = {"a": log_z(-10.0), "b": log_z(-11.0, doubts=("It lags.", "It drifts."))}
    with pytest.warns(ebm.EnergyWarning, match="model 'b' is in doubt.*It lags. It drifts."):
        table = ebm.compare(models)
    assert list(table["warning"]) == [False, True]
    assert table.loc["b", "doubts"] == "It lags. It drifts."


def result_of_smc(value, data_id="data"):
    runs = {"data_value": ("chain", [value, value]), "data_std_error": ("chain", [0.1, 0.1])}
    runs |= {name: ("chain", [0.0, 0.0]) for name in ("num_evaluations", "num_nan")}
    tree = xr.DataTree.from_dict({"/log_z": xr.Dataset(runs)})
    tree.attrs["data_id"] = data_id
    return tree


def test_results_of_smc_are_read():
    table = ebm.compare({"tree": result_of_smc(-10.0), "number": ebm.read_log_z(result_of_smc(-10.0))})
    np.testing.assert_array_equal(table["probability"], 0.5)
    with pytest.raises(ebm.IncomparableError, match="different observed data"):
        ebm.compare({"one": result_of_smc(-10.0), "other": result_of_smc(-11.0, "other")})


def test_what_cannot_be_compared():
    a, b = log_z(-10.0), log_z(-11.0)
    with pytest.raises(ebm.IncomparableError, match="different observed data"):
        ebm.compare({"a": a, "b": dataclasses.replace(b, data_id="other")})
    with pytest.raises(ebm.EnergyError, match="needs two models"):
        ebm.compare({"a": a})
    for value, error in ((np.nan, 0.1), (-1.0, np.nan), (-np.inf, 0.1), (-1.0, -0.1)):
        with pytest.raises(ebm.EnergyError, match=r"model 'b' is .*finite"):
            ebm.compare({"a": a, "b": log_z(value, error)})
    with pytest.raises(ebm.EnergyError, match="'b' is a float"):
        ebm.compare({"a": a, "b": -11.0})
    for prior, words in (
        ({"a": 1.0}, "the models are"),
        ({"a": 0.5, "c": 0.5}, "the models are"),
        ({"a": 1.0, "b": 0.0}, "are positive"),
        ({"a": 0.5, "b": np.nan}, "are positive"),
        ({"a": 0.5, "b": 0.6}, "add up to 1"),
    ):
        with pytest.raises(ebm.EnergyError, match=words):
            ebm.compare({"a": a, "b": b}, prior)
    with pytest.raises(ebm.EnergyError, match="ci_prob"):
        ebm.compare({"a": a, "b": b}, ci_prob=1.0)
