"""The kernels of ``step`` and ``update``.

Forward: ``step_forward``, then with alive masking ``clear_dead``. Backward: ``step_backward``,
then ``add_overlaps`` and ``add_programs``. Programs loop over tiles, the same for each call, and
add nothing up in an order that could vary: the same call gives the same bits.

A launch has as many programs for each group, one group after the other; every array has a leading
group axis. Grid sizes and the number of programs are arguments: nothing of them is compiled in.
"""

import triton
import triton.language as tl

from nca_kernels.backends.triton.cells import (
    bits,
    border,
    cell_number,
    channel_offsets,
    compacted_lanes,
    fires,
    flag_numbers,
    grid_of,
    in_grid,
    keep_flags,
    keep_lanes,
    kept_flags,
    lane_position,
    life,
    pack,
    popcount,
    program_and_group,
    tile_origin,
    tiles_of,
)
from nca_kernels.backends.triton.mlp import (
    carried_sums,
    held_weights,
    keep_carried,
    mlp,
    mlp_backward,
)
from nca_kernels.backends.triton.stencil import (
    activated,
    activated_backward,
    add_taps_gradient,
    edge_cells,
    edge_position,
    has_margin,
    keep_contributions,
    keep_rows,
    perceive,
    share,
    shares,
    tile_transpose,
)


@triton.jit
def _lanes(g: tl.constexpr):
    """Numbers of the tile's lanes: [runs, 16]."""
    return tl.arange(0, g.runs)[:, None] * 16 + tl.arange(0, 16)[None, :]


@triton.jit
def step_forward(
    state_ptr, fire_ptr, weights_ptr, given_ptr, inputs_ptr,
    out_ptr, plane_ptr, alive_ptr, scratch_ptr,
    depth, height, width, samples, programs,
    g: tl.constexpr,
):  # fmt: skip
    """The new state, but for cells that only its alive mask will clear.

    With alive masking also the new alive channel as a plane, and who was alive before.
    """
    program, group = program_and_group(programs, g)
    grid = grid_of(depth, height, width, samples, g)
    state_ptr += group * grid.cells * g.channels
    out_ptr += group * grid.cells * g.channels
    given_ptr += group * grid.cells * g.source_sizes[0]
    inputs_ptr += group * (grid.cells if g.inputs_per_cell else samples) * g.source_sizes[1]
    weights_ptr += group * g.own_weights * g.weights
    plane_ptr += group * grid.cells
    alive_ptr += group * grid.cells
    scratch_ptr += (group * programs + program) * g.scratch
    held = held_weights(weights_ptr, g)
    # What a tile's work has in common with the next one's would only fill registers.
    first_tile, end, step = tiles_of(program, programs, grid, g)
    for tile in tl.range(first_tile, end, step, disable_licm=True):
        sample, z0, y0, x0 = tile_origin(tile, grid, g)
        lz, ly, lx = lane_position(_lanes(g), g)
        inside = in_grid(z0 + lz, y0 + ly, x0 + lx, grid)
        cell = cell_number(sample, z0 + lz, y0 + ly, x0 + lx, grid, g)
        words = pack(fires(fire_ptr, group, cell, inside, grid, g))
        alive = words * 0 + 0xFFFF
        if g.alive:
            # A dead cell's update matters to the fate of living neighbours, and to no other cell.
            alive, near = life(state_ptr, sample, z0, y0, x0, scratch_ptr, grid, g)
            words = words & near
        upto = tl.cumsum(popcount(words), axis=0)
        count = tl.max(upto, axis=0)
        tl.debug_barrier()  # the previous tile's lanes are read
        numbers = flag_numbers(words, upto)
        keep_lanes(bits(words) != 0, numbers, _lanes(g), bits(alive), scratch_ptr, g)
        keep_flags(bits(words), bits(alive), _lanes(g), scratch_ptr, g)
        tl.debug_barrier()  # this one's are written
        _copy_rest(
            state_ptr, out_ptr, plane_ptr, alive_ptr, sample, z0, y0, x0, scratch_ptr, grid, g
        )
        for first in tl.range(0, count, g.rows, disable_licm=not g.hoisted):
            lane, lives, exists = compacted_lanes(scratch_ptr, first, count, g)
            rz, ry, rx = lane_position(lane, g)
            z, y, x = z0 + rz, y0 + ry, x0 + rx
            here = cell_number(sample, z, y, x, grid, g)  # [R]
            margin = has_margin(z0, y0, x0, grid, g)
            parts = perceive(state_ptr, weights_ptr, sample, z, y, x, margin, grid, g)
            row = (here, here if g.inputs_per_cell else rz * 0 + sample)
            sources = (given_ptr, inputs_ptr)
            u = mlp(activated(parts, g), sources, row, exists, scratch_ptr, weights_ptr, held, g)
            channel, real = channel_offsets(g)
            at = here[:, None] * g.channels + channel
            mask = exists[:, None] & real
            old = tl.load(state_ptr + at, mask=mask, other=0.0).to(tl.float32)
            new = (old + g.step_size * u).to(out_ptr.dtype.element_ty)
            if g.alive:
                value = new.to(tl.float32)
                alpha = tl.sum(tl.where(channel == g.alive_channel, value, 0.0), axis=1)
                tl.store(plane_ptr + here, alpha, mask=exists)
                new = tl.where(lives[:, None], new, value.to(new.dtype) * 0)
            tl.store(out_ptr + at, new, mask=mask)


