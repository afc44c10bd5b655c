"""Stencils as sums of shifted slices: perception, its transpose, and the alive pool.

The forward and the backward share ``correlate``. Depthwise perceptions are in filter-major order,
``f*C + c``, so that each filter is a contiguous sum of slices. The caller reorders the rows of the
first layer to match.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nca_kernels.perception import border_index, offsets, same_margins
from nca_kernels.rule import copies_cells, dot

Margins = list[tuple[int, int]]


def perceive(state: Array, taps: Array, padding: str, precision: str) -> Array:
    """``state [B, *S, C]``, ``taps [*kernel, 1 or C, P]`` to the perception ``[B, *S, P]``."""
    kernel = taps.shape[:-2]
    return correlate(pad(state, same_margins(kernel), padding), taps, precision)


def perceive_transpose(
    cotangent: Array, state: Array, taps: Array, padding: str, precision: str
) -> Array:
    """The gradient of the state ``[B, *S, C]`` from that of the perception ``[B, *S, P]``."""
    kernel = taps.shape[:-2]
    margins = same_margins(kernel)
    flipped = jnp.flip(_transpose_taps(taps, state.shape[-1]), range(len(kernel)))
    if not copies_cells(padding):  # what falls outside the grid is dropped
        reach = [(after, before) for before, after in margins]
        return correlate_adjoint(pad(cotangent, reach, "zeros"), flipped, precision)
    # What falls outside the grid goes to the cells that were copied there.
    reach = [(k - 1, k - 1) for k in kernel]
    padded = correlate_adjoint(pad(cotangent, reach, "zeros"), flipped, precision)
    _, unpad = jax.vjp(lambda s: pad(s, margins, padding), state)
    return unpad(padded)[0]


def taps_gradient(
    cotangent: Array, state: Array, taps: Array, padding: str, precision: str
) -> Array:
    """The gradient of the taps ``[*kernel, 1 or C, P]``: a reduction for each position.

    The loop over positions is not unrolled: 27 reductions side by side compile for many seconds.
    """
    kernel, (fan_in, size) = taps.shape[:-2], taps.shape[-2:]
    channels = state.shape[-1]
    padded = pad(state, same_margins(kernel), padding)
    grid = (cotangent.shape[0], *cotangent.shape[1:-1], channels)
    flat = cotangent.reshape(-1, size)

    def at(offset: Array) -> Array:
        start = [jnp.zeros((), jnp.int32), *offset, jnp.zeros((), jnp.int32)]
        shifted = lax.dynamic_slice(padded, start, grid).reshape(-1, channels)
        if fan_in != 1:
            return dot(shifted, flat, precision, contract=(0, 0))
        product = shifted[:, None] * flat.reshape(-1, size // channels, channels)  # [N, F, C]
        return jnp.sum(product, axis=0).reshape(1, size)

    return lax.map(at, jnp.array(offsets(kernel), jnp.int32)).reshape(taps.shape)


def correlate(padded: Array, taps: Array, precision: str) -> Array:
    """Valid cross-correlation of ``[B, *S + kernel - 1, C]`` with filter-major taps."""
    *kernel, fan_in, size = taps.shape
    channels = padded.shape[-1]
    grid = tuple(s - k + 1 for s, k in zip(padded.shape[1:-1], kernel, strict=True))
    if fan_in != 1 or channels == 1:
        return _sum(
            dot(shift(padded, o, grid), taps[o], precision)  # [B, *S, C] @ [C, P]
            for o in offsets(kernel)
        )
    filters = [
        _sum(
            shift(padded, o, grid) * _row(taps[o][0, f * channels : (f + 1) * channels], padded)
            for o in offsets(kernel)
        )
        for f in range(size // channels)
    ]
    return jnp.concatenate(filters, axis=-1)


def correlate_adjoint(padded: Array, taps: Array, precision: str) -> Array:
    """Valid correlation of a perception ``[B, *S', P]`` with transposed taps, to ``[B, *S, C]``."""
    fan_in = taps.shape[-2]
    if fan_in == padded.shape[-1]:  # dense, [*kernel, P, C]
        return correlate(padded, taps, precision)
    filters = jnp.split(padded, fan_in, axis=-1)  # depthwise, [*kernel, F, C]
    return _sum(correlate(p, taps[..., f : f + 1, :], precision) for f, p in enumerate(filters))


def _transpose_taps(taps: Array, channels: int) -> Array:
    """``[*kernel, 1, F*C]`` to ``[*kernel, F, C]``; dense ``[*kernel, C, P]`` to ``[.., P, C]``."""
    *kernel, fan_in, size = taps.shape
    if fan_in == 1:
        return taps.reshape(*kernel, size // channels, channels)
    return jnp.swapaxes(taps, -1, -2)


def max_pool(plane: Array, padding: str, radius: int) -> Array:
    """The max-pool of ``[B, *S]``, axis by axis; with the padding "zeros", nothing lies outside."""
    for axis in range(1, plane.ndim):
        size = plane.shape[axis]
        margins = [(0, 0)] * (axis - 1) + [(radius, radius)]
        padded = pad(plane, margins, padding, outside=-jnp.inf)
        slices = [lax.slice_in_dim(padded, o, o + size, axis=axis) for o in range(2 * radius + 1)]
        plane = reduce(jnp.maximum, slices)
    return plane


def pad(array: Array, margins: Margins, padding: str, outside: float = 0.0) -> Array:
    """Pads the spatial axes of ``[B, *S, ...]``; ``outside`` is what zeros stand for."""
    if not copies_cells(padding):
        config = [(0, 0, 0)] * array.ndim
        config[1 : 1 + len(margins)] = [(low, high, 0) for low, high in margins]
        return lax.pad(array, jnp.array(outside, array.dtype), config)
    for axis, (low, high) in enumerate(margins, start=1):
        if low or high:
            index = border_index(array.shape[axis], low, high, padding)
            before, after = index[:low], index[len(index) - high :]
            ends = [jnp.take(array, cells, axis=axis) for cells in (before, after)]
            array = jnp.concatenate([ends[0], array, ends[1]], axis=axis)
    return array


def shift(padded: Array, offset: tuple[int, ...], grid: tuple[int, ...]) -> Array:
    """The slice ``[B, *grid, C]`` of a padded array that starts at ``offset``."""
    start = (0, *offset, 0)
    limit = (padded.shape[0], *(o + s for o, s in zip(offset, grid, strict=True)))
    return lax.slice(padded, start, (*limit, padded.shape[-1]))


def _row(vector: Array, like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


def _sum(terms: Any) -> Array:
    return reduce(jnp.add, terms)
