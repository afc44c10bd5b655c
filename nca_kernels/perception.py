"""Filter banks for the perception, in 1-D, 2-D and 3-D, as plain arrays of taps.

Perception is data: a backend sees taps, never the name of a filter. A bank is a NumPy array
``[*kernel, F]``, one stencil in the last axis for each filter, applied by cross-correlation (no
flip), as ``jax.lax.conv`` and Flax do. A new bank is one function here, listed in ``BANKS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from typing import Any

import numpy as np

SMOOTH = np.array([1.0, 2.0, 1.0])  # the Sobel filter across its direction
DIFFERENCE = np.array([-1.0, 0.0, 1.0])  # and along it
CENTRE = np.array([0.0, 1.0, 0.0])


def identity(num_spatial_dims: int) -> np.ndarray:
    """The cell itself: one filter, ``[3, .., 1]``."""
    return _separable([CENTRE] * num_spatial_dims)[..., None]


def sobel(num_spatial_dims: int, normalize: bool = True) -> np.ndarray:
    """Sobel gradients, one filter for each spatial axis in order, ``[3, .., n]``.

    Args:
        normalize: divide by the sum of absolute values (8 in 2-D), as CAX's ``grad_kernel``.
    """
    return _per_axis(DIFFERENCE, SMOOTH, num_spatial_dims, normalize)


def gradient(num_spatial_dims: int) -> np.ndarray:
    """Central differences ``(x[i+1] - x[i-1]) / 2``, one filter for each axis, ``[3, .., n]``."""
    return _per_axis(DIFFERENCE, CENTRE, num_spatial_dims, normalize=True)


def laplacian(num_spatial_dims: int, normalize: bool = False) -> np.ndarray:
    """The Laplacian of the nearest neighbours (2n + 1 points), one filter, ``[3, .., 1]``."""
    second = np.array([1.0, -2.0, 1.0])
    kernel = _per_axis(second, CENTRE, num_spatial_dims, normalize=False).sum(-1, keepdims=True)
    return kernel / np.abs(kernel).sum() if normalize else kernel


def laplacian_moore(num_spatial_dims: int, normalize: bool = False) -> np.ndarray:
    """The Laplacian over the whole Moore neighbourhood, one filter, ``[3, .., 1]``.

    In 2-D ``[[1, 2, 1], [2, -12, 2], [1, 2, 1]]``, the filter of texture NCAs (Niklasson et al.,
    "Self-Organising Textures", Distill, 2021).
    """
    kernel = _separable([SMOOTH] * num_spatial_dims)
    kernel[(1,) * num_spatial_dims] -= kernel.sum()
    return (kernel / np.abs(kernel).sum() if normalize else kernel)[..., None]


def moore(num_spatial_dims: int) -> np.ndarray:
    """Every cell of the Moore neighbourhood, the centre too: ``3^n`` filters, C order."""
    return np.eye(3**num_spatial_dims).reshape(*[3] * num_spatial_dims, -1)


def von_neumann(num_spatial_dims: int) -> np.ndarray:
    """The centre, then for each axis the cell before and the cell after: ``2n + 1`` filters."""
    offsets = np.eye(num_spatial_dims, dtype=int)
    cells = [np.zeros(num_spatial_dims, int), *(s * o for o in offsets for s in (-1, 1))]
    return np.stack([_one_hot(tuple(c + 1)) for c in cells], axis=-1)


def mean(num_spatial_dims: int) -> np.ndarray:
    """The mean over the Moore neighbourhood, the centre too: one filter."""
    return np.full([3] * num_spatial_dims + [1], 3.0**-num_spatial_dims)


BANKS: dict[str, Callable[[int], np.ndarray]] = {
    bank.__name__: bank
    for bank in (
        identity,
        sobel,
        gradient,
        laplacian,
        laplacian_moore,
        moore,
        von_neumann,
        mean,
    )
}


def filter_bank(filters: Sequence[str | np.ndarray], num_spatial_dims: int = 2) -> np.ndarray:
    """Joins banks, by name or as arrays ``[*kernel, F]``, into one ``[*kernel, F]``.

    Smaller kernels are centred in the largest; their sizes must be odd.

    Raises:
        ValueError: for an unknown name or an array of another number of spatial dims.
    """
    if num_spatial_dims not in (1, 2, 3):
        raise ValueError(f"num_spatial_dims must be 1, 2 or 3, got {num_spatial_dims!r}")
    if isinstance(filters, str) or not len(filters):
        raise ValueError(f"filters must be a sequence of names or arrays, got {filters!r}")
    banks = [_bank(f, num_spatial_dims) for f in filters]
    size = np.max([b.shape[:-1] for b in banks], axis=0)
    margins = [size - b.shape[:-1] for b in banks]
    if any((m % 2).any() for m in margins):
        shapes = ", ".join(str(b.shape[:-1]) for b in banks)
        raise ValueError(f"filters of sizes {shapes} have no common centre: make all sizes odd")
    padded = [
        np.pad(b, [*((m // 2, m // 2) for m in margin), (0, 0)])
        for b, margin in zip(banks, margins, strict=True)
    ]
    return np.concatenate(padded, axis=-1)


def taps(
    filters: Sequence[str | np.ndarray], channels: int, num_spatial_dims: int = 2
) -> np.ndarray:
    """Depthwise taps ``[*kernel, 1, F*C]`` float32: every filter on every channel.

    Output index ``c*F + f``, the layout of Flax's grouped convolutions.

    Args:
        filters: names of banks (identity, sobel, gradient, laplacian, laplacian_moore, moore,
            von_neumann, mean) or arrays ``[*kernel, F]``.
        channels: C, the channels of the state.
        num_spatial_dims: 1, 2 or 3.

    Example:
        ``nk.taps(("identity", "sobel"), channels=16)`` is the perception of Growing NCA.
    """
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels must be a positive int, got {channels!r}")
    bank = filter_bank(filters, num_spatial_dims)
    return depthwise(bank, channels)


def depthwise(bank: np.ndarray, channels: int) -> np.ndarray:
    """A bank ``[*kernel, F]`` on every channel: taps ``[*kernel, 1, F*C]`` float32."""
    return np.tile(bank, channels)[..., None, :].astype(np.float32)


ConstantTaps = tuple[float, ...] | None  # a bank [*kernel, F], flat
MOST_CONSTANTS = 128  # taps that are not zero: a kernel has code for each of them


def constant_taps(taps: Any, channels: int) -> ConstantTaps:
    """The bank behind depthwise taps, flat, if a kernel can be compiled for it; else None.

    It can if the taps are a NumPy array, so that JAX neither traces nor changes them, are the same
    for all channels, have at least a quarter of zeros, which a kernel leaves out, and no more than
    ``MOST_CONSTANTS`` taps besides.
    """
    if not isinstance(taps, np.ndarray) or taps.shape[-2] != 1 or not np.isfinite(taps).all():
        return None
    by_channel = taps.astype(np.float32).reshape(-1, channels, taps.shape[-1] // channels)
    bank = by_channel[:, 0]
    used = np.count_nonzero(bank)
    few = 4 * used <= 3 * bank.size and used <= MOST_CONSTANTS
    return tuple(map(float, bank.ravel())) if few and (by_channel == bank[:, None]).all() else None


def _bank(item: str | np.ndarray, num_spatial_dims: int) -> np.ndarray:
    if isinstance(item, str):
        if item not in BANKS:
            raise ValueError(f"unknown filter {item!r}; known: {', '.join(BANKS)}")
        return BANKS[item](num_spatial_dims)
    item = np.asarray(item)
    if item.ndim != num_spatial_dims + 1 or 0 in item.shape:
        raise ValueError(
            f"a filter array must be [*kernel, F] with {num_spatial_dims} kernel axes, "
            f"got shape {item.shape}"
        )
    return item


def _separable(axes: Sequence[np.ndarray]) -> np.ndarray:
    """The outer product of one 1-D filter per axis."""
    return reduce(np.multiply.outer, axes, np.ones(()))


def _per_axis(along: np.ndarray, across: np.ndarray, n: int, normalize: bool) -> np.ndarray:
    """One separable filter for each axis: ``along`` it, ``across`` the others."""
    kernels = [_separable([along if j == i else across for j in range(n)]) for i in range(n)]
    if normalize:
        kernels = [k / np.abs(k).sum() for k in kernels]
    return np.stack(kernels, axis=-1)


def _one_hot(index: tuple[int, ...]) -> np.ndarray:
    kernel = np.zeros([3] * len(index))
    kernel[index] = 1.0
    return kernel


def same_margins(kernel: Sequence[int]) -> list[tuple[int, int]]:
    """Cells that a kernel reaches (before, after) its cell on each axis, aligned as ``SAME``."""
    return [((k - 1) // 2, k // 2) for k in kernel]


def offsets(kernel: Sequence[int]) -> list[tuple[int, ...]]:
    """All positions in a kernel, in C order."""
    return list(product(*map(range, kernel)))


def border_index(size: int, before: int, after: int, padding: str) -> np.ndarray:
    """Which cell lies at position ``-before .. size + after`` of an axis; -1 for none (zeros)."""
    i = np.arange(-before, size + after)
    if padding == "circular":
        return i % size
    if padding == "replicate":
        return np.clip(i, 0, size - 1)
    if padding == "reflect":
        period = max(2 * (size - 1), 1)
        return np.minimum(i % period, -i % period)
    return np.where((i >= 0) & (i < size), i, -1)
