"""Pieces of kernels that deal with the perception: the stencil, its transpose, its taps.

Depthwise taps are kept as ``[K, F, BC]``, dense ones as ``[K, BC, BP]``, both padded with zeros.
Constant taps ``[K, F]`` are part of the program, which leaves out what is zero. A perception is a
tuple of filters ``[R, BP]``: as many as there are if depthwise, a single one if dense.
"""

import triton
import triton.language as tl

from nca_kernels.backends.triton.cells import (
    border,
    cell_number,
    channel_offsets,
    lane_position,
)
from nca_kernels.backends.triton.mlp import (
    activate,
    activate_backward,
    add_block,
    add_vector,
    dot,
    load_block,
    rounded,
)


@triton.jit
def has_margin(z0, y0, x0, grid, g: tl.constexpr):
    """Whether all neighbours of a tile's cells are inside the grid."""
    in_z = (z0 >= g.before_z) & (z0 + g.tile_z + g.kernel_z - 1 - g.before_z <= grid.depth)
    in_y = (y0 >= g.before_y) & (y0 + g.tile_y + g.kernel_y - 1 - g.before_y <= grid.height)
    in_x = (x0 >= g.before_x) & (x0 + g.tile_x + g.kernel_x - 1 - g.before_x <= grid.width)
    return in_z & in_y & in_x


@triton.jit
def neighbours(state_ptr, k, sample, z, y, x, inside: tl.constexpr, grid, g: tl.constexpr):
    """What lies at position ``k`` of the kernel around each cell: [R, BC].

    ``inside``: nothing of that is across a border.
    """
    kz, ky, kx = k // (g.kernel_y * g.kernel_x), k // g.kernel_x % g.kernel_y, k % g.kernel_x
    dz, dy, dx = kz - g.before_z, ky - g.before_y, kx - g.before_x
    channel, there = channel_offsets(g)
    rows, columns = dz * 0, dx * 0
    if inside or g.padding == "zeros":  # a step of its own, so that all positions share an address
        rows, columns = (dz * grid.height + dy) * grid.width, dx * g.channels
    if g.wide:
        rows = rows.to(tl.int64)
    if not inside:
        cz, there_z = border(z + dz, grid.depth, g.padding, g.near_z)
        cy, there_y = border(y + dy, grid.height, g.padding, g.near_y)
        cx, there_x = border(x + dx, grid.width, g.padding, g.near_x)
        there = (there_z & there_y & there_x)[:, None] & there
        if g.padding != "zeros":
            z, y, x = cz, cy, cx
    at = cell_number(sample, z, y, x, grid, g)[:, None] * g.channels + channel
    # Positions of one row differ by a constant: it costs nothing in a load's address.
    row_ptr = (state_ptr + rows * g.channels) + at
    return tl.load(row_ptr + columns, mask=there, other=0.0).to(tl.float32)


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
def perceive(state_ptr, weights_ptr, sample, z, y, x, margin, grid, g: tl.constexpr):
    """The perception of R cells before its activation; each neighbour is loaded once.

    ``margin``: that of their tile, most of which need not look at borders.
    """
    if g.filters == 0:
        filters = ()
    elif margin:
        filters = _perceive(state_ptr, weights_ptr, sample, z, y, x, True, grid, g)
    else:
        filters = _perceive(state_ptr, weights_ptr, sample, z, y, x, False, grid, g)
    return filters


@triton.jit
def _perceive(state_ptr, weights_ptr, sample, z, y, x, inside: tl.constexpr, grid, g: tl.constexpr):
    filters = ()
    for f in tl.static_range(g.filters):
        start = tl.zeros((g.rows, g.block_p), tl.float32)
        if g.perception_bias:
            at = g.perception_bias_at + f * g.block_p + tl.arange(0, g.block_p)
            start += tl.load(weights_ptr + at)[None, :]
        filters = filters + (start,)
    if g.constant_taps:
        for k in tl.static_range(g.kernel):
            if g.used[k]:
                value = neighbours(state_ptr, k, sample, z, y, x, inside, grid, g)
                filters = _add_seen(filters, value, k, weights_ptr, g)
    else:
        for k in tl.range(0, g.kernel, loop_unroll_factor=g.unroll):
            value = neighbours(state_ptr, k, sample, z, y, x, inside, grid, g)
            filters = _add_seen(filters, value, k, weights_ptr, g)
    return filters


