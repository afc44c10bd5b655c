"""``step`` and ``update`` as launches of the kernels: two forward, three backward.

Which arrays the kernels get, and in which order; ``step_kernels.py`` says what each does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from nca_kernels.backends.triton.configuration import Engine, step_launch
from nca_kernels.backends.triton.device import has_64_row_products
from nca_kernels.backends.triton.geometry import Sizes
from nca_kernels.backends.triton.step_configuration import StepConfiguration, step_configuration
from nca_kernels.backends.triton.weights import pack, unpack
from nca_kernels.call import Operands, StepCall
from nca_kernels.tuning import Launch

Shape = jax.ShapeDtypeStruct


def forward(engine: Engine, call: StepCall, platform: str, operands: Operands) -> list[Array]:
    """``[new state [G, B, *S, C]]``, and with alive masking the mask ``[G, B, *S]``."""
    launch = step_launch(engine, "step_forward", call, platform, operands, forward)
    config, sizes = _configuration(engine, call, platform, operands, launch)
    run = partial(engine.run_kernel, config=config, sizes=sizes, launch=launch)
    kernels, groups = engine.step_kernels(), sizes.groups
    state, fire, perception, inputs = _flat_operands(operands)
    cells = sizes.cells if config.alive else 1
    new, plane, mask, _ = run(
        kernels.step_forward,
        [state, fire, pack(operands, config.packed, config.precision), perception, inputs],
        [
            Shape(state.shape, state.dtype),
            Shape((groups, cells), jnp.float32),
            Shape((groups, cells), jnp.bool_),
            Shape((groups, sizes.programs, config.scratch.size), jnp.float32),
        ],
        programs=groups * sizes.programs,
    )
    if not config.alive:
        return [new.reshape(operands.state.shape)]
    new, mask = run(
        kernels.clear_dead,
        [plane, mask, new],
        [Shape(new.shape, new.dtype), Shape(mask.shape, mask.dtype)],
        programs=groups * sizes.tiles,
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
    flags = jax.tree.unflatten(jax.tree.structure(operands), wrt)
    launch = step_launch(engine, "step_backward", call, platform, operands, backward)
    config, sizes = _configuration(engine, call, platform, operands, launch, flags)
    run = partial(engine.run_kernel, config=config, sizes=sizes, launch=launch)
    kernels, groups, wanted = engine.step_kernels(), sizes.groups, config.wanted
    overlaps = sizes.tiles * config.reach * config.channels if config.has_overlaps else 1
    state, fire, perception, inputs = _flat_operands(operands)
    d_state, overlap, touched, d_weights, d_given, d_inputs, _ = run(
        kernels.step_backward,
        [
            state, fire, pack(operands, config.packed, config.precision), perception, inputs,
            saved[0].reshape(groups, -1) if saved else jnp.zeros((groups, 1), jnp.bool_),
            cotangent.reshape(groups, -1),
        ],
        [
            Shape((groups, sizes.cells * config.channels if wanted.state else 1), state.dtype),
            Shape((groups, overlaps), jnp.float32),
            Shape((groups, sizes.tiles), jnp.int32),
            Shape((groups, sizes.programs, config.packed.size), jnp.float32),
            *(
                Shape((groups, sizes.cells * size if asked else 1), jnp.float32)
                for size, asked in zip(config.mlp.source_sizes, wanted.sources, strict=True)
            ),
            Shape((groups, sizes.programs, config.scratch.size), jnp.float32),
        ],
        programs=groups * sizes.programs,
    )  # fmt: skip
    if config.has_overlaps:
        (d_state,) = run(
            kernels.add_overlaps,
            [overlap, touched, d_state],
            [Shape(d_state.shape, d_state.dtype)],
            programs=groups * sizes.tiles,
            aliases={2: 0},
        )
    grads = Operands(d_state, operands.fire, d_given, d_inputs, operands.weights)
    if wanted.weights:
        (total,) = run(
            kernels.add_programs,
            [d_weights],
            [Shape((groups, config.packed.size), jnp.float32)],
            programs=groups * -(-config.packed.size // config.add_columns),
        )
        grads = grads._replace(weights=unpack(total, operands, config.packed))
    return _wanted_gradients(grads, operands, flags)


def _configuration(
    engine: Engine,
    call: StepCall,
    platform: str,
    operands: Operands,
    launch: Launch,
    wanted: Operands | None = None,
) -> tuple[StepConfiguration, Sizes]:
    return step_configuration(
        call,
        operands,
        launch,
        precision=engine.precision(call.rule.precision, platform),
        rounds_by_instruction=has_64_row_products(engine.capability()),
        wanted=wanted,
    )


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
