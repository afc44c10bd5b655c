"""Pieces of kernels that deal with the perception: the stencil, its transpose, its taps.

In memory, depthwise taps are ``[K, F, BC]`` and dense ones ``[K, BC, BP]``, both padded with zeros.
Constant taps ``[K, F]`` are part of the program, which leaves out those that are zero. A perception
is a tuple of blocks ``[R, BP]``, one for each depthwise filter, or a single one if taps are dense.
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
def _has_margin(first, size, axis: tl.constexpr):
    return (first >= axis.before) & (first + axis.tile + axis.kernel - 1 - axis.before <= size)


@triton.jit
def has_margin(z0, y0, x0, grid, config: tl.constexpr):
    """Whether all neighbours of a tile's cells are inside the grid."""
    in_z = _has_margin(z0, grid.depth, config.z)
    in_y = _has_margin(y0, grid.height, config.y)
    in_x = _has_margin(x0, grid.width, config.x)
    return in_z & in_y & in_x


@triton.jit
def stencil_position(k, config: tl.constexpr):
    """Position ``k`` of the stencil, counted in C order, to its place on each axis."""
    kz = k // (config.y.kernel * config.x.kernel)
    return kz, k // config.x.kernel % config.y.kernel, k % config.x.kernel


@triton.jit
def neighbours(state_ptr, k, sample, z, y, x, inside: tl.constexpr, grid, config: tl.constexpr):
    """What lies at position ``k`` of the stencil around each cell: [R, BC].

    ``inside``: no neighbour of any of the cells is across a border.
    """
    kz, ky, kx = stencil_position(k, config)
    dz, dy, dx = kz - config.z.before, ky - config.y.before, kx - config.x.before
    channel, there = channel_offsets(config)
    rows, columns = dz * 0, dx * 0
    if inside or config.zeros_outside:  # a step of its own, so that all positions share an address
        rows, columns = (dz * grid.height + dy) * grid.width, dx * config.channels
    if config.int64_indices:
        rows = rows.to(tl.int64)
    if not inside:
        cz, there_z = border(z + dz, grid.depth, config.padding, config.z.near)
        cy, there_y = border(y + dy, grid.height, config.padding, config.y.near)
        cx, there_x = border(x + dx, grid.width, config.padding, config.x.near)
        there = (there_z & there_y & there_x)[:, None] & there
        if not config.zeros_outside:
            z, y, x = cz, cy, cx
    at = cell_number(sample, z, y, x, grid, config)[:, None] * config.channels + channel
    # The addresses of positions of one row differ by a constant, which is free in a load.
    row_ptr = (state_ptr + rows * config.channels) + at
    return tl.load(row_ptr + columns, mask=there, other=0.0).to(tl.float32)


@triton.jit
def tap_row(weights_ptr, k, f, config: tl.constexpr):
    """A depthwise filter's taps at position ``k``, for every channel: [1, BC]."""
    at = (
        config.packed.taps_at
        + (k * config.perception.filters + f) * config.block_c
        + tl.arange(0, config.block_c)[None, :]
    )
    return tl.load(weights_ptr + at)


@triton.jit
def tap_block(weights_ptr, k, config: tl.constexpr):
    """The dense taps at position ``k``: [BC, BP]."""
    row = k * config.block_c
    return load_block(
        weights_ptr + config.packed.taps_at,
        row,
        0,
        config.perception.block_p,
        config.block_c,
        config.perception.block_p,
    )


@triton.jit
def perceive(state_ptr, weights_ptr, sample, z, y, x, margin, grid, config: tl.constexpr):
    """The perception of R cells before its activation; each neighbour is loaded once.

    ``margin``: whether all neighbours of the tile's cells are inside the grid, as of most tiles.
    """
    if config.perception.filters == 0:
        filters = ()
    elif margin:
        filters = _perceive(state_ptr, weights_ptr, sample, z, y, x, True, grid, config)
    else:
        filters = _perceive(state_ptr, weights_ptr, sample, z, y, x, False, grid, config)
    return filters


