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

from nca_kernels.backends.pallas import cells
from nca_kernels.backends.pallas.cells import block, indices, load, load_block
from nca_kernels.call import Operands, StepCall, Weights
from nca_kernels.fire_mask import threefry_bits, threshold
from nca_kernels.rule import Rule, activation, wraps

MOST_COLUMNS = 512  # numbers of a cell: its perception, its inputs and its update
MOST_WEIGHTS = 2**13  # of one product: 32 KB, and three times that where products are precise
NUMBERS_OF_A_PROGRAM = 2**13  # of all its cells: 64 registers of each of its 128 threads
TF32 = lax.DotAlgorithmPreset.TF32_TF32_F32
TF32_X3 = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
# Rule.precision on CUDA; elsewhere products are exact.
PRECISIONS: dict[str, Any] = {"default": TF32, "tensorfloat32": TF32, "float32": TF32_X3}


class Plan(NamedTuple):
    """The static facts of a launch."""

    rule: Rule
    around: cells.Neighbourhoods
    precision: Any  # of products
    rows: int  # cells of a program, T in the comments below; a power of two
    units: int  # of a hidden layer that are computed at once; a power of two


def plan_of(rule: Rule, platform: str, operands: Operands) -> Plan:
    around = cells.Neighbourhoods(operands.grid, operands.kernel, rule.padding)
    # Operands that are rounded to bfloat16 need no precise products.
    exact = lax.Precision.DEFAULT if rule.precision == "bfloat16" else lax.Precision.HIGHEST
    precision = PRECISIONS.get(rule.precision, exact) if platform == "cuda" else exact
    widths = block_widths(operands)
    hidden = max(map(block, operands.hidden_widths), default=16)
    units = max(16, min(64, hidden, MOST_WEIGHTS // max(widths)))
    rows = 1 << (NUMBERS_OF_A_PROGRAM // (sum(widths) + units)).bit_length() - 1
    return Plan(rule, around, precision, max(16, min(64, rows)), units)


def block_widths(operands: Operands) -> list[int]:
    """Columns of a cell's update, of each part of its perception, and of its inputs."""
    channels, parts = block(operands.channels), [block(operands.perception_size)]
    if operands.filters and not operands.dense:
        parts = [channels] * operands.filters
    inputs = [block(operands.input_size)] if operands.input_size else []
    return [channels, *parts, *inputs]


def too_wide(operands: Operands) -> str | None:
    """Why a cell's numbers, rounded up to powers of two, do not fit a program, or None."""
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


def forward(
    call: StepCall, platform: str, operands: Operands, interpret: bool = False
) -> list[Array]:
    """``[new state [G, B, *S, C]]``, and with alive masking the mask ``[G, B, *S]``."""
    rule, state = call.rule, operands.state
    plan = plan_of(rule, platform, operands)
    flat = flatten(operands, rounded=plan.precision is TF32)
    programs = flat.state.shape[0] * -(-flat.state.shape[1] // plan.rows)
    kernel = partial(step_kernel, plan=plan)
    (new,) = cells.call_kernel(kernel, [flat], [flat.state], programs, "nca_pallas_step", interpret)
    new = new.reshape(state.shape)
    if rule.alive is None:
        return [new]
    alive = is_alive(rule, state) & is_alive(rule, new)
    return [jnp.where(alive[..., None], new, jnp.zeros_like(new)), alive]


def flatten(operands: Operands, rounded: bool) -> Operands:
    """Joins the axes of the grid, and those of the taps' kernel, into one; weights as float32.

    ``rounded``: round the weights of products to the nearest TF32, since products truncate.
    """
    state, fire, perception, inputs, weights = operands

    def by_cell(array: Array) -> Array:  # [G, B, *S, ...] to [G, cells, ...]
        number = math.prod(state.shape[1:-1])
        return array.reshape(array.shape[0], number, *array.shape[state.ndim - 1 :])

    def of_product(weight: Array) -> Array:
        return lax.reduce_precision(weight, 8, 10) if rounded else weight

    fire = by_cell(fire) if operands.fire_source == "mask" else fire
    inputs = by_cell(inputs) if operands.inputs_per_cell else inputs
    perception = None if perception is None else by_cell(perception)
    taps, bias, layers = jax.tree.map(lambda w: w.astype(jnp.float32), weights)
    if taps is not None:
        taps = of_product(taps) if operands.dense else taps
        taps = taps.reshape(taps.shape[0], -1, *taps.shape[-2:])
    weights = Weights(taps, bias, tuple((of_product(w), b) for w, b in layers))
    return Operands(by_cell(state), fire, perception, inputs, weights)


def is_alive(rule: Rule, state: Array) -> Array:
    """Where the pool of the alive channel exceeds the threshold: ``[G, B, *S]``."""
    assert rule.alive is not None
    plane = state[..., rule.alive.channel].astype(jnp.float32)
    window = (1, 1, *(2 * rule.alive.radius + 1,) * (plane.ndim - 2))
    padding = "SAME"  # but for circular, a border shows the pool only cells that it sees anyway
    if wraps(rule.padding):
        plane = jnp.pad(plane, [(side // 2, side // 2) for side in window], mode="wrap")
        padding = "VALID"
    lowest = np.float32(-np.inf)
    pool = lax.reduce_window(plane, lowest, lax.max, window, (1,) * plane.ndim, padding)
    return pool > rule.alive.threshold


# ---- the kernel ----


class Program(NamedTuple):
    """The operands and the cells of one program."""

    operands: Operands  # references to memory, flattened
    plan: Plan
    group: Array
    cell: Array  # numbers of its cells, in C order over samples and grid, [T]
    exists: Array  # false for those beyond the end that a group's last program has, [T]

    def member(self, ref: Any) -> Any:
        """The index of the program's group in an operand, which all groups may share."""
        return self.group if ref.shape[0] > 1 else 0

    def rows(self, ref: Any, row: Array, width: int) -> Array:
        """Rows of an operand [G, rows, N], one for each cell, as float32: [T, width]."""
        return load_block(ref, (self.member(ref),), row, self.exists, indices(width))

    def start(self, bias: Any, column: Array, exists: Array) -> Array:
        """The start of a sum: columns [N] of a bias, or zeros where there is none: [T, N]."""
        zeros = jnp.zeros((self.plan.rows, column.size), jnp.float32)
        if bias is None:
            return zeros
        return zeros + load(bias, (self.member(bias), column), exists)[None, :]

    def dot(self, a: Array, b: Array) -> Array:
        if self.plan.rule.precision == "bfloat16":
            a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jnp.dot(a, b, precision=self.plan.precision, preferred_element_type=jnp.float32)


class Columns(NamedTuple):
    """Which numbers of the perception and the inputs a block holds."""

    number: Array  # of the outputs of taps, and of rows of the first layer, [W]
    exists: Array  # [W]


Part = tuple[Columns, Array]  # a part of the first layer's input, [T, W]


def step_kernel(operands: Operands, new_state: Any, *, plan: Plan) -> None:
    """``new_state = state + step_size * update`` where a cell fires, else ``state``."""
    number_of_cells, channels = operands.state.shape[1], operands.channels
    group, block_number = cells.divide(pallas.program_id(0), -(-number_of_cells // plan.rows))
    cell = block_number * plan.rows + indices(plan.rows)
    program = Program(operands, plan, group, cell, cell < number_of_cells)
    parts = [*perceive(program), *input_part(program)]
    update = layer_outputs(
        len(operands.weights.layers) - 1, indices(block(channels)), parts, program
    )
    old = program.rows(operands.state, cell, block(channels))
    new = jnp.where(fires(program)[:, None], old + plan.rule.step_size * update, old)
    cells.store_block(new_state, (group,), cell, program.exists, new)


def fires(program: Program) -> Array:
    """Which of the cells fire: [T]."""
    fire = program.operands.fire
    if fire is None:
        return program.exists
    index = program.member(fire)
    if fire.dtype == jnp.bool_:
        return load(fire, (index, program.cell), program.exists)
    low = program.cell.astype(jnp.uint32)
    bits = threefry_bits(fire[index, 0], fire[index, 1], jnp.zeros_like(low), low)
    return (bits >> np.uint32(9)) < np.uint32(threshold(program.plan.rule.fire_rate))


def perceive(program: Program) -> list[Part]:
    """The perception after its activation: a part for each depthwise filter, or a single part."""
    operands, rule = program.operands, program.plan.rule
    size, channels, filters = operands.perception_size, operands.channels, operands.filters
    output, channel = indices(block(size)), indices(block(channels))
    columns = [Columns(output, output < size)]
    if not filters:
        return [(columns[0], program.rows(operands.perception, program.cell, output.size))]
    if not operands.dense:
        columns = [Columns(channel * filters + f, channel < channels) for f in range(filters)]
    start = [program.start(operands.weights.perception_bias, *column) for column in columns]
    activate = activation(rule, rule.perception_activation)
    sums = add_taps(start, columns, program)
    return [(column, activate(total)) for column, total in zip(columns, sums, strict=True)]


def add_taps(sums: list[Array], columns: Sequence[Columns], program: Program) -> list[Array]:
    """Adds to the sums [T, W] what the cells see through the taps of each neighbour."""
    (state, *_, weights), channels = program.operands, program.operands.channels
    taps, channel = weights.taps, indices(block(channels))
    index = program.member(taps)

    def add_neighbour(position: Array, sums: list[Array]) -> list[Array]:
        neighbour, inside = program.plan.around.neighbour(program.cell, position)
        seeing = program._replace(exists=program.exists & inside)
        value = seeing.rows(state, neighbour, channel.size)  # [T, C]
        if program.operands.dense:
            (output,) = columns
            weight = load_block(taps, (index, position), channel, channel < channels, output.number)
            return [sums[0] + program.dot(value, weight)]
        rows = [load(taps, (index, position, 0, number), exists) for number, exists in columns]
        return [total + value * row[None, :] for total, row in zip(sums, rows, strict=True)]

    return cells.loop(taps.shape[1], add_neighbour, sums)


def input_part(program: Program) -> list[Part]:
    """The inputs, which come after the perception, if there are any."""
    inputs, row = program.operands.inputs, program.cell
    if inputs is None:
        return []
    size = program.operands.input_size
    column = indices(block(size))
    if inputs.shape[1] != program.operands.state.shape[1]:  # per sample
        row = cells.unravel(row, program.plan.around.grid)[0]
    first_row = program.operands.weights.layers[0][0].shape[1] - size
    columns = Columns(first_row + column, column < size)
    return [(columns, program.rows(inputs, row, column.size))]


def layer_outputs(layer: int, column: Array, parts: Sequence[Part], program: Program) -> Array:
    """The outputs ``column`` [N] of a layer, before its activation: [T, N].

    The units of the layer before it are computed here, a few at a time, and stored nowhere.
    """
    (weight, bias), plan = program.operands.weights.layers[layer], program.plan
    activate = activation(plan.rule, plan.rule.activation)
    index = (program.member(weight),)
    outputs = program.start(bias, column, column < weight.shape[-1])
    if layer == 0:
        for rows, value in parts:
            outputs += program.dot(value, load_block(weight, index, *rows, column))
        return outputs

    def add_units(i: Array, outputs: Array) -> Array:
        unit = i * plan.units + indices(plan.units)
        hidden = layer_outputs(layer - 1, unit, parts, program)
        rows = load_block(weight, index, unit, unit < weight.shape[1], column)
        return outputs + program.dot(activate(hidden), rows)

    return cells.loop(-(-weight.shape[1] // plan.units), add_units, outputs)
