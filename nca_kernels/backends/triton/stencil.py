"""Pieces of kernels that deal with the perception: the stencil, its transpose, its taps.

Depthwise taps are kept as ``[K, F, BC]``, dense ones as ``[K, BC, BP]``, both padded with zeros.
A perception is a tuple of parts ``[R, BP]``: one a filter if depthwise, a single one if dense.
"""

import triton
import triton.language as tl

from nca_kernels.backends.triton.cells import border, cell_number, channel_offsets
from nca_kernels.backends.triton.mlp import activate, add_block, add_vector, dot, load_block


@triton.jit
def neighbours(state_ptr, k, sample, z, y, x, exists, g: tl.constexpr):
    """What lies at position ``k`` of the kernel around each cell: [R, BC]."""
    kz, ky, kx = k // (g.kernel_y * g.kernel_x), k // g.kernel_x % g.kernel_y, k % g.kernel_x
    z, there_z = border(z + kz - g.before_z, g.depth, g.padding)
    y, there_y = border(y + ky - g.before_y, g.height, g.padding)
    x, there_x = border(x + kx - g.before_x, g.width, g.padding)
    channel, real = channel_offsets(g)
    there = exists & there_z & there_y & there_x
    at = cell_number(sample, z, y, x, g)[:, None] * g.channels + channel
    return tl.load(state_ptr + at, mask=there[:, None] & real, other=0.0).to(tl.float32)


@triton.jit
def tap_row(weights_ptr, k, f, g: tl.constexpr):
    """A depthwise filter's taps at position ``k``, for every channel: [1, BC]."""
    at = g.taps_at + (k * g.filters + f) * g.block_c + tl.arange(0, g.block_c)[None, :]
    return tl.load(weights_ptr + at)


@triton.jit
def tap_block(weights_ptr, k, g: tl.constexpr):
    """The dense taps at position ``k``: [BC, BP]."""
    row = k * g.block_c
    return load_block(weights_ptr + g.taps_at, row, 0, g.block_p, g.block_c, g.block_p)


@triton.jit
def perceive(state_ptr, weights_ptr, sample, z, y, x, exists, g: tl.constexpr):
    """The perception of R cells before its activation; each neighbour is loaded once."""
    parts = ()
    for f in tl.static_range(g.filters):
        bias = tl.load(weights_ptr + g.perception_bias_at + f * g.block_p + tl.arange(0, g.block_p))
        parts = parts + (tl.zeros((g.rows, g.block_p), tl.float32) + bias[None, :],)
    if g.filters > 0:
        for k in tl.range(0, g.kernel, loop_unroll_factor=g.unroll):
            value = neighbours(state_ptr, k, sample, z, y, x, exists, g)
            new = ()
            for f in tl.static_range(g.filters):
                if g.dense:
                    new = new + (dot(value, tap_block(weights_ptr, k, g), parts[f], g),)
                else:
                    new = new + (parts[f] + value * tap_row(weights_ptr, k, f, g),)
            parts = new
    return parts


@triton.jit
def activated(parts, g: tl.constexpr):
    new = ()
    for f in tl.static_range(g.filters):
        new = new + (activate(parts[f], g.perception_activation),)
    return new


@triton.jit
def add_taps_gradient(d_parts, state_ptr, grads_ptr, sample, z, y, x, exists, g: tl.constexpr):
    """Adds R cells' share of the gradients of taps and perception bias to the partial sums."""
    for f in tl.static_range(g.filters):
        add_vector(grads_ptr + g.perception_bias_at, f * g.block_p, tl.sum(d_parts[f], axis=0))
    if g.taps_grad:
        for k in range(0, g.kernel):
            value = neighbours(state_ptr, k, sample, z, y, x, exists, g)
            for f in tl.static_range(g.filters):
                if g.dense:
                    zeros = tl.zeros((g.block_c, g.block_p), tl.float32)
                    d_taps = dot(tl.trans(value), d_parts[f], zeros, g)
                    add_block(grads_ptr + g.taps_at, k * g.block_c, 0, g.block_p, d_taps)
                else:
                    d_taps = tl.sum(value * d_parts[f], axis=0)
                    add_vector(grads_ptr + g.taps_at, (k * g.filters + f) * g.block_c, d_taps)


