"""Pieces of kernels that deal with cells: tiles, borders, who fires, who lives, compaction.

A program works on one tile at a time: a box of cells whose lanes are numbered in C order. Flags
of lanes are kept as words, one 16-bit word for each run of 16 cells along x, so that pooling
along x is a shift and picking the n-th set flag is arithmetic.

``g`` is always the :class:`Constants` of the call; see ``geometry.py`` for its names.
"""

from typing import NamedTuple

import triton
import triton.language as tl

RUN = 16  # cells in a word
RUN_MASK = tl.constexpr(0xFFFF)


# ---- where a cell is ----


class Grid(NamedTuple):
    """Sizes of one group that kernels are given as arguments, so that no grid is compiled in."""

    depth: tl.tensor
    height: tl.tensor
    width: tl.tensor
    tiles_z: tl.tensor
    tiles_y: tl.tensor
    tiles_x: tl.tensor
    tiles: tl.tensor  # of all samples
    cells: tl.tensor  # of all samples


@triton.jit
def grid_of(depth, height, width, samples, g: tl.constexpr):
    """The sizes of a call.

    The compiler knows an axis of one cell, and a number that the width is a multiple of: it reads
    and writes several neighbours at once then.
    """
    width = width // g.aligned * g.aligned
    if g.window_z == 1:
        depth = depth * 0 + 1
    if g.window_y == 1:
        height = height * 0 + 1
    if g.window_x == 1:
        width = width * 0 + 1
    tiles_z, tiles_y = tl.cdiv(depth, g.tile_z), tl.cdiv(height, g.tile_y)
    tiles_x = tl.cdiv(width, g.tile_x)
    tiles = samples * tiles_z * tiles_y * tiles_x
    if g.wide:
        samples = samples.to(tl.int64)
    cells = samples * depth * height * width
    return Grid(depth, height, width, tiles_z, tiles_y, tiles_x, tiles, cells)


@triton.jit
def divided(number, size):
    """``number // size`` and ``number % size`` of numbers that are not negative.

    Divided without a sign, for which GPUs take fewer instructions.
    """
    number += size * 0  # of a loop's counter, which Triton's interpreter has as a plain number
    if number.dtype == tl.int64:
        quotient = number // size
    else:
        quotient = (number.to(tl.uint32) // size.to(tl.uint32)).to(tl.int32)
    return quotient, number - quotient * size


@triton.jit
def program_and_group(programs, g: tl.constexpr):
    """Which of its group's programs this one is, and the group.

    A single group is 0 to the compiler, and moves no array's address.
    """
    program = tl.program_id(0)
    group = program * 0
    if not g.one_group:
        group, program = divided(program, programs)
    if g.wide:
        group = group.to(tl.int64)
    return program, group


@triton.jit
def tiles_of(program, programs, grid, g: tl.constexpr):
    """The tiles that a program works on: (first, end, step); of one alone the compiler knows."""
    end, step = grid.tiles, programs
    if g.one_tile:
        end, step = program + 1, 1
    return program, end, step


@triton.jit
def tile_origin(tile, grid, g: tl.constexpr):
    """A tile's number to its sample and its first cell."""
    tile, x = divided(tile, grid.tiles_x)
    tile, y = divided(tile, grid.tiles_y)
    sample, z = divided(tile, grid.tiles_z)
    return sample, z * g.tile_z, y * g.tile_y, x * g.tile_x


@triton.jit
def lane_position(lane, g: tl.constexpr):
    """A lane's number to its place in the tile."""
    return lane // (g.tile_y * g.tile_x), lane // g.tile_x % g.tile_y, lane % g.tile_x


@triton.jit
def cell_number(sample, z, y, x, grid, g: tl.constexpr):
    """C-order index of a cell within its group."""
    if g.wide:
        sample = sample.to(tl.int64)
    return ((sample * grid.depth + z) * grid.height + y) * grid.width + x


@triton.jit
def in_grid(z, y, x, grid):
    return (z < grid.depth) & (y < grid.height) & (x < grid.width)


@triton.jit
def _below(i, size):
    """Whether a position is in 0 .. size, in one comparison: of negative ones the sign is large."""
    if i.dtype == tl.int64:
        below = (i >= 0) & (i < size)
    else:
        below = i.to(tl.uint32, bitcast=True) < size.to(tl.uint32)
    return below


@triton.jit
def border(i, size, padding: tl.constexpr, near: tl.constexpr):
    """A position on an axis, maybe outside, to (the cell that lies there, is there one).

    ``near``: positions that matter are less than ``size`` outside, so that borders other than
    zeros show a cell without a division.
    """
    there = i >= -2147483647
    if padding == "zeros":
        there = _below(i, size)
    elif padding == "replicate":
        i = tl.minimum(tl.maximum(i, 0), size - 1)
    elif near:
        if padding == "circular":
            i = tl.where(i < 0, i + size, tl.where(i < size, i, i - size))
        else:
            tl.static_assert(padding == "reflect", "the Triton kernels lack a padding")
            i = tl.where(i < 0, -i, tl.where(i < size, i, 2 * (size - 1) - i))
        there = _below(i, size)
    elif padding == "circular":
        i = (i % size + size) % size  # % keeps the sign of i
    else:
        tl.static_assert(padding == "reflect", "the Triton kernels lack a padding")
        period = tl.maximum(2 * (size - 1), 1)  # of a single cell, all positions are its own
        i = (i % period + period) % period
        i = tl.minimum(i, period - i)
    return i, there


@triton.jit
def channel_offsets(g: tl.constexpr):
    """Channels [1, BC] and which of them exist."""
    channel = tl.arange(0, g.block_c)[None, :]
    return channel, channel < g.channels


# ---- who fires ----


@triton.jit
def _round(x0, x1, rotation: tl.constexpr):
    x0 = x0 + x1
    return x0, ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0


@triton.jit
def _four_rounds(
    x0, x1, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr, key0, key1
):
    x0, x1 = _round(x0, x1, a)
    x0, x1 = _round(x0, x1, b)
    x0, x1 = _round(x0, x1, c)
    x0, x1 = _round(x0, x1, d)
    return x0 + key0, x1 + key1


@triton.jit
def threefry_bits(key0, key1, high, low):
    """32 random bits for each counter (high, low), uint32; see ``nca_kernels.fire_mask``."""
    key2 = key0 ^ key1 ^ 0x1BD11BDA
    x0, x1 = high + key0, low + key1
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6, key1, key2 + 1)
    x0, x1 = _four_rounds(x0, x1, 17, 29, 16, 24, key2, key0 + 2)
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6, key0, key1 + 3)
    x0, x1 = _four_rounds(x0, x1, 17, 29, 16, 24, key1, key2 + 4)
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6, key2, key0 + 5)
    return x0 ^ x1