@triton.jit
def _perceive(
    state_ptr, weights_ptr, sample, z, y, x, inside: tl.constexpr, grid, config: tl.constexpr
):
    filters = ()
    for f in tl.static_range(config.perception.filters):
        start = tl.zeros((config.rows, config.perception.block_p), tl.float32)
        if config.perception.bias:
            at = (
                config.packed.perception_bias_at
                + f * config.perception.block_p
                + tl.arange(0, config.perception.block_p)
            )
            start += tl.load(weights_ptr + at)[None, :]
        filters = filters + (start,)
    if config.perception.constant:
        for k in tl.static_range(config.perception.positions):
            if config.perception.used[k]:
                value = neighbours(state_ptr, k, sample, z, y, x, inside, grid, config)
                filters = _add_seen(filters, value, k, weights_ptr, config)
    else:
        for k in tl.range(0, config.perception.positions, loop_unroll_factor=config.unroll):
            value = neighbours(state_ptr, k, sample, z, y, x, inside, grid, config)
            filters = _add_seen(filters, value, k, weights_ptr, config)
    return filters


@triton.jit
def _add_seen(filters, value, k, weights_ptr, config: tl.constexpr):
    """Adds what each filter makes of the neighbours at position ``k``, [R, BC]."""
    new = ()
    for f in tl.static_range(config.perception.filters):
        if config.perception.constant:
            if config.perception.taps[k * config.perception.filters + f] != 0.0:
                tap = config.perception.taps[k * config.perception.filters + f]
                new = new + (filters[f] + value * tap,)
            else:
                new = new + (filters[f],)
        elif config.perception.dense:
            taps = tap_block(weights_ptr, k, config)
            new = new + (dot(rounded(value, config), taps, filters[f], config),)
        else:
            new = new + (filters[f] + value * tap_row(weights_ptr, k, f, config),)
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
def activated(filters, config: tl.constexpr):
    """The perception as products want it: a part for each filter, or one of all side by side.

    The latter ends with two columns of ones, if there is room, and of zeros.
    """
    parts = ()
    for f in tl.static_range(config.perception.filters):
        value = activate(filters[f], config.perception_activation, config)
        parts = parts + (rounded(value, config),)
    if config.perception.side_by_side:
        BP: tl.constexpr = config.perception.block_p
        blocks: tl.constexpr = config.perception.part // BP
        column = tl.zeros((config.rows, BP), tl.int32) + tl.arange(0, BP)[None, :]
        for f in tl.static_range(config.perception.filters, blocks):
            ones = column < (2 if f == config.perception.filters else 0)
            parts = parts + (ones.to(tl.float32),)
        for level in tl.static_range(config.perception.doublings):
            pairs = ()
            for i in tl.static_range(blocks >> (level + 1)):
                pairs = pairs + (_side_by_side(parts[2 * i], parts[2 * i + 1]),)
            parts = pairs
    return parts


@triton.jit
def activated_backward(filters, d_parts, config: tl.constexpr):
    """From the gradients of the parts to those of the perception before its activation."""
    if config.perception.side_by_side:
        for level in tl.static_range(config.perception.doublings):
            halves = ()
            for i in tl.static_range(1 << level):
                left, right = _halves(d_parts[i])
                halves = halves + (left, right)
            d_parts = halves
    new = ()
    for f in tl.static_range(config.perception.filters):
        d = activate_backward(filters[f], d_parts[f], config.perception_activation, config)
        new = new + (d,)
    return new


