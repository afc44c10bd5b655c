"""Textures, how unlike they are, and how they move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from nca_models import motion
from nca_models.data import DataError
from nca_models.data.textures import AT_HAND, texture
from nca_models.systems import dynamics
from nca_models.texture_loss import features, random_filters, sliced_transport

KEY = jax.random.key(0)


def picture(name, size=32):
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    return jnp.asarray(np.asarray(texture(name, size), np.float32) / 255)[None]


def loss(a, b, key=KEY):
    return float(sliced_transport(features(a), features(b), key)[0])


def test_the_loss_sees_textures_and_not_places():
    brick, grass = picture("brick"), picture("grass")
    assert loss(brick, brick) == 0
    # Shifted by a multiple of the coarsest scale, on a torus, a texture is the same.
    assert loss(jnp.roll(brick, (8, 4), (1, 2)), brick) < 1e-10
    other = loss(grass, brick)
    assert other > 0.05
    shuffled = jax.random.permutation(KEY, brick.reshape(-1, 3)).reshape(brick.shape)
    assert loss(shuffled, brick) > 0.02  # of the same colours, without the structure
    assert loss(grass, brick, jax.random.key(1)) == pytest.approx(other, rel=0.5)


def test_the_gradient_leads_to_the_texture():
    wanted = features(picture("gravel", 24))
    image = jax.random.uniform(KEY, (1, 24, 24, 3))

    adam = optax.adam(0.02)

    @jax.jit
    def descend(image, state, key):
        error = lambda image: sliced_transport(features(image), wanted, key)[0]
        value, gradient = jax.value_and_grad(error)(image)
        updates, state = adam.update(gradient, state)
        return image + updates, state, value

    state, values = adam.init(image), []
    for key in jax.random.split(KEY, 60):
        image, state, value = descend(image, state, key)
        values.append(float(value))
    assert np.mean(values[-5:]) < 0.1 * np.mean(values[:5])


def test_filters_are_always_the_same():
    filters = random_filters()
    np.testing.assert_array_equal(filters, random_filters())
    np.testing.assert_allclose(filters.mean((0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose(jnp.square(filters).sum((0, 1, 2)), 1, rtol=1e-5)


def test_flow_of_what_moves_by_two_pixels():
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    still = (np.asarray(picture("gravel", 48)[0]) * 255).astype(np.uint8)
    film = np.stack([np.roll(still, 2 * i, axis=1) for i in range(4)])
    flow = motion.flow(film)
    assert flow.shape == (3, 48, 48, 2)
    np.testing.assert_allclose(np.median(flow, (0, 1, 2)), [2, 0], atol=0.05)
    assert motion.strength(film) == pytest.approx(2, rel=0.1)
    assert motion.strength(film[[0, 0, 0]]) < 0.01


def test_textures(tmp_path):
    for name in AT_HAND:
        assert texture(name, 16).size == (16, 16) if picture(name).size else True
    Image.new("RGB", (30, 20), (10, 20, 30)).save(tmp_path / "plain.png")
    assert texture(str(tmp_path / "plain.png"), 8).getpixel((3, 3)) == (10, 20, 30)
    with pytest.raises(DataError, match="no such file, nor one of brick, grass, gravel"):
        texture("granite", 8)


def test_the_filters_of_the_paper():
    """The cell, Sobel in x and in y and the Laplacian over all eight neighbours."""
    x, y, laplacian = np.moveaxis(dynamics.FILTERS, -1, 0)
    np.testing.assert_array_equal(x, [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    np.testing.assert_array_equal(y, x.T)
    np.testing.assert_array_equal(laplacian, [[1, 1, 1], [1, -8, 1], [1, 1, 1]])
