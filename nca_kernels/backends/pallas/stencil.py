"""Pieces of kernels that deal with the perception: the stencil, its transpose, its taps.

``backends/triton/stencil.py`` explains their shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from nca_kernels.backends.pallas.cells import (
    Position,
    across,
    border,
    cell_number,
    channel_positions,
    div,
    lane_position,
    loop,
    moved,
    on_grid,
    rem,
    unravel,
)
from nca_kernels.backends.pallas.launch import Memory
from nca_kernels.backends.pallas.mlp import (
    activate,
    add_block,
    add_rows,
    block_at,
    dot,
    dot_transposed,
    outer,
    zeros,
)


def kernel_position(k: Any, g: Any) -> Position:
    return unravel(k, g.kernel_y, g.kernel_x)


def neighbours(
    state: Memory, k: Any, sample: Any, position: Position, exists: Array, g: Any
) -> Array:
    """What lies at position ``k`` of the kernel around each cell: [R, BC]."""
    by = moved(kernel_position(k, g), (-g.before_z, -g.before_y, -g.before_x))
    cell, there = on_grid(moved(position, by), g.padding, g)
    at, mask = channel_positions(cell_number(sample, cell, g), exists & there, g)
    return state.load(at, mask).astype(jnp.float32)


def tap_row(weights: Memory, k: Any, f: int, g: Any) -> Array:
    """A depthwise filter's taps at position ``k``, for every channel: [1, BC]."""
    return weights.load(g.taps_at + (k * g.filters + f) * g.block_c + across(g.block_c))


def tap_block(weights: Memory, k: Any, g: Any) -> Array:
    """The dense taps at position ``k``: [BC, BP]."""
    return weights.load(g.taps_at + block_at(k * g.block_c, 0, g.block_p, g.block_c, g.block_p))


def perceive(
    state: Memory, weights: Memory, sample: Any, position: Position, exists: Array, g: Any
) -> list[Array]:
    """The perception of R cells before its activation: [R, BP] for each filter."""
    if g.filters == 0:
        return []
    bias = weights + g.perception_bias_at
    parts = [
        zeros(g.rows, g.block_p) + bias.load(f * g.block_p + across(g.block_p))
        for f in range(g.filters)
    ]

    def add_tap(k: Any, parts: list[Array]) -> list[Array]:
        value = neighbours(state, k, sample, position, exists, g)
        if g.dense:
            return [parts[0] + dot(value, tap_block(weights, k, g), g)]
        return [part + value * tap_row(weights, k, f, g) for f, part in enumerate(parts)]

    return loop(g.kernel, add_tap, parts)


def activated(parts: Sequence[Array], g: Any) -> list[Array]:
    return [activate(part, g.perception_activation) for part in parts]


def add_taps_gradient(
    d_parts: Sequence[Array],
    state: Memory,
    sums: Memory,
    sample: Any,
    position: Position,
    exists: Array,
    g: Any,
) -> None:
    """Adds R cells' share of the gradients of taps and perception bias to the partial sums."""
    for f, d_part in enumerate(d_parts):
        add_rows(sums + g.perception_bias_at, f * g.block_p, d_part)

    def add_tap(k: Any, _: None) -> None:
        value = neighbours(state, k, sample, position, exists, g)
        if g.dense:
            row = k * g.block_c
            add_block(sums + g.taps_at, row, 0, g.block_p, outer(value, d_parts[0], g))
            return
        for f, d_part in enumerate(d_parts):
            add_rows(sums + g.taps_at, (k * g.filters + f) * g.block_c, value * d_part)

    if g.taps_grad:
        loop(g.kernel, add_tap)


# ---- the transpose, in two steps: within a tile, then from tile to tile ----


def keep_perception_gradient(
    d_parts: Sequence[Array], lane: Array, exists: Array, scratch: Memory, g: Any
) -> None:
    """The gradients of R lanes' perceptions to this program's scratch ``[T, F, BP]``."""
    for f, d_part in enumerate(d_parts):
        at = lane[:, None] * (g.filters * g.block_p) + f * g.block_p + across(g.block_p)
        scratch.store(at, d_part, exists[:, None])


def tile_transpose(
    place: Position, exists: Array, turns: Any, scratch: Memory, weights: Memory, g: Any
) -> Array:
    """What the tile's cells contribute to the state at places of its surroundings: [R, BC].

    Place ``r`` of an axis is cell ``r - before`` of the tile; tap ``k`` of the cell at ``r - k``
    reaches it. ``turns``: as many taps, or none if no cell of the tile is active.
    """

    def add_tap(k: Any, acc: Array) -> Array:
        z, y, x = (r - i for r, i in zip(place, kernel_position(k, g), strict=True))
        inside = exists & in_tile((z, y, x), g)
        lane = (z * g.tile_y + y) * g.tile_x + x
        inside = inside & ((scratch + g.active_at).load(lane, inside) != 0)
        for f in range(g.filters):
            at = lane[:, None] * (g.filters * g.block_p) + f * g.block_p + across(g.block_p)
            d_part = scratch.load(at, inside[:, None])
            if g.dense:
                acc = acc + dot_transposed(d_part, tap_block(weights, k, g), g)
            else:
                acc = acc + d_part * tap_row(weights, k, f, g)
        return acc

    return loop(turns, add_tap, zeros(g.rows, g.block_c))