@triton.jit
def _copy_rest(
    state_ptr, out_ptr, plane_ptr, alive_ptr, sample, z0, y0, x0, scratch_ptr, grid,
    g: tl.constexpr,
):  # fmt: skip
    """What is known of every cell without the MLP: who is alive, and the cells that stay."""
    lane = tl.arange(0, g.tile)
    needed, lives = kept_flags(lane, scratch_ptr, g)
    lz, ly, lx = lane_position(lane, g)
    kept = in_grid(z0 + lz, y0 + ly, x0 + lx, grid)
    at = cell_number(sample, z0 + lz, y0 + ly, x0 + lx, grid, g)
    if g.alive:
        tl.store(alive_ptr + at, lives, mask=kept)
    kept = kept & ~needed
    if g.alive:
        alpha = tl.load(state_ptr + at * g.channels + g.alive_channel, mask=kept, other=0.0)
        tl.store(plane_ptr + at, alpha.to(tl.float32), mask=kept)
    channel, real = channel_offsets(g)
    at = at[:, None] * g.channels + channel
    old = tl.load(state_ptr + at, mask=(kept & lives)[:, None] & real, other=0.0)
    tl.store(out_ptr + at, old, mask=kept[:, None] & real)


@triton.jit
def clear_dead(
    plane_ptr, before_ptr, state_ptr, out_ptr, alive_ptr,
    depth, height, width, samples,
    g: tl.constexpr,
):  # fmt: skip
    """Clears the cells that the update killed, in place; completes the alive mask.

    A program has one tile. ``before_ptr`` and ``alive_ptr`` are one array, and so are ``state_ptr``
    and ``out_ptr``.
    """
    grid = grid_of(depth, height, width, samples, g)
    tile, group = program_and_group(grid.tiles, g)
    sample, z0, y0, x0 = tile_origin(tile, grid, g)
    lz, ly, lx = lane_position(tl.arange(0, g.tile), g)
    z, y, x = z0 + lz, y0 + ly, x0 + lx
    inside = in_grid(z, y, x, grid)
    cell = cell_number(sample, z, y, x, grid, g)
    pool: tl.constexpr = "circular" if g.padding == "circular" else "zeros"
    lives = tl.load(before_ptr + group * grid.cells + cell, mask=inside, other=0) != 0
    largest = tl.full((g.tile,), float("-inf"), tl.float32)
    for k in tl.static_range(g.pool):
        dz = k // (g.window_y * g.window_x) - g.window_z // 2
        dy = k // g.window_x % g.window_y - g.window_y // 2
        dx = k % g.window_x - g.window_x // 2
        nz, there_z = border(z + dz, grid.depth, pool, g.near_z)
        ny, there_y = border(y + dy, grid.height, pool, g.near_y)
        nx, there_x = border(x + dx, grid.width, pool, g.near_x)
        there = lives & there_z & there_y & there_x
        at, rows, columns = cell_number(sample, nz, ny, nx, grid, g), 0, 0
        if pool == "zeros":  # steps of their own, so that all share an address
            at, rows, columns = cell, (dz * grid.height + dy) * grid.width, dx
        row_ptr = (plane_ptr + group * grid.cells + rows) + at
        alpha = tl.load(row_ptr + columns, mask=there, other=float("-inf"))
        largest = tl.maximum(largest, alpha)
    survives = lives & (largest > g.alive_threshold)
    tl.debug_barrier()  # of few cells, other threads read the same flags
    tl.store(alive_ptr + group * grid.cells + cell, survives, mask=inside)
    dies = lives & ~survives
    if tl.max(dies.to(tl.int32), axis=0) > 0:
        channel, real = channel_offsets(g)
        row = out_ptr + (group * grid.cells + cell)[:, None] * g.channels
        zeros = tl.zeros((g.tile, g.block_c), out_ptr.dtype.element_ty)
        tl.store(row + channel, zeros, mask=dies[:, None] & real)


