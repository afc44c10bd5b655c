"""What ``step`` and ``update`` share: their arrays in the form of the primitives."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nca_kernels.call import Operands, StepCall, Weights
from nca_kernels.fire_mask import drawn, fire_operand
from nca_kernels.primitive import differentiable_op
from nca_kernels.rule import Controls, Layer

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
    controls: Controls = Controls(),  # noqa: B008
    return_alive: bool = False,
) -> Any:
    """Brings the arrays into the primitives' form and binds: the next state, maybe who is alive.

    The batch is one group of ``B`` samples, or ``B`` groups if each has its step size.

    Args:
        statics: the call, but for the structure of its operands.
    """
    batch_shape = state.shape[: state.ndim - statics.num_spatial_dims - 1]
    samples = math.prod(batch_shape)
    if samples == 0:
        return (state, jnp.zeros(state.shape[:-1], bool)) if return_alive else state
    groups = samples if np.ndim(controls.step_size) else 1

    def grouped(array: Array | None) -> Array | None:  # [*batch, ...] to [G, B / G, ...]
        if array is None:
            return None
        return array.reshape(groups, samples // groups, *array.shape[len(batch_shape) :])

    if controls.fire_rate is not None or groups > 1:
        rate = statics.rule.fire_rate if controls.fire_rate is None else controls.fire_rate
        key = drawn(key, rate, state.shape[:-1])
    fire = fire_operand(key, statics.rule.fire_rate, state.shape[:-1])
    if fire is not None:
        fire = grouped(fire) if fire.dtype == jnp.bool_ else fire[None]
    layers = tuple(map(tuple, weights.layers))
    weights = jax.tree.map(lambda w: jnp.asarray(w)[None], weights._replace(layers=layers))
    if controls.step_size is not None:
        scaled = _scaled(weights.layers[-1], controls.step_size)
        weights = weights._replace(layers=(*weights.layers[:-1], scaled))
    operands = Operands(grouped(state), fire, grouped(perception), grouped(inputs), weights)
    call = replace(statics, treedef=jax.tree.structure(operands))
    new, *mask = BIND[statics.op](call, backend, operands)
    new = new.reshape(state.shape)
    if not return_alive:
        return new
    return new, mask[0].reshape(state.shape[:-1]) if mask else jnp.ones(state.shape[:-1], bool)


def _scaled(layer: Layer, step_size: Any) -> Layer:
    """The last layer ``[1, ...]`` times a step size, a scalar or one for each group ``[G]``."""
    size = jnp.reshape(step_size, (-1, 1, 1))
    weight, bias = layer
    weight = (weight * size).astype(weight.dtype)
    return weight, None if bias is None else (bias * size[:, 0]).astype(bias.dtype)