@triton.jit
def add_taps_gradient(d_parts, state_ptr, grads_ptr, sample, z, y, x, grid, config: tl.constexpr):
    """Adds R cells' share of the gradients of taps and perception bias to the partial sums.

    ``d_parts`` is zero in rows that do not exist.
    """
    BP: tl.constexpr = config.perception.block_p
    if config.wanted.perception_bias:
        for f in tl.static_range(config.perception.filters):
            d_bias = tl.sum(d_parts[f], axis=0)
            add_vector(grads_ptr + config.packed.perception_bias_at, f * BP, d_bias)
    if config.wanted.taps:
        for k in range(0, config.perception.positions):
            value = neighbours(state_ptr, k, sample, z, y, x, False, grid, config)
            for f in tl.static_range(config.perception.filters):
                if config.perception.dense:
                    zeros = tl.zeros((config.block_c, BP), tl.float32)
                    seen, d = rounded(value, config), rounded(d_parts[f], config)
                    d_taps = dot(tl.trans(seen), d, zeros, config)
                    row = k * config.block_c
                    add_block(grads_ptr + config.packed.taps_at, row, 0, BP, d_taps)
                else:
                    d_taps = tl.sum(value * d_parts[f], axis=0)
                    at = (k * config.perception.filters + f) * config.block_c
                    add_vector(grads_ptr + config.packed.taps_at, at, d_taps)


# ---- the transpose, in two steps: within a tile, then from tile to tile ----


@triton.jit
def store_contributions(d_parts, first, scratch_ptr, weights_ptr, config: tl.constexpr):
    """Writes what rows first .. first + R contribute to the state to this program's scratch.

    The scratch has it tap by tap, ``[1 + T, K, BC]``, or where that is too large as gradients of
    perceptions, ``[1 + T, F, BP]``. Row 0 is zeros, active cell number n has row 1 + n.
    """
    row = 1 + first + tl.arange(0, config.rows)[:, None]
    at = scratch_ptr + row * config.scratch.contribution
    if config.contributions_by_tap:
        channel = tl.arange(0, config.block_c)[None, :]
        # A loop breaks Triton 3.6 for sm_100.
        for k in tl.static_range(config.perception.positions):
            zeros = tl.zeros((config.rows, config.block_c), tl.float32)
            value = add_tap_transposed(zeros, d_parts, k, weights_ptr, config)
            tl.store(at + k * config.block_c + channel, value, mask=row <= config.tile_cells)
    else:
        BP: tl.constexpr = config.perception.block_p
        for f in tl.static_range(config.perception.filters):
            column = f * BP + tl.arange(0, BP)[None, :]
            tl.store(at + column, d_parts[f], mask=row <= config.tile_cells)


@triton.jit
def add_tap_transposed(value, d_parts, k, weights_ptr, config: tl.constexpr):
    """Adds the gradient that perceptions give the state at position ``k`` of the stencil."""
    for f in tl.static_range(config.perception.filters):
        if config.perception.constant:
            if config.perception.taps[k * config.perception.filters + f] != 0.0:
                tap = config.perception.taps[k * config.perception.filters + f]
                value += d_parts[f] * tap
        elif config.perception.dense:
            taps = tap_block(weights_ptr, k, config)
            value = dot(rounded(d_parts[f], config), tl.trans(taps), value, config)
        else:
            value += d_parts[f] * tap_row(weights_ptr, k, f, config)
    return value


@triton.jit
def around(z, y, x, config: tl.constexpr):
    """Where a cell's entry lies among those of the tile and of the cells around it."""
    return (z * config.y.around + y) * config.x.around + x


@triton.jit
def store_rows(active, numbers, lz, ly, lx, scratch_ptr, config: tl.constexpr):
    """Writes each lane's row among those of :func:`store_contributions` to the scratch."""
    z, y, x = lz + config.z.kernel - 1, ly + config.y.kernel - 1, lx + config.x.kernel - 1
    at = around(z, y, x, config)
    row = tl.where(active, (1 + numbers) * config.scratch.contribution, 0)
    tl.store(scratch_ptr + config.scratch.rows_at + at, row.to(tl.float32, bitcast=True))


