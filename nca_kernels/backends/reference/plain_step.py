"""``step`` and ``update`` in ordinary JAX: slow, obvious, the oracle and the baseline."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nca_kernels.fire_mask import drawn
from nca_kernels.perception import same_margins
from nca_kernels.rule import (
    Rule,
    RuleParams,
    activation,
    compute_dtype,
    copies_cells,
    dot,
    lax_precision,
)

PAD_MODES = {
    "zeros": "constant",
    "circular": "wrap",
    "replicate": "edge",
    "reflect": "reflect",
}


def step(
    rule: Rule, params: RuleParams, state: Array, key: Any, inputs: Array | None = None
) -> tuple[Array, Array]:
    """One step: perception, then ``update``. ``state`` ``[*batch, *spatial, C]``."""
    num_spatial_dims = params.perception.ndim - 2
    perception = perceive(rule, params, state)
    return update(rule, params.layers, state, perception, key, inputs, num_spatial_dims)


def update(
    rule: Rule,
    layers: Any,
    state: Array,
    perception: Array,
    key: Any,
    inputs: Array | None,
    num_spatial_dims: int,
) -> tuple[Array, Array]:
    """MLP, stochastic residual update and alive mask; ``perception`` ``[*batch, *spatial, P]``.

    Returns the new state and the cells that are alive, bool ``[*batch, *spatial]``.
    """
    dtype = compute_dtype(state.dtype)
    hidden = perception.astype(dtype)
    if inputs is not None:
        if inputs.ndim < state.ndim:  # per sample: the same for every cell
            ones = (1,) * num_spatial_dims
            inputs = inputs.reshape(*inputs.shape[:-1], *ones, inputs.shape[-1])
        shape = (*hidden.shape[:-1], inputs.shape[-1])
        hidden = jnp.concatenate([hidden, jnp.broadcast_to(inputs, shape).astype(dtype)], -1)
    for i, (weight, bias) in enumerate(layers):
        hidden = dot(hidden, weight.astype(dtype), rule.precision)
        if bias is not None:
            hidden = hidden + bias.astype(dtype).reshape((1,) * (hidden.ndim - 1) + (-1,))
        if i < len(layers) - 1:
            hidden = activation(rule, rule.activation)(hidden)
    fires = drawn(key, rule.fire_rate, state.shape[:-1])
    step_size = rule.step_size
    if np.ndim(step_size):  # [*batch], the same for every cell and channel
        step_size = step_size.reshape(*step_size.shape, *(1,) * (num_spatial_dims + 1))
    change = jnp.where(fires[..., None], step_size * hidden, 0)
    new_state = (state.astype(dtype) + change).astype(state.dtype)
    if rule.alive is None:
        return new_state, jnp.ones(state.shape[:-1], bool)
    alive = is_alive(rule, state, num_spatial_dims) & is_alive(rule, new_state, num_spatial_dims)
    return jnp.where(alive[..., None], new_state, jnp.zeros_like(new_state)), alive


def perceive(rule: Rule, params: RuleParams, state: Array) -> Array:
    """``[*batch, *spatial, C]`` to the perception ``[*batch, *spatial, P]``."""
    taps = params.perception
    *kernel, fan_in, size = taps.shape
    num_spatial_dims = len(kernel)
    dtype = compute_dtype(state.dtype)
    batch, grid = state.shape[: -num_spatial_dims - 1], state.shape[-num_spatial_dims - 1 :]
    padded = pad(rule, state.reshape(-1, *grid).astype(dtype), same_margins(kernel))
    operand, taps = padded, taps.astype(dtype)
    if rule.precision == "bfloat16" and fan_in > 1:  # dense taps are a matrix product
        operand, taps = operand.astype(jnp.bfloat16), taps.astype(jnp.bfloat16)
    spatial = "DHW"[-num_spatial_dims:]
    perception = lax.conv_general_dilated(
        operand,
        taps,
        window_strides=(1,) * num_spatial_dims,
        padding="VALID",
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=grid[-1] // fan_in,
        precision=lax_precision(rule.precision),
        preferred_element_type=dtype,
    )
    if params.perception_bias is not None:
        bias = params.perception_bias.astype(dtype)
        perception = perception + bias.reshape((1,) * (perception.ndim - 1) + (-1,))
    perception = activation(rule, rule.perception_activation)(perception)
    return perception.reshape(*batch, *grid[:-1], size)


def pad(rule: Rule, array: Array, margins: list[tuple[int, int]]) -> Array:
    """Pads the spatial axes of ``[N, *spatial, C]`` by the rule's border."""
    return jnp.pad(array, [(0, 0), *margins, (0, 0)], mode=PAD_MODES[rule.padding])


def is_alive(rule: Rule, state: Array, num_spatial_dims: int) -> Array:
    """Whether the max-pool of the alive channel exceeds the threshold: bool ``[..., *S]``."""
    assert rule.alive is not None
    radius = rule.alive.radius
    channel = rule.alive.channel % state.shape[-1]
    alpha = state[..., channel : channel + 1].astype(compute_dtype(state.dtype))
    grid = alpha.shape[-num_spatial_dims - 1 :]
    flat = alpha.reshape(-1, *grid)
    padding = "SAME"
    if copies_cells(rule.padding):
        flat, padding = pad(rule, flat, [(radius, radius)] * num_spatial_dims), "VALID"
    window = (1, *(2 * radius + 1,) * num_spatial_dims, 1)
    pooled = lax.reduce_window(flat, -jnp.inf, lax.max, window, (1,) * len(window), padding)
    return (pooled > rule.alive.threshold).reshape(alpha.shape[:-1])