@triton.jit
def step_backward(
    state_ptr, fire_ptr, weights_ptr, given_ptr, inputs_ptr, alive_ptr, cotangent_ptr,
    d_state_ptr, overlap_ptr, touched_ptr, d_weights_ptr, d_given_ptr, d_inputs_ptr, scratch_ptr,
    depth, height, width, samples, programs,
    g: tl.constexpr,
):  # fmt: skip
    """All gradients: of the state within each tile, of the weights within each program.

    The perception's gradient stays in this program's scratch, a tile at a time. What the tile's
    cells mean to cells of other tiles goes to ``overlap_ptr`` [tiles, places, C].
    """
    program, group = program_and_group(programs, g)
    grid = grid_of(depth, height, width, samples, g)
    state_ptr += group * grid.cells * g.channels
    cotangent_ptr += group * grid.cells * g.channels
    d_state_ptr += group * grid.cells * g.channels
    given_ptr += group * grid.cells * g.source_sizes[0]
    d_given_ptr += group * grid.cells * g.source_sizes[0]
    inputs_ptr += group * (grid.cells if g.inputs_per_cell else samples) * g.source_sizes[1]
    d_inputs_ptr += group * grid.cells * g.source_sizes[1]
    weights_ptr += group * g.own_weights * g.weights
    alive_ptr += group * grid.cells
    overlap_ptr += group * grid.tiles * g.places * g.channels
    touched_ptr += group * grid.tiles
    d_weights_ptr += (group * programs + program) * g.weights
    scratch_ptr += (group * programs + program) * g.scratch
    _clear(d_weights_ptr, g.weights)
    _clear(scratch_ptr, g.kept)  # the row of zeros
    _clear(scratch_ptr + g.active_at, g.around)
    sums = carried_sums(g)
    # What a tile's work has in common with the next one's would only fill registers.
    first_tile, end, step = tiles_of(program, programs, grid, g)
    for tile in tl.range(first_tile, end, step, disable_licm=True):
        sample, z0, y0, x0 = tile_origin(tile, grid, g)
        lz, ly, lx = lane_position(_lanes(g), g)
        inside = in_grid(z0 + lz, y0 + ly, x0 + lx, grid)
        cell = cell_number(sample, z0 + lz, y0 + ly, x0 + lx, grid, g)
        active = fires(fire_ptr, group, cell, inside, grid, g)
        if g.alive:
            active = active & (tl.load(alive_ptr + cell, mask=inside, other=0) != 0)
        words = pack(active)
        upto = tl.cumsum(popcount(words), axis=0)
        count = tl.max(upto, axis=0)
        tl.store(touched_ptr + tile, count)
        _clear_source_rows((d_given_ptr, d_inputs_ptr), cell, inside, g)
        tl.debug_barrier()  # the previous tile's scratch is read
        numbers, active = flag_numbers(words, upto), bits(words) != 0  # not drawn once more
        keep_lanes(active, numbers, _lanes(g), 0, scratch_ptr, g)
        keep_rows(active, numbers, lz, ly, lx, scratch_ptr, g)
        tl.debug_barrier()  # this one's lanes and rows are written
        for first in tl.range(0, count, g.rows, disable_licm=not g.hoisted):
            lane, _, exists = compacted_lanes(scratch_ptr, first, count, g)
            rz, ry, rx = lane_position(lane, g)
            z, y, x = z0 + rz, y0 + ry, x0 + rx
            here = cell_number(sample, z, y, x, grid, g)  # [R]
            margin = has_margin(z0, y0, x0, grid, g)
            before = perceive(state_ptr, weights_ptr, sample, z, y, x, margin, grid, g)
            row = (here, here if g.inputs_per_cell else rz * 0 + sample, here)
            du = g.step_size * _cotangent(cotangent_ptr, here, exists, g)
            d_parts, sums = mlp_backward(
                du, activated(before, g), (given_ptr, inputs_ptr), row, exists, scratch_ptr,
                weights_ptr, d_weights_ptr, (d_given_ptr, d_inputs_ptr), sums, g,
            )  # fmt: skip
            if g.filters > 0:
                d_before = activated_backward(before, d_parts, g)
                if g.weight_grad:
                    add_taps_gradient(d_before, state_ptr, d_weights_ptr, sample, z, y, x, grid, g)
                keep_contributions(d_before, first, scratch_ptr, weights_ptr, g)
            tl.debug_barrier()  # before others read the scratch, or add to the same sums
        if g.state_grad:
            first_place = program * 0 + tile
            if g.wide:
                first_place = first_place.to(tl.int64)
            _tile_gradient(
                cotangent_ptr, alive_ptr, d_state_ptr,
                overlap_ptr + first_place * g.places * g.channels, weights_ptr, scratch_ptr,
                count, sample, z0, y0, x0, grid, g,
            )  # fmt: skip
    keep_carried(sums, d_weights_ptr, g)


