"""The kernels of ``step`` and ``update``.

Forward: ``step_forward``, then with alive masking ``clear_dead``. Backward: ``step_backward``,
then ``add_overlaps`` and ``add_programs``. Which programs work on which tiles is the same for each
call, and all sums have a fixed order: the same call gives the same bits.

A launch has equally many programs for each group, one group after the other; every array has a
leading group axis. Grid sizes and the number of programs are arguments of the kernels, which are
not compiled for them.

Kernels take many arguments because JAX hands pointers and sizes over one by one; their pieces do,
too, so that each shows which memory it touches.
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
    lane_position,
    life,
    load_flags,
    pack,
    popcount,
    program_and_group,
    store_flags,
    store_lanes,
    tile_origin,
    tiles_of,
)
from nca_kernels.backends.triton.mlp import (
    load_weights_once,
    mlp,
    mlp_backward,
    register_sums,
    store_register_sums,
)
from nca_kernels.backends.triton.stencil import (
    activated,
    activated_backward,
    add_taps_gradient,
    edge_cells,
    edge_position,
    has_margin,
    perceive,
    share,
    shares,
    store_contributions,
    store_rows,
    tile_transpose,
)


@triton.jit
def _lanes(config: tl.constexpr):
    """Numbers of the tile's lanes: [runs, 16]."""
    return tl.arange(0, config.runs)[:, None] * 16 + tl.arange(0, 16)[None, :]


@triton.jit
def step_forward(
    state_ptr, fire_ptr, weights_ptr, perception_ptr, inputs_ptr,
    out_ptr, plane_ptr, alive_ptr, scratch_ptr,
    depth, height, width, samples, programs,
    config: tl.constexpr,
):  # fmt: skip
    """The new state, in which :func:`clear_dead` has yet to clear the cells that the step kills.

    With alive masking it also writes the new alive channel as a plane, and who was alive before.
    """
    program, group = program_and_group(programs, config)
    grid = grid_of(depth, height, width, samples, config)
    state_ptr += group * grid.cells * config.channels
    out_ptr += group * grid.cells * config.channels
    perception_ptr += group * grid.cells * config.mlp.source_sizes[0]
    input_rows = grid.cells if config.mlp.inputs_per_cell else samples
    inputs_ptr += group * input_rows * config.mlp.source_sizes[1]
    weights_ptr += group * config.weights_per_group * config.packed.size
    plane_ptr += group * grid.cells
    alive_ptr += group * grid.cells
    scratch_ptr += (group * programs + program) * config.scratch.size
    loaded = load_weights_once(weights_ptr, config)
    # What a tile's work has in common with the next one's would only fill registers.
    first_tile, end, step = tiles_of(program, programs, grid, config)
    for tile in tl.range(first_tile, end, step, disable_licm=True):
        sample, z0, y0, x0 = tile_origin(tile, grid, config)
        lz, ly, lx = lane_position(_lanes(config), config)
        inside = in_grid(z0 + lz, y0 + ly, x0 + lx, grid)
        cell = cell_number(sample, z0 + lz, y0 + ly, x0 + lx, grid, config)
        words = pack(fires(fire_ptr, group, cell, inside, grid, config))
        alive = words * 0 + 0xFFFF
        if config.alive:
            # A dead cell's update matters to the fate of living neighbours, and to no other cell.
            alive, near = life(state_ptr, sample, z0, y0, x0, scratch_ptr, grid, config)
            words = words & near
        upto = tl.cumsum(popcount(words), axis=0)
        count = tl.max(upto, axis=0)
        tl.debug_barrier()  # the previous tile's lanes are read
        numbers = flag_numbers(words, upto)
        store_lanes(bits(words) != 0, numbers, _lanes(config), bits(alive), scratch_ptr, config)
        store_flags(bits(words), bits(alive), _lanes(config), scratch_ptr, config)
        tl.debug_barrier()  # this one's are written
        _copy_rest(
            state_ptr, out_ptr, plane_ptr, alive_ptr, sample, z0, y0, x0, scratch_ptr, grid, config
        )
        for first in tl.range(0, count, config.rows, disable_licm=not config.hoist_invariants):
            lane, lives, exists = compacted_lanes(scratch_ptr, first, count, config)
            rz, ry, rx = lane_position(lane, config)
            z, y, x = z0 + rz, y0 + ry, x0 + rx
            here = cell_number(sample, z, y, x, grid, config)  # [R]
            margin = has_margin(z0, y0, x0, grid, config)
            parts = perceive(state_ptr, weights_ptr, sample, z, y, x, margin, grid, config)
            row = (here, here if config.mlp.inputs_per_cell else rz * 0 + sample)
            sources = (perception_ptr, inputs_ptr)
            parts = activated(parts, config)
            u = mlp(parts, sources, row, exists, scratch_ptr, weights_ptr, loaded, config)
            channel, real = channel_offsets(config)
            at = here[:, None] * config.channels + channel
            mask = exists[:, None] & real
            old = tl.load(state_ptr + at, mask=mask, other=0.0).to(tl.float32)
            new = (old + config.step_size * u).to(out_ptr.dtype.element_ty)
            if config.alive:
                value = new.to(tl.float32)
                alpha = tl.sum(tl.where(channel == config.alive_channel, value, 0.0), axis=1)
                tl.store(plane_ptr + here, alpha, mask=exists)
                new = tl.where(lives[:, None], new, value.to(new.dtype) * 0)
            tl.store(out_ptr + at, new, mask=mask)