@triton.jit
def tile_transpose(rz, ry, rx, exists, scratch_ptr, weights_ptr, config: tl.constexpr):
    """What the tile's cells contribute to the state at places of its surroundings: [R, BC].

    Place ``r`` of an axis is cell ``r - before`` of the tile; tap ``k`` of the cell at ``r - k``
    reaches it.
    """
    acc = tl.zeros((config.rows, config.block_c), tl.float32)
    here = around(rz, ry, rx, config)
    if config.perception.constant:
        for k in tl.static_range(config.perception.positions):
            if config.perception.used[k]:
                acc = _add_reaching(acc, here, k, exists, scratch_ptr, weights_ptr, config)
    else:
        for k in tl.range(0, config.perception.positions, loop_unroll_factor=config.unroll):
            acc = _add_reaching(acc, here, k, exists, scratch_ptr, weights_ptr, config)
    return acc


@triton.jit
def _add_reaching(acc, here, k, exists, scratch_ptr, weights_ptr, config: tl.constexpr):
    """Adds what reaches the places by tap ``k``, [R, BC]."""
    kz, ky, kx = stencil_position(k, config)
    # A step of its own, so that all positions share an address.
    z, y, x = config.z.kernel - 1 - kz, config.y.kernel - 1 - ky, config.x.kernel - 1 - kx
    step = around(z, y, x, config)
    row = tl.load(scratch_ptr + config.scratch.rows_at + step + here, mask=exists, other=0.0)
    # Rows lie a multiple of 16 numbers apart: so several are loaded at once.
    row = tl.multiple_of(row.to(tl.int32, bitcast=True), 16)[:, None]
    if config.contributions_by_tap:
        channel = tl.arange(0, config.block_c)[None, :]
        acc += tl.load((scratch_ptr + k * config.block_c + channel) + row)
    else:
        column = tl.arange(0, config.perception.block_p)[None, :]
        d_parts = ()
        for f in tl.static_range(config.perception.filters):
            # The compiler leaves out what constant taps make nothing of.
            d = tl.load((scratch_ptr + f * config.perception.block_p + column) + row)
            d_parts = d_parts + (d,)
        acc = add_tap_transposed(acc, d_parts, k, weights_ptr, config)
    return acc


