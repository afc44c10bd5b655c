"""Handwritten digits: MNIST from local files, or else the 1,797 digits of scikit-learn.

Nothing is downloaded.
"""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from nca_models._files import whole_file
from nca_models.data import DataError
from nca_models.training.config import TrainConfig, target_side

_TEST_SHARE = 0.2  # of scikit-learn's digits, the last ones
_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
_NPZ = {
    "train_images": "x_train",
    "train_labels": "y_train",
    "test_images": "x_test",
    "test_labels": "y_test",
}


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(TrainConfig):
    """Settings of a system that is shown digits."""

    target_help: ClassVar[str] = "a folder with MNIST's files (default: scikit-learn's digits)"

    target_size: int = target_side()

    @classmethod
    def check_target(cls, system: str, target: str) -> None:
        """Refuse what is no folder."""
        if not Path(target).is_dir():
            raise DataError(f"--data-dir {target}: {system} wants a folder with MNIST's files")


@dataclass(frozen=True)
class Digits:
    """Digits to train on and others to test on.

    Attributes:
        train_images, test_images: `[n, size, size]` float32, 0 (paper) to 1 (ink).
        train_labels, test_labels: `[n]` int32.
        source: where they come from, in words.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source: str


def digits(size: int, folder: Path | None = None) -> Digits:
    """Return digits scaled to `size` by `size` pixels.

    Args:
        size: side of an image.
        folder: holds MNIST as the four IDX files (`train-images-idx3-ubyte`, ..., with or without
            `.gz`) or as `mnist.npz`; None for scikit-learn's digits.

    Raises:
        DataError: the folder holds neither, a file is broken, or scikit-learn is missing.
    """
    arrays, source = _scikit_learn() if folder is None else _mnist(folder)
    for name in ("train_images", "test_images"):
        arrays[name] = np.stack([_resized(image, size) for image in arrays[name]])
    for name in ("train_labels", "test_labels"):
        arrays[name] = arrays[name].astype(np.int32)
    return Digits(**arrays, source=source)


def save(data: Digits, path: Path) -> None:
    """Write digits to an `.npz` file, whole or not at all, with pixels of 8 bits."""
    arrays = {name: getattr(data, name) for name in _FILES}
    for name in ("train_images", "test_images"):
        arrays[name] = (arrays[name] * 255).round().astype(np.uint8)
    with whole_file(path) as temporary:
        np.savez_compressed(temporary, source=data.source, **arrays)


def load(path: Path) -> Digits:
    """Read what `save` wrote.

    Raises:
        DataError: no such file, or it is broken.
    """
    arrays = _from_npz(path, {name: name for name in (*_FILES, "source")}, "digits")
    for name in ("train_images", "test_images"):
        arrays[name] = arrays[name].astype(np.float32) / 255
    return Digits(source=str(arrays.pop("source")), **arrays)


def _scikit_learn() -> tuple[dict[str, np.ndarray], str]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "digits need scikit-learn: run `pip install scikit-learn`, or give a folder of MNIST "
            "files with --data-dir DIR"
        ) from error
    bunch = load_digits()
    images = (bunch.images / 16 * 255).round().astype(np.uint8)
    first = round(len(images) * (1 - _TEST_SHARE))
    arrays = {
        "train_images": images[:first],
        "train_labels": bunch.target[:first],
        "test_images": images[first:],
        "test_labels": bunch.target[first:],
    }
    return arrays, "scikit-learn's 1,797 digits of 8x8 pixels"


def _mnist(folder: Path) -> tuple[dict[str, np.ndarray], str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --data-dir wants one with MNIST's files")
    npz = folder / "mnist.npz"
    if npz.is_file():
        return _from_npz(npz, _NPZ, "MNIST"), str(npz)
    arrays = {}
    for name, file_name in _FILES.items():
        files = [p for p in (folder / file_name, folder / f"{file_name}.gz") if p.is_file()]
        if not files:
            raise DataError(
                f"{folder}: has neither mnist.npz nor {file_name} (or {file_name}.gz); leave out "
                "--data-dir for scikit-learn's digits"
            )
        arrays[name] = _idx(files[0])
    return arrays, str(folder)


def _from_npz(path: Path, keys: dict[str, str], kind: str) -> dict[str, np.ndarray]:
    """Read arrays by other names: `keys` are those in the file."""
    try:
        with np.load(path) as file:
            return {name: file[key] for name, key in keys.items()}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as {kind} ({error})") from error


def _idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, dims = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dims}I", data, 4)
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
        if zero or kind != 8:
            raise ValueError("it does not hold unsigned bytes")
        return values.reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise DataError(f"{path}: cannot be read as an IDX file ({error})") from error


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape != (size, size):
        image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    return image.astype(np.float32) / 255
