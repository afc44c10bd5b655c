"""Pieces of kernels that deal with cells: tiles, borders, who fires, who lives, compaction.

A program works on one tile at a time: a box of cells, its lanes, which are numbered in C order.
Flags of lanes are packed into words, one of 16 bits for each run of 16 cells along x, so that
pooling along x is a shift and finding the n-th set flag is arithmetic.

``config`` is always the call's :class:`.step_configuration.StepConfiguration`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

RUN = 16  # cells in a word
RUN_MASK = tl.constexpr(0xFFFF)


# ---- where a cell is ----


class Grid(NamedTuple):
    """Sizes of one group: arguments of kernels, which are compiled for no grid."""

    depth: tl.tensor
    height: tl.tensor
    width: tl.tensor
    tiles_z: tl.tensor
    tiles_y: tl.tensor
    tiles_x: tl.tensor
    tiles: tl.tensor  # of all samples
    cells: tl.tensor  # of all samples


@triton.jit
def grid_of(depth, height, width, samples, config: tl.constexpr):
    """The sizes of a call.

    The compiler is told of axes of one cell, and of a number that the width is a multiple of, so
    that several neighbours are read or written at once.
    """
    width = width // config.aligned * config.aligned
    if config.z.pool == 1:
        depth = depth * 0 + 1
    if config.y.pool == 1:
        height = height * 0 + 1
    if config.x.pool == 1:
        width = width * 0 + 1
    tiles_z, tiles_y = tl.cdiv(depth, config.z.tile), tl.cdiv(height, config.y.tile)
    tiles_x = tl.cdiv(width, config.x.tile)
    tiles = samples * tiles_z * tiles_y * tiles_x
    if config.int64_indices:
        samples = samples.to(tl.int64)
    cells = samples * depth * height * width
    return Grid(depth, height, width, tiles_z, tiles_y, tiles_x, tiles, cells)


@triton.jit
def divided(number, size):
    """``number // size`` and ``number % size``, for numbers that are not negative.

    An unsigned division takes a GPU fewer instructions.
    """
    number += size * 0  # of a loop's counter, which Triton's interpreter has as a plain number
    if number.dtype == tl.int64:
        quotient = number // size
    else:
        quotient = (number.to(tl.uint32) // size.to(tl.uint32)).to(tl.int32)
    return quotient, number - quotient * size


@triton.jit
def program_and_group(programs, config: tl.constexpr):
    """Which of its group's programs this one is, and the group.

    The compiler is told that a single group is 0: no address depends on it then.
    """
    program = tl.program_id(0)
    group = program * 0
    if not config.one_group:
        group, program = divided(program, programs)
    if config.int64_indices:
        group = group.to(tl.int64)
    return program, group


@triton.jit
def tiles_of(program, programs, grid, config: tl.constexpr):
    """The tiles that a program works on, (first, end, step); the compiler is told if it is one."""
    end, step = grid.tiles, programs
    if config.one_tile:
        end, step = program + 1, 1
    return program, end, step


@triton.jit
def tile_origin(tile, grid, config: tl.constexpr):
    """A tile's number to its sample and its first cell."""
    tile, x = divided(tile, grid.tiles_x)
    tile, y = divided(tile, grid.tiles_y)
    sample, z = divided(tile, grid.tiles_z)
    return sample, z * config.z.tile, y * config.y.tile, x * config.x.tile


@triton.jit
def lane_position(lane, config: tl.constexpr):
    """A lane's number to its place in the tile."""
    return (
        lane // (config.y.tile * config.x.tile),
        lane // config.x.tile % config.y.tile,
        lane % config.x.tile,
    )


@triton.jit
def cell_number(sample, z, y, x, grid, config: tl.constexpr):
    """C-order index of a cell within its group."""
    if config.int64_indices:
        sample = sample.to(tl.int64)
    return ((sample * grid.depth + z) * grid.height + y) * grid.width + x


@triton.jit
def in_grid(z, y, x, grid):
    return (z < grid.depth) & (y < grid.height) & (x < grid.width)


