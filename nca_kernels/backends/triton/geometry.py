"""What a kernel knows: sizes, blocks, and where things lie in packed arrays.

Kernels of Triton take :data:`SIZES` as arguments or compute them, and are compiled for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nca_kernels.call import Operands, StepCall
from nca_kernels.fire_mask import threshold
from nca_kernels.perception import ConstantTaps, same_margins
from nca_kernels.tuning import Launch

RUN = 16  # cells in a word of flags, see cells.py
# What changes from grid to grid, and with the number of samples and of groups.
SIZES = frozenset(
    (
        "depth", "height", "width", "samples", "cells", "tiles", "tiles_z", "tiles_y", "tiles_x",
        "programs", "groups",
    )
)  # fmt: skip


def block(size: int) -> int:
    """The power of two, at least 16, that holds ``size``: what products and ranges want."""
    return max(16, 1 << (size - 1).bit_length())


def three_axes(sizes: Sequence[int]) -> tuple[int, ...]:
    """(z, y, x); missing axes have size 1."""
    return (1,) * (3 - len(sizes)) + tuple(sizes)


def step_constants(
    call: StepCall,
    operands: Operands,
    launch: Launch,
    precision: str,
    wanted: Operands | None = None,
) -> dict[str, Any]:
    """The constants of a ``step`` or ``update``; ``wanted``: gradients asked for, as flags."""
    groups, channels = operands.groups, operands.channels
    values = _grid_constants(operands, launch)
    values |= _rule_constants(call.rule, channels, values, operands)
    values |= _layer_constants(operands, launch, values, call.constant_taps)
    values |= _gradient_constants(wanted)
    values |= _scratch_constants(values, launch)
    values["precision"] = precision
    values["groups"], values["one_group"] = groups, groups == 1
    values["rows"], values["unroll"] = launch.rows, launch.unroll
    values["hoisted"] = launch.hoisted
    values["programs"] = max(1, min(values["tiles"], -(-launch.programs // groups)))
    values["one_tile"] = values["programs"] == values["tiles"]  # each program has one
    values["add_rows"], values["add_columns"] = 32, 64
    one_block = values["layers"] == 2 and values["padded_widths"][0] == values["block_h"]
    one_block &= not any(values["source_sizes"])
    values["carried"] = (
        launch.carried and one_block and values["parts"] == 1 and values["weight_grad"]
    )
    weights = values["block_h"] * (values["parts"] * values["part"] + values["block_c"])
    values["held"] = bool(one_block and wanted is None and weights <= launch.held)
    largest = max(
        math.prod(operands.state.shape),
        groups * values["tiles"] * values["places"] * channels,
        groups * values["programs"] * max(values["scratch"], values["weights"]),
        groups * values["cells"] * max(values["source_sizes"]),
    )
    values["wide"] = largest >= 2**31
    return values


def _grid_constants(operands: Operands, launch: Launch) -> dict[str, Any]:
    grid, kernel, batch = *map(three_axes, (operands.grid, operands.kernel)), operands.samples
    values: dict[str, Any] = {}
    for axis, size, tile, reach, (before, after) in zip(
        ("z", "y", "x"), grid, launch.tile, kernel, same_margins(kernel), strict=True
    ):
        values |= {
            f"tile_{axis}": tile,
            f"tiles_{axis}": -(-size // tile),
            f"kernel_{axis}": reach,
            f"before_{axis}": before,
            f"places_{axis}": tile + reach - 1,  # what a tile's cells contribute to
            f"halo_{axis}": 2 if size > 1 else 0,  # what a tile's life depends on
            f"window_{axis}": 3 if size > 1 else 1,
            # Whether all positions that matter are less than the grid's size outside of it.
            f"near_{axis}": max(before, after, 2) < size,
            f"around_{axis}": tile + 2 * (reach - 1),  # the cells that may contribute to those
            f"shares_{axis}": 1 + (reach - 1 + tile - 1) // tile,  # of tiles that reach a cell
            f"edge_{axis}": min(reach - 1, tile),  # cells that other tiles contribute to,
            f"low_{axis}": after if reach <= tile else tile,  # of them at the beginning
        }
    for name in ("tiles", "places", "around", "kernel"):
        values[name] = math.prod(values[f"{name}_{axis}"] for axis in "zyx")
    values["tiles"] *= batch
    inner = math.prod(values[f"tile_{axis}"] - values[f"edge_{axis}"] for axis in "zyx")
    values["edges"] = math.prod(launch.tile) - inner
    values["tile"] = math.prod(launch.tile)
    values["runs"] = values["tile"] // RUN
    values["runs_x"] = values["tile_x"] // RUN
    values["pool"] = math.prod(values[f"window_{axis}"] for axis in "zyx")
    for axis in "zy":
        values[f"pool_{axis}"] = values[f"tile_{axis}"] + 2 * values[f"halo_{axis}"]
    values["pool_runs"] = block(values["pool_z"] * values["pool_y"] * values["runs_x"])
    values |= dict(zip(("depth", "height", "width"), grid, strict=True))
    values["aligned"] = next(n for n in (16, 4, 2, 1) if grid[2] % n == 0)  # divides the width
    values["samples"], values["cells"] = batch, batch * math.prod(grid)
    return values


def _rule_constants(
    rule: Any, channels: int, grid: dict[str, Any], operands: Operands
) -> dict[str, Any]:
    fire, alive = operands.fire, rule.alive
    return {
        "channels": channels,
        "block_c": block(channels),
        "padding": rule.padding,
        "activation": rule.activation,
        "perception_activation": rule.perception_activation,
        "negative_slope": float(rule.negative_slope),
        "step_size": float(rule.step_size),
        "fire": operands.fire_source,
        "own_fire": int(fire is not None and fire.shape[0] > 1),
        "fire_threshold": threshold(rule.fire_rate),
        "alive": alive is not None,
        "alive_channel": 0 if alive is None else alive.channel % channels,
        # As the reference compares: in float32.
        "alive_threshold": 0.0 if alive is None else float(np.float32(alive.threshold)),
    }


def _tap_constants(taps: ConstantTaps, kernel: int) -> dict[str, Any]:
    """Constant taps [K, F], and at which positions there is any."""
    used = np.any(np.reshape(taps, (kernel, -1)), axis=1) if taps else np.ones(kernel, bool)
    return {"constant_taps": bool(taps), "taps": taps or (0.0,), "used": tuple(map(bool, used))}


def _layer_constants(
    operands: Operands,
    launch: Launch,
    values: dict[str, Any],
    constant_taps: ConstantTaps,
) -> dict[str, Any]:
    """Parts, sources and layers, and where each lies in the packed weights; see weights.py."""
    dense, filters, hidden = operands.dense, operands.filters, operands.hidden_widths
    given, inputs = operands.given_size, operands.input_size
    block_p = block(operands.perception_size) if dense else values["block_c"]
    block_h = min(launch.block_h, block(max(hidden, default=1)))
    block_s = min(64, block(max(given, inputs, 1)))
    widths = [-(-h // block_h) * block_h for h in hidden] + [values["block_c"]]
    sources = [-(-size // block_s) * block_s for size in (given, inputs)]
    taps_size = values["kernel"] * values["block_c"] * (block_p if dense else filters)
    perception_bias_at = taps_size if filters else 0
    at = perception_bias_at + filters * block_p
    side_by_side = block(max(filters, 1) * block_p)
    joined = filters > 1 and side_by_side <= launch.joined
    parts, part = (1, side_by_side) if joined else (filters, block_p)
    ones = joined and part > filters * block_p  # its weights are the bias, see weights.py
    weight_at, bias_at, source_at, fan_in = [], [], (0, 0), parts * part
    for i, width in enumerate(widths):
        weight_at.append(at)
        at += fan_in * width
        if i == 0:
            source_at = (at, at + sources[0] * width)
            at += sum(sources) * width
        if i == 0 and ones:
            bias_at.append(weight_at[0] + filters * block_p * width)
        else:
            bias_at.append(at)
            at += width
        fan_in = width
    return {
        "dense": dense,
        **_tap_constants(constant_taps, values["kernel"]),
        "filters": filters,
        "block_p": block_p,
        "joined": joined,
        "parts": parts,
        "part": part,
        "ones": ones,
        "doublings": (part // block_p).bit_length() - 1,
        "block_h": block_h,
        "block_s": block_s,
        "layers": len(widths),
        "padded_widths": tuple(widths),
        "source_sizes": (given, inputs),
        "padded_sources": tuple(sources),
        "inputs_per_cell": operands.inputs is None or operands.inputs_per_cell,
        "taps_at": 0,
        "perception_bias": operands.weights.perception_bias is not None,
        "perception_bias_at": perception_bias_at,
        "weight_at": tuple(weight_at),
        "source_at": source_at,
        "bias_at": tuple(bias_at),
        "weights": at,
        "own_weights": int(operands.weight_groups > 1),
    }


def _gradient_constants(wanted: Operands | None) -> dict[str, Any]:
    if wanted is None:
        return {
            "weight_grad": False, "taps_grad": False, "perception_bias_grad": False,
            "state_grad": False, "source_grad": (False, False),
        }  # fmt: skip
    return {
        "weight_grad": any(jax.tree.leaves(wanted.weights)),
        "taps_grad": wanted.weights.taps is True,
        "perception_bias_grad": wanted.weights.perception_bias is True,
        "state_grad": wanted.state is True,
        "source_grad": (wanted.perception is True, wanted.inputs is True),
    }


def _scratch_constants(values: dict[str, Any], launch: Launch) -> dict[str, Any]:
    """Each program's own memory, and where things lie in it, in floats (or integers of 32 bits).

    Backward what the tile's active cells mean to the state, by tap or by filter, behind a row of
    zeros, and each cell's row in it; then the lanes that have rows, each lane's flags, words of who
    lives, and the hidden layers (but the last) of a block of rows and their gradients.
    """
    hidden = values["padded_widths"][:-2]
    backward = values["weight_grad"] or values["state_grad"] or any(values["source_grad"])
    by_filter = values["filters"] * values["block_p"]
    by_tap = values["kernel"] * values["block_c"] if by_filter else 0
    # Of constant taps, of which many are zero, little is gathered of each filter.
    taps_fit = not values["constant_taps"] and values["tile"] * by_tap <= launch.by_tap
    kept = by_tap if taps_fit else by_filter
    active_at = (1 + values["tile"]) * kept
    lanes_at = active_at + values["around"] if backward else 0
    flags_at = lanes_at + values["tile"]
    words_at = flags_at + values["tile"]
    at = words_at + values["pool_runs"]
    hidden_at, gradient_at = [], []
    for width in hidden:
        hidden_at.append(at)
        at += launch.rows * width
    for width in values["padded_widths"][:-1] if backward and hidden else ():
        gradient_at.append(at)
        at += launch.rows * width
    return {
        "by_tap": taps_fit,
        "kept": kept,
        "active_at": active_at,
        "lanes_at": lanes_at,
        "flags_at": flags_at,
        "words_at": words_at,
        "hidden_at": tuple(hidden_at) or (0,),
        "gradient_at": tuple(gradient_at) or (0,),
        "scratch": max(at, 1),
    }
