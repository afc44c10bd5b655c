"""The kernels of ``step`` and ``update``; ``backends/triton/step_kernels.py`` documents them.

The grid is (programs, groups); every array is flat and has a leading group axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas

from nca_kernels.backends.pallas.cells import (
    Position,
    across,
    along,
    cell_number,
    channel_positions,
    compacted_lanes,
    counts,
    div,
    down,
    fires,
    in_grid,
    lane_position,
    life,
    loop,
    moved,
    on_grid,
    pack_tile,
    pool_padding,
    tile_origin,
    total,
    unpack,
    unravel,
)
from nca_kernels.backends.pallas.launch import Memory
from nca_kernels.backends.pallas.mlp import Rows, Sums, activate_backward, mlp, mlp_backward, zeros
from nca_kernels.backends.pallas.stencil import (
    activated,
    add_taps_gradient,
    edge_cells,
    edge_position,
    in_tile,
    keep_perception_gradient,
    overlap,
    overlaps,
    perceive,
    tile_transpose,
)


class Reads(NamedTuple):
    """What both directions read, from this group on, and this program's own scratch."""

    state: Memory
    weights: Memory
    sources: tuple[Memory, Memory]  # the given perception and the inputs
    scratch: Memory


class Writes(NamedTuple):
    """What the forward writes, from this group on."""

    out: Memory
    plane: Memory
    alive: Memory


class Tile(NamedTuple):
    """A tile and its cells."""

    sample: Any
    origin: Position
    cell: Array  # numbers of the tile's cells, [T]
    inside: Array  # which of them the grid has, [T]


class Block(NamedTuple):
    """R active cells of a tile."""

    position: Position  # [R] each
    perception: list[Array]  # before its activation, [R, BP] for each filter
    rows: Rows


def _reads(
    program: Any,
    group: Any,
    state: Memory,
    weights: Memory,
    given: Memory,
    inputs: Memory,
    scratch: Memory,
    g: Any,
) -> Reads:
    given_size, inputs_size = g.source_sizes
    input_rows = g.cells if g.inputs_per_cell else g.samples
    return Reads(
        state + group * (g.cells * g.channels),
        weights + group * (g.own_weights * g.weights),
        (given + group * (g.cells * given_size), inputs + group * (input_rows * inputs_size)),
        scratch + (group * g.programs + program) * g.scratch,
    )


def _tile(number: Any, g: Any) -> Tile:
    sample, origin = tile_origin(number, g)
    position = moved(origin, lane_position(along(g.tile), g))
    return Tile(sample, origin, cell_number(sample, position, g), in_grid(position, g))


def _block(reads: Reads, tile: Tile, lane: Array, exists: Array, g: Any) -> Block:
    sample = tile.sample
    position = moved(tile.origin, lane_position(lane, g))
    cell = cell_number(sample, position, g)
    perception = perceive(reads.state, reads.weights, sample, position, exists, g)
    row = (cell, cell if g.inputs_per_cell else jnp.zeros_like(cell) + sample)
    parts = activated(perception, g)
    rows = Rows(parts, reads.sources, row, cell, exists, reads.weights, reads.scratch)
    return Block(position, perception, rows)


def _tiles(program: Any, g: Any) -> Any:
    """How many tiles a program works on: each ``programs``-th from its own number on."""
    return div(g.tiles - program + g.programs - 1, g.programs)


def _blocks(count: Any, g: Any) -> Any:
    return div(count + g.rows - 1, g.rows)


# ---- forward ----


