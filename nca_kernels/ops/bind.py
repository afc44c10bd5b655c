"""What ``step`` and ``update`` share: their arrays in the form of the primitives."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nca_kernels.call import Operands, StepCall, Weights
from nca_kernels.fire_mask import fire_operand
from nca_kernels.primitive import differentiable_op

BIND = {op: differentiable_op(op) for op in ("step", "update")}


def bind(
    statics: StepCall,
    backend: str,
    state: Array,
    key: Any,
    weights: Weights,
    *,
    perception: Array | None = None,
    inputs: Array | None = None,
) -> Array:
    """Brings the arrays into the primitives' form, one group of ``B`` samples, and binds.

    ``statics``: the call, but for the structure of its operands.
    """
    batch_shape = state.shape[: state.ndim - statics.num_spatial_dims - 1]
    samples = math.prod(batch_shape)
    if samples == 0:
        return state

    def grouped(array: Array | None) -> Array | None:  # [*batch, ...] to [1, B, ...]
        if array is None:
            return None
        return array.reshape(1, samples, *array.shape[len(batch_shape) :])

    fire = fire_operand(key, statics.rule.fire_rate, state.shape[:-1])
    if fire is not None:
        fire = grouped(fire) if fire.dtype == jnp.bool_ else fire[None]
    layers = tuple(map(tuple, weights.layers))
    weights = jax.tree.map(lambda w: jnp.asarray(w)[None], weights._replace(layers=layers))
    operands = Operands(grouped(state), fire, grouped(perception), grouped(inputs), weights)
    call = replace(statics, treedef=jax.tree.structure(operands))
    return BIND[statics.op](call, backend, operands).reshape(state.shape)