@triton.jit
def _copy_rest(
    state_ptr, out_ptr, plane_ptr, alive_ptr, sample, z0, y0, x0, scratch_ptr, grid,
    config: tl.constexpr,
):  # fmt: skip
    """Writes what needs no MLP: who is alive, and the state of cells that do not change."""
    lane = tl.arange(0, config.tile_cells)
    needed, lives = load_flags(lane, scratch_ptr, config)
    lz, ly, lx = lane_position(lane, config)
    inside = in_grid(z0 + lz, y0 + ly, x0 + lx, grid)
    at = cell_number(sample, z0 + lz, y0 + ly, x0 + lx, grid, config)
    if config.alive:
        tl.store(alive_ptr + at, lives, mask=inside)
    stays = inside & ~needed
    if config.alive:
        alive_channel = state_ptr + at * config.channels + config.alive_channel
        alpha = tl.load(alive_channel, mask=stays, other=0.0)
        tl.store(plane_ptr + at, alpha.to(tl.float32), mask=stays)
    channel, real = channel_offsets(config)
    at = at[:, None] * config.channels + channel
    old = tl.load(state_ptr + at, mask=(stays & lives)[:, None] & real, other=0.0)
    tl.store(out_ptr + at, old, mask=stays[:, None] & real)


@triton.jit
def clear_dead(
    plane_ptr, before_ptr, state_ptr, out_ptr, alive_ptr,
    depth, height, width, samples,
    config: tl.constexpr,
):  # fmt: skip
    """Clears the cells that the update killed, in place; completes the alive mask.

    A program has one tile. ``before_ptr`` and ``alive_ptr`` are one array, and so are ``state_ptr``
    and ``out_ptr``.
    """
    grid = grid_of(depth, height, width, samples, config)
    tile, group = program_and_group(grid.tiles, config)
    sample, z0, y0, x0 = tile_origin(tile, grid, config)
    lz, ly, lx = lane_position(tl.arange(0, config.tile_cells), config)
    z, y, x = z0 + lz, y0 + ly, x0 + lx
    inside = in_grid(z, y, x, grid)
    cell = cell_number(sample, z, y, x, grid, config)
    lives = tl.load(before_ptr + group * grid.cells + cell, mask=inside, other=0) != 0
    largest = tl.full((config.tile_cells,), float("-inf"), tl.float32)
    plane_ptr += group * grid.cells
    if config.pool_positions <= 27:
        for k in tl.static_range(config.pool_positions):
            largest = _add_to_pool(largest, plane_ptr, k, sample, z, y, x, lives, grid, config)
    else:  # more would be too much code
        for k in range(0, config.pool_positions):
            largest = _add_to_pool(largest, plane_ptr, k, sample, z, y, x, lives, grid, config)
    survives = lives & (largest > config.alive_threshold)
    tl.debug_barrier()  # of few cells, other threads read the same flags
    tl.store(alive_ptr + group * grid.cells + cell, survives, mask=inside)
    dies = lives & ~survives
    if tl.max(dies.to(tl.int32), axis=0) > 0:
        channel, real = channel_offsets(config)
        row = out_ptr + (group * grid.cells + cell)[:, None] * config.channels
        zeros = tl.zeros((config.tile_cells, config.block_c), out_ptr.dtype.element_ty)
        tl.store(row + channel, zeros, mask=dies[:, None] & real)


