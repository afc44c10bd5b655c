"""The MLP on rows of cells, forward and backward, for the cells that need it.

On a CPU the active cells are ranked, gathered a block at a time, and run through the products while
the block is in cache; the number of blocks follows the number of active cells. On a GPU all cells
go through at once: a loop of data-dependent length would wait for the host in every turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nca_kernels.rule import Rule, activation, dot

Layers = Sequence[tuple[Array, Array | None]]
BLOCK_ELEMENTS = 2**17  # of the widest layer: 512 KiB of float32, within an L2 cache


class Mlp(NamedTuple):
    """The layers of one group, and what is fixed about running them."""

    rule: Rule
    layers: Layers
    perception_size: int  # the columns of the rows that take the perception's activation
    platform: str

    def update(self, rows: Array, active: Array | None) -> Array:
        """The update ``[N, C]`` of the active cells, elsewhere 0.

        Args:
            rows: ``[N, P + I]``, the perception before its activation and the inputs.
            active: ``[N]`` bool, None for all cells.
        """
        block = self._block_size(rows.shape[0])
        if block is None:
            update = self._forward(rows)
            return update if active is None else jnp.where(active[:, None], update, 0)
        blocks = _Blocks.of(active, rows.shape[0], block)
        update, _ = blocks.run(lambda cells, _: (self._forward(_gather(rows, cells)), ()), ())
        return update

    def gradients(self, rows: Array, cotangent: Array, active: Array | None) -> tuple[Array, Any]:
        """Gradients for the rows ``[N, P + I]`` (0 where not active) and, summed, for the layers.

        ``cotangent`` is that of the update, ``[N, C]``; the other arguments as for ``update``.
        """
        transposed = [weight.T for weight, _ in self.layers]
        block = self._block_size(rows.shape[0])
        if block is None:
            if active is not None:
                cotangent = jnp.where(active[:, None], cotangent, 0)
            return self._backward(transposed, rows, cotangent)
        blocks = _Blocks.of(active, rows.shape[0], block)

        def backward(cells: Array, is_cell: Array) -> tuple[Array, Any]:
            d_update = jnp.where(is_cell[:, None], _gather(cotangent, cells), 0)
            return self._backward(transposed, _gather(rows, cells), d_update)

        zeros = jax.tree.map(jnp.zeros_like, [tuple(layer) for layer in self.layers])
        return blocks.run(backward, zeros)

    def _block_size(self, num_cells: int) -> int | None:
        """Rows in a block on this platform, or None for all of them at once."""
        if self.platform != "cpu":
            return None
        width = max(max(weight.shape) for weight, _ in self.layers)
        block = min(max(BLOCK_ELEMENTS // width, 64), 4096)
        return block if jax.export.is_symbolic_dim(num_cells) else min(block, num_cells)

    def _forward(self, rows: Array) -> Array:
        """``rows [R, P + I]`` to the update ``[R, C]``."""
        hidden = self._activate_perception(rows)
        for i, layer in enumerate(self.layers):
            hidden = self._affine(layer, hidden)
            if i < len(self.layers) - 1:
                hidden = activation(self.rule, self.rule.activation)(hidden)
        return hidden

    def _backward(
        self, transposed: Sequence[Array], rows: Array, cotangent: Array
    ) -> tuple[Array, list[tuple[Array, Array | None]]]:
        """Gradients for the rows ``[R, P + I]`` and the layers, recomputing the hidden layers.

        ``transposed``: the weights as ``[out, in]``, made once for all blocks.
        """
        hidden, pull = jax.vjp(self._activate_perception, rows)
        inputs, pulls = [], [pull]
        for layer in self.layers[:-1]:
            inputs.append(hidden)
            activate = activation(self.rule, self.rule.activation)
            hidden, pull = jax.vjp(activate, self._affine(layer, hidden))
            pulls.append(pull)
        inputs.append(hidden)
        grads: list[tuple[Array, Array | None]] = []
        for i in reversed(range(len(self.layers))):
            d_bias = None if self.layers[i][1] is None else jnp.sum(cotangent, axis=0)
            grads.append((self._weight_gradient(inputs[i], cotangent), d_bias))
            (cotangent,) = pulls[i](dot(cotangent, transposed[i], self.rule.precision))
        return cotangent, grads[::-1]

    def _weight_gradient(self, inputs: Array, cotangent: Array) -> Array:
        """``inputs.T @ cotangent``, the narrower operand on the left: XLA's CPU wants it there."""
        if inputs.shape[1] <= cotangent.shape[1]:
            return dot(inputs, cotangent, self.rule.precision, contract=(0, 0))
        return dot(cotangent, inputs, self.rule.precision, contract=(0, 0)).T

    def _affine(self, layer: tuple[Array, Array | None], rows: Array) -> Array:
        weight, bias = layer
        product = dot(rows, weight, self.rule.precision)
        return product if bias is None else product + bias[None]

    def _activate_perception(self, rows: Array) -> Array:
        size, name = self.perception_size, self.rule.perception_activation
        if name == "identity" or not size:
            return rows
        return jnp.concatenate(
            [activation(self.rule, name)(rows[:, :size]), rows[:, size:]], axis=1
        )