@triton.jit
def fires(fire_ptr, group, cell, inside, grid, g: tl.constexpr):
    """Which of the cells fire; none outside the grid."""
    fired = inside
    if g.fire == "mask":
        at = fire_ptr + group * g.own_fire * grid.cells + cell
        fired = tl.load(at, mask=inside, other=0).to(tl.int1) & inside
    elif g.fire == "key":
        key0 = tl.load(fire_ptr + 2 * group * g.own_fire).to(tl.uint32)
        key1 = tl.load(fire_ptr + 2 * group * g.own_fire + 1).to(tl.uint32)
        low = cell.to(tl.uint32)
        high = low * 0
        if g.wide:
            high = (cell >> 32).to(tl.uint32)
        fired = ((threefry_bits(key0, key1, high, low) >> 9) < g.fire_threshold) & inside
    return fired


# ---- words ----


@triton.jit
def pack(flags):
    """Flags [rows, 16] to words [rows]."""
    bit = tl.arange(0, flags.shape[1])[None, :]
    return tl.sum(flags.to(tl.int32) << bit, axis=1)


@triton.jit
def bits(words):
    """Words [rows] to flags 0 and 1 [rows, 16]."""
    return (words[:, None] >> tl.arange(0, 16)[None, :]) & 1


@triton.jit
def popcount(word):
    """Set bits of a 16-bit word."""
    word = word - ((word >> 1) & 0x5555)
    word = (word & 0x3333) + ((word >> 2) & 0x3333)
    word = (word + (word >> 4)) & 0x0F0F
    return (word + (word >> 8)) & 0x1F


@triton.jit
def flag_numbers(words, upto):
    """How many flags are set before each lane: [runs, 16].

    ``upto`` [runs]: set flags up to and including each word.
    """
    below = (1 << tl.arange(0, 16)[None, :]) - 1
    return (upto - popcount(words))[:, None] + popcount(words[:, None] & below)


