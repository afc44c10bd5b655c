"""The kernels of ``neighborhood_attention``, as those in ``backends/triton``.

A row is one head of one cell; a program works on a block of rows and meets their neighbours one
offset of the window at a time.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas

from nca_kernels.backends.pallas.cells import (
    Position,
    across,
    along,
    border,
    cell_number,
    div,
    loop,
    rem,
    total,
    unravel,
)
from nca_kernels.backends.pallas.launch import Memory

Rows = tuple[Array, Array, Array, Position, Array]  # row, head, sample, position, exists: [R]


def _rows(g: Any) -> Rows:
    row = pallas.program_id(0) * g.rows + along(g.rows)
    exists = row < g.cells * g.heads
    cell = div(row, g.heads)
    z, y, x = unravel(cell, g.height, g.width)
    return row, rem(row, g.heads), div(z, g.depth), (rem(z, g.depth), y, x), exists


def _neighbour(o: Array, rows: Rows, g: Any) -> tuple[Array, Array]:
    """Row numbers of the neighbours at offset ``o`` of the window, and which are inside."""
    _, head, sample, position, inside = rows
    offset = unravel(o, g.window_y, g.window_x)
    sizes, windows = (g.depth, g.height, g.width), (g.window_z, g.window_y, g.window_x)
    cell = []
    for at, by, size, window in zip(position, offset, sizes, windows, strict=True):
        i, there = border(at + by - window // 2, size, g.padding)
        cell.append(i)
        inside = inside & there
    z, y, x = cell
    return cell_number(sample, (z, y, x), g) * g.heads + head, inside


def _at(row: Array, exists: Array, g: Any) -> tuple[Array, Array]:
    column = across(g.block_d)
    return row[:, None] * g.head_size + column, exists[:, None] & (column < g.head_size)


def _load(memory: Memory, row: Array, exists: Array, g: Any) -> Array:
    """Vectors of rows, [R, BD] float32; 0 where there is none."""
    return memory.load(*_at(row, exists, g)).astype(jnp.float32)


def _store(memory: Memory, row: Array, exists: Array, value: Array, g: Any) -> None:
    at, mask = _at(row, exists, g)
    memory.store(at, value, mask)


def _weights(logits: Array, less: Array, inside: Array) -> Array:
    return jnp.where(inside, jnp.exp(logits - less), 0.0)


def attention_forward(
    query_: Memory, key_: Memory, value_: Memory, out: Memory, lse: Memory, g: Any
) -> None:
    """The output ``[cells, heads, d]`` and the log-sum-exp ``[cells, heads]`` of the logits."""
    rows = _rows(g)
    row, exists = rows[0], rows[-1]
    query = _load(query_, row, exists, g) * g.scale
    start = total(query * _load(key_, row, exists, g), 1)

    def attend(o: Array, carry: tuple) -> tuple:
        highest, sums, mixed = carry
        other, inside = _neighbour(o, rows, g)
        logits = total(query * _load(key_, other, inside, g), 1)
        new = jnp.where(inside, jnp.maximum(highest, logits), highest)
        kept, weight = jnp.exp(highest - new), _weights(logits, new, inside)
        value = _load(value_, other, inside, g)
        return new, kept * sums + weight, kept[:, None] * mixed + weight[:, None] * value

    highest, sums, mixed = loop(
        g.window, attend, (start, jnp.zeros_like(start), jnp.zeros_like(query))
    )
    sums = jnp.where(exists, sums, 1.0)
    _store(out, row, exists, mixed / sums[:, None], g)
    lse.store(row, highest + jnp.log(sums), exists)


def attention_backward_query(
    query_: Memory,
    key_: Memory,
    value_: Memory,
    lse_: Memory,
    cotangent: Memory,
    d_query: Memory,
    delta_: Memory,
    g: Any,
) -> None:
    """The queries' gradient, and each row's ``delta``, the cotangent times the output."""
    rows = _rows(g)
    row, exists = rows[0], rows[-1]
    query = _load(query_, row, exists, g) * g.scale
    given, lse = _load(cotangent, row, exists, g), lse_.load(row, exists)

    def add(o: Array, carry: tuple) -> tuple:
        delta, with_value, without = carry
        other, inside = _neighbour(o, rows, g)
        key = _load(key_, other, inside, g)
        weight = _weights(total(query * key, 1), lse, inside)
        share = weight * total(given * _load(value_, other, inside, g), 1)
        return delta + share, with_value + share[:, None] * key, without + weight[:, None] * key

    zeros = jnp.zeros_like(query)
    delta, with_value, without = loop(g.window, add, (jnp.zeros_like(lse), zeros, zeros))
    _store(d_query, row, exists, g.scale * (with_value - delta[:, None] * without), g)
    delta_.store(row, delta, exists)


def attention_backward_key_value(
    query_: Memory,
    key_: Memory,
    value_: Memory,
    lse_: Memory,
    cotangent: Memory,
    delta_: Memory,
    d_key_: Memory,
    d_value_: Memory,
    g: Any,
) -> None:
    """The gradients of keys and values: a cell's neighbours are also those that attend to it."""
    rows = _rows(g)
    row, exists = rows[0], rows[-1]
    key, value = _load(key_, row, exists, g), _load(value_, row, exists, g)

    def add(o: Array, carry: tuple) -> tuple:
        d_key, d_value = carry
        other, inside = _neighbour(o, rows, g)
        query = _load(query_, other, inside, g) * g.scale
        given = _load(cotangent, other, inside, g)
        weight = _weights(total(query * key, 1), lse_.load(other, inside), inside)
        d_logit = weight * (total(given * value, 1) - delta_.load(other, inside))
        return d_key + d_logit[:, None] * query, d_value + weight[:, None] * given

    d_key, d_value = loop(g.window, add, (jnp.zeros_like(key), jnp.zeros_like(value)))
    _store(d_key_, row, exists, d_key, g)
    _store(d_value_, row, exists, d_value, g)
