"""``step`` and ``update`` as calls of the native kernels: their arrays and attributes.

``src/handlers.cpp`` reads the arrays in the same order. Weights and inputs are float32 there. An
empty array stands for an operand that is absent, or for a gradient that is not wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nca_kernels.backends.cpu import library
from nca_kernels.call import Operands, StepCall, three_axes
from nca_kernels.fire_mask import threshold


def forward(call: StepCall, platform: str, operands: Operands) -> list[Array]:
    """``[new state [G, B, *S, C]]``, and with alive masking the mask ``[G, B, *S]``."""
    library.load()
    state = operands.state
    results = [jax.ShapeDtypeStruct(state.shape, state.dtype)]
    if call.rule.alive is not None:
        results.append(jax.ShapeDtypeStruct(state.shape[:-1], jnp.bool_))
    run = jax.ffi.ffi_call(library.target("step_forward"), results)
    return list(run(*_arrays(operands), **_attributes(call, operands)))


def backward(
    call: StepCall,
    platform: str,
    operands: Operands,
    saved: Sequence[Array],
    cotangent: Array,
    wrt: tuple[bool, ...],
) -> list[Array]:
    """The gradients ``[G, ...]`` of the operands whose flag in ``wrt`` is True."""
    library.load()
    groups = operands.state.shape[0]
    wanted = jax.tree.unflatten(jax.tree.structure(operands), wrt)

    def result(operand: Any, flag: Any, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        shape = (groups, *operand.shape[1:]) if flag is True else (0,)
        return jax.ShapeDtypeStruct(shape, dtype)

    # In the order of the operands, without `fire`, which has no gradient.
    pairs = [
        (operands.perception, wanted.perception),
        (operands.inputs, wanted.inputs),
        (operands.weights.taps, wanted.weights.taps),
        (operands.weights.perception_bias, wanted.weights.perception_bias),
        *(
            pair
            for layers in zip(operands.weights.layers, wanted.weights.layers, strict=True)
            for pair in zip(*layers, strict=True)
        ),
    ]
    results = [result(operands.state, wanted.state, operands.state.dtype)]
    results += [result(operand, flag) for operand, flag in pairs]
    alive = saved[0] if saved else jnp.zeros((0,), jnp.bool_)
    run = jax.ffi.ffi_call(library.target("step_backward"), results)
    out = run(*_arrays(operands), alive, cotangent, **_attributes(call, operands))
    pairs = [(operands.state, wanted.state), *pairs]
    return [
        grad.astype(operand.dtype)
        for grad, (operand, flag) in zip(out, pairs, strict=True)
        if flag is True
    ]


def _arrays(operands: Operands) -> list[Array]:
    nothing = jnp.zeros((0,), jnp.float32)

    def float32(array: Any) -> Array:
        return nothing if array is None else array.astype(jnp.float32)

    taps, perception_bias, layers = operands.weights
    rest = (operands.perception, operands.inputs, taps, perception_bias, *sum(layers, ()))
    fire = nothing if operands.fire is None else operands.fire
    return [operands.state, fire, *map(float32, rest)]


def _attributes(call: StepCall, operands: Operands) -> dict[str, Any]:
    rule, alive = call.rule, call.rule.alive
    perception = "dense" if operands.dense else "depthwise" if operands.filters else "precomputed"
    names = {
        "padding": rule.padding,
        "perception": perception,
        "precision": "float32" if rule.precision == "default" else rule.precision,
        "activation": rule.activation,
        "perception_activation": rule.perception_activation,
        "fire": operands.fire_source,
    }
    integers = {
        "grid": _axes_to_split(operands.grid),
        "kernel": _axes_to_split(operands.kernel),
        "groups": operands.groups,
        "batch": operands.samples,
        "channels": operands.channels,
        "perceived": operands.perception_size,
        "inputs": operands.input_size,
        "inputs_per_cell": operands.inputs_per_cell,
        "fire_threshold": threshold(rule.fire_rate),
        "alive": alive is not None,
        "alive_channel": 0 if alive is None else alive.channel % operands.channels,
        "alive_radius": 0 if alive is None else alive.radius,
        "layers": len(operands.weights.layers),
    }
    reals = {
        "negative_slope": rule.negative_slope,
        "step_size": rule.step_size,
        "alive_threshold": alive.threshold if alive else 0.0,
    }
    return {
        **names,
        **library.integers(integers),
        **{name: np.float32(value) for name, value in reals.items()},
    }


def _axes_to_split(sizes: Sequence[int]) -> tuple[int, ...]:
    """``(z, y, x)``: a line is a column of cells along y, which tiles can split."""
    return three_axes((*sizes, 1) if len(sizes) == 1 else sizes)
