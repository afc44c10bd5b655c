"""``step`` and ``update``: a kernel that updates all cells, then in plain JAX those that live."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas

from nca_kernels.backends.pallas.grid import Neighbourhoods, three_axes, unravel
from nca_kernels.backends.pallas.memory import (
    block,
    call_kernel,
    divide,
    indices,
    load,
    load_block,
    loop,
    store_block,
)
from nca_kernels.call import Operands, StepCall, Weights
from nca_kernels.fire_mask import threefry_bits, threshold
from nca_kernels.rule import Rule, activation

MOST_COLUMNS = 512  # of all that a cell keeps: its perception, inputs and update
MOST_WEIGHTS = 2**13  # of one product: 32 KB, three times that where it is precise
HELD = 2**13  # floats that a program's cells keep, if they can: 64 registers of each thread
TF32 = lax.DotAlgorithmPreset.TF32_TF32_F32
PRECISIONS: dict[str, Any] = {  # Rule.precision on CUDA; elsewhere products are exact
    "default": TF32,
    "tensorfloat32": TF32,
    "float32": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
}


# ---- what a program works on ----


class Plan(NamedTuple):
    """The static facts of a launch."""

    rule: Rule
    around: Neighbourhoods
    precision: Any  # of products of float32
    rows: int  # cells of a program, T in the comments below; a power of two
    units: int  # of a hidden layer that are computed at once; a power of two


def plan_of(rule: Rule, platform: str, operands: Operands) -> Plan:
    grid, kernel = three_axes(operands.grid), three_axes(operands.kernel)
    around = Neighbourhoods(grid, kernel, rule.padding)
    # Operands of bfloat16 are rounded, and need no more.
    exact = lax.Precision.DEFAULT if rule.precision == "bfloat16" else lax.Precision.HIGHEST
    precision = PRECISIONS.get(rule.precision, exact) if platform == "cuda" else exact
    widths = block_widths(operands)
    hidden = max(map(block, operands.hidden_widths), default=16)
    units = max(16, min(64, hidden, MOST_WEIGHTS // max(widths)))
    rows = 1 << (HELD // (sum(widths) + units)).bit_length() - 1
    return Plan(rule, around, precision, max(16, min(64, rows)), units)


def block_widths(operands: Operands) -> list[int]:
    """Columns of what a cell keeps: its update, each part of the perception, its inputs."""
    channels = block(operands.channels)
    if operands.filters and not operands.dense:
        parts = [channels] * operands.filters
    else:
        parts = [block(operands.perception_size)]
    inputs = [block(operands.input_size)] if operands.input_size else []
    return [channels, *parts, *inputs]


def too_wide(operands: Operands) -> str | None:
    """Why a cell's numbers do not fit a program, or None. All are rounded up to powers of two."""
    channels, *parts = widths = block_widths(operands)
    if sum(widths) > MOST_COLUMNS:
        return (
            f"it takes up to {MOST_COLUMNS} numbers a cell, those of the update, of each filter "
            f"and of the inputs rounded up to powers of two, got {sum(widths)}"
        )
    weights = channels * max(parts)
    if weights > MOST_WEIGHTS and (operands.dense or not operands.hidden_widths):
        return (
            f"it takes up to {MOST_WEIGHTS} weights in one product (the dense taps at a position, "
            "or a part of the perception times the channels where there is no hidden layer), "
            f"rounded up to powers of two, got {weights}"
        )
    return None


# ---- the op ----


