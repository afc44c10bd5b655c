"""One call as primitives and backends see it: its static facts, and its arrays by name.

Every array has a leading group axis. A group is one independent call: ``jax.vmap`` turns its axis
into groups. ``G`` is the number of groups; the key and the weights may have a group axis of 1,
which all groups share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nca_kernels.perception import ConstantTaps
from nca_kernels.rule import Layer, Rule, compute_dtype


def three_axes(sizes: Sequence[int]) -> tuple[int, int, int]:
    """Sizes of spatial axes as (z, y, x); axes that are missing have size 1."""
    z, y, x = (1,) * (3 - len(sizes)) + tuple(sizes)
    return z, y, x


class Weights(NamedTuple):
    """What is learned about a step."""

    taps: Any  # [G or 1, *kernel, 1, F*C] or [G or 1, *kernel, C, P], None for update
    perception_bias: Any  # [G or 1, P] or None
    layers: tuple[Layer, ...]  # (W [G or 1, in, out], b [G or 1, out] or None)


class Operands(NamedTuple):
    """The arrays of a ``step`` or an ``update``, and what their shapes say."""

    state: Any  # [G, B, *S, C]
    fire: Any  # key data uint32 [G or 1, 2]; a mask bool [G or 1, B, *S]; None if all cells fire
    perception: Any  # [G, B, *S, P] of an update, None of a step
    inputs: Any  # [G, B, *S, I] or [G, B, I] or None
    weights: Weights

    @property
    def groups(self) -> int:
        return self.state.shape[0]

    @property
    def samples(self) -> int:
        """How many samples a group has."""
        return self.state.shape[1]

    @property
    def grid(self) -> tuple[int, ...]:
        """The sizes of the spatial axes."""
        return tuple(self.state.shape[2:-1])

    @property
    def channels(self) -> int:
        return self.state.shape[-1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sizes of the taps' spatial axes; () if the perception is given."""
        return () if self.weights.taps is None else tuple(self.weights.taps.shape[1:-2])

    @property
    def dense(self) -> bool:
        """Whether the taps connect all channels, ``[*kernel, C, P]``.

        Taps of a single channel, for which both layouts are the same, count as depthwise.
        """
        return self.weights.taps is not None and self.weights.taps.shape[-2] != 1

    @property
    def filters(self) -> int:
        """Depthwise filters of each channel; 1 if the taps are dense, 0 if there are none."""
        if self.weights.taps is None:
            return 0
        return 1 if self.dense else self.weights.taps.shape[-1] // self.channels

    @property
    def perception_size(self) -> int:
        """``P``, of taps or of the given perception."""
        source = self.perception if self.weights.taps is None else self.weights.taps
        return source.shape[-1]

    @property
    def given_size(self) -> int:
        """``P`` of the given perception, else 0."""
        return 0 if self.perception is None else self.perception.shape[-1]

    @property
    def input_size(self) -> int:
        return 0 if self.inputs is None else self.inputs.shape[-1]

    @property
    def inputs_per_cell(self) -> bool:
        """Whether there are inputs that differ from cell to cell, not just by sample."""
        return self.inputs is not None and self.inputs.ndim == self.state.ndim

    @property
    def hidden_widths(self) -> list[int]:
        return [weight.shape[-1] for weight, _ in self.weights.layers[:-1]]

    @property
    def weight_groups(self) -> int:
        """How many sets of weights there are: 1, or one for each group."""
        return max(array.shape[0] for array in jax.tree.leaves(self.weights))

    @property
    def fire_source(self) -> str:
        """What says which cells fire: "all" (they all do), a "key" or a "mask"."""
        if self.fire is None:
            return "all"
        return "mask" if self.fire.dtype == jnp.bool_ else "key"


class AttentionOperands(NamedTuple):
    """The arrays of one ``neighborhood_attention``, each ``[G, B, *S, heads, d]``.

    Groups share none of them.
    """

    query: Any
    key: Any
    value: Any


@dataclass(frozen=True)
class StepCall:
    """The static facts of one ``step`` or ``update``; see :class:`nca_kernels.primitive.Call`."""

    op: str  # "step" or "update"
    rule: Rule
    num_spatial_dims: int
    treedef: Any
    constant_taps: ConstantTaps = None

    def operands(self, arrays: Sequence[Any]) -> Operands:
        """The operands among the arrays or abstract values that a primitive has."""
        return jax.tree.unflatten(self.treedef, arrays[: self.treedef.num_leaves])

    @property
    def shared(self) -> tuple[bool, ...]:
        """For each operand, whether groups may share it: the key, a mask and the weights."""
        flags = self.operands([True] * self.treedef.num_leaves)
        alone = jax.tree.map(lambda _: False, (flags.state, flags.perception, flags.inputs))
        flags = flags._replace(state=alone[0], perception=alone[1], inputs=alone[2])
        return tuple(jax.tree.leaves(flags))

    def outputs(self, avals: Sequence[Any]) -> list[Any]:
        """The new state ``[G, B, *S, C]``, and with alive masking the mask ``[G, B, *S]``."""
        state = avals[0]
        if self.rule.alive is None:
            return [state]
        return [state, state.update(shape=state.shape[:-1], dtype=jnp.dtype(bool))]


@dataclass(frozen=True)
class AttentionCall:
    """The static facts of one attention; see :class:`nca_kernels.primitive.Call`."""

    op: str
    radius: int
    num_spatial_dims: int
    padding: str  # "zeros" or "circular"
    treedef: Any

    def operands(self, arrays: Sequence[Any]) -> AttentionOperands:
        """The operands among the arrays or abstract values that a primitive has."""
        return jax.tree.unflatten(self.treedef, arrays[: self.treedef.num_leaves])

    @property
    def shared(self) -> tuple[bool, ...]:
        return (False,) * self.treedef.num_leaves

    def outputs(self, avals: Sequence[Any]) -> list[Any]:
        """The value ``[G, B, *S, heads, d]`` and the log-sum-exp ``[G, B, *S, heads]``."""
        query = avals[0]
        lse = query.update(shape=query.shape[:-1], dtype=compute_dtype(query.dtype))
        return [query, lse]
