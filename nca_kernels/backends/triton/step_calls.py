"""``step`` and ``update`` as launches of the kernels: two forward, three backward.

Which arrays the kernels get, and in which order; ``step_kernels.py`` says what each does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nca_kernels.backends.triton.configuration import Engine, step_launch
from nca_kernels.backends.triton.device import is_hopper
from nca_kernels.backends.triton.geometry import step_constants
from nca_kernels.backends.triton.weights import pack, unpack
from nca_kernels.call import Operands, StepCall
from nca_kernels.tuning import Launch

Shape = jax.ShapeDtypeStruct


def forward(engine: Engine, call: StepCall, platform: str, operands: Operands) -> list[Array]:
    """``[new state [G, B, *S, C]]``, and with alive masking the mask ``[G, B, *S]``."""
    launch, kernels = engine.launch, engine.step_kernels()
    how = step_launch(engine, "step_forward", call, platform, operands, forward)
    g = _constants(engine, call, platform, operands, how)
    groups = operands.groups
    state, fire, given, inputs = _flat_operands(operands)
    alive = g["alive"]
    new, plane, mask, _ = launch(
        kernels.step_forward,
        [state, fire, pack(operands, g), given, inputs],
        [
            Shape(state.shape, state.dtype),
            Shape((groups, g["cells"] if alive else 1), jnp.float32),
            Shape((groups, g["cells"] if alive else 1), jnp.bool_),
            Shape((groups, g["programs"], g["scratch"]), jnp.float32),
        ],
        (g["programs"], groups),
        g,
        how,
    )
    if not alive:
        return [new.reshape(operands.state.shape)]
    new, mask = launch(
        kernels.clear_dead,
        [plane, mask, new],
        [Shape(new.shape, new.dtype), Shape(mask.shape, mask.dtype)],
        (g["tiles"], groups),
        g,
        how,
        aliases={1: 1, 2: 0},
    )
    shape = operands.state.shape
    return [new.reshape(shape), mask.reshape(shape[:-1])]


def backward(
    engine: Engine,
    call: StepCall,
    platform: str,
    operands: Operands,
    saved: Sequence[Array],
    cotangent: Array,
    wrt: tuple[bool, ...],
) -> list[Array]:
    """The gradients ``[G, ...]`` of the operands that ``wrt`` (a flag for each array) asks for."""
    launch, kernels = engine.launch, engine.step_kernels()
    wanted = jax.tree.unflatten(jax.tree.structure(operands), wrt)
    how = step_launch(engine, "step_backward", call, platform, operands, backward)
    g = _constants(engine, call, platform, operands, how, wanted)
    groups = operands.groups
    state, fire, given, inputs = _flat_operands(operands)
    alive = saved[0].reshape(groups, -1) if saved else jnp.zeros((groups, 1), jnp.bool_)

    def each_cell(size: int, if_wanted: bool, dtype: Any = jnp.float32) -> Shape:
        return Shape((groups, g["cells"] * size if if_wanted else 1), dtype)

    (given_size, inputs_size), source_grad = g["source_sizes"], g["source_grad"]
    has_overlaps = g["state_grad"] and g["filters"] > 0 and g["places"] > g["tile"]
    overlaps = g["tiles"] * g["places"] * g["channels"] if has_overlaps else 1
    d_state, overlap, touched, d_weights, d_given, d_inputs, _ = launch(
        kernels.step_backward,
        [
            state, fire, pack(operands, g), given, inputs, alive,
            cotangent.reshape(groups, -1),
        ],
        [
            each_cell(g["channels"], g["state_grad"], state.dtype),
            Shape((groups, overlaps), jnp.float32),
            Shape((groups, g["tiles"]), jnp.int32),
            Shape((groups, g["programs"], g["weights"]), jnp.float32),
            each_cell(given_size, source_grad[0]),
            each_cell(inputs_size, source_grad[1]),
            Shape((groups, g["programs"], g["scratch"]), jnp.float32),
        ],
        (g["programs"], groups),
        g,
        how,
    )  # fmt: skip
    if has_overlaps:
        (d_state,) = launch(
            kernels.add_overlaps,
            [overlap, touched, d_state],
            [Shape(d_state.shape, d_state.dtype)],
            (g["tiles"], groups),
            g,
            how,
            aliases={2: 0},
        )
    grads = Operands(d_state, operands.fire, d_given, d_inputs, operands.weights)
    if g["weight_grad"]:
        (total,) = launch(
            kernels.add_programs,
            [d_weights],
            [Shape((groups, g["weights"]), jnp.float32)],
            (-(-g["weights"] // g["add_columns"]), groups),
            g,
            how,
        )
        grads = grads._replace(weights=unpack(total, operands, g))
    return _wanted_gradients(grads, operands, wanted)


def _constants(
    engine: Engine,
    call: StepCall,
    platform: str,
    operands: Operands,
    how: Launch,
    wanted: Operands | None = None,
) -> dict[str, Any]:
    precision = engine.precision(call.rule.precision, platform)
    g = step_constants(call, operands, how, precision, wanted)
    return g | {"hopper": is_hopper(engine.capability())}


def _flat_operands(operands: Operands) -> tuple[Array, Array, Array, Array]:
    """State, fire, given perception and inputs, each ``[G, -1]``; one number for what is absent."""
    groups = operands.groups
    nothing = jnp.zeros((groups, 1), jnp.float32)
    arrays = (operands.state, operands.fire, operands.perception, operands.inputs)
    flat = [nothing if a is None else a.reshape(a.shape[0], -1) for a in arrays]
    return flat[0], flat[1], flat[2], flat[3]


def _wanted_gradients(grads: Operands, operands: Operands, wanted: Operands) -> list[Array]:
    """In the shapes and dtypes of the operands, those that were asked for."""
    groups, inputs = operands.groups, operands.inputs
    if wanted.inputs is True:
        d_inputs = grads.inputs.reshape(groups, operands.state.shape[1], -1, inputs.shape[-1])
        if not operands.inputs_per_cell:  # per sample: the sum over its cells
            d_inputs = jnp.sum(d_inputs, axis=2)
        grads = grads._replace(inputs=d_inputs)
    if operands.perception is None:
        grads = grads._replace(perception=None)
    if operands.inputs is None:
        grads = grads._replace(inputs=None)
    leaves = zip(
        jax.tree.leaves(grads), jax.tree.leaves(operands), jax.tree.leaves(wanted), strict=True
    )
    return [d.reshape(groups, *a.shape[1:]).astype(a.dtype) for d, a, w in leaves if w]
