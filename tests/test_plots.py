"""Pictures are drawn without a display, of what they are asked for."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
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


def smooth(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    ebm.energy_factor("smooth", jnp.sum(jnp.diff(x) ** 2))
    numpyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)


@pytest.fixture(scope="module")
def runs():
    """Two runs of SMC through both phases, and draws of the prior, in one tree."""
    target, key = ebm.target(smooth, jnp.array([0.0, 3.0, 0.0])), jax.random.key(0)
    data = ebm.sample(key, target, ebm.SMC(num_particles=100), num_chains=2, progress_bar=False)
    data.update(ebm.prior_predictive(key, target, num_samples=100))
    return data


def test_smc(runs):
    figure = ebm.plot_smc(runs)
    path = runs["smc"]
    names = dict(zip(figure.axes, ("beta", "ess", "accept_rate", "log_z"), strict=True))
    for axis, name in names.items():
        shown = np.concatenate([line.get_ydata() for line in axis.lines])
        np.testing.assert_array_equal(np.sort(shown), np.sort(path[name].values.ravel()))
    bands = [band.get_paths()[0].vertices[:, 1] for band in figure.axes[3].collections]
    low = path["log_z"] - 2 * path["log_z_std_error"]
    assert min(band.min() for band in bands) == pytest.approx(float(low.min()))
    prior = int((path["role"] == 0).sum())
    assert figure.axes[0].patches[0].get_extents().transformed(figure.axes[0].transData.inverted()).x1 == prior + 0.5
    figure.canvas.draw()
    with pytest.raises(ebm.EnergyError, match="no group 'smc'"):
        ebm.plot_smc(xr.DataTree())


def test_energies(runs):
    """The data push the energy far beyond what the prior has: its histogram lies to the right."""
    (axis,) = ebm.plot_energies(runs).axes
    before, after = axis.containers
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["prior", "posterior"]
    centres = [
        np.average([bar.get_center()[0] for bar in bars], weights=[bar.get_height() for bar in bars])
        for bars in (before, after)
    ]
    energies = [runs[group]["energy_smooth"].values for group in ("sample_stats_prior", "sample_stats")]
    np.testing.assert_allclose(centres, [each.mean() for each in energies], atol=1.0)
    assert centres[1] - centres[0] > 10 and "'smooth'" in axis.get_xlabel()
    axis.figure.canvas.draw()
    alone = xr.DataTree.from_dict({"/sample_stats": runs["sample_stats"].to_dataset()})
    assert len(ebm.plot_energies(alone).axes[0].containers) == 1
    assert len(ebm.plot_energies(alone, runs).axes[0].containers) == 2
    with pytest.raises(ebm.EnergyError, match="no energy terms"):
        ebm.plot_energies(xr.DataTree.from_dict({"/sample_stats": xr.Dataset({"lp": 0.0})}))


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
