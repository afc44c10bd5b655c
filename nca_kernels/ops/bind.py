"""What ``step`` and ``update`` share: their arrays in the form of the primitives."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nca_kernels.call import Operands, StepCall, Weights
from nca_kernels.fire_mask import fire_operand
from nca_kernels.perception import ConstantTaps
from nca_kernels.primitive import differentiable_op
from nca_kernels.rule import Rule

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
    weights = Weights(taps, perception_bias, tuple(map(tuple, layers)))
    weights = jax.tree.map(lambda w: jnp.asarray(w)[None], weights)
    operands = Operands(grouped(state), fire, grouped(perception), grouped(inputs), weights)
    treedef = jax.tree.structure(operands)
    call = StepCall(op, rule, num_spatial_dims, treedef, constant_taps)
    return BIND[op](call, backend, operands).reshape(state.shape)