@triton.jit
def _add_seen(filters, value, k, weights_ptr, g: tl.constexpr):
    """Adds what each filter makes of the neighbours at position ``k``, [R, BC]."""
    new = ()
    for f in tl.static_range(g.filters):
        if g.constant_taps:
            if g.taps[k * g.filters + f] != 0.0:
                new = new + (filters[f] + value * g.taps[k * g.filters + f],)
            else:
                new = new + (filters[f],)
        elif g.dense:
            taps = tap_block(weights_ptr, k, g)
            new = new + (dot(rounded(value, g), taps, filters[f], g),)
        else:
            new = new + (filters[f] + value * tap_row(weights_ptr, k, f, g),)
    return new


@triton.jit
def _side_by_side(a, b):
    """Two blocks [R, N] side by side: [R, 2N]."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _halves(x):
    """The left and the right half of [R, 2N]: [R, N] each."""
    x = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(x, (0, 2, 1)))


@triton.jit
def activated(filters, g: tl.constexpr):
    """The perception as products want it: a part for each filter, or one of all side by side.

    The latter ends with two columns of ones, if there is room, and of zeros.
    """
    parts = ()
    for f in tl.static_range(g.filters):
        parts = parts + (rounded(activate(filters[f], g.perception_activation, g), g),)
    if g.joined:
        column = tl.zeros((g.rows, g.block_p), tl.int32) + tl.arange(0, g.block_p)[None, :]
        for f in tl.static_range(g.filters, g.part // g.block_p):
            ones = column < (2 if f == g.filters else 0)
            parts = parts + (ones.to(tl.float32),)
        for level in tl.static_range(g.doublings):
            pairs = ()
            for i in tl.static_range(g.part // g.block_p >> (level + 1)):
                pairs = pairs + (_side_by_side(parts[2 * i], parts[2 * i + 1]),)
            parts = pairs
    return parts


@triton.jit
def activated_backward(filters, d_parts, g: tl.constexpr):
    """From the gradients of the parts to those of the perception before its activation."""
    if g.joined:
        for level in tl.static_range(g.doublings):
            halves = ()
            for i in tl.static_range(1 << level):
                left, right = _halves(d_parts[i])
                halves = halves + (left, right)
            d_parts = halves
    new = ()
    for f in tl.static_range(g.filters):
        new = new + (activate_backward(filters[f], d_parts[f], g.perception_activation, g),)
    return new


@triton.jit
def add_taps_gradient(d_parts, state_ptr, grads_ptr, sample, z, y, x, grid, g: tl.constexpr):
    """Adds R cells' share of the gradients of taps and perception bias to the partial sums.

    Those of rows that do not exist are zeros.
    """
    if g.perception_bias_grad:
        for f in tl.static_range(g.filters):
            add_vector(grads_ptr + g.perception_bias_at, f * g.block_p, tl.sum(d_parts[f], axis=0))
    if g.taps_grad:
        for k in range(0, g.kernel):
            value = neighbours(state_ptr, k, sample, z, y, x, False, grid, g)
            for f in tl.static_range(g.filters):
                if g.dense:
                    zeros = tl.zeros((g.block_c, g.block_p), tl.float32)
                    seen, d = rounded(value, g), rounded(d_parts[f], g)
                    d_taps = dot(tl.trans(seen), d, zeros, g)
                    add_block(grads_ptr + g.taps_at, k * g.block_c, 0, g.block_p, d_taps)
                else:
                    d_taps = tl.sum(value * d_parts[f], axis=0)
                    add_vector(grads_ptr + g.taps_at, (k * g.filters + f) * g.block_c, d_taps)


# ---- the transpose, in two steps: within a tile, then from tile to tile ----


@triton.jit
def keep_contributions(d_parts, first, scratch_ptr, weights_ptr, g: tl.constexpr):
    """What rows first .. first + R contribute to the state, to this program's scratch.

    It is ``[1 + T, K, BC]``, by tap, or where that is too large ``[1 + T, F, BP]``, the gradients
    of the perceptions. Row 0 is zeros, active cell number n has row 1 + n.
    """
    row = 1 + first + tl.arange(0, g.rows)[:, None]
    at = scratch_ptr + row * g.kept
    if g.by_tap:
        channel = tl.arange(0, g.block_c)[None, :]
        for k in tl.static_range(g.kernel):  # a loop breaks Triton 3.6 for sm_100
            zeros = tl.zeros((g.rows, g.block_c), tl.float32)
            value = add_tap_transposed(zeros, d_parts, k, weights_ptr, g)
            tl.store(at + k * g.block_c + channel, value, mask=row <= g.tile)
    else:
        for f in tl.static_range(g.filters):
            column = f * g.block_p + tl.arange(0, g.block_p)[None, :]
            tl.store(at + column, d_parts[f], mask=row <= g.tile)


@triton.jit
def add_tap_transposed(value, d_parts, k, weights_ptr, g: tl.constexpr):
    """Adds what perceptions mean to the state at position ``k`` of the kernel, [R, BC]."""
    for f in tl.static_range(g.filters):
        if g.constant_taps:
            if g.taps[k * g.filters + f] != 0.0:
                value += d_parts[f] * g.taps[k * g.filters + f]
        elif g.dense:
            taps = tap_block(weights_ptr, k, g)
            value = dot(rounded(d_parts[f], g), tl.trans(taps), value, g)
        else:
            value += d_parts[f] * tap_row(weights_ptr, k, f, g)
    return value


@triton.jit
def around(z, y, x, g: tl.constexpr):
    """Where a cell's entry lies among those of the tile and of the cells around it."""
    return (z * g.around_y + y) * g.around_x + x