def in_tile(position: Position, g: Any) -> Array:
    z, y, x = position
    inside = (z >= 0) & (y >= 0) & (x >= 0)
    return inside & (z < g.tile_z) & (y < g.tile_y) & (x < g.tile_x)


class _Axis(NamedTuple):
    """One axis of the grid, as it is cut into tiles."""

    size: int
    tiles: int
    tile: int
    places: int
    kernel: int
    before: int
    shares: int  # how many tiles' surroundings may hold one position
    edge: int  # cells that other tiles contribute to, ``low`` of them at a tile's beginning
    low: int

    def near_border(self, first: Any) -> Any:
        """Whether positions outside of the axis may show one of a tile's cells."""
        if self.kernel == 1:
            return first < 0
        return (first < self.kernel) | (first + self.tile > self.size - self.kernel)

    def from_edges(self, i: Array) -> Array:
        """A tile's cells: the ``edge`` first, ``low`` of them at its beginning, then the others."""
        end = jnp.where(i < self.low, i, self.tile - self.edge + i)
        return jnp.where(i < self.edge, end, self.low + i - self.edge)


def _axes(g: Any) -> list[_Axis]:
    names = ("tiles", "tile", "places", "kernel", "before", "shares", "edge", "low")
    return [
        _Axis(size, *(getattr(g, f"{name}_{axis}") for name in names))
        for axis, size in (("z", g.depth), ("y", g.height), ("x", g.width))
    ]


def overlaps(first: Position, g: Any) -> list[Any]:
    """How many turns of :func:`overlap` cells from ``first`` on need, on each axis.

    Positions outside the grid, images of cells, matter only to cells near its borders.
    """
    turns = []
    for a, at in zip(_axes(g), first, strict=True):
        few, many = jnp.int32(a.shares), jnp.int32(a.shares * a.kernel)
        turns.append(few if g.padding == "zeros" else lax.select(a.near_border(at), many, few))
    return turns


def edge_cells(first: Position, g: Any) -> tuple[Any, Any]:
    """How many of a tile's cells others may contribute to, and whether these are all of them.

    Near borders that show cells to cells, all; else those that other tiles reach.
    """
    if g.padding == "zeros":
        return g.edges, False
    near_z, near_y, near_x = (a.near_border(at) for a, at in zip(_axes(g), first, strict=True))
    everywhere = near_z | near_y | near_x
    return lax.select(everywhere, jnp.int32(g.tile), jnp.int32(g.edges)), everywhere


def edge_position(number: Array, everywhere: Any, g: Any) -> Position:
    """Where number n of a tile's cells is: those at an edge in z come first, then in y, then in x.

    Unless all are asked for, which come in their order.
    """
    axis_z, axis_y, axis_x = _axes(g)
    inner_z, inner_y = axis_z.tile - axis_z.edge, axis_y.tile - axis_y.edge
    size_z = axis_z.edge * g.tile_y * g.tile_x
    size_y = inner_z * axis_y.edge * g.tile_x
    z, y, x = lane = lane_position(number, g)
    # Of each part: cells of an axis in the order of from_edges.
    if size_y:
        in_y, (nz, ny, nx) = number >= size_z, unravel(number - size_z, axis_y.edge, g.tile_x)
        z, y = jnp.where(in_y, axis_z.edge + nz, z), jnp.where(in_y, ny, y)
        x = jnp.where(in_y, nx, x)
    if axis_x.edge and inner_y:
        n = number - size_z - size_y
        in_x, (nz, ny, nx) = n >= 0, unravel(n, inner_y, axis_x.edge)
        z, y = jnp.where(in_x, axis_z.edge + nz, z), jnp.where(in_x, axis_y.edge + ny, y)
        x = jnp.where(in_x, nx, x)
    position = axis_z.from_edges(z), axis_y.from_edges(y), axis_x.from_edges(x)
    if g.padding == "zeros":
        return position
    z, y, x = (jnp.where(everywhere, a, b) for a, b in zip(lane, position, strict=True))
    return z, y, x


def overlap(turn: Position, cell: Position, sample: Any, g: Any) -> tuple[Array, Array, Array]:
    """Which tile's surroundings, number ``turn`` on each axis, hold something for cells [R].

    Returns (tile, place in it, is there one that is not the cell's own).
    """
    tile: Any = sample
    place: Any = 0
    there: Any = True
    own: Any = True
    for a, s, j in zip(_axes(g), turn, cell, strict=True):
        nth, at, exists, is_own = _overlap_on_axis(s, j, a, g.padding)
        tile, place = tile * a.tiles + nth, place * a.places + at
        there, own = exists & there, is_own & own
    return tile, place, there & ~own


def _overlap_on_axis(s: Any, j: Array, a: _Axis, padding: str) -> tuple[Array, ...]:
    """See the Triton kernel's ``overlap``: (tile, place in it, does it exist, is it the own)."""
    image = div(s, a.shares)  # 0: the cell itself, 1 .. before: left of the grid, then right
    outside = jnp.where(image <= a.before, -image, a.size - 1 + image - a.before)
    position = jnp.where(image == 0, j, outside)
    shown, there = border(position, a.size, padding)
    nth = div(position + a.before, a.tile) - rem(s, a.shares)
    place = position + a.before - nth * a.tile
    exists = there & (shown == j) & (nth >= 0) & (nth * a.tile < a.size) & (place < a.places)
    return nth, place, exists, (position == j) & (nth == div(j, a.tile))
