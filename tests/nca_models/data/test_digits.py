"""Digits from files, from scikit-learn, and the message when neither can be had."""

import gzip
import struct

import numpy as np
import pytest

from nca_models.data import DataError
from nca_models.data.digits import _FILES, digits, load, save

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "train_images": RANDOM.integers(0, 256, (7, 28, 28), np.uint8),
    "train_labels": RANDOM.integers(0, 10, 7).astype(np.uint8),
    "test_images": RANDOM.integers(0, 256, (3, 28, 28), np.uint8),
    "test_labels": RANDOM.integers(0, 10, 3).astype(np.uint8),
}


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_scikit_learn():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    data = digits(12)
    assert data.train_images.shape == (1438, 12, 12)
    assert data.test_images.shape == (359, 12, 12)
    assert set(data.test_labels) == set(range(10))
    assert 0 <= data.train_images.min() < 0.01
    assert 0.9 < data.train_images.max() <= 1
    assert "scikit-learn" in data.source


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files(tmp_path, compress):
    for name, file_name in _FILES.items():
        content = idx(ARRAYS[name])
        path = tmp_path / (file_name + ".gz" * compress)
        path.write_bytes(gzip.compress(content) if compress else content)
    data = digits(28, tmp_path)
    np.testing.assert_array_equal(data.test_images * 255, ARRAYS["test_images"])
    np.testing.assert_array_equal(data.train_labels, ARRAYS["train_labels"])
    assert digits(14, tmp_path).train_images.shape == (7, 14, 14)
    save(data, tmp_path / "digits.npz")
    again = load(tmp_path / "digits.npz")
    np.testing.assert_array_equal(again.train_images, data.train_images)
    assert again.source == str(tmp_path)


def test_npz_file(tmp_path):
    keys = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "mnist.npz", **dict(zip(keys, ARRAYS.values(), strict=True)))
    np.testing.assert_array_equal(digits(28, tmp_path).test_labels, ARRAYS["test_labels"])


def test_errors(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        digits(8, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has neither mnist\.npz nor train-images-idx3-ubyte"):
        digits(8, tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x0d\3" + bytes(12))
    with pytest.raises(DataError, match="cannot be read as an IDX file"):
        digits(8, tmp_path)
    (tmp_path / "mnist.npz").write_bytes(b"no zip")
    with pytest.raises(DataError, match="cannot be read as MNIST"):
        digits(8, tmp_path)
    with pytest.raises(DataError, match="cannot be read as digits"):
        load(tmp_path / "mnist.npz")