@triton.jit
def overlap(s, j, size, axis: tl.constexpr, config: tl.constexpr):
    """Along one axis, the ``s``-th place that holds a contribution to cell ``j``.

    What is contributed to a position outside the grid belongs to the cell that the position shows.
    Each position lies within reach of up to ``axis.shares`` tiles. Returns (tile, place in it, does
    it exist, is it the cell's place in its own tile).
    """
    image = s // axis.shares  # 0: the cell itself, 1 .. before: left of the grid, then right of it
    itself = image == 0
    outside = tl.where(image <= axis.before, -image, size - 1 + image - axis.before)
    position = tl.where(itself, j, outside)
    shown, there = border(position, size, config.padding, axis.near)
    nth = (position + axis.before) // axis.tile - s % axis.shares
    place = position + axis.before - nth * axis.tile
    exists = there & (shown == j) & (nth >= 0) & (nth * axis.tile < size) & (place < axis.reach)
    same = (position == j) & (nth == j // axis.tile)
    return nth, place, exists, same


@triton.jit
def edge_cells(z0, y0, x0, grid, config: tl.constexpr):
    """How many of a tile's cells get contributions from elsewhere, and whether that is all of them.

    Those are the cells that other tiles reach; near borders that fold back, all.
    """
    count, everywhere = z0 * 0 + config.edges, z0 < 0
    if config.borders_fold_back:
        near_z = _near_border(z0, grid.depth, config.z)
        near_y = _near_border(y0, grid.height, config.y)
        near_x = _near_border(x0, grid.width, config.x)
        everywhere = near_z | near_y | near_x
        count = tl.where(everywhere, config.tile_cells, count)
    return count, everywhere


@triton.jit
def _near_border(first, size, axis: tl.constexpr):
    """Whether positions outside of an axis may show one of a tile's cells."""
    near = (first < axis.kernel) | (first + axis.tile > size - axis.kernel)
    return near & (axis.kernel > 1)


@triton.jit
def edge_position(number, everywhere, config: tl.constexpr):
    """The position in its tile of the n-th cell that gets contributions from elsewhere.

    Cells at an edge in z come first, then those in y, then those in x. With ``everywhere`` it is
    all cells in C order.
    """
    size_z: tl.constexpr = config.z.edge * config.y.tile * config.x.tile
    size_y: tl.constexpr = (config.z.tile - config.z.edge) * config.y.edge * config.x.tile
    lz, ly, lx = lane_position(number, config)
    z, y, x = lz, ly, lx  # of each part, the cells of an axis in the order of _from_edges
    n = number - size_z
    if size_y > 0:
        in_y = n >= 0
        z = tl.where(in_y, config.z.edge + n // (config.y.edge * config.x.tile), z)
        y = tl.where(in_y, n // config.x.tile % config.y.edge, y)
        x = tl.where(in_y, n % config.x.tile, x)
    n -= size_y
    if config.x.edge > 0 and config.y.edge < config.y.tile:
        in_x = n >= 0
        inner: tl.constexpr = config.y.tile - config.y.edge
        z = tl.where(in_x, config.z.edge + n // (inner * config.x.edge), z)
        y = tl.where(in_x, config.y.edge + n // config.x.edge % inner, y)
        x = tl.where(in_x, n % config.x.edge, x)
    z, y, x = _from_edges(z, config.z), _from_edges(y, config.y), _from_edges(x, config.x)
    if config.borders_fold_back:
        z, y = tl.where(everywhere, lz, z), tl.where(everywhere, ly, y)
        x = tl.where(everywhere, lx, x)
    return z, y, x


@triton.jit
def _from_edges(i, axis: tl.constexpr):
    """Cell number ``i`` of an axis, counting the low edge's first, then the high edge's."""
    at_edge = tl.where(i < axis.low_edge, i, axis.tile - axis.edge + i)
    return tl.where(i < axis.edge, at_edge, axis.low_edge + i - axis.edge)


@triton.jit
def shares(first, size, axis: tl.constexpr):
    """How many turns of :func:`share` cells from ``first`` on need on an axis.

    Positions outside the grid, images of cells, matter only to cells near its borders.
    """
    return tl.where(_near_border(first, size, axis), axis.shares * axis.kernel, axis.shares)


@triton.jit
def share(s, turns_y, turns_x, sample, z, y, x, inside, touched_ptr, grid, config: tl.constexpr):
    """Where other tiles hold contributions to cells, in turn ``s``: (at [R, BC], is there any [R]).

    Turns are counted over all axes in C order. What is in the cells' own tile is left out.
    """
    sz, sy, sx = s // (turns_y * turns_x), s // turns_x % turns_y, s % turns_x
    tz, pz, ok_z, same_z = overlap(sz, z, grid.depth, config.z, config)
    ty, py, ok_y, same_y = overlap(sy, y, grid.height, config.y, config)
    tx, px, ok_x, same_x = overlap(sx, x, grid.width, config.x, config)
    there = inside & ok_z & ok_y & ok_x & ~(same_z & same_y & same_x)
    tile = ((sample * grid.tiles_z + tz) * grid.tiles_y + ty) * grid.tiles_x + tx
    there = there & (tl.load(touched_ptr + tile, mask=there, other=0) > 0)
    if config.int64_indices:
        tile = tile.to(tl.int64)
    channel, _ = channel_offsets(config)
    place = tile * config.reach + (pz * config.y.reach + py) * config.x.reach + px
    return place[:, None] * config.channels + channel, there