@triton.jit
def keep_rows(active, numbers, lz, ly, lx, scratch_ptr, g: tl.constexpr):
    """Where each lane's row is in what :func:`keep_contributions` keeps, to the same scratch."""
    at = around(lz + g.kernel_z - 1, ly + g.kernel_y - 1, lx + g.kernel_x - 1, g)
    row = tl.where(active, (1 + numbers) * g.kept, 0).to(tl.float32, bitcast=True)
    tl.store(scratch_ptr + g.active_at + at, row)


@triton.jit
def tile_transpose(rz, ry, rx, exists, scratch_ptr, weights_ptr, g: tl.constexpr):
    """What the tile's cells contribute to the state at places of its surroundings: [R, BC].

    Place ``r`` of an axis is cell ``r - before`` of the tile; tap ``k`` of the cell at ``r - k``
    reaches it.
    """
    acc = tl.zeros((g.rows, g.block_c), tl.float32)
    here = around(rz, ry, rx, g)
    if g.constant_taps:
        for k in tl.static_range(g.kernel):
            if g.used[k]:
                acc = _add_reaching(acc, here, k, exists, scratch_ptr, weights_ptr, g)
    else:
        for k in tl.range(0, g.kernel, loop_unroll_factor=g.unroll):
            acc = _add_reaching(acc, here, k, exists, scratch_ptr, weights_ptr, g)
    return acc


@triton.jit
def _add_reaching(acc, here, k, exists, scratch_ptr, weights_ptr, g: tl.constexpr):
    """Adds what reaches the places by tap ``k``, [R, BC]."""
    kz, ky, kx = k // (g.kernel_y * g.kernel_x), k // g.kernel_x % g.kernel_y, k % g.kernel_x
    # A step of its own, so that all positions share an address.
    step = around(g.kernel_z - 1 - kz, g.kernel_y - 1 - ky, g.kernel_x - 1 - kx, g)
    row = tl.load(scratch_ptr + g.active_at + step + here, mask=exists, other=0.0)
    # A multiple of g.kept, which is one of 16: loads of several numbers at once.
    row = tl.multiple_of(row.to(tl.int32, bitcast=True), 16)[:, None]
    if g.by_tap:
        channel = tl.arange(0, g.block_c)[None, :]
        acc += tl.load((scratch_ptr + k * g.block_c + channel) + row)
    else:
        column = tl.arange(0, g.block_p)[None, :]
        d_parts = ()
        for f in tl.static_range(g.filters):  # what constant taps make nothing of is not loaded
            d_parts = d_parts + (tl.load((scratch_ptr + f * g.block_p + column) + row),)
        acc = add_tap_transposed(acc, d_parts, k, weights_ptr, g)
    return acc


