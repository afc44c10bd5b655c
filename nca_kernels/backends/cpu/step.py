"""``step`` and ``update`` as calls of the native kernels: which arrays and numbers they get.

``src/handlers.cpp`` reads them in the same order. Weights and inputs are float32 there, and an
absent array, or a gradient that nobody asked for, is an empty one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nca_kernels.backends.cpu import library
from nca_kernels.fire_mask import threshold
from nca_kernels.rule import ACTIVATIONS, PADDINGS, Operands

PERCEPTIONS = ("depthwise", "dense", "given")
FIRES = ("all", "key", "mask")
PRECISIONS = {"default": 0, "float32": 0, "tensorfloat32": 1, "bfloat16": 2}
STATES = ("float32", "bfloat16")


def unsupported(call: Any, avals: Sequence[Any]) -> str | None:
    """Why a call cannot run, or None."""
    dtype = avals[0].dtype
    if dtype.name not in STATES:
        return f"states are {' or '.join(STATES)} there, and this one is {dtype}: cast it"
    return None


def forward(call: Any, platform: str, operands: Operands) -> list[Array]:
    """``[new state [G, B, *S, C]]``, and with alive masking the mask ``[G, B, *S]``."""
    library.load()
    state = operands.state
    results = [jax.ShapeDtypeStruct(state.shape, state.dtype)]
    if call.rule.alive is not None:
        results.append(jax.ShapeDtypeStruct(state.shape[:-1], jnp.bool_))
    run = jax.ffi.ffi_call(library.target("step_forward"), results)
    return list(run(*_arrays(operands), **_attributes(call, operands)))


def backward(
    call: Any,
    platform: str,
    operands: Operands,
    saved: Sequence[Array],
    cotangent: Array,
    wrt: tuple[bool, ...],
) -> list[Array]:
    """The gradients ``[G, ...]`` of the operands that ``wrt`` (a flag for each array) asks for."""
    library.load()
    groups = operands.state.shape[0]
    wanted = jax.tree.unflatten(jax.tree.structure(operands), wrt)

    def result(operand: Any, flag: Any, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        shape = (groups, *operand.shape[1:]) if flag is True else (0,)
        return jax.ShapeDtypeStruct(shape, dtype)

    # The order of the operands, without the one that says who fires.
    pairs = [
        (operands.perception, wanted.perception),
        (operands.inputs, wanted.inputs),
        (operands.taps, wanted.taps),
        (operands.perception_bias, wanted.perception_bias),
        *((a, w) for layer in zip(operands.layers, wanted.layers) for a, w in zip(*layer)),
    ]
    results = [result(operands.state, wanted.state, operands.state.dtype)]
    results += [result(operand, flag) for operand, flag in pairs]
    alive = saved[0] if saved else jnp.zeros((0,), jnp.bool_)
    run = jax.ffi.ffi_call(library.target("step_backward"), results)
    out = run(*_arrays(operands), alive, cotangent, **_attributes(call, operands))
    pairs = [(operands.state, wanted.state), *pairs]
    return [g.astype(a.dtype) for g, (a, flag) in zip(out, pairs, strict=True) if flag is True]


def _arrays(operands: Operands) -> list[Array]:
    nothing = jnp.zeros((0,), jnp.float32)

    def float32(array: Any) -> Array:
        return nothing if array is None else array.astype(jnp.float32)

    rest = (operands.perception, operands.inputs, operands.taps, operands.perception_bias)
    weights = [array for layer in operands.layers for array in layer]
    fire = nothing if operands.fire is None else operands.fire
    return [operands.state, fire, *map(float32, (*rest, *weights))]


def _attributes(call: Any, operands: Operands) -> dict[str, Any]:
    rule, state, taps, inputs = call.rule, operands.state, operands.taps, operands.inputs
    groups, batch, *grid, channels = state.shape
    fire = "all" if operands.fire is None else "mask" if operands.fire.dtype == jnp.bool_ else "key"
    perception = "given" if taps is None else "depthwise" if taps.shape[-2] == 1 else "dense"
    kernel = () if taps is None else taps.shape[1:-2]
    alive = rule.alive
    integers = {
        **dict(zip(("depth", "height", "width"), _three_axes(grid), strict=True)),
        **dict(zip(("kernel_z", "kernel_y", "kernel_x"), _three_axes(kernel), strict=True)),
        "groups": groups,
        "batch": batch,
        "channels": channels,
        "padding": PADDINGS.index(rule.padding),
        "perception": PERCEPTIONS.index(perception),
        "perceived": (operands.perception if taps is None else taps).shape[-1],
        "inputs": 0 if inputs is None else inputs.shape[-1],
        "inputs_per_cell": inputs is not None and inputs.ndim == state.ndim,
        "precision": PRECISIONS[rule.precision],
        "activation": list(ACTIVATIONS).index(rule.activation),
        "perception_activation": list(ACTIVATIONS).index(rule.perception_activation),
        "fire": FIRES.index(fire),
        "fire_threshold": threshold(rule.fire_rate),
        "alive": alive is not None,
        "alive_channel": 0 if alive is None else alive.channel % channels,
        "layers": len(operands.layers),
    }
    reals = {"step_size": rule.step_size, "alive_threshold": alive.threshold if alive else 0.0}
    return {
        **{name: np.int64(value) for name, value in integers.items()},
        **{name: np.float32(value) for name, value in reals.items()},
    }


def _three_axes(sizes: Sequence[int]) -> tuple[int, ...]:
    """``(z, y, x)``: a line is a column of cells along y, which tiles can split."""
    if len(sizes) == 1:
        return (1, sizes[0], 1)
    return (1,) * (3 - len(sizes)) + tuple(sizes)
