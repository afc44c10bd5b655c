"""Pieces of kernels that deal with the MLP; ``backends/triton/mlp.py`` explains their shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nca_kernels.backends.pallas.cells import across, down, loop, total
from nca_kernels.backends.pallas.launch import Memory
from nca_kernels.rule import ACTIVATIONS

PRECISIONS: dict[str, Any] = {
    "tf32": lax.DotAlgorithmPreset.TF32_TF32_F32,
    "tf32x3": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
    "ieee": lax.Precision.HIGHEST,
    "bfloat16": lax.Precision.DEFAULT,
}


class Rows(NamedTuple):
    """R cells on their way through the MLP, and the memory of their program."""

    parts: Sequence[Array]  # the stencil's filters, activated, [R, BP] each
    sources: tuple[Memory, Memory]  # the given perception and the inputs, [*, size] each
    row: tuple[Array, Array]  # where each cell is in them, [R]
    cell: Array  # the cell's own number, [R]
    exists: Array  # [R]
    weights: Memory
    scratch: Memory


class Sums(NamedTuple):
    """Where gradients are added up: of the weights by program, of the sources by cell."""

    weights: Memory
    sources: tuple[Memory, Memory]


def activate(x: Array, name: str) -> Array:
    return ACTIVATIONS[name](x)


def activate_backward(x: Array, d: Array, name: str) -> Array:
    """The gradient before the activation at ``x``, given that after it."""
    return jax.vjp(ACTIVATIONS[name], x)[1](d)[0]


# ---- products and blocks ----


def dot(a: Array, b: Array, g: Any, contract: tuple[int, int] = (1, 0)) -> Array:
    """``a @ b`` at the rule's precision, accumulated in float32; transposed by ``contract``."""
    if g.precision == "bfloat16":
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = PRECISIONS[g.precision]
    return lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def outer(x: Array, d: Array, g: Any) -> Array:
    """``x.T @ d``: the rows' share of a weight's gradient."""
    return dot(x, d, g, contract=(0, 0))


def dot_transposed(d: Array, w: Array, g: Any) -> Array:
    """``d @ w.T``."""
    return dot(d, w, g, contract=(1, 1))


def zeros(rows: int, columns: int) -> Array:
    return jnp.zeros((rows, columns), jnp.float32)


def block_at(row: Any, column: Any, stride: int, rows: int, columns: int) -> Array:
    """Where a block [rows, columns] of a row-major matrix, padded to whole blocks, lies."""
    return (row + down(rows)) * stride + (column + across(columns))


def add_block(memory: Memory, row: Any, column: Any, stride: int, value: Array) -> None:
    """Adds a block to this program's own partial sums in memory."""
    at = block_at(row, column, stride, *value.shape)
    memory.store(at, memory.load(at) + value)


def add_rows(memory: Memory, column: Any, values: Array) -> None:
    """Adds the rows [R, N] to N sums in memory."""
    add_block(memory, 0, column, 0, total(values, 0)[None, :])


# ---- the weights and what else is read a block at a time ----


def _bias(rows: Rows, layer: int, n: Any, size: int, g: Any) -> Array:
    """[1, size]."""
    return rows.weights.load(g.bias_at[layer] + n + across(size))


def _weight(rows: Rows, layer: int, k: Any, n: Any, g: Any) -> Array:
    """A block of a layer behind the first: [BH, BH], of the last one [BH, BC]."""
    size = g.block_h if layer < g.layers - 1 else g.block_c
    at = block_at(k, n, g.padded_widths[layer], g.block_h, size)
    return rows.weights.load(g.weight_at[layer] + at)


def _part_weight(rows: Rows, f: int, n: Any, size: int, g: Any) -> Array:
    """A block of the first layer, for a filter: [BP, size]."""
    at = block_at(f * g.block_p, n, g.padded_widths[0], g.block_p, size)
    return rows.weights.load(g.weight_at[0] + at)


def _source_weight(rows: Rows, s: int, k: Any, n: Any, size: int, g: Any) -> Array:
    """A block of the first layer, for columns of a source: [BS, size]."""
    at = block_at(k, n, g.padded_widths[0], g.block_s, size)
    return rows.weights.load(g.source_at[s] + at)