@triton.jit
def _below(i, size):
    """Whether 0 <= i < size, by one comparison: negative numbers without their sign are large."""
    if i.dtype == tl.int64:
        below = (i >= 0) & (i < size)
    else:
        below = i.to(tl.uint32, bitcast=True) < size.to(tl.uint32)
    return below


@triton.jit
def border(i, size, padding: tl.constexpr, near: tl.constexpr):
    """A position on an axis, maybe outside, to (the cell that it shows, is there one).

    ``near``: positions that matter are less than ``size`` cells outside, so that no division is
    needed to find the cell.
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
def channel_offsets(config: tl.constexpr):
    """Channels [1, BC] and which of them exist."""
    channel = tl.arange(0, config.block_c)[None, :]
    return channel, channel < config.channels


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
def fires(fire_ptr, group, cell, inside, grid, config: tl.constexpr):
    """Which of the cells fire; none outside the grid."""
    fired = inside
    if config.fire_source == "mask":
        at = fire_ptr + group * config.fire_per_group * grid.cells + cell
        fired = tl.load(at, mask=inside, other=0).to(tl.int1) & inside
    elif config.fire_source == "key":
        key0 = tl.load(fire_ptr + 2 * group * config.fire_per_group).to(tl.uint32)
        key1 = tl.load(fire_ptr + 2 * group * config.fire_per_group + 1).to(tl.uint32)
        low = cell.to(tl.uint32)
        high = low * 0
        if config.int64_indices:
            high = (cell >> 32).to(tl.uint32)
        fired = ((threefry_bits(key0, key1, high, low) >> 9) < config.fire_threshold) & inside
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
def store_lanes(flags, numbers, lanes, lives, scratch_ptr, config: tl.constexpr):
    """The tile's lanes whose flag is set, in their order, to this program's scratch."""
    entry = (2 * lanes + lives).to(tl.float32, bitcast=True)
    tl.store(scratch_ptr + config.scratch.lanes_at + numbers, entry, mask=flags)


@triton.jit
def store_flags(needed, lives, lanes, scratch_ptr, config: tl.constexpr):
    """Flags 0 and 1 of the tile's lanes [runs, 16] to this program's scratch.

    Threads read there what they need of lanes that other threads hold; left to itself, Triton would
    draw and pool again for those.
    """
    entry = (needed + 2 * lives).to(tl.float32, bitcast=True)
    tl.store(scratch_ptr + config.scratch.flags_at + lanes, entry)


@triton.jit
def load_flags(lane, scratch_ptr, config: tl.constexpr):
    """Which lanes are needed, and which live."""
    entry = tl.load(scratch_ptr + config.scratch.flags_at + lane).to(tl.int32, bitcast=True)
    return (entry & 1) != 0, (entry & 2) != 0


@triton.jit
def compacted_lanes(scratch_ptr, first, count, config: tl.constexpr):
    """Lanes [R] of the set flags number first .. first + R, which of them live and which exist.

    Behind the last flag, its lane is repeated.
    """
    number = first + tl.arange(0, config.rows)
    exists = number < count
    entry = tl.load(scratch_ptr + config.scratch.lanes_at + tl.minimum(number, count - 1))
    entry = entry.to(tl.int32, bitcast=True)
    return (entry >> 1) & (config.tile_cells - 1), (entry & 1) != 0, exists


# ---- who lives ----


@triton.jit
def life(state_ptr, sample, z0, y0, x0, scratch_ptr, grid, config: tl.constexpr):
    """Words of the tile's cells that are alive, and of those with a living neighbour: [runs].

    A cell is alive where a pool of the alive channel exceeds the threshold, and has a living
    neighbour where a pool of twice the radius does. Reads the alive channel of the tile and of the
    cells within that reach, once. Along x a word is pooled in a register; what its neighbours
    along y and z hold goes through this program's scratch. A border other than circular shows the
    pool no cell that it does not see anyway.
    """
    runs: tl.constexpr = config.runs_with_halo
    if runs <= 128:
        _store_words(state_ptr, sample, z0, y0, x0, scratch_ptr, 0, runs, grid, config)
    else:  # in as many registers
        for first in range(0, runs, 128):
            _store_words(state_ptr, sample, z0, y0, x0, scratch_ptr, first, 128, grid, config)
    tl.debug_barrier()
    return _pooled_words(scratch_ptr, config)


@triton.jit
def _store_words(
    state_ptr, sample, z0, y0, x0, scratch_ptr, first, N: tl.constexpr, grid, config: tl.constexpr
):
    """Words of runs first .. first + N of the tile and its surroundings, pooled along x."""
    pool: tl.constexpr = config.pool_padding
    halo: tl.constexpr = 2 * config.alive_radius  # along x: 32 lanes hold 16 cells and two of it
    q = first + tl.arange(0, N)
    row = q[:, None]
    lane = tl.arange(0, 32)[None, :]
    z = z0 + row // (config.y.with_halo * config.runs_x) - config.z.halo
    z, there_z = border(z, grid.depth, pool, config.z.near)
    y = y0 + row // config.runs_x % config.y.with_halo - config.y.halo
    y, there_y = border(y, grid.height, pool, config.y.near)
    x = x0 + row % config.runs_x * 16 + lane - halo
    x, there_x = border(x, grid.width, pool, config.x.near)
    there = there_z & there_y & there_x & (lane < 16 + 2 * halo)
    there = there & (row < config.z.with_halo * config.y.with_halo * config.runs_x)
    at = cell_number(sample, z, y, x, grid, config) * config.channels + config.alive_channel
    alpha = tl.load(state_ptr + at, mask=there, other=0.0).to(tl.float32)
    once = pack(there & (alpha > config.alive_threshold))  # [N]
    word = once
    for i in tl.static_range(1, config.alive_radius + 1):
        once = once | (word << i) | (word >> i)
    twice = once
    for i in tl.static_range(config.alive_radius + 1, halo + 1):
        twice = twice | (word << i) | (word >> i)
    both = ((once >> halo) & 0xFFFF) | ((twice >> halo) << 16)
    tl.store(scratch_ptr + config.scratch.words_at + q, both.to(tl.float32, bitcast=True))


@triton.jit
def _pooled_words(scratch_ptr, config: tl.constexpr):
    """Of the words in scratch, those pooled along y and z, and those pooled twice: [runs]."""
    t = tl.arange(0, config.runs)
    z, y = t // (config.y.tile * config.runs_x), t // config.runs_x % config.y.tile
    x = t % config.runs_x
    first = (z * config.y.with_halo + y) * config.runs_x + x
    within: tl.constexpr = config.alive_radius * config.alive_radius
    alive, near = t * 0, t * 0
    if config.z.halo <= 2:
        for dz in tl.static_range(2 * config.z.halo + 1):
            for dy in tl.static_range(2 * config.y.halo + 1):
                both = _words_at(scratch_ptr, dz, dy, first, config)
                near = near | both
                far_z = (dz - config.z.halo) * (dz - config.z.halo)
                far_y = (dy - config.y.halo) * (dy - config.y.halo)
                if far_z <= within and far_y <= within:
                    alive = alive | both
    else:  # in as little code
        for dz in range(0, 2 * config.z.halo + 1):
            far_z = (dz - config.z.halo) * (dz - config.z.halo)
            for dy in tl.static_range(2 * config.y.halo + 1):
                both = _words_at(scratch_ptr, dz, dy, first, config)
                near = near | both
                far_y = (dy - config.y.halo) * (dy - config.y.halo)
                if far_y <= within:
                    alive = alive | tl.where(far_z <= within, both, 0)
    return alive & 0xFFFF, (near >> 16) & 0xFFFF


@triton.jit
def _words_at(scratch_ptr, dz, dy, first, config: tl.constexpr):
    """Words of the tile's runs, moved by dz and dy: [runs]."""
    step = (dz * config.y.with_halo + dy) * config.runs_x
    at = scratch_ptr + config.scratch.words_at + step + first
    return tl.load(at).to(tl.int32, bitcast=True)