# ---- the transpose, in two steps: within a tile, then from tile to tile ----


@triton.jit
def keep_perception_gradient(d_parts, lane, exists, scratch_ptr, g: tl.constexpr):
    """The gradients of R lanes' perceptions to this program's scratch ``[T, F, BP]``."""
    for f in tl.static_range(g.filters):
        column = f * g.block_p + tl.arange(0, g.block_p)[None, :]
        at = scratch_ptr + lane[:, None] * (g.filters * g.block_p) + column
        tl.store(at, d_parts[f], mask=exists[:, None])


@triton.jit
def tile_transpose(rz, ry, rx, exists, scratch_ptr, active_ptr, weights_ptr, g: tl.constexpr):
    """What the tile's cells contribute to the state at places of its surroundings: [R, BC].

    Place ``r`` of an axis is cell ``r - before`` of the tile; tap ``k`` of the cell at ``r - k``
    reaches it.
    """
    acc = tl.zeros((g.rows, g.block_c), tl.float32)
    column = tl.arange(0, g.block_p)[None, :]
    for k in tl.range(0, g.kernel, loop_unroll_factor=g.unroll):
        lz = rz - k // (g.kernel_y * g.kernel_x)
        ly, lx = ry - k // g.kernel_x % g.kernel_y, rx - k % g.kernel_x
        inside = exists & (lz >= 0) & (ly >= 0) & (lx >= 0)
        inside = inside & (lz < g.tile_z) & (ly < g.tile_y) & (lx < g.tile_x)
        lane = (lz * g.tile_y + ly) * g.tile_x + lx
        inside = inside & (tl.load(active_ptr + lane, mask=inside, other=0.0) != 0)
        for f in tl.static_range(g.filters):
            at = scratch_ptr + lane[:, None] * (g.filters * g.block_p) + f * g.block_p + column
            d_part = tl.load(at, mask=inside[:, None], other=0.0)
            if g.dense:
                acc = dot(d_part, tl.trans(tap_block(weights_ptr, k, g)), acc, g)
            else:
                acc += d_part * tap_row(weights_ptr, k, f, g)
    return acc


@triton.jit
def overlap(s, j, size: tl.constexpr, tile: tl.constexpr, kernel: tl.constexpr,
            before: tl.constexpr, g: tl.constexpr):  # fmt: skip
    """Which tile's surroundings, number ``s`` on one axis, hold something for cell ``j``.

    Positions outside the grid that show cell ``j`` count as it does; each position lies in the
    surroundings of up to ``candidates`` tiles. Returns (tile, place in it, does it exist, is it
    the cell's own tile).
    """
    candidates: tl.constexpr = 1 + (kernel - 1 + tile - 1) // tile
    image = s // candidates  # 0: the cell itself, 1 .. before: left of the grid, then right of it
    position = tl.where(image == 0, j, tl.where(image <= before, -image, size - 1 + image - before))
    shown, there = border(position, size, g.padding)
    nth = (position + before) // tile
    place = position + before - (nth - s % candidates) * tile
    nth = nth - s % candidates
    exists = there & (shown == j) & (nth >= 0) & (nth * tile < size) & (place < tile + kernel - 1)
    own = (position == j) & (nth == j // tile)
    return nth, place, exists, own


@triton.jit
def overlaps(first, size: tl.constexpr, tile: tl.constexpr, kernel: tl.constexpr, g: tl.constexpr):
    """How many ``s`` of :func:`overlap` cells from ``first`` on need: images only near borders."""
    candidates: tl.constexpr = 1 + (kernel - 1 + tile - 1) // tile
    count = first * 0 + candidates
    if g.padding != "zeros" and kernel > 1:
        at_border = (first < kernel) | (first + tile > size - kernel)
        count = tl.where(at_border, candidates * kernel, candidates)
    return count