def step_forward(
    state: Memory,
    fire: Memory,
    weights: Memory,
    given: Memory,
    inputs: Memory,
    out: Memory,
    plane: Memory,
    alive: Memory,
    scratch: Memory,
    g: Any,
) -> None:
    """The new state, but for cells that only its alive mask will clear.

    With alive masking also the new alive channel as a plane, and who was alive before.
    """
    program, group = pallas.program_id(0), pallas.program_id(1)
    reads = _reads(program, group, state, weights, given, inputs, scratch, g)
    writes = Writes(
        out + group * (g.cells * g.channels), plane + group * g.cells, alive + group * g.cells
    )

    def one_tile(i: Any, _: None) -> None:
        tile = _tile(program + i * g.programs, g)
        words = pack_tile(fires(fire, group, tile.cell, tile.inside, g), g)
        lives = None
        if g.alive:
            # A dead cell's update matters to the fate of living neighbours, and to no other cell.
            lives, near = life(reads.state, tile.sample, tile.origin, g)
            words = words & near
        _copy_rest(reads.state, writes, tile, lives, words, g)
        upto, count = counts(words)

        def one_block(j: Any, _: None) -> None:
            lane, exists = compacted_lanes(words, upto, j * g.rows, count, g)
            rows = _block(reads, tile, lane, exists, g).rows
            _store_update(mlp(rows, g), reads.state, writes, rows, g)

        loop(_blocks(count, g), one_block)

    loop(_tiles(program, g), one_tile)


def _copy_rest(
    state: Memory, writes: Writes, tile: Tile, lives: Array | None, words: Array, g: Any
) -> None:
    """What is known of every cell without the MLP: who is alive, and the cells that stay."""
    stays = tile.inside & ~unpack(words, g)
    copied = stays
    if lives is not None:
        flags = unpack(lives, g)
        writes.alive.store(tile.cell, flags, tile.inside)
        g.barrier()  # other threads read it for their rows
        alpha = state.load(tile.cell * g.channels + g.alive_channel, stays)
        writes.plane.store(tile.cell, alpha, stays)
        copied = stays & flags
    at, mask = channel_positions(tile.cell, stays, g)
    writes.out.store(at, state.load(at, mask & copied[:, None]), mask)


def _store_update(u: Array, state: Memory, writes: Writes, rows: Rows, g: Any) -> None:
    """Adds the update [R, BC] to the rows; of cells that were dead, only the plane sees it."""
    at, mask = channel_positions(rows.cell, rows.exists, g)
    old = state.load(at, mask).astype(jnp.float32)
    new = (old + g.step_size * u).astype(state.ref.dtype)
    if g.alive:
        chosen = across(g.block_c) == g.alive_channel
        alpha = total(jnp.where(chosen, new.astype(jnp.float32), 0.0), 1)
        writes.plane.store(rows.cell, alpha, rows.exists)
        lives = writes.alive.load(rows.cell, rows.exists)
        new = jnp.where(lives[:, None], new, jnp.zeros_like(new))
    writes.out.store(at, new, mask)


