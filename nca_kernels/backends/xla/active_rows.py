"""The MLP on rows of cells, forward and backward, for the cells that need it.

With a ``block``, the active cells are ranked, gathered a block at a time and run through the
products while the block is in cache; the number of blocks follows the number of active cells.
Without, all cells go through at once: on a GPU a loop of data-dependent length would wait for the
host in every turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nca_kernels.rule import Rule, activation, dot

Layers = Sequence[tuple[Array, Array | None]]
BLOCK_ELEMENTS = 2**17  # of the widest layer: 512 KiB of float32, within an L2 cache


def mlp(rule: Rule, layers: Layers, rows: Array, perception_size: int) -> Array:
    """``rows [R, P + I]`` (perception before its activation, inputs) to the update ``[R, C]``."""
    hidden = _activate_perception(rule, rows, perception_size)
    for i, layer in enumerate(layers):
        hidden = _affine(rule, layer, hidden)
        if i < len(layers) - 1:
            hidden = activation(rule, rule.activation)(hidden)
    return hidden


def mlp_backward(
    rule: Rule,
    layers: Layers,
    transposed: Sequence[Array],
    rows: Array,
    cotangent: Array,
    perception_size: int,
) -> tuple[Array, list[tuple[Array, Array | None]]]:
    """Gradients for the rows ``[R, P + I]`` and the layers, recomputing the hidden layers.

    ``transposed``: the weights as ``[out, in]``, made once for all blocks.
    """
    hidden, pull = jax.vjp(lambda r: _activate_perception(rule, r, perception_size), rows)
    inputs, pulls = [], [pull]
    for layer in layers[:-1]:
        inputs.append(hidden)
        hidden, pull = jax.vjp(activation(rule, rule.activation), _affine(rule, layer, hidden))
        pulls.append(pull)
    inputs.append(hidden)
    grads: list[tuple[Array, Array | None]] = []
    for i in reversed(range(len(layers))):
        d_bias = None if layers[i][1] is None else jnp.sum(cotangent, axis=0)
        grads.append((_weight_gradient(rule, inputs[i], cotangent), d_bias))
        (cotangent,) = pulls[i](dot(cotangent, transposed[i], rule.precision))
    return cotangent, grads[::-1]


def _weight_gradient(rule: Rule, inputs: Array, cotangent: Array) -> Array:
    """``inputs.T @ cotangent``, with the narrower one on the left: XLA's CPU products want it."""
    if inputs.shape[1] <= cotangent.shape[1]:
        return dot(inputs, cotangent, rule.precision, contract=(0, 0))
    return dot(cotangent, inputs, rule.precision, contract=(0, 0)).T


def _affine(rule: Rule, layer: tuple[Array, Array | None], rows: Array) -> Array:
    weight, bias = layer
    product = dot(rows, weight, rule.precision)
    return product if bias is None else product + bias[None]


def _activate_perception(rule: Rule, rows: Array, size: int) -> Array:
    if rule.perception_activation == "identity" or not size:
        return rows
    perception, inputs = rows[:, :size], rows[:, size:]
    return jnp.concatenate(
        [activation(rule, rule.perception_activation)(perception), inputs], axis=1
    )


def map_active(
    rule: Rule, layers: Layers, rows: Array, active: Array | None, size: int, platform: str
) -> Array:
    """The update ``[N, C]`` of the active cells (``[N]`` bool, None for all), elsewhere 0."""
    block = _block_size(platform, layers, rows.shape[0])
    if block is None:
        update = mlp(rule, layers, rows, size)
        return update if active is None else jnp.where(active[:, None], update, 0)
    order, rank, count, slots = _compact(active, rows.shape[0], block)

    def body(i: Array, out: Array) -> Array:
        update = mlp(rule, layers, _gather(rows, _block(order, i, block)), size)
        return lax.dynamic_update_slice_in_dim(out, update, i * block, axis=0)

    out = jnp.zeros((slots, layers[-1][0].shape[1]), rows.dtype)
    out = lax.fori_loop(0, _num_blocks(count, block), body, out)
    return _scatter_back(out, rank, active, rows.shape[0])


def map_active_backward(
    rule: Rule,
    layers: Layers,
    rows: Array,
    cotangent: Array,
    active: Array | None,
    size: int,
    platform: str,
) -> tuple[Array, Any]:
    """Gradients for the rows ``[N, P + I]`` (0 where not active) and, summed, for the layers."""
    transposed = [weight.T for weight, _ in layers]
    block = _block_size(platform, layers, rows.shape[0])
    if block is None:
        if active is not None:
            cotangent = jnp.where(active[:, None], cotangent, 0)
        return mlp_backward(rule, layers, transposed, rows, cotangent, size)
    order, rank, count, slots = _compact(active, rows.shape[0], block)

    def body(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        out, total = carry
        cells = _block(order, i, block)
        inside = i * block + jnp.arange(block, dtype=jnp.int32) < count  # the last block's rest
        d_update = jnp.where(inside[:, None], _gather(cotangent, cells), 0)
        d_rows, grads = mlp_backward(rule, layers, transposed, _gather(rows, cells), d_update, size)
        out = lax.dynamic_update_slice_in_dim(out, d_rows, i * block, axis=0)
        return out, jax.tree.map(jnp.add, total, grads)

    zeros = jax.tree.map(jnp.zeros_like, [tuple(layer) for layer in layers])
    out = jnp.zeros((slots, rows.shape[1]), rows.dtype)
    out, total = lax.fori_loop(0, _num_blocks(count, block), body, (out, zeros))
    return _scatter_back(out, rank, active, rows.shape[0]), total


def _block_size(platform: str, layers: Layers, num_cells: int) -> int | None:
    """Rows a block on this platform, or None for all at once."""
    if platform != "cpu":
        return None
    width = max(max(weight.shape) for weight, _ in layers)
    block = min(max(BLOCK_ELEMENTS // width, 64), 4096)
    return block if jax.export.is_symbolic_dim(num_cells) else min(block, num_cells)


def _compact(
    active: Array | None, num_cells: int, block: int
) -> tuple[Array, Array | None, Array | int, int]:
    """(cells in the order of their rank, rank of each cell, how many, slots rounded to blocks)."""
    slots = -(-num_cells // block) * block
    cells = jnp.arange(num_cells, dtype=jnp.int32)
    if active is None:
        return jnp.pad(cells, (0, slots - num_cells)), None, num_cells, slots
    rank = jnp.cumsum(active, dtype=jnp.int32) - 1
    order = jnp.zeros(slots, jnp.int32)
    order = order.at[jnp.where(active, rank, slots)].set(cells, mode="drop", unique_indices=False)
    return order, rank, rank[-1] + 1, slots


def _num_blocks(count: Array | int, block: int) -> Array | int:
    return (count + (block - 1)) // block


def _block(order: Array, i: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(order, i * block, block)


def _gather(rows: Array, cells: Array) -> Array:
    return rows.at[cells].get(mode="promise_in_bounds")


def _scatter_back(out: Array, rank: Array | None, active: Array | None, num_cells: int) -> Array:
    """From slots back to cells; as a gather, because XLA's scatters are serial on a CPU."""
    if rank is None or active is None:
        return out[:num_cells]
    return jnp.where(active[:, None], _gather(out, jnp.maximum(rank, 0)), 0)
