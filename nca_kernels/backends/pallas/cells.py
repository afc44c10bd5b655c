"""Pieces of kernels that deal with cells; ``backends/triton/cells.py`` explains their shape.

``g`` holds the constants of the call, see ``nca_kernels.tiled.geometry``. Positions are int32,
and divisions truncate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nca_kernels.backends.pallas.launch import Memory
from nca_kernels.fire_mask import threefry_bits
from nca_kernels.tiled.geometry import RUN

Position = tuple[Any, Any, Any]  # z, y, x

# ---- numbers and loops ----


def along(size: int) -> Array:
    """0, 1, ...: [size]."""
    return lax.iota(jnp.int32, size)


def down(size: int) -> Array:
    """[size, 1]."""
    return lax.broadcasted_iota(jnp.int32, (size, 1), 0)


def across(size: int) -> Array:
    """[1, size]."""
    return lax.broadcasted_iota(jnp.int32, (1, size), 1)


def div(a: Any, b: int) -> Any:
    """``a // b``, for a >= 0."""
    if b & (b - 1) == 0:
        return a >> (b.bit_length() - 1) if b > 1 else a
    return lax.div(a, jnp.full_like(a, b))


def rem(a: Any, b: int) -> Any:
    """``a % b``, maybe less ``b`` for a < 0."""
    if b & (b - 1) == 0:
        return a & (b - 1) if b > 1 else jnp.zeros_like(a)
    return lax.rem(a, jnp.full_like(a, b))


def loop(count: Any, body: Callable[[Any, Any], Any], carry: Any = None) -> Any:
    """``carry = body(i, carry)`` for i below ``count``; a loop of at most one turn is none."""
    if isinstance(count, int) and count <= 1:
        return body(jnp.int32(0), carry) if count else carry

    def turn(i: Any, carry: Any) -> Any:
        return body(i.astype(jnp.int32), carry)  # under x64, JAX may count in int64

    upper = np.int32(count) if isinstance(count, int) else count
    return lax.fori_loop(np.int32(0), upper, turn, carry)


def total(values: Array, axis: int) -> Array:
    """The sum, in the dtype of the values."""
    return jnp.sum(values, axis=axis, dtype=values.dtype)


# ---- where a cell is ----


def unravel(number: Any, height: int, width: int) -> Position:
    """A number in C order to its position."""
    row = div(number, width)
    return div(row, height), rem(row, height), rem(number, width)


def tile_origin(tile: Any, g: Any) -> tuple[Any, Position]:
    """A tile's number to its sample and its first cell."""
    z, y, x = unravel(tile, g.tiles_y, g.tiles_x)
    origin = rem(z, g.tiles_z) * g.tile_z, y * g.tile_y, x * g.tile_x
    return div(z, g.tiles_z), origin


def lane_position(lane: Array, g: Any) -> Position:
    """A lane's number to its place in the tile."""
    return unravel(lane, g.tile_y, g.tile_x)


def moved(origin: Position, by: Position) -> Position:
    return origin[0] + by[0], origin[1] + by[1], origin[2] + by[2]


def cell_number(sample: Any, position: Position, g: Any) -> Array:
    """C-order index of a cell within its group."""
    z, y, x = position
    return ((sample * g.depth + z) * g.height + y) * g.width + x


def in_grid(position: Position, g: Any) -> Array:
    z, y, x = position
    return (z < g.depth) & (y < g.height) & (x < g.width)


def border(i: Any, size: int, padding: str) -> tuple[Any, Any]:
    """A position on an axis, maybe outside, to (the cell that lies there, is there one)."""
    there = jnp.full(i.shape, True)
    if padding == "zeros":
        there = (i >= 0) & (i < size)
    elif padding == "circular":
        i = rem(rem(i, size) + size, size)
    elif padding == "replicate":
        i = lax.clamp(np.int32(0), i, np.int32(size - 1))
    elif size > 1:
        period = 2 * (size - 1)
        i = rem(rem(i, period) + period, period)
        i = lax.min(i, period - i)
    else:
        i = jnp.zeros_like(i)
    return i, there


def on_grid(position: Position, padding: str, g: Any) -> tuple[Position, Array]:
    """As :func:`border`, on every axis."""
    z, there_z = border(position[0], g.depth, padding)
    y, there_y = border(position[1], g.height, padding)
    x, there_x = border(position[2], g.width, padding)
    return (z, y, x), there_z & there_y & there_x


def pool_padding(g: Any) -> str:
    """A border other than circular shows a pool no cell that it does not see anyway."""
    return "circular" if g.padding == "circular" else "zeros"