def clear_dead(
    plane: Memory, lived: Memory, state: Memory, out: Memory, alive: Memory, g: Any
) -> None:
    """Clears the cells that the update killed, in place; completes the alive mask.

    A program has one tile. ``lived`` and ``alive`` are one array, and so are ``state`` and ``out``.
    """
    start = pallas.program_id(1) * g.cells
    sample, origin = tile_origin(pallas.program_id(0), g)
    position = moved(origin, lane_position(along(g.tile), g))
    cell, inside = cell_number(sample, position, g), in_grid(position, g)
    lives = (lived + start).load(cell, inside) & inside
    before = -(g.window_z // 2), -(g.window_y // 2), -(g.window_x // 2)

    def add_neighbour(k: Any, largest: Array) -> Array:
        by = moved(unravel(k, g.window_y, g.window_x), before)
        neighbour, there = on_grid(moved(position, by), pool_padding(g), g)
        there = lives & there
        alpha = (plane + start).load(cell_number(sample, neighbour, g), there)
        return jnp.where(there, lax.max(largest, alpha), largest)

    lowest = jnp.full((g.tile,), -jnp.inf, jnp.float32)
    survives = lives & (loop(g.pool, add_neighbour, lowest) > g.alive_threshold)
    g.barrier()  # of few cells, other threads read the same flags
    (alive + start).store(cell, survives, inside)
    at, mask = channel_positions(cell, lives & ~survives, g)
    (out + start * g.channels).store(at, jnp.zeros(at.shape, out.ref.dtype), mask)


# ---- backward ----


def step_backward(
    state: Memory,
    fire: Memory,
    weights: Memory,
    given: Memory,
    inputs: Memory,
    alive: Memory,
    cotangent: Memory,
    d_state: Memory,
    shares: Memory,
    touched: Memory,
    d_weights: Memory,
    d_given: Memory,
    d_inputs: Memory,
    scratch: Memory,
    g: Any,
) -> None:
    """All gradients: of the state within each tile, of the weights within each program.

    The perception's gradient stays in this program's scratch, a tile at a time. What the tile's
    cells mean to cells of other tiles goes to ``shares`` [tiles, places, C].
    """
    program, group = pallas.program_id(0), pallas.program_id(1)
    reads = _reads(program, group, state, weights, given, inputs, scratch, g)
    given_size, inputs_size = g.source_sizes
    sums = Sums(
        d_weights + (group * g.programs + program) * g.weights,
        (d_given + group * (g.cells * given_size), d_inputs + group * (g.cells * inputs_size)),
    )
    alive, cotangent = alive + group * g.cells, cotangent + group * (g.cells * g.channels)
    d_state, touched = d_state + group * (g.cells * g.channels), touched + group * g.tiles
    shares = shares + group * (g.tiles * g.places * g.channels)
    _clear(sums.weights, g.weights)

    def one_tile(i: Any, _: None) -> None:
        number = program + i * g.programs
        tile = _tile(number, g)
        active = fires(fire, group, tile.cell, tile.inside, g)
        if g.alive:
            active = active & alive.load(tile.cell, tile.inside)
        words = pack_tile(active, g)
        upto, count = counts(words)
        touched.store(number + along(1), count[None])
        (reads.scratch + g.active_at).store(along(g.tile), active.astype(jnp.float32))
        _clear_source_rows(sums, tile, g)
        g.barrier()  # the previous tile's scratch is read, this one's flags are written

        def one_block(j: Any, _: None) -> None:
            lane, exists = compacted_lanes(words, upto, j * g.rows, count, g)
            block = _block(reads, tile, lane, exists, g)
            du = g.step_size * _cotangent(cotangent, block.rows.cell, exists, g)
            d_parts = mlp_backward(du, block.rows, sums, g)
            _perception_backward(d_parts, block, tile.sample, lane, reads, sums, g)
            g.barrier()  # before others read the scratch, or add to the same sums

        loop(_blocks(count, g), one_block)
        if g.state_grad:
            own_shares = shares + number * (g.places * g.channels)
            _tile_gradient(cotangent, alive, d_state, own_shares, reads, count, tile, g)
        g.barrier()

    loop(_tiles(program, g), one_tile)


def _clear(memory: Memory, size: int) -> None:
    def one(i: Any, _: None) -> None:
        at = i * 1024 + along(1024)
        memory.store(at, jnp.zeros(1024), at < size)

    loop(-(-size // 1024), one)


def _clear_source_rows(sums: Sums, tile: Tile, g: Any) -> None:
    """Zeros for the gradients of the sources, which the tile's active cells add to."""
    for memory, size, wanted in zip(sums.sources, g.source_sizes, g.source_grad, strict=True):

        def one(i: Any, _: None, memory: Memory = memory, size: int = size) -> None:
            column = i * g.block_s + across(g.block_s)
            mask = tile.inside[:, None] & (column < size)
            memory.store(tile.cell[:, None] * size + column, zeros(*mask.shape), mask)

        if wanted:
            loop(-(-size // g.block_s), one)


def _cotangent(cotangent: Memory, cell: Array, exists: Array, g: Any) -> Array:
    """[R, BC]."""
    return cotangent.load(*channel_positions(cell, exists, g)).astype(jnp.float32)


def _perception_backward(
    d_parts: list[Array],
    block: Block,
    sample: Any,
    lane: Array,
    reads: Reads,
    sums: Sums,
    g: Any,
) -> None:
    """From the gradients of the parts to the taps' and, in scratch, the perception's."""
    name, exists = g.perception_activation, block.rows.exists
    d_parts = [
        activate_backward(x, d, name) for x, d in zip(block.perception, d_parts, strict=True)
    ]
    if g.weight_grad:
        add_taps_gradient(d_parts, reads.state, sums.weights, sample, block.position, exists, g)
    keep_perception_gradient(d_parts, lane, exists, reads.scratch, g)


def _tile_gradient(
    cotangent: Memory,
    alive: Memory,
    d_state: Memory,
    shares: Memory,
    reads: Reads,
    count: Any,
    tile: Tile,
    g: Any,
) -> None:
    """The state's gradient: cells of the tile to ``d_state``, places around it to ``shares``."""
    turns = lax.select(count > 0, np.int32(g.kernel), np.int32(0)) if g.filters else 0

    def one_block(i: Any, _: None) -> None:
        number = i * g.rows + along(g.rows)
        exists = number < g.places
        place = unravel(number, g.places_y, g.places_x)
        acc = tile_transpose(place, exists, turns, reads.scratch, reads.weights, g)
        lane = moved(place, (-g.before_z, -g.before_y, -g.before_x))
        position = moved(tile.origin, lane)
        own = exists & in_tile(lane, g) & in_grid(position, g)
        cell = cell_number(tile.sample, position, g)
        lives = own & alive.load(cell, own) if g.alive else own
        at, mask = channel_positions(cell, own, g)
        d_state.store(at, acc + _cotangent(cotangent, cell, lives, g), mask)
        if g.filters and g.places > g.tile:
            at, mask = channel_positions(number, exists & ~own & (count > 0), g)
            shares.store(at, acc, mask)

    loop(-(-g.places // g.rows), one_block)


def add_overlaps(shares: Memory, touched: Memory, d_state: Memory, out: Memory, g: Any) -> None:
    """Adds to each cell, in place, what cells of other tiles or across the border contribute."""
    number, group = pallas.program_id(0), pallas.program_id(1)
    shares = shares + group * (g.tiles * g.places * g.channels)
    touched = touched + group * g.tiles
    start = group * (g.cells * g.channels)
    sample, origin = tile_origin(number, g)
    turns_z, turns_y, turns_x = overlaps(origin, g)
    count, everywhere = edge_cells(origin, g)

    def one_block(i: Any, _: None) -> None:
        n = i * g.rows + along(g.rows)
        position = moved(origin, edge_position(n, everywhere, g))
        inside = in_grid(position, g) & (n < count)

        def add(s: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            acc, changed = carry
            row = lax.div(s, turns_x)
            turn = lax.div(row, turns_y), lax.rem(row, turns_y), lax.rem(s, turns_x)
            tile, place, there = overlap(turn, position, sample, g)
            there = there & inside
            there = there & (touched.load(tile, there) > 0)
            at, mask = channel_positions(tile * g.places + place, there, g)
            return acc + shares.load(at, mask), changed | there

        nothing = zeros(g.rows, g.block_c), jnp.full((g.rows,), False)
        acc, changed = loop(turns_z * turns_y * turns_x, add, nothing)
        at, mask = channel_positions(cell_number(sample, position, g), changed, g)
        own = (d_state + start).load(at, mask).astype(jnp.float32)
        (out + start).store(at, own + acc, mask)

    loop(_blocks(count, g), one_block)


def add_programs(partial: Memory, totals: Memory, g: Any) -> None:
    """Adds up the programs' gradients of the weights, [programs, weights], in a fixed order."""
    group = pallas.program_id(1)
    column = pallas.program_id(0) * g.add_columns + across(g.add_columns)
    partial = partial + group * (g.programs * g.weights)

    def add(i: Any, acc: Array) -> Array:
        program = i * g.add_rows + down(g.add_rows)
        mask = (program < g.programs) & (column < g.weights)
        return acc + partial.load(program * g.weights + column, mask)

    acc = loop(-(-g.programs // g.add_rows), add, zeros(g.add_rows, g.add_columns))
    (totals + group * g.weights).store(column, total(acc, 0)[None, :], column < g.weights)