@triton.jit
def overlap(s, j, size, tile: tl.constexpr, kernel: tl.constexpr, before: tl.constexpr,
            few: tl.constexpr, near: tl.constexpr, g: tl.constexpr):  # fmt: skip
    """Which tile's surroundings, number ``s`` on one axis, hold something for cell ``j``.

    Positions outside the grid that show cell ``j`` count as it does; each position lies in the
    surroundings of up to ``few`` tiles. Returns (tile, place in it, does it exist, is it the
    cell's own tile).
    """
    image = s // few  # 0: the cell itself, 1 .. before: left of the grid, then right of it
    position = tl.where(image == 0, j, tl.where(image <= before, -image, size - 1 + image - before))
    shown, there = border(position, size, g.padding, near)
    nth = (position + before) // tile - s % few
    place = position + before - nth * tile
    exists = there & (shown == j) & (nth >= 0) & (nth * tile < size) & (place < tile + kernel - 1)
    own = (position == j) & (nth == j // tile)
    return nth, place, exists, own


@triton.jit
def edge_cells(z0, y0, x0, grid, g: tl.constexpr):
    """How many of a tile's cells others may contribute to, and whether these are all of them.

    Near borders that show cells to cells, all; else those that other tiles reach.
    """
    count, everywhere = z0 * 0 + g.edges, z0 < 0
    if g.padding != "zeros":
        near_z = _near_border(z0, grid.depth, g.tile_z, g.kernel_z)
        near_y = _near_border(y0, grid.height, g.tile_y, g.kernel_y)
        near_x = _near_border(x0, grid.width, g.tile_x, g.kernel_x)
        everywhere = near_z | near_y | near_x
        count = tl.where(everywhere, g.tile, count)
    return count, everywhere


@triton.jit
def _near_border(first, size, tile: tl.constexpr, kernel: tl.constexpr):
    """Whether positions outside of an axis may show one of a tile's cells."""
    return ((first < kernel) | (first + tile > size - kernel)) & (kernel > 1)


@triton.jit
def edge_position(number, everywhere, g: tl.constexpr):
    """Where number n of a tile's cells is: those at an edge in z come first, then in y, then in x.

    Unless all are asked for, which come in their order.
    """
    size_z: tl.constexpr = g.edge_z * g.tile_y * g.tile_x
    size_y: tl.constexpr = (g.tile_z - g.edge_z) * g.edge_y * g.tile_x
    lz, ly, lx = lane_position(number, g)
    z, y, x = lz, ly, lx  # of each part, the cells of an axis in the order of _from_edges
    n = number - size_z
    if size_y > 0:
        in_y = n >= 0
        z = tl.where(in_y, g.edge_z + n // (g.edge_y * g.tile_x), z)
        y = tl.where(in_y, n // g.tile_x % g.edge_y, y)
        x = tl.where(in_y, n % g.tile_x, x)
    n -= size_y
    if g.edge_x > 0 and g.edge_y < g.tile_y:
        in_x = n >= 0
        inner: tl.constexpr = g.tile_y - g.edge_y
        z = tl.where(in_x, g.edge_z + n // (inner * g.edge_x), z)
        y = tl.where(in_x, g.edge_y + n // g.edge_x % inner, y)
        x = tl.where(in_x, n % g.edge_x, x)
    z = _from_edges(z, g.tile_z, g.low_z, g.edge_z)
    y = _from_edges(y, g.tile_y, g.low_y, g.edge_y)
    x = _from_edges(x, g.tile_x, g.low_x, g.edge_x)
    if g.padding != "zeros":
        z, y = tl.where(everywhere, lz, z), tl.where(everywhere, ly, y)
        x = tl.where(everywhere, lx, x)
    return z, y, x


@triton.jit
def _from_edges(i, size: tl.constexpr, low: tl.constexpr, edge: tl.constexpr):
    """Cells of an axis: the ``edge`` first, ``low`` of them at the beginning, then the others."""
    end = tl.where(i < low, i, size - edge + i)
    return tl.where(i < edge, end, low + i - edge)


@triton.jit
def shares(first, size, tile: tl.constexpr, kernel: tl.constexpr, few: tl.constexpr):
    """How many turns of :func:`share` cells from ``first`` on need on an axis.

    Positions outside the grid, images of cells, matter only to cells near its borders.
    """
    return tl.where(_near_border(first, size, tile, kernel), few * kernel, few)


@triton.jit
def share(s, turns_y, turns_x, sample, z, y, x, inside, touched_ptr, grid, g: tl.constexpr):
    """Where tiles hold something for cells, in turn ``s``: (at [R, BC], is there any [R]).

    Turns of all axes count in C order. Only what is not the cells' own tile.
    """
    sz, sy, sx = s // (turns_y * turns_x), s // turns_x % turns_y, s % turns_x
    tz, pz, ok_z, own_z = overlap(
        sz, z, grid.depth, g.tile_z, g.kernel_z, g.before_z, g.shares_z, g.near_z, g
    )
    ty, py, ok_y, own_y = overlap(
        sy, y, grid.height, g.tile_y, g.kernel_y, g.before_y, g.shares_y, g.near_y, g
    )
    tx, px, ok_x, own_x = overlap(
        sx, x, grid.width, g.tile_x, g.kernel_x, g.before_x, g.shares_x, g.near_x, g
    )
    there = inside & ok_z & ok_y & ok_x & ~(own_z & own_y & own_x)
    tile = ((sample * grid.tiles_z + tz) * grid.tiles_y + ty) * grid.tiles_x + tx
    there = there & (tl.load(touched_ptr + tile, mask=there, other=0) > 0)
    if g.wide:
        tile = tile.to(tl.int64)
    channel, _ = channel_offsets(g)
    place = tile * g.places + (pz * g.places_y + py) * g.places_x + px
    return place[:, None] * g.channels + channel, there