@triton.jit
def _add_to_pool(largest, plane_ptr, k, sample, z, y, x, wanted, grid, config: tl.constexpr):
    """The larger of ``largest`` and the alive channel at position ``k`` of the pool's window."""
    dz = k // (config.y.pool * config.x.pool) - config.z.pool // 2
    dy = k // config.x.pool % config.y.pool - config.y.pool // 2
    dx = k % config.x.pool - config.x.pool // 2
    nz, there_z = border(z + dz, grid.depth, config.pool_padding, config.z.near)
    ny, there_y = border(y + dy, grid.height, config.pool_padding, config.y.near)
    nx, there_x = border(x + dx, grid.width, config.pool_padding, config.x.near)
    there = wanted & there_z & there_y & there_x
    at, rows, columns = cell_number(sample, nz, ny, nx, grid, config), 0, 0
    if not config.pool_wraps:  # steps of their own, so that all share an address
        at = cell_number(sample, z, y, x, grid, config)
        rows, columns = (dz * grid.height + dy) * grid.width, dx
    alpha = tl.load((plane_ptr + rows) + at + columns, mask=there, other=float("-inf"))
    return tl.maximum(largest, alpha)


@triton.jit
def step_backward(
    state_ptr, fire_ptr, weights_ptr, perception_ptr, inputs_ptr, alive_ptr, cotangent_ptr,
    d_state_ptr, overlap_ptr, touched_ptr, d_weights_ptr, d_perception_ptr, d_inputs_ptr,
    scratch_ptr,
    depth, height, width, samples, programs,
    config: tl.constexpr,
):  # fmt: skip
    """All gradients, but for sums over tiles and over programs.

    The state's lacks what cells of other tiles contribute, which goes to ``overlap_ptr``
    [tiles, reach, C]; the weights' are sums of each program. The perception's gradient stays in
    the program's scratch, a tile at a time.
    """
    program, group = program_and_group(programs, config)
    grid = grid_of(depth, height, width, samples, config)
    state_ptr += group * grid.cells * config.channels
    cotangent_ptr += group * grid.cells * config.channels
    d_state_ptr += group * grid.cells * config.channels
    perception_ptr += group * grid.cells * config.mlp.source_sizes[0]
    d_perception_ptr += group * grid.cells * config.mlp.source_sizes[0]
    input_rows = grid.cells if config.mlp.inputs_per_cell else samples
    inputs_ptr += group * input_rows * config.mlp.source_sizes[1]
    d_inputs_ptr += group * grid.cells * config.mlp.source_sizes[1]
    weights_ptr += group * config.weights_per_group * config.packed.size
    alive_ptr += group * grid.cells
    overlap_ptr += group * grid.tiles * config.reach * config.channels
    touched_ptr += group * grid.tiles
    d_weights_ptr += (group * programs + program) * config.packed.size
    scratch_ptr += (group * programs + program) * config.scratch.size
    _clear(d_weights_ptr, config.packed.size)
    _clear(scratch_ptr, config.scratch.contribution)  # the row of zeros
    _clear(scratch_ptr + config.scratch.rows_at, config.around)
    sums = register_sums(config)
    # What a tile's work has in common with the next one's would only fill registers.
    first_tile, end, step = tiles_of(program, programs, grid, config)
    for tile in tl.range(first_tile, end, step, disable_licm=True):
        sample, z0, y0, x0 = tile_origin(tile, grid, config)
        lz, ly, lx = lane_position(_lanes(config), config)
        inside = in_grid(z0 + lz, y0 + ly, x0 + lx, grid)
        cell = cell_number(sample, z0 + lz, y0 + ly, x0 + lx, grid, config)
        active = fires(fire_ptr, group, cell, inside, grid, config)
        if config.alive:
            active = active & (tl.load(alive_ptr + cell, mask=inside, other=0) != 0)
        words = pack(active)
        upto = tl.cumsum(popcount(words), axis=0)
        count = tl.max(upto, axis=0)
        tl.store(touched_ptr + tile, count)
        _clear_source_rows((d_perception_ptr, d_inputs_ptr), cell, inside, config)
        tl.debug_barrier()  # the previous tile's scratch is read
        # From the words: left to itself, Triton draws once more.
        numbers, active = flag_numbers(words, upto), bits(words) != 0
        store_lanes(active, numbers, _lanes(config), 0, scratch_ptr, config)
        store_rows(active, numbers, lz, ly, lx, scratch_ptr, config)
        tl.debug_barrier()  # this one's lanes and rows are written
        for first in tl.range(0, count, config.rows, disable_licm=not config.hoist_invariants):
            lane, _, exists = compacted_lanes(scratch_ptr, first, count, config)
            rz, ry, rx = lane_position(lane, config)
            z, y, x = z0 + rz, y0 + ry, x0 + rx
            here = cell_number(sample, z, y, x, grid, config)  # [R]
            margin = has_margin(z0, y0, x0, grid, config)
            before = perceive(state_ptr, weights_ptr, sample, z, y, x, margin, grid, config)
            row = (here, here if config.mlp.inputs_per_cell else rz * 0 + sample, here)
            du = config.step_size * _cotangent(cotangent_ptr, here, exists, config)
            d_parts, sums = mlp_backward(
                du, activated(before, config), (perception_ptr, inputs_ptr), row, exists,
                scratch_ptr, weights_ptr, d_weights_ptr, (d_perception_ptr, d_inputs_ptr), sums,
                config,
            )  # fmt: skip
            if config.perception.filters > 0:
                d_before = activated_backward(before, d_parts, config)
                if config.wanted.weights:
                    add_taps_gradient(
                        d_before, state_ptr, d_weights_ptr, sample, z, y, x, grid, config
                    )
                store_contributions(d_before, first, scratch_ptr, weights_ptr, config)
            tl.debug_barrier()  # before others read the scratch, or add to the same sums
        if config.wanted.state:
            overlap_row = program * 0 + tile
            if config.int64_indices:
                overlap_row = overlap_row.to(tl.int64)
            _tile_gradient(
                cotangent_ptr, alive_ptr, d_state_ptr,
                overlap_ptr + overlap_row * config.reach * config.channels,
                weights_ptr, scratch_ptr, count, sample, z0, y0, x0, grid, config,
            )  # fmt: skip
    store_register_sums(sums, d_weights_ptr, config)


