"""Textures: how different two of them are, and how they move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from nca_models.data import DataError
from nca_models.data.textures import AT_HAND, texture
from nca_models.data.vgg16 import BLOCKS, vgg16
from nca_models.measures import motion
from nca_models.systems import dynamics
from nca_models.texture_loss import feature_transport, patch_transport, pyramid, vgg16_features

KEY = jax.random.key(0)


def picture(name, size=32):
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    return jnp.asarray(np.asarray(texture(name, size), np.float32) / 255)[None]


def loss(a, b, key=KEY):
    return float(patch_transport(pyramid(a), pyramid(b), key)[0])


def test_the_loss_sees_textures_and_not_places():
    brick, grass = picture("brick"), picture("grass")
    # Of the exemplar there are no patches across its borders, of the torus there are.
    same = loss(brick, brick)
    # Shifted by a multiple of the coarsest scale, on a torus, a texture is the same.
    assert loss(jnp.roll(brick, (8, 4), (1, 2)), brick) == pytest.approx(same, rel=1e-3)
    other = loss(grass, brick)
    assert other > 5 * same
    shuffled = jax.random.permutation(KEY, brick.reshape(-1, 3)).reshape(brick.shape)
    assert loss(shuffled, brick) > 5 * same  # the same colours, without the structure
    assert loss(grass, brick, jax.random.key(1)) == pytest.approx(other, rel=0.5)


def test_the_loss_of_a_torus_that_is_its_own_exemplar_is_none():
    """Repeated beyond its borders, by less than half, a torus has its own patches and no others."""
    torus = jax.random.uniform(KEY, (1, 24, 24, 3))
    around = jnp.tile(torus, (1, 4, 4, 1))
    assert loss(torus, around) < 0.1 * loss(
        jax.random.uniform(jax.random.key(1), torus.shape), around
    )


def test_faint_noise_counts():
    """A fixed set of filters does not see all of it, random ones do."""
    brick = picture("brick", 40)
    noise = jax.random.normal(KEY, brick.shape)
    losses = [loss(brick + size * noise, brick) for size in (0, 0.02, 0.04, 0.08)]
    assert losses == sorted(losses)
    assert losses[2] > 1.5 * losses[0]


def test_the_gradient_leads_to_the_texture():
    wanted = pyramid(picture("gravel", 24))
    image = jax.random.uniform(KEY, (1, 24, 24, 3))

    adam = optax.adam(0.02)

    @jax.jit
    def descend(image, state, key):
        error = lambda image: patch_transport(pyramid(image), wanted, key)[0]
        value, gradient = jax.value_and_grad(error)(image)
        updates, state = adam.update(gradient, state)
        return image + updates, state, value

    state, values = adam.init(image), []
    for key in jax.random.split(KEY, 60):
        image, state, value = descend(image, state, key)
        values.append(float(value))
    assert np.mean(values[-5:]) < 0.1 * np.mean(values[:5])


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


def test_textures_of_a_dataset(tmp_path):
    folder = tmp_path / "images" / "bubbly"
    folder.mkdir(parents=True)
    Image.new("RGB", (30, 20), (10, 20, 30)).save(folder / "bubbly_0101.png")
    assert texture(str(tmp_path / "bubbly_0101"), 8).getpixel((3, 3)) == (10, 20, 30)
    with pytest.raises(DataError, match="bubbly_0102"):
        texture(str(tmp_path / "bubbly_0102"), 8)


def narrow_vgg16():
    """Weights `[3, 3, in, out]` and biases of a VGG16 a sixteenth as wide."""
    random, width, layers = np.random.default_rng(0), 3, []
    for size, out in zip(BLOCKS, (4, 8, 16, 32, 32), strict=True):
        for _ in range(size):
            kernel = random.normal(size=(3, 3, width, out)) * (9 * width) ** -0.5
            layers.append((kernel.astype(np.float32), random.normal(size=out).astype(np.float32)))
            width = out
    return layers


def write_torch(path, layers):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    state = {"classifier.0.weight": torch.zeros(3, 3), "classifier.0.bias": torch.zeros(3)}
    for i, (kernel, bias) in enumerate(layers):
        state[f"features.{2 * i}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        state[f"features.{2 * i}.bias"] = torch.from_numpy(bias)
    torch.save(state, path)


def write_npz(path, layers):
    named = {f"features.{2 * i}.weight": k.transpose(3, 2, 0, 1) for i, (k, _) in enumerate(layers)}
    np.savez(path, **named, **{f"features.{2 * i}.bias": b for i, (_, b) in enumerate(layers)})


def write_keras(path, layers):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(path, "w") as file:
        for block, size in enumerate(BLOCKS, 1):
            for i in range(1, size + 1):
                kernel, bias = layers[sum(BLOCKS[: block - 1]) + i - 1]
                name = f"block{block}_conv{i}/block{block}_conv{i}"
                file[f"{name}_W_1:0"], file[f"{name}_b_1:0"] = kernel, bias


WRITERS = {".pth": write_torch, ".npz": write_npz, ".h5": write_keras}


@pytest.mark.parametrize("suffix", WRITERS)
def test_vgg16_from_a_file(tmp_path, suffix):
    layers, path = narrow_vgg16(), tmp_path / f"weights{suffix}"
    WRITERS[suffix](path, layers)
    network = vgg16(path)
    for (kernel, bias), (read_kernel, read_bias) in zip(layers, network.layers, strict=True):
        np.testing.assert_array_equal(read_kernel, kernel)
        np.testing.assert_array_equal(read_bias, bias)
    colours = np.linspace(0, 1, 3)
    expected = (colours[list(network.order)] - network.mean) / network.deviation
    if suffix == ".h5":  # blue, green, red, from 0 to 255, less ImageNet's mean
        np.testing.assert_allclose(expected, [255 - 103.939, 127.5 - 116.779, -123.68])
    else:
        np.testing.assert_allclose(expected, [-0.485 / 0.229, 0.044 / 0.224, 0.594 / 0.225])


def test_vgg16_features_see_textures(tmp_path):
    write_npz(tmp_path / "weights.npz", narrow_vgg16())
    network = vgg16(tmp_path / "weights.npz")
    brick, grass = (vgg16_features(network, picture(name)) for name in ("brick", "grass"))
    assert [f.shape for f in brick] == [
        (1, 1024, 3), (1, 1024, 4), (1, 256, 8), (1, 64, 16), (1, 16, 32), (1, 4, 32)
    ]  # fmt: skip
    assert float(feature_transport(brick, brick, KEY)[0]) == 0
    assert float(feature_transport(grass, brick, KEY)[0]) > 0.05
    turned = vgg16_features(network, jnp.roll(picture("brick"), (16, 16), (1, 2)))
    assert float(feature_transport(turned, brick, KEY)[0]) < 1e-8  # on a torus


def test_what_is_no_vgg16(tmp_path):
    layers = narrow_vgg16()
    write_npz(tmp_path / "short.npz", layers[:-1])
    write_npz(tmp_path / "torn.npz", layers[1:] + layers[:1])
    (tmp_path / "text.npz").write_text("no weights")
    for name, words in (
        ("short.npz", "13 convolutions"),
        ("torn.npz", "is not VGG16"),
        ("text.npz", "cannot be read"),
        ("none.npz", "no such file"),
        ("weights.onnx", "must be a file .pth"),
    ):
        with pytest.raises(DataError, match=words):
            vgg16(tmp_path / name)