@triton.jit
def _clear(ptr, size: tl.constexpr):
    for first in range(0, size, 1024):
        index = first + tl.arange(0, 1024)
        tl.store(ptr + index, tl.zeros((1024,), tl.float32), mask=index < size)


@triton.jit
def _cotangent(cotangent_ptr, here, exists, g: tl.constexpr):
    channel, real = channel_offsets(g)
    at = here[:, None] * g.channels + channel
    return tl.load(cotangent_ptr + at, mask=exists[:, None] & real, other=0.0).to(tl.float32)


@triton.jit
def _clear_source_rows(d_sources, cell, inside, g: tl.constexpr):
    """Zeros for the gradients of the sources, which the tile's active cells add to."""
    for s in tl.static_range(2):
        if g.source_grad[s]:
            row = tl.reshape(cell, (g.tile,))[:, None]
            there = tl.reshape(inside, (g.tile,))[:, None]
            for k in range(0, g.source_sizes[s], g.block_s):
                column = k + tl.arange(0, g.block_s)[None, :]
                at = d_sources[s] + row * g.source_sizes[s] + column
                zeros = tl.zeros((g.tile, g.block_s), tl.float32)
                tl.store(at, zeros, mask=there & (column < g.source_sizes[s]))


@triton.jit
def _tile_gradient(
    cotangent_ptr, alive_ptr, d_state_ptr, overlap_ptr, weights_ptr, scratch_ptr,
    count, sample, z0, y0, x0, grid, g: tl.constexpr,
):  # fmt: skip
    """The state's gradient: cells of the tile to ``d_state``, places around it to ``overlap``."""
    channel, real = channel_offsets(g)
    for first in range(0, g.places, g.rows):
        place = first + tl.arange(0, g.rows)
        exists = place < g.places
        rz = place // (g.places_y * g.places_x)
        ry, rx = place // g.places_x % g.places_y, place % g.places_x
        acc = tl.zeros((g.rows, g.block_c), tl.float32)
        if g.filters > 0:
            if count > 0:
                acc = tile_transpose(rz, ry, rx, exists, scratch_ptr, weights_ptr, g)
        lz, ly, lx = rz - g.before_z, ry - g.before_y, rx - g.before_x
        z, y, x = z0 + lz, y0 + ly, x0 + lx
        own = exists & (lz >= 0) & (ly >= 0) & (lx >= 0)
        own = own & (lz < g.tile_z) & (ly < g.tile_y) & (lx < g.tile_x) & in_grid(z, y, x, grid)
        here = cell_number(sample, z, y, x, grid, g)
        lives = own
        if g.alive:
            lives = own & (tl.load(alive_ptr + here, mask=own, other=0) != 0)
        total = acc + _cotangent(cotangent_ptr, here, lives, g)
        at = here[:, None] * g.channels + channel
        mask = own[:, None] & real
        tl.store(d_state_ptr + at, total.to(d_state_ptr.dtype.element_ty), mask=mask)
        if g.places > g.tile:
            if count > 0:
                around = place[:, None] * g.channels + channel
                tl.store(overlap_ptr + around, acc, mask=(exists & ~own)[:, None] & real)