def forward(
    call: StepCall,
    platform: str,
    operands: Operands,
    interpret: bool = False,
    rows: int | None = None,
) -> list[Array]:
    """``[new state [G, B, *S, C]]``, and with alive masking the mask ``[G, B, *S]``.

    ``rows``: cells of a program, for tests.
    """
    rule, state = call.rule, operands.state
    plan = plan_of(rule, platform, operands)
    plan = plan._replace(rows=rows or plan.rows)
    flat = flatten(operands, rounded=plan.precision is TF32)
    groups, cells, _ = flat.state.shape
    (new,) = call_kernel(
        partial(step_kernel, plan=plan),
        [flat],
        [jax.ShapeDtypeStruct(flat.state.shape, state.dtype)],
        groups * -(-cells // plan.rows),
        "nca_pallas_step",
        interpret,
    )
    new = new.reshape(state.shape)
    if rule.alive is None:
        return [new]
    alive = is_alive(rule, state) & is_alive(rule, new)
    return [jnp.where(alive[..., None], new, jnp.zeros_like(new)), alive]


def flatten(operands: Operands, rounded: bool) -> Operands:
    """Axes of the grid, and of the taps' kernel, as one; weights in float32.

    ``rounded``: those of products to the nearest TF32, as these would cut off what is more.
    """
    state, fire, perception, inputs, weights = operands
    dims, cells = state.ndim - 3, math.prod(state.shape[1:-1])

    def by_cell(array: Array) -> Array:
        """[G, B, *S, ...] to [G, cells, ...]."""
        return array.reshape(array.shape[0], cells, *array.shape[dims + 2 :])

    def of_product(weight: Array) -> Array:
        return lax.reduce_precision(weight, 8, 10) if rounded else weight

    taps, bias, layers = jax.tree.map(lambda weight: weight.astype(jnp.float32), weights)
    if taps is not None:
        taps = of_product(taps) if taps.shape[-2] != 1 else taps
        taps = taps.reshape(taps.shape[0], -1, *taps.shape[-2:])
    return Operands(
        by_cell(state),
        by_cell(fire) if fire is not None and fire.dtype == jnp.bool_ else fire,
        None if perception is None else by_cell(perception),
        by_cell(inputs) if inputs is not None and inputs.ndim == state.ndim else inputs,
        Weights(taps, bias, tuple((of_product(weight), bias) for weight, bias in layers)),
    )


def is_alive(rule: Rule, state: Array) -> Array:
    """Where a cell or one around it is above the threshold: ``[G, B, *S]``."""
    plane = state[..., rule.alive.channel].astype(jnp.float32)  # type: ignore[union-attr]
    window = (1, 1, *(3,) * (plane.ndim - 2))
    padding = "SAME"  # other borders than circular show a pool no cell that it does not see anyway
    if rule.padding == "circular":
        plane = jnp.pad(plane, [(side // 2, side // 2) for side in window], mode="wrap")
        padding = "VALID"
    lowest = np.float32(-np.inf)
    pool = lax.reduce_window(plane, lowest, lax.max, window, (1,) * plane.ndim, padding)
    return pool > rule.alive.threshold  # type: ignore[union-attr]


# ---- the kernel ----


class Cells(NamedTuple):
    """The cells that a program works on."""

    group: Array
    number: Array  # in C order over samples and grid, [T]
    exists: Array  # the last program of a group has more than there are, [T]


class Part(NamedTuple):
    """Some of the numbers that the first layer takes."""

    value: Array  # [T, W]
    row: Array  # of the first layer's weights that each column meets, [W]
    exists: Array  # [W]


def step_kernel(operands: Operands, new_state: Any, *, plan: Plan) -> None:
    """``new_state = state + step_size * update`` where a cell fires, else ``state``.

    ``operands``, flattened, and ``new_state`` are references to memory.
    """
    state, channels = operands.state, block(operands.state.shape[-1])
    programs = -(-state.shape[1] // plan.rows)  # of a group
    group, program = divide(pallas.program_id(0), programs)
    number = program * plan.rows + indices(plan.rows)
    cells = Cells(group, number, number < state.shape[1])
    parts = [*perceive(operands, cells, plan), *input_part(operands, cells, plan)]
    update = layer_outputs(
        len(operands.weights.layers) - 1, indices(channels), parts, operands, cells, plan
    )
    old = load_rows(state, cells, channels)
    new = old + plan.rule.step_size * update
    new = jnp.where(fires(operands.fire, cells, plan)[:, None], new, old)
    store_block(new_state, (group,), number, cells.exists, new)


def member(ref: Any, group: Array) -> Any:
    """The index of a group in an operand that groups may share."""
    return group if ref.shape[0] > 1 else 0


def load_rows(ref: Any, cells: Cells, width: int, row: Array | None = None) -> Array:
    """What ``ref`` [G, cells, N] holds of each cell, or at each ``row``, as float32: [T, width]."""
    row = cells.number if row is None else row
    return load_block(ref, (member(ref, cells.group),), row, cells.exists, indices(width))


def fires(fire: Any, cells: Cells, plan: Plan) -> Array:
    """Which of the cells fire: [T]."""
    if fire is None:
        return cells.exists
    index = member(fire, cells.group)
    if fire.dtype == jnp.bool_:
        return load(fire, (index, cells.number), cells.exists)
    low = cells.number.astype(jnp.uint32)
    bits = threefry_bits(fire[index, 0], fire[index, 1], jnp.zeros_like(low), low)
    return (bits >> np.uint32(9)) < np.uint32(threshold(plan.rule.fire_rate))


def dot(a: Array, b: Array, plan: Plan) -> Array:
    """``a @ b``, accumulated in float32."""
    if plan.rule.precision == "bfloat16":
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.dot(a, b, precision=plan.precision, preferred_element_type=jnp.float32)


# ---- the perception ----


def perceive(operands: Operands, cells: Cells, plan: Plan) -> list[Part]:
    """The perception after its activation: depthwise a part for each filter, else one."""
    taps, bias, _ = operands.weights
    if taps is None:
        size = operands.perception.shape[-1]
        column = indices(block(size))
        given = load_rows(operands.perception, cells, block(size))
        return [Part(given, column, column < size)]
    channels, (fan_in, size) = operands.state.shape[-1], taps.shape[-2:]
    if fan_in == 1:
        channel, filters = indices(block(channels)), size // channels
        outputs = [(channel * filters + f, channel < channels) for f in range(filters)]
    else:
        outputs = [(indices(block(size)), indices(block(size)) < size)]
    sums = []
    for column, exists in outputs:
        start = jnp.zeros((plan.rows, column.size), jnp.float32)
        if bias is not None:
            start += load(bias, (member(bias, cells.group), column), exists)[None, :]
        sums.append(start)
    sums = add_taps(sums, outputs, operands, cells, plan)
    activate = activation(plan.rule, plan.rule.perception_activation)
    return [Part(activate(value), *output) for value, output in zip(sums, outputs, strict=True)]


def add_taps(
    sums: list[Array],
    outputs: Sequence[tuple[Array, Array]],
    operands: Operands,
    cells: Cells,
    plan: Plan,
) -> list[Array]:
    """Adds what the cells see through the taps at each place of the kernel to [T, W] each."""
    state, taps = operands.state, operands.weights.taps
    group, channels = member(taps, cells.group), block(state.shape[-1])

    def add_place(place: Array, sums: list[Array]) -> list[Array]:
        neighbour, inside = plan.around.neighbour(cells.number, place)
        seen = cells._replace(exists=cells.exists & inside)
        value = load_rows(state, seen, channels, neighbour)  # [T, C]
        if taps.shape[-2] != 1:
            (column, _), row = outputs[0], indices(channels)
            weight = load_block(taps, (group, place), row, row < state.shape[-1], column)
            return [sums[0] + dot(value, weight, plan)]
        tap_rows = [load(taps, (group, place, 0, *output[:1]), output[1]) for output in outputs]
        return [total + value * tap[None, :] for total, tap in zip(sums, tap_rows, strict=True)]

    return loop(taps.shape[1], add_place, sums)


# ---- the MLP ----


def input_part(operands: Operands, cells: Cells, plan: Plan) -> list[Part]:
    """The inputs, which come after the perception, if there are any."""
    inputs = operands.inputs
    if inputs is None:
        return []
    size, row = inputs.shape[-1], cells.number
    if inputs.shape[1] != operands.state.shape[1]:  # per sample
        row, _ = unravel(row, plan.around.sizes)
    column = indices(block(size))
    value = load_rows(inputs, cells, block(size), row)
    first_row = operands.weights.layers[0][0].shape[1] - size
    return [Part(value, first_row + column, column < size)]


def layer_outputs(
    layer: int, column: Array, parts: Sequence[Part], operands: Operands, cells: Cells, plan: Plan
) -> Array:
    """Some outputs [N] of a layer before its activation: [T, N].

    Those of the layer before it are computed here, some units at a time, and kept nowhere.
    """
    weight, bias = operands.weights.layers[layer]
    group = member(weight, cells.group)
    outputs = jnp.zeros((plan.rows, column.size), jnp.float32)
    if bias is not None:
        exists = column < bias.shape[-1]
        outputs += load(bias, (member(bias, cells.group), column), exists)[None, :]
    if layer == 0:
        for part in parts:
            rows = load_block(weight, (group,), part.row, part.exists, column)
            outputs += dot(part.value, rows, plan)
        return outputs

    def add_units(i: Array, outputs: Array) -> Array:
        unit = i * plan.units + indices(plan.units)
        hidden = layer_outputs(layer - 1, unit, parts, operands, cells, plan)
        hidden = activation(plan.rule, plan.rule.activation)(hidden)
        rows = load_block(weight, (group,), unit, unit < weight.shape[1], column)
        return outputs + dot(hidden, rows, plan)

    return loop(-(-weight.shape[1] // plan.units), add_units, outputs)
