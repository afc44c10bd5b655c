"""Which launch a call gets: the engine's own, a device's winner, or a heuristic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from nca_kernels.rule import AttentionOperands, Operands
from nca_kernels.tiled.geometry import RUN, block
from nca_kernels.tuning import Launch, winner

WIDEST = 1024  # channels, or outputs of dense taps


@dataclass(frozen=True)
class Engine:
    """How a backend runs kernels over tiles.

    Args:
        name: what its winners are filed under.
        step_kernels, attention_kernels: import and return what holds the kernels, by name.
        launch: ``(kernel, inputs, outputs, grid, constants, how, aliases={})`` runs a kernel.
        precision: ``(Rule.precision, platform)`` as the engine's products take it.
        fixed: a launch for every call instead of winners and heuristics, for tests.
    """

    name: str
    step_kernels: Callable[[], Any]
    attention_kernels: Callable[[], Any]
    launch: Callable[..., list[Array]]
    precision: Callable[[str, str], str]
    fixed: Callable[[Any], Launch] | None = None


def step_launch(
    engine: Engine, kernel: str, call: Any, platform: str, operands: Operands
) -> Launch:
    """The launch of ``kernel`` for this call."""
    if engine.fixed is not None:
        return engine.fixed(call)
    problem = f"{engine.name} {problem_name(call, operands)}"
    return winner(device_kind(), kernel, problem) or heuristic(kernel, call, operands)


def attention_launch(engine: Engine, call: Any, operands: AttentionOperands) -> Launch:
    """The launch of the kernels of attention for this call."""
    heads, size = operands.query.shape[-2:]
    dims = call.num_spatial_dims
    problem = f"{engine.name} {dims}d radius {call.radius} heads {heads} size {size}"
    found = winner(device_kind(), "neighborhood_attention", problem)
    return found or Launch(rows=max(16, min(128, 2**12 // block(size))))


def problem_name(call: Any, operands: Operands) -> str:
    """What a winner depends on, as text: dims, widths and precision, not the sizes of the grid."""
    channels = operands.state.shape[-1]
    taps = operands.taps
    perception = "given" if taps is None else "x".join(map(str, taps.shape[1:]))
    widths = [weight.shape[-1] for weight, _ in operands.layers[:-1]]
    inputs = 0 if operands.inputs is None else operands.inputs.shape[-1]
    hidden = "-".join(map(str, widths)) or "none"
    return (
        f"{call.num_spatial_dims}d {operands.state.dtype} C{channels} taps {perception} "
        f"inputs {inputs} hidden {hidden} {call.rule.precision}"
    )


def device_kind() -> str:
    """The name of the GPU, as winners are filed under; of another device, its name."""
    return jax.devices()[0].device_kind


def heuristic(kernel: str, call: Any, operands: Operands) -> Launch:
    """A launch that compiles without spills for common sizes, and works for all."""
    block_c = block(operands.state.shape[-1])
    taps = operands.taps
    dense = taps is not None and taps.shape[-2] != 1
    width = 0 if taps is None else block_c * (taps.shape[-1] // operands.state.shape[-1])
    if dense:
        width = block(taps.shape[-1])
    cells = max(16, min(256, 2**13 // block_c))
    tile = {
        1: (1, 1, cells),
        2: (1, cells // 16, 16),
        3: (max(min(4, cells // 32), 1), max(min(4, cells // 64), 1), 16),
    }[call.num_spatial_dims]
    grid = (1, 1, *operands.state.shape[2:-1])[-3:]
    z, y, x = (min(t, 1 << (n - 1).bit_length()) for t, n in zip(tile, grid, strict=True))
    tile = (z, y, max(x, RUN))
    rows = max(16, min(64, 2**12 // max(width, block_c, 1)))
    hidden = max((weight.shape[-1] for weight, _ in operands.layers[:-1]), default=16)
    backward = kernel == "step_backward"
    block_h = min(block(hidden), 64 if backward else 128, max(16, 2**13 // max(block_c, 64)))
    return Launch(tile=tile, rows=rows, block_h=block_h, warps=4, unroll=3)


def unsupported_by_tiles(call: Any, avals: Sequence[Any]) -> str | None:
    """Why kernels over tiles cannot run a call, or None: a block of cells holds all channels."""
    state = avals[0]
    if state.dtype == "float64":
        return "float64 needs backend='xla' or 'reference'"
    if call.op == "neighborhood_attention":
        widths = {"head size": state.shape[-1]}
    else:
        taps = jax.tree.unflatten(call.treedef, avals[: call.treedef.num_leaves]).taps
        dense = taps is not None and taps.shape[-2] != 1
        widths = {"channels": state.shape[-1], "outputs of taps": taps.shape[-1] if dense else 0}
    for name, width in widths.items():
        if width > WIDEST:
            return f"it takes up to {WIDEST} {name}, got {width}"
    return None
