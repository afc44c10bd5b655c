"""The descriptor of textures, on textures that are known."""

import numpy as np
import pytest

from nca_models.data import drawn
from nca_models.data.textures import AT_HAND, elsewhere, texture
from nca_models.measures.textures import distance, distances

SIZE = 64


def crops(name):
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    return np.asarray(texture(name, SIZE)), np.asarray(elsewhere(name, SIZE))


@pytest.mark.parametrize("name", AT_HAND)
def test_another_crop_is_taken_for_the_same_texture(name):
    middle, corner = crops(name)
    assert distance(middle, middle) < 1e-6
    measured = distances([corner], middle)
    assert set(measured) == {"exemplar", *AT_HAND} - {name}
    assert min(measured, key=measured.__getitem__) == "exemplar"


@pytest.mark.parametrize("name", ["brick", "brickwork", "cracked", "crystalline", "grass"])
def test_structure_counts_and_faint_noise_hardly(name):
    middle, corner = crops(name)
    rng = np.random.default_rng(0)
    noisy = np.clip(corner + rng.normal(0, 2, corner.shape), 0, 255).astype(np.uint8)
    shuffled = rng.permutation(middle.reshape(-1, 3)).reshape(middle.shape)
    apart = distance(middle, corner)
    assert distance(middle, noisy) < 2 * apart
    # Grass is nearly as random as its shuffled cells.
    assert distance(middle, shuffled) > (1.2 if name == "grass" else 2) * apart


def test_drawn_textures_are_cut_from_one_and_the_same():
    for name in drawn.TEXTURES:
        small, large = drawn.draw(name, 24), drawn.draw(name, 40)
        np.testing.assert_array_equal(small, large[:24, :24])
        assert large.shape == (40, 40, 3)
        assert large.std() > 10


def test_a_picture_of_one_colour():
    flat = np.full((24, 24, 3), 90, np.uint8)
    assert distance(flat, flat) < 1e-6
    assert distance(flat, np.asarray(drawn.draw("chequered", 24))) > 0.3