def channel_positions(cell: Array, exists: Array, g: Any) -> tuple[Array, Array]:
    """Where the channels of cells [R] lie in a state, and which of them exist: [R, BC]."""
    channel = across(g.block_c)
    return cell[:, None] * g.channels + channel, exists[:, None] & (channel < g.channels)


# ---- who fires ----


def fires(fire: Memory, group: Any, cell: Array, inside: Array, g: Any) -> Array:
    """Which of the cells [T] fire; none outside the grid."""
    if g.fire == "mask":
        return fire.load(group * g.own_fire * g.cells + cell, inside) & inside
    if g.fire == "key":
        one = jnp.zeros((1,), jnp.int32) + 2 * group * g.own_fire
        low = cell.astype(jnp.uint32)
        bits = threefry_bits(fire.load(one), fire.load(one + 1), jnp.zeros_like(low), low)
        return ((bits >> np.uint32(9)) < np.uint32(g.fire_threshold)) & inside
    return inside


# ---- words ----


def pack(flags: Array) -> Array:
    """Flags [rows, bits] to words [rows]."""
    return total(flags.astype(jnp.int32) << across(flags.shape[1]), 1)


def pack_tile(flags: Array, g: Any) -> Array:
    """Flags of the tile's lanes [T] to words [runs]."""
    return pack(flags.reshape(g.runs, RUN))


def unpack(words: Array, g: Any) -> Array:
    """Words [runs] to flags of the tile's lanes [T]."""
    return (((words[:, None] >> across(RUN)) & 1) != 0).reshape(g.tile)


def counts(words: Array) -> tuple[Array, Array]:
    """Set flags up to and including each word [runs], and of all words []."""
    each = lax.population_count(words)
    return lax.cumsum(each, axis=0), total(each, 0)


def _nth_bit(word: Array, n: Array) -> Array:
    """Position of the n-th (from 0) set bit of a 16-bit word, by halving."""
    position = jnp.zeros_like(n)
    for half in (8, 4, 2, 1):
        below = lax.population_count(word & ((1 << half) - 1))
        upper = n >= below
        n = jnp.where(upper, n - below, n)
        word = jnp.where(upper, word >> half, word)
        position = jnp.where(upper, position + half, position)
    return position


def compacted_lanes(words: Array, upto: Array, first: Any, count: Any, g: Any) -> Any:
    """Lanes [R] of the set flags number first .. first + R, and which of them exist.

    ``upto`` [runs]: set flags up to and including each word.
    """
    number = first + along(g.rows)  # [R]
    index = total((upto[None, :] <= number[:, None]).astype(jnp.int32), 1)
    chosen = index[:, None] == across(g.runs)  # [R, runs]
    before = upto - lax.population_count(words)
    word = total(jnp.where(chosen, words[None, :], 0), 1)
    before = total(jnp.where(chosen, before[None, :], 0), 1)
    exists = number < count
    lane = index * RUN + _nth_bit(word, number - before)
    return jnp.where(exists, lane, 0), exists


# ---- who lives ----


def life(state: Memory, sample: Any, origin: Position, g: Any) -> tuple[Array, Array]:
    """Words of the tile's cells that are alive, and of those with a living neighbour: [runs].

    Reads, for each run of the tile, the alive channel of the rows around it.
    """
    run, lane = down(g.runs), across(32)  # 16 cells, two more on each side
    z, y, x = moved(origin, lane_position(run * RUN, g))  # [runs, 1]
    rows_y = 2 * g.halo_y + 1

    def add_row(k: Any, words: tuple[Array, Array]) -> tuple[Array, Array]:
        dz, dy = div(k, rows_y) - g.halo_z, rem(k, rows_y) - g.halo_y
        cell, there = on_grid((z + dz, y + dy, x + lane - 2), pool_padding(g), g)
        there = there & (lane < RUN + 4)
        at = cell_number(sample, cell, g) * g.channels + g.alive_channel
        alpha = state.load(at, there).astype(jnp.float32)
        word = pack(there & (alpha > g.alive_threshold))
        close = (abs(dz) <= 1) & (abs(dy) <= 1)
        return words[0] | jnp.where(close, word, 0), words[1] | word

    none = jnp.zeros((g.runs,), jnp.int32)
    one, two = loop((2 * g.halo_z + 1) * rows_y, add_row, (none, none))
    one, two = _spread(one), _spread(_spread(two))
    return (one >> 2) & 0xFFFF, (two >> 2) & 0xFFFF


def _spread(words: Array) -> Array:
    return words | (words << 1) | (words >> 1)
