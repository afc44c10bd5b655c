"""The stochastic mask: which cells fire, from (key, global cell index) alone.

Cell ``i`` (C order over batch and grid) fires exactly where
``jax.random.bernoulli(key, fire_rate, shape)[i]`` does. For threefry2x32 that is a comparison of
23 random bits with a threshold. The bits depend on nothing but the key and ``i``, so that a kernel
can compute them in registers, for any block of cells, in any order.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; the counter layout is
JAX's with ``jax_threefry_partitionable``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def fire_operand(key: Any, fire_rate: float, shape: tuple[int, ...]) -> Array | None:
    """What tells a kernel which cells fire: key data ``uint32 [2]``, a mask, or None for all.

    A mask ``bool [*shape]`` is drawn here, by ``jax.random``, if its bits are not threefry's of the
    cell index: with another PRNG, with ``jax_threefry_partitionable=False``, or under x64. A mask
    that is passed in place of the key is used as it is, whatever the fire rate.
    """
    if key.dtype == jnp.bool_:
        return jnp.asarray(key)
    if fire_rate >= 1.0:
        return None
    key = _typed(key)
    if _counted(key):
        return jax.random.key_data(key)
    return jax.random.bernoulli(key, fire_rate, shape)


def drawn(key: Any, fire_rate: Any, shape: tuple[int, ...]) -> Array:
    """The mask ``bool [*shape]``, drawn by ``jax.random`` unless it takes the place of the key.

    ``fire_rate``: a number, or an array whose axes are the first of ``shape``.
    """
    if key.dtype == jnp.bool_:
        return jnp.asarray(key)
    return jax.random.bernoulli(key, _broadcast(fire_rate, len(shape)), shape)


def _broadcast(fire_rate: Any, ndim: int) -> Any:
    """An array of rates with axes of 1 for the cells; numbers as they are."""
    shape = np.shape(fire_rate)
    return jnp.reshape(fire_rate, (*shape, *(1,) * (ndim - len(shape)))) if shape else fire_rate


def drawn_at(key: Any, fire_rate: Any, shape: tuple[int, ...], positions: Sequence[Array]) -> Array:
    """A part of the mask of ``shape``: ``bool [n, m, ...]`` at ``positions``, int32 for each axis.

    Equivalent to ``drawn(key, fire_rate, shape)[jnp.ix_(*positions)]``. If the bits are threefry's
    of the cell index, those of no other cell are drawn. ``fire_rate``: a number, or an array whose
    axes are the first of the part.
    """
    key, fire_rate = _typed(key), _broadcast(fire_rate, len(shape))
    if not _counted(key):
        uniform = jax.random.uniform(key, shape, jnp.asarray(fire_rate).dtype)
        return uniform.at[jnp.ix_(*positions)].get(mode="clip") < fire_rate
    part = tuple(position.size for position in positions)
    words = [p.astype(jnp.uint32).reshape(-1, *(1,) * (len(part) - a - 1))
             for a, p in enumerate(positions)]  # fmt: skip
    high, low = _index(shape, [jnp.broadcast_to(word, part) for word in words])
    data = jax.random.key_data(key)
    return _below_rate(threefry_bits(data[0], data[1], high, low), fire_rate)


def _typed(key: Any) -> Any:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)


def _counted(key: Any) -> bool:
    """Whether a cell's bits are threefry's of the key and the cell's index."""
    config: Any = jax.config
    counted = config.jax_threefry_partitionable and not config.jax_enable_x64
    return counted and str(jax.random.key_impl(key)) == "threefry2x32"


def fires(key_data: Array, fire_rate: float, shape: tuple[int, ...]) -> Array:
    """The mask ``bool [*shape]`` of one key, ``uint32 [2]``.

    Equivalent to ``jax.random.bernoulli(jax.random.wrap_key_data(key_data), fire_rate, shape)``.
    """
    high, low = cell_index(shape)
    bits = threefry_bits(key_data[0], key_data[1], high, low)
    return _below_rate(bits, fire_rate)


def _below_rate(bits: Array, fire_rate: Any) -> Array:
    """Whether the uniform numbers in [0, 1) that ``bits`` stand for are below ``fire_rate``."""
    if isinstance(fire_rate, (jax.Array, np.ndarray)):
        uniform = (bits >> np.uint32(9)).astype(jnp.float32) * np.float32(2**-23)
        return uniform < fire_rate.astype(jnp.float32)
    return (bits >> np.uint32(9)) < np.uint32(threshold(fire_rate))


def threshold(fire_rate: float) -> int:
    """A cell fires if its upper 23 bits, as an integer, are below this."""
    return min(math.ceil(float(np.float32(fire_rate)) * 2**23), 2**23)


def threefry_bits(key0: Any, key1: Any, high: Any, low: Any) -> Any:
    """32 random bits for each 64-bit counter ``(high, low)``; all uint32."""
    schedule = (key0, key1, key0 ^ key1 ^ np.uint32(PARITY))
    x0, x1 = high + schedule[0], low + schedule[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
            x1 = x1 ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x0 ^ x1


def cell_index(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The C-order index of every cell as two uint32 ``[*shape]``: (high, low) words."""
    if _fits_a_word(shape):
        return jnp.zeros(shape, jnp.uint32), lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _index(shape, [lax.broadcasted_iota(jnp.uint32, shape, a) for a in range(len(shape))])


def _index(shape: tuple[int, ...], positions: Sequence[Array]) -> tuple[Array, Array]:
    """The C-order index in ``shape`` of cells at uint32 ``positions`` by axis, as two words."""
    high = low = jnp.zeros_like(positions[0])
    stride = 1
    for position, size in zip(reversed(positions), reversed(shape), strict=True):
        if _fits_a_word(shape):
            low = low + position * np.uint32(stride)
        else:
            high, low = multiply_add(high, low, position, stride)
        stride *= size
    return high, low


def _fits_a_word(shape: tuple[int, ...]) -> bool:
    """Whether all indices fit 32 bits, which is not known of a symbolic batch."""
    return not any(map(jax.export.is_symbolic_dim, shape)) and math.prod(shape) <= 2**32


def multiply_add(high: Array, low: Array, position: Array, stride: int) -> tuple[Array, Array]:
    """``(high, low) + position * stride`` in 64 bits made of uint32 words."""
    stride_high, stride_low = np.uint32(stride >> 32), np.uint32(stride & 0xFFFFFFFF)
    total = low + position * stride_low
    carry = (total < low).astype(jnp.uint32)
    return high + position * stride_high + _high_word(position, stride_low) + carry, total


def _high_word(a: Array, b: np.uint32) -> Array:
    """The upper 32 bits of the 64-bit product, from 16-bit halves."""
    half, mask = np.uint32(16), np.uint32(0xFFFF)
    a0, a1, b0, b1 = a & mask, a >> half, b & mask, b >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    lower = a0 * b1 + (middle & mask)
    return a1 * b1 + (middle >> half) + (lower >> half)