def _source_at(rows: Rows, row: Array, s: int, k: Any, g: Any) -> tuple[Array, Array]:
    """Where columns k .. k + BS of a source lie, and which exist: [R, BS]."""
    size, column = g.source_sizes[s], k + across(g.block_s)
    return row[:, None] * size + column, rows.exists[:, None] & (column < size)


def _source(rows: Rows, s: int, k: Any, g: Any) -> Array:
    """[R, BS]."""
    at, mask = _source_at(rows, rows.row[s], s, k, g)
    return rows.sources[s].load(at, mask).astype(jnp.float32)


def _kept(rows: Rows, at: int, width: int, n: Any, g: Any) -> tuple[Memory, Array]:
    """Where columns n .. n + BH of a hidden layer or its gradient lie in scratch."""
    return rows.scratch + at, block_at(0, n, width, g.rows, g.block_h)


# ---- forward ----


def _first_layer(rows: Rows, n: Any, size: int, g: Any) -> Array:
    """Outputs n .. n + size of the first layer before its activation: [R, size]."""
    z = zeros(g.rows, size) + _bias(rows, 0, n, size, g)
    for f, part in enumerate(rows.parts):
        z = z + dot(part, _part_weight(rows, f, n, size, g), g)
    for s in range(2):

        def add_source(i: Any, z: Array, s: int = s) -> Array:
            k = i * g.block_s
            return z + dot(_source(rows, s, k, g), _source_weight(rows, s, k, n, size, g), g)

        z = loop(g.padded_sources[s] // g.block_s, add_source, z)
    return z


def _hidden_layer(rows: Rows, layer: int, n: Any, g: Any) -> Array:
    """Outputs n .. n + BH of a hidden layer before its activation: [R, BH]."""
    if layer == 0:
        return _first_layer(rows, n, g.block_h, g)
    inputs = g.padded_widths[layer - 1]

    def add_inputs(i: Any, z: Array) -> Array:
        memory, at = _kept(rows, g.hidden_at[layer - 1], inputs, i * g.block_h, g)
        h = activate(memory.load(at), g.activation)
        return z + dot(h, _weight(rows, layer, i * g.block_h, n, g), g)

    z = zeros(g.rows, g.block_h) + _bias(rows, layer, n, g.block_h, g)
    return loop(inputs // g.block_h, add_inputs, z)


def _keep_hidden(rows: Rows, g: Any) -> None:
    """All hidden layers but the last, before their activation, to scratch."""
    if g.layers > 2:
        g.barrier()  # other threads may still read what the previous rows left there
    for layer in range(g.layers - 2):
        width = g.padded_widths[layer]

        def keep(i: Any, _: None, layer: int = layer, width: int = width) -> None:
            memory, at = _kept(rows, g.hidden_at[layer], width, i * g.block_h, g)
            memory.store(at, _hidden_layer(rows, layer, i * g.block_h, g))

        loop(width // g.block_h, keep)
        g.barrier()  # the next layer's threads read what these wrote


def mlp(rows: Rows, g: Any) -> Array:
    """The update of R cells: [R, BC]."""
    last = g.layers - 1
    if last == 0:
        return _first_layer(rows, 0, g.block_c, g)
    _keep_hidden(rows, g)

    def add_hidden(i: Any, u: Array) -> Array:
        n = i * g.block_h
        h = activate(_hidden_layer(rows, last - 1, n, g), g.activation)
        return u + dot(h, _weight(rows, last, n, 0, g), g)

    u = zeros(g.rows, g.block_c) + _bias(rows, last, 0, g.block_c, g)
    return loop(g.padded_widths[last - 1] // g.block_h, add_hidden, u)


# ---- backward ----


def mlp_backward(du: Array, rows: Rows, sums: Sums, g: Any) -> list[Array]:
    """From the gradient of the update, du [R, BC], to those of the parts, [R, BP] each.

    Adds what these rows mean to the gradients of weights and sources.
    """
    last = g.layers - 1
    d_parts = [zeros(g.rows, g.block_p) for _ in rows.parts]
    if last == 0:
        return _first_layer_backward(du, 0, d_parts, rows, sums, g)
    _keep_hidden(rows, g)
    if g.weight_grad:
        add_rows(sums.weights + g.bias_at[last], 0, du)

    def last_layer(i: Any, d_parts: list[Array]) -> list[Array]:
        n = i * g.block_h
        z = _hidden_layer(rows, last - 1, n, g)
        if g.weight_grad:
            dw = outer(activate(z, g.activation), du, g)
            add_block(sums.weights + g.weight_at[last], n, 0, g.block_c, dw)
        dh = dot_transposed(du, _weight(rows, last, n, 0, g), g)
        dz = activate_backward(z, dh, g.activation)
        return _hand_on(last - 1, dz, n, d_parts, rows, sums, g)

    d_parts = loop(g.padded_widths[last - 1] // g.block_h, last_layer, d_parts)
    for layer in range(last - 1, 0, -1):
        g.barrier()  # these threads read the gradients that others wrote
        d_parts = _hidden_layer_backward(layer, d_parts, rows, sums, g)
    return d_parts


def _hand_on(
    layer: int, dz: Array, n: Any, d_parts: list[Array], rows: Rows, sums: Sums, g: Any
) -> list[Array]:
    """Takes dz, the gradient of outputs n .. n + BH of a hidden layer, on to what is before it."""
    if layer == 0:
        return _first_layer_backward(dz, n, d_parts, rows, sums, g)
    memory, at = _kept(rows, g.gradient_at[layer], g.padded_widths[layer], n, g)
    memory.store(at, dz)
    if g.weight_grad:
        add_rows(sums.weights + g.bias_at[layer], n, dz)
    return d_parts


def _hidden_layer_backward(
    layer: int, d_parts: list[Array], rows: Rows, sums: Sums, g: Any
) -> list[Array]:
    """From the gradient of a hidden layer > 0, in scratch, to that of the one before it."""
    inputs, width = g.padded_widths[layer - 1], g.padded_widths[layer]

    def one(i: Any, d_parts: list[Array]) -> list[Array]:
        k = i * g.block_h
        memory, at = _kept(rows, g.hidden_at[layer - 1], inputs, k, g)
        z = memory.load(at)
        h = activate(z, g.activation)

        def add_outputs(j: Any, dh: Array) -> Array:
            n = j * g.block_h
            memory, at = _kept(rows, g.gradient_at[layer], width, n, g)
            d = memory.load(at)
            if g.weight_grad:
                add_block(sums.weights + g.weight_at[layer], k, n, width, outer(h, d, g))
            return dh + dot_transposed(d, _weight(rows, layer, k, n, g), g)

        dh = loop(width // g.block_h, add_outputs, zeros(g.rows, g.block_h))
        dz = activate_backward(z, dh, g.activation)
        return _hand_on(layer - 1, dz, k, d_parts, rows, sums, g)

    return loop(inputs // g.block_h, one, d_parts)


def _first_layer_backward(
    dz: Array, n: Any, d_parts: list[Array], rows: Rows, sums: Sums, g: Any
) -> list[Array]:
    """Adds what outputs n .. n + N of the first layer, dz [R, N], mean to parts and sources."""
    width, size = g.padded_widths[0], dz.shape[1]
    new = []
    for f, (part, d_part) in enumerate(zip(rows.parts, d_parts, strict=True)):
        w = _part_weight(rows, f, n, size, g)
        new.append(d_part + dot_transposed(dz, w, g))
        if g.weight_grad:
            dw = outer(part, dz, g)
            add_block(sums.weights + g.weight_at[0], f * g.block_p, n, width, dw)
    for s in range(2):
        _source_backward(s, dz, n, rows, sums, g)
    if g.weight_grad:
        add_rows(sums.weights + g.bias_at[0], n, dz)
    return new


def _source_backward(s: int, dz: Array, n: Any, rows: Rows, sums: Sums, g: Any) -> None:
    width, size = g.padded_widths[0], dz.shape[1]

    def one(i: Any, _: None) -> None:
        k = i * g.block_s
        if g.weight_grad:
            dw = outer(_source(rows, s, k, g), dz, g)
            add_block(sums.weights + g.source_at[s], k, n, width, dw)
        if g.source_grad[s]:
            dx = dot_transposed(dz, _source_weight(rows, s, k, n, size, g), g)
            at, mask = _source_at(rows, rows.cell, s, k, g)
            memory = sums.sources[s]
            memory.store(at, memory.load(at, mask) + dx, mask)

    loop(g.padded_sources[s] // g.block_s, one)