@triton.jit
def keep_lanes(flags, numbers, lanes, lives, scratch_ptr, g: tl.constexpr):
    """The tile's lanes whose flag is set, in their order, to this program's scratch."""
    entry = (2 * lanes + lives).to(tl.float32, bitcast=True)
    tl.store(scratch_ptr + g.lanes_at + numbers, entry, mask=flags)


@triton.jit
def keep_flags(needed, lives, lanes, scratch_ptr, g: tl.constexpr):
    """Flags 0 and 1 of the tile's lanes [runs, 16] to this program's scratch.

    For threads that hold other lanes: left to itself, Triton draws and pools again for those.
    """
    entry = (needed + 2 * lives).to(tl.float32, bitcast=True)
    tl.store(scratch_ptr + g.flags_at + lanes, entry)


@triton.jit
def kept_flags(lane, scratch_ptr, g: tl.constexpr):
    """Which lanes are needed, and which live."""
    entry = tl.load(scratch_ptr + g.flags_at + lane).to(tl.int32, bitcast=True)
    return (entry & 1) != 0, (entry & 2) != 0


@triton.jit
def compacted_lanes(scratch_ptr, first, count, g: tl.constexpr):
    """Lanes [R] of the set flags number first .. first + R, which of them live and which exist.

    Those that do not exist are the last one's.
    """
    number = first + tl.arange(0, g.rows)
    exists = number < count
    entry = tl.load(scratch_ptr + g.lanes_at + tl.minimum(number, count - 1))
    entry = entry.to(tl.int32, bitcast=True)
    return (entry >> 1) & (g.tile - 1), (entry & 1) != 0, exists


# ---- who lives ----


@triton.jit
def life(state_ptr, sample, z0, y0, x0, scratch_ptr, grid, g: tl.constexpr):
    """Words of the tile's cells that are alive, and of those with a living neighbour: [runs].

    Reads the alive channel of the tile and of two cells around it, once. A border other than
    circular shows the pool no cell that it does not see anyway. Along x a word is pooled in a
    register; what its neighbours along y and z hold goes through this program's scratch.
    """
    pool: tl.constexpr = "circular" if g.padding == "circular" else "zeros"
    q = tl.arange(0, g.pool_runs)  # runs of the tile and its surroundings
    row = q[:, None]
    lane = tl.arange(0, 32)[None, :]  # 16 cells, two more on each side
    z, there_z = border(z0 + row // (g.pool_y * g.runs_x) - g.halo_z, grid.depth, pool, g.near_z)
    y, there_y = border(y0 + row // g.runs_x % g.pool_y - g.halo_y, grid.height, pool, g.near_y)
    x, there_x = border(x0 + row % g.runs_x * 16 + lane - 2, grid.width, pool, g.near_x)
    there = there_z & there_y & there_x & (lane < 20) & (row < g.pool_z * g.pool_y * g.runs_x)
    at = cell_number(sample, z, y, x, grid, g) * g.channels + g.alive_channel
    alpha = tl.load(state_ptr + at, mask=there, other=0.0).to(tl.float32)
    word = pack(there & (alpha > g.alive_threshold))  # [pool_runs]
    one = word | (word << 1) | (word >> 1)
    two = one | (word << 2) | (word >> 2)
    both = ((one >> 2) & 0xFFFF) | ((two >> 2) << 16)
    tl.store(scratch_ptr + g.words_at + q, both.to(tl.float32, bitcast=True))
    tl.debug_barrier()
    return _pooled_words(scratch_ptr, g)


@triton.jit
def _pooled_words(scratch_ptr, g: tl.constexpr):
    """Of the words in scratch, those pooled over one row around, and over two: [runs]."""
    t = tl.arange(0, g.runs)
    z, y, x = t // (g.tile_y * g.runs_x), t // g.runs_x % g.tile_y, t % g.runs_x
    first = (z * g.pool_y + y) * g.runs_x + x
    alive, near = t * 0, t * 0
    for dz in tl.static_range(2 * g.halo_z + 1):
        for dy in tl.static_range(2 * g.halo_y + 1):
            at = scratch_ptr + g.words_at + (dz * g.pool_y + dy) * g.runs_x + first
            both = tl.load(at).to(tl.int32, bitcast=True)
            near = near | both
            far = (dz - g.halo_z) * (dz - g.halo_z) > 1 or (dy - g.halo_y) * (dy - g.halo_y) > 1
            if not far:
                alive = alive | both
    return alive & 0xFFFF, (near >> 16) & 0xFFFF