@triton.jit
def _clear(ptr, size: tl.constexpr):
    for first in range(0, size, 1024):
        index = first + tl.arange(0, 1024)
        tl.store(ptr + index, tl.zeros((1024,), tl.float32), mask=index < size)


@triton.jit
def _cotangent(cotangent_ptr, here, exists, config: tl.constexpr):
    channel, real = channel_offsets(config)
    at = here[:, None] * config.channels + channel
    return tl.load(cotangent_ptr + at, mask=exists[:, None] & real, other=0.0).to(tl.float32)


@triton.jit
def _clear_source_rows(d_sources, cell, inside, config: tl.constexpr):
    """Zeros for the gradients of the sources, which the tile's active cells add to."""
    for s in tl.static_range(2):
        if config.wanted.sources[s]:
            row = tl.reshape(cell, (config.tile_cells,))[:, None]
            there = tl.reshape(inside, (config.tile_cells,))[:, None]
            for k in range(0, config.mlp.source_sizes[s], config.mlp.block_s):
                column = k + tl.arange(0, config.mlp.block_s)[None, :]
                at = d_sources[s] + row * config.mlp.source_sizes[s] + column
                zeros = tl.zeros((config.tile_cells, config.mlp.block_s), tl.float32)
                tl.store(at, zeros, mask=there & (column < config.mlp.source_sizes[s]))


