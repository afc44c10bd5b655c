"""The convolutions of a VGG16 network, from a file of weights on the machine.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
2014. Nothing is downloaded: torchvision's `vgg16-397923af.pth` and Keras'
`vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5` are the common files, and any `.npz` with the
same arrays works.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nca_models.data import DataError

BLOCKS = (2, 2, 3, 3, 3)  # convolutions of each block; a pool follows each
_LAYERS = sum(BLOCKS)


class VGG16(NamedTuple):
    """Kernels `[3, 3, in, out]` and biases `[out]` of 13 convolutions, and what input they expect.

    Colours from 0 to 1 become their input as `(colours[..., order] - mean) / deviation`.
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    order: tuple[int, int, int]
    mean: np.ndarray
    deviation: np.ndarray


# torchvision's weights are for RGB in units of ImageNet's deviation, Keras' for BGR from 0 to 255.
_TORCH = ((0, 1, 2), np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
_KERAS = ((2, 1, 0), np.array([103.939, 116.779, 123.68]) / 255, np.full(3, 1 / 255))


def vgg16(path: Path) -> VGG16:
    """Read the weights in a `.pth`, `.pt`, `.npz` or `.h5` file.

    Kernels `[out, in, 3, 3]` are taken to be trained as torchvision's, `[3, 3, in, out]` as Keras'.

    Raises:
        DataError: the file cannot be read, or is no VGG16.
    """
    readers = {".pth": _torch, ".pt": _torch, ".npz": _npz, ".h5": _keras, ".hdf5": _keras}
    if path.suffix not in readers:
        raise DataError(f"{path}: VGG16's weights must be a file {', '.join(readers)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a file with VGG16's weights")
    try:
        arrays = readers[path.suffix](path)
    except ImportError as error:
        raise DataError(f"{path}: to read it, run `pip install {error.name}`") from error
    except Exception as error:  # each library has its own errors
        raise DataError(f"{path}: cannot be read as weights ({error})") from error
    names = sorted(arrays, key=_natural)
    kernels = [arrays[name] for name in names if arrays[name].ndim == 4][:_LAYERS]
    biases = [arrays[name] for name in names if arrays[name].ndim == 1][:_LAYERS]
    torch = bool(kernels) and kernels[0].shape[2:] == (3, 3)
    if torch:
        kernels = [kernel.transpose(2, 3, 1, 0) for kernel in kernels]
    wanted = 3
    for kernel, bias in zip(kernels, biases, strict=False):
        if kernel.shape[:3] != (3, 3, wanted) or bias.shape != kernel.shape[3:]:
            break
        wanted = kernel.shape[3]
    else:
        if len(kernels) == len(biases) == _LAYERS:
            layers = tuple(zip(kernels, biases, strict=True))
            return VGG16(layers, *(_TORCH if torch else _KERAS))
    raise DataError(f"{path}: is not VGG16: wants {_LAYERS} convolutions of 3 x 3 with biases")


def _natural(name: str) -> list[Any]:
    """Sorts `features.10` after `features.2`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _torch(path: Path) -> dict[str, np.ndarray]:
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.numpy() for name, tensor in state.items() if "classifier" not in name}


def _npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _keras(path: Path) -> dict[str, np.ndarray]:
    import h5py

    names: list[str] = []
    with h5py.File(path) as file:
        file.visit(names.append)
        convolutions = {name: file[name] for name in names if "conv" in name}
        return {n: item[()] for n, item in convolutions.items() if isinstance(item, h5py.Dataset)}
