"""Pictures are drawn without a display, of what they are asked for."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

import ebm_ppl as ebm


def walk(slope, data_id="data"):
    time = np.arange(5.0)
    group = xr.Dataset(
        {
            "log_evidence": ("time", slope * (time + 1)),
            "elpd": ("time", np.full(5, slope)),
            "log_evidence_se": ("time", np.full(5, 0.3)),
            "elpd_se": ("time", np.full(5, 0.1)),
        },
        coords={"time": time},
    )
    tree = xr.DataTree.from_dict({"/sequential": group})
    tree.attrs["data_id"] = data_id
    return tree


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_compare():
    models = {name: ebm.LogZ(value, 0.5) for name, value in (("a", -2.0), ("b", -1.0), ("c", -9.0))}
    figure = ebm.plot_compare(ebm.compare(models))
    evidence, probability = figure.axes
    assert [label.get_text() for label in evidence.get_yticklabels()] == ["b", "a", "c"]
    bars = evidence.collections[0].get_segments()
    np.testing.assert_allclose([bar[:, 0] for bar in bars], [[-2.0, 0.0], [-3.0, -1.0], [-10.0, -8.0]])
    assert "89 %" in probability.get_xlabel()
    figure.canvas.draw()
    with pytest.raises(ebm.EnergyError, match=r"table of ebm_ppl\.compare"):
        ebm.plot_compare(ebm.compare(models)[["rank", "se"]])


def test_sequential_evidence_of_one_model_and_of_two():
    (top, bottom) = ebm.plot_sequential_evidence(walk(-1.0)).axes
    np.testing.assert_allclose(top.lines[0].get_ydata(), -np.arange(1.0, 6.0))
    figure = ebm.plot_sequential_evidence({"base": walk(-1.0), "rival": walk(-0.4)})
    top, bottom = figure.axes
    np.testing.assert_allclose(top.lines[0].get_ydata(), 0.6 * np.arange(1.0, 6.0))
    assert "over base" in top.get_ylabel() and bottom.get_xlabel() == "time"
    figure.canvas.draw()
    with pytest.raises(ebm.IncomparableError, match="'rival' and 'base' are of different data"):
        ebm.plot_sequential_evidence({"base": walk(-1.0), "rival": walk(-0.4, "other")})
    with pytest.raises(ebm.EnergyError, match="no group 'sequential'"):
        ebm.plot_sequential_evidence({"base": xr.DataTree()})
