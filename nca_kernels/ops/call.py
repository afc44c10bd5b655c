"""What ``step`` and ``update`` share: one call as the primitives see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nca_kernels.fire_mask import fire_operand
from nca_kernels.perception import ConstantTaps
from nca_kernels.primitive import differentiable_op
from nca_kernels.rule import Operands, Rule

PER_GROUP = ("state", "perception", "inputs")


@dataclass(frozen=True)
class StepCall:
    """The static facts of one ``step`` or ``update``; see :class:`nca_kernels.primitive.Call`."""

    op: str  # "step" or "update"
    rule: Rule
    num_spatial_dims: int
    treedef: Any
    constant_taps: ConstantTaps = None

    @property
    def shared(self) -> tuple[bool, ...]:
        """True for the key and the weights."""
        flags = jax.tree.unflatten(self.treedef, [True] * self.treedef.num_leaves)
        own = {f: None if getattr(flags, f) is None else False for f in PER_GROUP}
        return tuple(jax.tree.leaves(flags._replace(**own)))

    def outputs(self, avals: Sequence[Any]) -> list[Any]:
        state = avals[0]
        if self.rule.alive is None:
            return [state]
        return [state, state.update(shape=state.shape[:-1], dtype=jnp.dtype(bool))]


BIND = {op: differentiable_op(op) for op in ("step", "update")}


def bind(
    op: str,
    backend: str,
    rule: Rule,
    state: Array,
    key: Any,
    num_spatial_dims: int,
    *,
    perception: Array | None = None,
    inputs: Array | None = None,
    taps: Array | None = None,
    perception_bias: Array | None = None,
    layers: Any,
    constant_taps: ConstantTaps = None,
) -> Array:
    """Brings the arrays into the primitives' form, one group of ``B`` samples, and binds."""
    batch_shape = state.shape[: state.ndim - num_spatial_dims - 1]
    samples = math.prod(batch_shape)
    if samples == 0:
        return state

    def grouped(array: Array | None) -> Array | None:  # [*batch, ...] to [1, B, ...]
        return (
            None if array is None else array.reshape(1, samples, *array.shape[len(batch_shape) :])
        )

    fire = fire_operand(key, rule.fire_rate, state.shape[:-1])
    if fire is not None:
        fire = grouped(fire) if fire.dtype == jnp.bool_ else fire[None]
    weights = jax.tree.map(
        lambda w: jnp.asarray(w)[None], (taps, perception_bias, tuple(map(tuple, layers)))
    )
    operands = Operands(grouped(state), fire, grouped(perception), grouped(inputs), *weights)
    treedef = jax.tree.structure(operands)
    call = StepCall(op, rule, num_spatial_dims, treedef, constant_taps)
    return BIND[op](call, backend, operands).reshape(state.shape)