@triton.jit
def _tile_gradient(
    cotangent_ptr, alive_ptr, d_state_ptr, overlap_ptr, weights_ptr, scratch_ptr,
    count, sample, z0, y0, x0, grid, config: tl.constexpr,
):  # fmt: skip
    """Writes the state's gradient: the tile's to ``d_state``, that around it to ``overlap``."""
    channel, real = channel_offsets(config)
    for first in range(0, config.reach, config.rows):
        place = first + tl.arange(0, config.rows)
        exists = place < config.reach
        rz = place // (config.y.reach * config.x.reach)
        ry, rx = place // config.x.reach % config.y.reach, place % config.x.reach
        acc = tl.zeros((config.rows, config.block_c), tl.float32)
        if config.perception.filters > 0:
            if count > 0:
                acc = tile_transpose(rz, ry, rx, exists, scratch_ptr, weights_ptr, config)
        lz, ly, lx = rz - config.z.before, ry - config.y.before, rx - config.x.before
        z, y, x = z0 + lz, y0 + ly, x0 + lx
        in_tile = exists & (lz >= 0) & (ly >= 0) & (lx >= 0)
        in_tile = (
            in_tile
            & (lz < config.z.tile)
            & (ly < config.y.tile)
            & (lx < config.x.tile)
            & in_grid(z, y, x, grid)
        )
        here = cell_number(sample, z, y, x, grid, config)
        lives = in_tile
        if config.alive:
            lives = in_tile & (tl.load(alive_ptr + here, mask=in_tile, other=0) != 0)
        total = acc + _cotangent(cotangent_ptr, here, lives, config)
        at = here[:, None] * config.channels + channel
        mask = in_tile[:, None] & real
        tl.store(d_state_ptr + at, total.to(d_state_ptr.dtype.element_ty), mask=mask)
        if config.reach > config.tile_cells:
            if count > 0:
                around = place[:, None] * config.channels + channel
                tl.store(overlap_ptr + around, acc, mask=(exists & ~in_tile)[:, None] & real)


@triton.jit
def add_overlaps(
    overlap_ptr, touched_ptr, d_state_ptr, out_ptr,
    depth, height, width, samples,
    config: tl.constexpr,
):  # fmt: skip
    """Adds to each cell, in place, what cells of other tiles or across the border contribute."""
    grid = grid_of(depth, height, width, samples, config)
    tile, group = program_and_group(grid.tiles, config)
    overlap_ptr += group * grid.tiles * config.reach * config.channels
    touched_ptr += group * grid.tiles
    sample, z0, y0, x0 = tile_origin(tile, grid, config)
    channel, real = channel_offsets(config)
    count, everywhere = edge_cells(z0, y0, x0, grid, config)
    for first in range(0, count, config.rows):
        number = first + tl.arange(0, config.rows)
        lz, ly, lx = edge_position(number, everywhere, config)
        z, y, x = z0 + lz, y0 + ly, x0 + lx
        inside = in_grid(z, y, x, grid) & (number < count)
        acc = tl.zeros((config.rows, config.block_c), tl.float32)
        changed = inside & (z < 0)
        if config.borders_fold_back:
            turns_z = shares(z0, grid.depth, config.z)
            turns_y = shares(y0, grid.height, config.y)
            turns_x = shares(x0, grid.width, config.x)
            for s in range(0, turns_z * turns_y * turns_x):
                at, there = share(
                    s, turns_y, turns_x, sample, z, y, x, inside, touched_ptr, grid, config
                )
                acc += tl.load(overlap_ptr + at, mask=there[:, None] & real, other=0.0)
                changed = changed | there
        else:
            for s in tl.static_range(config.z.shares * config.y.shares * config.x.shares):
                at, there = share(
                    s,
                    config.y.shares,
                    config.x.shares,
                    sample,
                    z,
                    y,
                    x,
                    inside,
                    touched_ptr,
                    grid,
                    config,
                )
                acc += tl.load(overlap_ptr + at, mask=there[:, None] & real, other=0.0)
                changed = changed | there
        here = group * grid.cells + cell_number(sample, z, y, x, grid, config)
        at = here[:, None] * config.channels + channel
        mask = changed[:, None] & real
        old = tl.load(d_state_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (old + acc).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_programs(
    partial_ptr, total_ptr,
    programs,
    config: tl.constexpr,
):  # fmt: skip
    """Adds up the programs' gradients of the weights, [programs, weights], in a fixed order."""
    blocks: tl.constexpr = (config.packed.size + config.add_columns - 1) // config.add_columns
    column, group = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    index = column * config.add_columns + tl.arange(0, config.add_columns)[None, :]
    acc = tl.zeros((config.add_rows, config.add_columns), tl.float32)
    for first in range(0, programs, config.add_rows):
        program = first + tl.arange(0, config.add_rows)[:, None]
        at = (group * programs + program).to(tl.int64) * config.packed.size + index
        mask = (program < programs) & (index < config.packed.size)
        acc += tl.load(partial_ptr + at, mask=mask, other=0.0)
    total = tl.sum(acc, axis=0)[None, :]
    tl.store(
        total_ptr + group.to(tl.int64) * config.packed.size + index,
        total,
        mask=index < config.packed.size,
    )
