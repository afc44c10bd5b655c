"""``neighborhood_attention``: a kernel with a running softmax over the window."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas

from nca_kernels.backends.pallas import cells
from nca_kernels.backends.pallas.cells import block, indices, load_block
from nca_kernels.call import AttentionCall, AttentionOperands

WIDEST = 1024  # numbers of a head


def too_wide(operands: AttentionOperands) -> str | None:
    """Why a head's numbers do not fit a program, or None."""
    size = operands.query.shape[-1]
    return f"it takes heads of up to {WIDEST} numbers, got {size}" if size > WIDEST else None


def forward(
    call: AttentionCall, platform: str, operands: AttentionOperands, interpret: bool = False
) -> list[Array]:
    """``[out [G, B, *S, heads, d], log-sum-exp [G, B, *S, heads]]``."""
    *_, heads, size = shape = operands.query.shape
    grid = shape[2:-2]
    around = cells.Neighbourhoods(grid, (2 * call.radius + 1,) * len(grid), call.padding)
    flat = [array.reshape(-1, size) for array in operands]
    rows = max(16, min(128, 2**12 // block(size)))
    kernel = partial(attention_kernel, around=around, heads=heads, rows=rows)
    outputs = [flat[0], jax.ShapeDtypeStruct((flat[0].shape[0], 1), jnp.float32)]
    programs = -(-flat[0].shape[0] // rows)
    out, lse = cells.call_kernel(kernel, flat, outputs, programs, "nca_pallas_attention", interpret)
    return [out.reshape(shape), lse.reshape(shape[:-1])]


def attention_kernel(
    queries: Any, keys: Any, values: Any, out: Any, lse: Any, *,
    around: cells.Neighbourhoods, heads: int, rows: int,
) -> None:  # fmt: skip
    """The output and the log-sum-exp of the logits, for R rows; a row is a head of a cell.

    The positional arguments are references to memory: ``[cells * heads, d]``, and
    ``[cells * heads, 1]`` for ``lse``.
    """
    row = pallas.program_id(0) * rows + indices(rows)
    exists = row < queries.shape[0]
    cell, head = cells.divide(row, heads)
    column = indices(block(queries.shape[-1]))
    query = load_block(queries, (), row, exists, column) * queries.shape[-1] ** -0.5  # [R, d]

    def logits_of(row: Array, exists: Array) -> Array:
        return jnp.sum(query * load_block(keys, (), row, exists, column), axis=1)  # [R]

    def attend(position: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = carry
        neighbour, inside = around.neighbour(cell, position)
        other, inside = neighbour * heads + head, exists & inside
        logits = logits_of(other, inside)
        new = jnp.where(inside, jnp.maximum(highest, logits), highest)
        scale, weight = jnp.exp(highest - new), jnp.where(inside, jnp.exp(logits - new), 0.0)
        value = load_block(values, (), other, inside, column)
        return new, scale * total + weight, scale[:, None] * mixed + weight[:, None] * value

    # The cell itself is in its neighbourhood, so that its logit is a finite start for the maximum.
    start = logits_of(row, exists)
    carry = (start, jnp.zeros_like(start), jnp.zeros_like(query))
    highest, total, mixed = cells.loop(math.prod(around.window), attend, carry)
    cells.store_block(out, (), row, exists, mixed / total[:, None])
    cells.store_block(lse, (), row, exists, (highest + jnp.log(total))[:, None])
