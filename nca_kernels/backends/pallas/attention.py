"""``neighborhood_attention``: a kernel with a running softmax over the window."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas

from nca_kernels.backends.pallas.grid import Neighbourhoods, three_axes
from nca_kernels.backends.pallas.memory import (
    block,
    call_kernel,
    divide,
    indices,
    load_block,
    loop,
    store_block,
)
from nca_kernels.call import AttentionCall, AttentionOperands

WIDEST = 1024  # numbers of a head: 16 of them fit a program


def forward(
    call: AttentionCall,
    platform: str,
    operands: AttentionOperands,
    interpret: bool = False,
    rows: int | None = None,
) -> list[Array]:
    """``[out [G, B, *S, heads, d], log-sum-exp [G, B, *S, heads]]``.

    ``rows``: heads of cells that a program works on, for tests.
    """
    *cells, heads, size = operands.query.shape
    around = Neighbourhoods(
        three_axes(cells[2:]), three_axes([2 * call.radius + 1] * len(cells[2:])), call.padding
    )
    flat = [array.reshape(-1, size) for array in operands]
    count, dtype = flat[0].shape[0], operands.query.dtype
    rows = rows or max(16, min(128, 2**12 // block(size)))
    out, lse = call_kernel(
        partial(attention_kernel, around=around, heads=heads, rows=rows),
        flat,
        [
            jax.ShapeDtypeStruct((count, size), dtype),
            jax.ShapeDtypeStruct((count, 1), jnp.float32),
        ],
        -(-count // rows),
        "nca_pallas_attention",
        interpret,
    )
    return [out.reshape(operands.query.shape), lse.reshape(operands.query.shape[:-1])]


def too_wide(operands: AttentionOperands) -> str | None:
    """Why a head's numbers do not fit a program, or None."""
    size = operands.query.shape[-1]
    return f"it takes heads of up to {WIDEST} numbers, got {size}" if size > WIDEST else None


def attention_kernel(
    queries: Any, keys: Any, values: Any, out: Any, lse: Any, *,
    around: Neighbourhoods, heads: int, rows: int,
) -> None:  # fmt: skip
    """The output and the log-sum-exp of the logits, for R rows, each a head of a cell.

    All arguments are references to memory, ``[cells * heads, d]``, ``lse`` ``[.., 1]``.
    """
    row = pallas.program_id(0) * rows + indices(rows)
    exists = row < queries.shape[0]
    cell, head = divide(row, heads)
    column = indices(block(queries.shape[-1]))
    query = load_block(queries, (), row, exists, column) * queries.shape[-1] ** -0.5  # [R, d]

    def logits_of(row: Array, exists: Array) -> Array:
        return jnp.sum(query * load_block(keys, (), row, exists, column), axis=1)  # [R]

    def attend(place: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = carry
        neighbour, inside = around.neighbour(cell, place)
        other, inside = neighbour * heads + head, exists & inside
        logits = logits_of(other, inside)
        new = jnp.where(inside, jnp.maximum(highest, logits), highest)
        kept, weight = jnp.exp(highest - new), jnp.where(inside, jnp.exp(logits - new), 0.0)
        value = load_block(values, (), other, inside, column)
        return new, kept * total + weight, kept[:, None] * mixed + weight[:, None] * value

    # A cell is its own neighbour: its logit is a finite start for the maximum.
    start = logits_of(row, exists)
    carry = (start, jnp.zeros_like(start), jnp.zeros_like(query))
    places = around.window[0] * around.window[1] * around.window[2]
    highest, total, mixed = loop(places, attend, carry)
    store_block(out, (), row, exists, mixed / total[:, None])
    store_block(lse, (), row, exists, (highest + jnp.log(total))[:, None])
