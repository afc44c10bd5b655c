"""The weights as kernels want them: one flat float32 array of blocks, padded with zeros.

:meth:`PackedWeights.sections` is the one description of what lies where. Kernels take offsets from
it, :func:`pack` fills the array by it, and :func:`unpack` is the transpose of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nca_kernels.backends.triton.geometry import block
from nca_kernels.call import Operands, Weights

SOURCES = ("given perception", "inputs")  # what the first layer sees beside the stencil's filters
MANTISSA = {"tf32": 10, "bfloat16": 7}  # bits that operands of products keep


@dataclass(frozen=True)
class Perception:
    """The stencil's filters, and how they go through products.

    Args:
        positions: of the stencil; 0 if the perception is given.
        filters: for each channel; 1 if dense, 0 if the perception is given.
        dense: whether taps connect all channels.
        block_p: columns of a filter.
        side_by_side: whether all filters go through products as one block.
        bias: whether there is one.
        taps: ``[positions * filters]``, the same for all channels, if they are constant, else ().
    """

    positions: int
    filters: int
    dense: bool
    block_p: int
    side_by_side: bool
    bias: bool
    taps: tuple[float, ...]

    @property
    def constant(self) -> bool:
        """Whether kernels are compiled for the values of taps."""
        return bool(self.taps)

    @cached_property
    def used(self) -> tuple[bool, ...]:
        """At which positions any constant tap is not zero."""
        return tuple(map(any, np.reshape(self.taps, (-1, self.filters)))) if self.taps else ()

    @property
    def columns(self) -> int:
        """Of all filters."""
        return self.filters * self.block_p

    @property
    def parts(self) -> int:
        """Blocks that go through products."""
        return 1 if self.side_by_side else self.filters

    @property
    def part(self) -> int:
        """Columns of such a block."""
        return block(self.columns) if self.side_by_side else self.block_p

    @property
    def ones(self) -> bool:
        """Whether a part has columns of ones, whose weights are the bias."""
        return self.side_by_side and self.part > self.columns

    @property
    def doublings(self) -> int:
        """How often blocks are put side by side, two by two, until they are the part."""
        return (self.part // self.block_p).bit_length() - 1


@dataclass(frozen=True)
class MLP:
    """The layers behind the perception; the last one gives the update.

    Args:
        widths: outputs of each layer, in whole blocks.
        block_h: hidden units at a time.
        source_sizes: numbers of a given perception and of inputs, which the first layer sees, too.
        block_s: of those at a time.
        inputs_per_cell: whether inputs differ from cell to cell and not only by sample.
    """

    widths: tuple[int, ...]
    block_h: int
    source_sizes: tuple[int, int]
    block_s: int
    inputs_per_cell: bool

    @property
    def layers(self) -> int:
        return len(self.widths)

    @property
    def one_block(self) -> bool:
        """Whether all is one block of hidden units, without sources."""
        return self.layers == 2 and self.widths[0] == self.block_h and not any(self.source_sizes)

    @property
    def padded_sources(self) -> tuple[int, int]:
        perceived, inputs = (-(-size // self.block_s) * self.block_s for size in self.source_sizes)
        return perceived, inputs


class Section(NamedTuple):
    """A part of the packed weights.

    Args:
        name: of the part.
        shape: in the packed array, of each group.
        fill: the group's numbers ``[G, ...]``, which are padded with zeros to the shape; None for
            zeros alone. Linear in the weights.
    """

    name: str
    shape: tuple[int, ...]
    fill: Callable[[Weights], Array | None]


@dataclass(frozen=True)
class PackedWeights:
    """What lies where in a group's packed weights; offsets and the size are in numbers."""

    perception: Perception
    mlp: MLP

    def sections(self) -> list[Section]:
        """All parts in their order.

        A perception that goes through products as one block with columns of ones has its bias in
        the rows that those meet: the bias as products round it, then what that took off.
        """
        perception, widths = self.perception, self.mlp.widths
        filters, block_p, width = perception.filters, perception.block_p, widths[0]
        bias = Section("bias 0", (width,), partial(_layer, 0, 1))
        sections = []
        if filters:
            inputs = widths[-1] if perception.dense else 1
            sections = [
                Section("taps", (perception.positions, inputs, filters, block_p), self._taps),
                Section("perception bias", (filters, block_p), self._perception_bias),
                Section("weight 0", (filters, block_p, width), self._filter_rows),
            ]
        if perception.ones:
            rest = perception.part - perception.columns - 1
            sections += [bias, Section("rest of bias 0", (rest, width), lambda weights: None)]
        for source, name in enumerate(SOURCES):
            shape = self.mlp.padded_sources[source], width
            sections.append(Section(name, shape, partial(self._source_rows, source)))
        if not perception.ones:
            sections.append(bias)
        for i, shape in enumerate(pairwise(widths), start=1):
            sections.append(Section(f"weight {i}", shape, partial(_layer, i, 0)))
            sections.append(Section(f"bias {i}", shape[1:], partial(_layer, i, 1)))
        return sections

    @cached_property
    def _offsets(self) -> dict[str, int]:
        sections = self.sections()
        names = (section.name for section in sections)
        sizes = (math.prod(section.shape) for section in sections)
        return dict(zip((*names, "end"), accumulate(sizes, initial=0), strict=True))

    @property
    def taps_at(self) -> int:
        return self._offsets.get("taps", 0)

    @property
    def perception_bias_at(self) -> int:
        return self._offsets.get("perception bias", 0)

    @property
    def weight_at(self) -> tuple[int, ...]:
        """Where each layer's matrix lies."""
        return tuple(self._offsets.get(f"weight {i}", 0) for i in range(self.mlp.layers))

    @property
    def bias_at(self) -> tuple[int, ...]:
        """Where each layer's bias lies."""
        return tuple(self._offsets[f"bias {i}"] for i in range(self.mlp.layers))

    @property
    def source_at(self) -> tuple[int, ...]:
        """Where the first matrix's rows of each source lie."""
        return tuple(self._offsets[name] for name in SOURCES)

    @property
    def size(self) -> int:
        return self._offsets["end"]

    def _taps(self, weights: Weights) -> Array:
        groups, *_, inputs, outputs = weights.taps.shape
        taps = weights.taps.reshape(groups, self.perception.positions, inputs, outputs)
        return self._by_filter(taps, 3)

    def _perception_bias(self, weights: Weights) -> Array | None:
        bias = weights.perception_bias
        return None if bias is None else self._by_filter(bias, 1)

    def _filter_rows(self, weights: Weights) -> Array:
        weight = weights.layers[0][0]
        return self._by_filter(weight[:, : weight.shape[1] - sum(self.mlp.source_sizes)], 1)

    def _source_rows(self, source: int, weights: Weights) -> Array:
        weight, sizes = weights.layers[0][0], self.mlp.source_sizes
        first = weight.shape[1] - sum(sizes[source:])
        return weight[:, first : first + sizes[source]]

    def _by_filter(self, array: Array, axis: int) -> Array:
        """A perception's axis as two, of filters and of numbers; if depthwise it is ``c*F + f``."""
        filters = self.perception.filters
        before, size, after = array.shape[:axis], array.shape[axis], array.shape[axis + 1 :]
        array = array.reshape(*before, size // filters, filters, *after)
        return jnp.swapaxes(array, axis, axis + 1)


def _layer(i: int, which: int, weights: Weights) -> Array | None:
    """Layer ``i``'s matrix (0) or bias (1)."""
    return weights.layers[i][which]


def pack(operands: Operands, packed: PackedWeights, precision: str) -> Array:
    """``[G or 1, size]``, for products of this precision, see :class:`.StepConfiguration`."""
    groups = operands.weight_groups
    taps, perception_bias, layers = jax.tree.map(
        lambda w: jnp.broadcast_to(w, (groups, *w.shape[1:])).astype(jnp.float32),
        operands.weights,
    )
    if precision == "tf32":  # to the nearest: products would cut off what they have more
        taps = _rounded(taps, precision) if packed.perception.dense else taps
        layers = tuple((_rounded(weight, precision), bias) for weight, bias in layers)
    array = _filled(packed, Weights(taps, perception_bias, layers))
    bias = layers[0][1]
    if not packed.perception.ones or bias is None or precision not in MANTISSA:
        return array
    bias = _padded(bias, (groups, packed.mlp.widths[0]))
    whole = _rounded(bias, precision)
    rest = jnp.where(jnp.isfinite(whole), bias - whole, 0.0)
    both = jnp.concatenate([whole, rest], axis=1)
    return jax.lax.dynamic_update_slice(array, both, (0, packed.bias_at[0]))


def unpack(array: Array, operands: Operands, packed: PackedWeights) -> Weights:
    """Gradients ``[G, size]`` as those of the operands: the transpose of :func:`pack`."""
    groups = array.shape[0]
    shapes = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct((groups, *w.shape[1:]), jnp.float32), operands.weights
    )
    (grads,) = jax.linear_transpose(partial(_filled, packed), shapes)(array)
    return jax.tree.map(lambda d, w: d.astype(w.dtype), grads, operands.weights)


def _filled(packed: PackedWeights, weights: Weights) -> Array:
    groups = weights.layers[0][0].shape[0]
    arrays = []
    for section in packed.sections():
        numbers, shape = section.fill(weights), (groups, *section.shape)
        array = jnp.zeros(shape, jnp.float32) if numbers is None else _padded(numbers, shape)
        arrays.append(array.reshape(groups, -1))
    return jnp.concatenate(arrays, axis=1)


def _padded(array: Array, shape: tuple[int, ...]) -> Array:
    """``array`` with zeros behind it on each axis."""
    config = [(0, size - n, 0) for n, size in zip(array.shape, shape, strict=True)]
    return jax.lax.pad(array, jnp.zeros((), array.dtype), config)


def _rounded(array: Array, precision: str) -> Array:
    return jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=MANTISSA[precision])