class _Blocks(NamedTuple):
    """The active cells in the order of their rank, a block at a time."""

    active: Array | None  # [N] bool; None: all cells
    cells: Array  # [slots]: the cells by rank; cell 0 fills the slots behind the active cells
    rank: Array | None  # [N], of each cell among the active ones
    num_active: Array | int
    num_cells: int
    size: int  # cells in a block

    @staticmethod
    def of(active: Array | None, num_cells: int, size: int) -> _Blocks:
        slots = -(-num_cells // size) * size
        cells = jnp.arange(num_cells, dtype=jnp.int32)
        if active is None:
            padded = jnp.pad(cells, (0, slots - num_cells))
            return _Blocks(None, padded, None, num_cells, num_cells, size)
        rank = jnp.cumsum(active, dtype=jnp.int32) - 1
        slot = jnp.where(active, rank, slots)
        by_rank = jnp.zeros(slots, jnp.int32).at[slot].set(cells, mode="drop")
        return _Blocks(active, by_rank, rank, rank[-1] + 1, num_cells, size)

    def run(self, body: Callable[[Array, Array], tuple[Array, Any]], zeros: Any) -> Any:
        """What ``body`` makes of each active cell, ``[N, ...]`` (elsewhere 0), and its totals.

        Args:
            body: ``(cells, is_cell) -> (rows, terms)``; all ``[size]`` or ``[size, ...]``.
                ``is_cell`` is False for what only fills the last block.
            zeros: what the sums of the ``terms`` start from.
        """
        example = jax.eval_shape(lambda: body(self.cells[: self.size], self.cells[: self.size] < 0))

        def turn(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            out, total = carry
            start = i * self.size
            cells = lax.dynamic_slice_in_dim(self.cells, start, self.size)
            is_cell = start + jnp.arange(self.size, dtype=jnp.int32) < self.num_active
            rows, terms = body(cells, is_cell)
            out = lax.dynamic_update_slice_in_dim(out, rows, start, axis=0)
            return out, jax.tree.map(jnp.add, total, terms)

        out = jnp.zeros((self.cells.shape[0], *example[0].shape[1:]), example[0].dtype)
        blocks = (self.num_active + (self.size - 1)) // self.size
        out, total = lax.fori_loop(0, blocks, turn, (out, zeros))
        if self.rank is None or self.active is None:
            return out[: self.num_cells], total
        # Back to cells as a gather, because XLA's scatters are serial on a CPU.
        rows = _gather(out, jnp.maximum(self.rank, 0))
        return jnp.where(self.active[:, None], rows, 0), total


def _gather(rows: Array, cells: Array) -> Array:
    return rows.at[cells].get(mode="promise_in_bounds")