@triton.jit
def add_overlaps(
    overlap_ptr, touched_ptr, d_state_ptr, out_ptr,
    depth, height, width, samples,
    g: tl.constexpr,
):  # fmt: skip
    """Adds to each cell, in place, what cells of other tiles or across the border contribute."""
    grid = grid_of(depth, height, width, samples, g)
    tile, group = program_and_group(grid.tiles, g)
    overlap_ptr += group * grid.tiles * g.places * g.channels
    touched_ptr += group * grid.tiles
    sample, z0, y0, x0 = tile_origin(tile, grid, g)
    channel, real = channel_offsets(g)
    count, everywhere = edge_cells(z0, y0, x0, grid, g)
    for first in range(0, count, g.rows):
        number = first + tl.arange(0, g.rows)
        lz, ly, lx = edge_position(number, everywhere, g)
        z, y, x = z0 + lz, y0 + ly, x0 + lx
        inside = in_grid(z, y, x, grid) & (number < count)
        acc = tl.zeros((g.rows, g.block_c), tl.float32)
        changed = inside & (z < 0)
        if g.padding == "zeros":
            for s in tl.static_range(g.shares_z * g.shares_y * g.shares_x):
                at, there = share(
                    s, g.shares_y, g.shares_x, sample, z, y, x, inside, touched_ptr, grid, g
                )
                acc += tl.load(overlap_ptr + at, mask=there[:, None] & real, other=0.0)
                changed = changed | there
        else:
            turns_z = shares(z0, grid.depth, g.tile_z, g.kernel_z, g.shares_z)
            turns_y = shares(y0, grid.height, g.tile_y, g.kernel_y, g.shares_y)
            turns_x = shares(x0, grid.width, g.tile_x, g.kernel_x, g.shares_x)
            for s in range(0, turns_z * turns_y * turns_x):
                at, there = share(
                    s, turns_y, turns_x, sample, z, y, x, inside, touched_ptr, grid, g
                )
                acc += tl.load(overlap_ptr + at, mask=there[:, None] & real, other=0.0)
                changed = changed | there
        here = group * grid.cells + cell_number(sample, z, y, x, grid, g)
        at = here[:, None] * g.channels + channel
        mask = changed[:, None] & real
        own = tl.load(d_state_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (own + acc).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_programs(
    partial_ptr, total_ptr,
    programs,
    g: tl.constexpr,
):  # fmt: skip
    """Adds up the programs' gradients of the weights, [programs, weights], in a fixed order."""
    blocks: tl.constexpr = (g.weights + g.add_columns - 1) // g.add_columns
    column, group = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    index = column * g.add_columns + tl.arange(0, g.add_columns)[None, :]
    acc = tl.zeros((g.add_rows, g.add_columns), tl.float32)
    for first in range(0, programs, g.add_rows):
        program = first + tl.arange(0, g.add_rows)[:, None]
        at = (group * programs + program).to(tl.int64) * g.weights + index
        mask = (program < programs) & (index < g.weights)
        acc += tl.load(partial_ptr + at, mask=mask, other=0.0)
    total = tl.sum(acc, axis=0)[None, :]
    tl.store(total_ptr + group.to(tl.int64) * g.weights + index, total, mask=index < g.weights)
