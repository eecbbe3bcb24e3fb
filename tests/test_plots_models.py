"""Pictures of models are drawn, and say what is in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ebm_ppl as ebm


@pytest.fixture(scope="module")
def model():
    return ebm.vae(jax.random.key(0), 3, ebm.BernoulliLikelihood((4, 5)), width=4, depth=1)


def test_a_sheet_has_each_image_once():
    images = np.random.default_rng(0).random((7, 4, 5))
    figure = ebm.plot_images(images, num_columns=3)
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(figure.axes) == 9 and len(shown) == 7
    scaled = (images - images.min()) / (images.max() - images.min())
    np.testing.assert_allclose(np.stack(shown), scaled)
    assert len(ebm.plot_images(np.zeros((2, 3, 4, 5))).axes) == 2


def test_a_traversal_has_a_row_for_each_latent(model):
    figure = ebm.plot_traversal(model, jnp.ones(3), latents=[2, 0], num=5, reach=1.0)
    assert [axis.get_ylabel() for axis in figure.axes[::5]] == ["z[2]", "z[0]"]
    middle = [figure.axes[i].images[0].get_array() for i in (2, 7)]
    np.testing.assert_allclose(*middle)  # both rows go through the same point
    assert not np.allclose(figure.axes[0].images[0].get_array(), figure.axes[4].images[0].get_array())


def test_what_they_refuse(model):
    with pytest.raises(ebm.EnergyShapeError, match=r"images have shape \(4, 5\)"):
        ebm.plot_images(np.zeros((4, 5)))
    with pytest.raises(ebm.EnergyShapeError, match="2 names for 1 rows"):
        ebm.plot_images(np.zeros((3, 4, 5)), rows=["a", "b"])
    with pytest.raises(ebm.EnergyError, match="from 0 to 2"):
        ebm.plot_traversal(model, latents=[3])
    with pytest.raises(ebm.EnergyShapeError, match="origin has shape"):
        ebm.plot_traversal(model, jnp.zeros(2))
    flat = ebm.vae(jax.random.key(0), 2, ebm.GaussianLikelihood((4,)), width=4, depth=1)
    with pytest.raises(ebm.EnergyShapeError, match="none of an image"):
        ebm.plot_traversal(flat)
