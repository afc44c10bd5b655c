"""Which launch a call gets: the engine's own, a device's winner, or a heuristic."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import Array

from nca_kernels.backends.triton import device
from nca_kernels.backends.triton.geometry import RUN, block
from nca_kernels.backends.triton.tuner import Tunable, tuned
from nca_kernels.call import AttentionOperands, Operands, three_axes
from nca_kernels.tuning import TUNE, Launch, winner

# The largest calls, for a device with this much shared memory. A device with less takes smaller
# ones, and precise products take half as much.
FITTING = 163 << 10  # bytes
WIDEST = 1024  # numbers of a cell with its perception, or of an attention head
DENSEST = 2**15  # numbers of dense taps at one position of the stencil
# What Rule.precision means for a product of float32 blocks. The default is what XLA does.
PRECISIONS = {
    "cuda": {"default": "tf32", "float32": "tf32x3", "tensorfloat32": "tf32"},
    "rocm": {"default": "ieee", "float32": "ieee", "tensorfloat32": "ieee"},
    "cpu": {"default": "ieee", "float32": "ieee", "tensorfloat32": "ieee"},
}


def product_precision(precision: str, platform: str) -> str:
    """``Rule.precision`` as Triton's products take it: bfloat16, tf32, tf32x3 or ieee."""
    return "bfloat16" if precision == "bfloat16" else PRECISIONS[platform][precision]


@dataclass(frozen=True)
class Engine:
    """How kernels are run; tests and tools replace parts of it.

    Args:
        name: what winners are filed under.
        step_kernels, attention_kernels: import and return what holds the kernels, by name.
        run_kernel: as :func:`nca_kernels.backends.triton.launch.run_kernel`.
        precision: ``(Rule.precision, platform)`` as the engine's products take it.
        capability: the CUDA compute capability that kernels make use of; 0 for what all have.
        device: the name that winners are looked up by.
        fixed: a launch for every call instead of winners and heuristics, for tests.
    """

    name: str
    step_kernels: Callable[[], Any]
    attention_kernels: Callable[[], Any]
    run_kernel: Callable[..., list[Array]]
    precision: Callable[[str, str], str] = product_precision
    capability: Callable[[], int] = lambda: 0
    device: Callable[[], str] = lambda: jax.devices()[0].device_kind
    fixed: Callable[[Any], Launch] | None = None


def step_launch(
    engine: Engine, kernel: str, call: Any, platform: str, operands: Operands, op: Callable
) -> Launch:
    """The launch of ``kernel``, ``step_forward`` or ``step_backward``, for this call.

    ``op``: what runs it, ``(engine, call, platform, operands, ...)``, for tuning.
    """

    def guess() -> Launch:
        precise = engine.precision(call.rule.precision, platform) in ("ieee", "tf32x3")
        return heuristic(kernel, call, operands, precise, engine.capability())

    tunable = Tunable(engine, kernel, call, platform, operands, op)
    return _chosen(tunable, problem_name(call, operands), guess)


def attention_launch(
    engine: Engine, kernel: str, call: Any, platform: str, operands: AttentionOperands, op: Callable
) -> Launch:
    """The launch of ``kernel``, ``attention_forward`` or ``attention_backward``, for this call.

    ``op``: as for :func:`step_launch`.
    """
    *_, heads, size = operands.query.shape
    problem = (
        f"{call.num_spatial_dims}d {operands.query.dtype} radius {call.radius} "
        f"heads {heads} size {size}"
    )

    def guess() -> Launch:
        return Launch(rows=max(16, min(128, 2**12 // block(size))))

    return _chosen(Tunable(engine, kernel, call, platform, operands, op), problem, guess)


def _chosen(tunable: Tunable, problem: str, guess: Callable[[], Launch]) -> Launch:
    """The engine's launch, the fastest if tuning was asked for, a winner, or a guess."""
    engine = tunable.engine
    if engine.fixed is not None:
        return engine.fixed(tunable.call)
    problem = f"{engine.name} {problem}"
    if os.environ.get(TUNE) == "1":
        return tuned(tunable, problem, guess())
    return winner(engine.device(), tunable.kernel, problem) or guess()


def problem_name(call: Any, operands: Operands) -> str:
    """What a winner is filed under: dims, dtype, widths, precision, and whether cells are many."""
    channels, cells = operands.channels, math.prod(operands.state.shape[1:-1])
    size = " few" if cells < FEW else " many" if cells >= MANY else ""
    taps = operands.weights.taps
    perception = "given" if taps is None else "x".join(map(str, taps.shape[1:]))
    perception += " constant" if call.constant_taps else ""
    hidden = "-".join(map(str, operands.hidden_widths)) or "none"
    return (
        f"{call.num_spatial_dims}d {operands.state.dtype} C{channels} taps {perception} "
        f"inputs {operands.input_size} hidden {hidden} {call.rule.precision}{size}"
    )


def _size(rows: int, block_h: int, warps: int = 4, hoist_invariants: bool = True) -> Launch:
    return Launch(
        rows=rows, block_h=block_h, warps=warps, hoist_invariants=hoist_invariants, stages=1
    )


# By (backward, precise), and by the width of a row's perception and update. Each takes the fewest
# instructions, as `make aot` counts them, of the sizes that do not spill, if there are any.
WIDTHS = (64, 80, 128, 256)
SIZES = {
    (False, False): (_size(64, 128), _size(64, 128, 4, False), _size(32, 64), _size(32, 128)),
    (False, True): (_size(64, 64), _size(64, 64, 4, False), _size(64, 64), _size(32, 64, 8)),
    (True, False): (_size(64, 64), _size(64, 64, 4, False), _size(64, 32), _size(16, 32)),
    (True, True): (_size(64, 16), _size(64, 16, 4, False), _size(64, 16), _size(16, 16)),
}
SIZES_OF_64_ROWS = {
    (False, False): (_size(64, 128), _size(64, 128), _size(64, 128), _size(64, 64)),
    (False, True): SIZES[False, True],
    (True, False): (
        _size(64, 64), _size(64, 64, 4, False), _size(64, 32), _size(64, 64, 8, False),
    ),
    (True, True): (
        _size(64, 32, 4, False), _size(64, 32, 4, False), _size(64, 16), _size(16, 64, 8, False),
    ),
}  # fmt: skip
FEW = 2**16  # cells of a call: each program has a single tile
MANY = 2**20  # cells of a call: each program has several tiles even of twice the size
SIDE_BY_SIDE = 64  # columns: more fill registers, and are a third zeros
# Numbers, 128 KB: they fit a multiprocessor of Hopper beside a program's other blocks.
IN_SHARED_MEMORY = 2**15


def heuristic(kernel: str, call: Any, operands: Operands, precise: bool, capability: int) -> Launch:
    """A launch that works for all calls; compiled ahead of time, common sizes do not spill.

    Args:
        precise: whether products are of float32, which takes three times the registers.
        capability: the device's, see ``Engine.capability``.
    """
    block_c, width = block(operands.channels), _width(operands)
    backward, of_64_rows = kernel == "step_backward", device.has_64_row_products(capability)
    sizes = (SIZES_OF_64_ROWS if of_64_rows else SIZES)[backward, precise]
    size = sizes[sum(width > limit for limit in WIDTHS[:-1])]
    hidden = max(operands.hidden_widths, default=16)
    tile = _tile(call.num_spatial_dims, operands.grid, operands.samples, block_c)
    beyond = -(-width // WIDTHS[-1])  # of wider rows, fewer fit registers
    column_bytes = 18 if precise and backward else 12  # of shared memory, at most, as compiled
    fit = device.shared_memory(capability) // (width * column_bytes)
    units = min(size.block_h // min(beyond, 2), max(32, 128 // beyond))
    # Products of 64 rows read weights from shared memory anyway; those of fewer, from registers.
    from_shared_memory = of_64_rows and not (backward or precise)
    return replace(
        size,
        tile=tile,
        rows=_power_of_two(min(size.rows // beyond, fit, math.prod(tile))),
        block_h=min(block(hidden), _power_of_two(units)),
        programs=132 if size.warps > 4 else 264,  # what fits Hopper's 132 multiprocessors
        unroll=1 if width > WIDTHS[1] else 3,
        side_by_side=SIDE_BY_SIDE if of_64_rows else 0,
        weights_in_shared_memory=IN_SHARED_MEMORY if from_shared_memory else 0,
    )


def _width(operands: Operands) -> int:
    """Columns of all the parts of a row's perception, and of its update."""
    block_c = block(operands.channels)
    if not operands.filters:  # the perception is given
        return 2 * block_c
    dense = operands.dense
    return block_c + (block(operands.perception_size) if dense else block_c * operands.filters)


def _power_of_two(size: int) -> int:
    """The largest power of two that is not above ``size``, but at least 16."""
    return max(16, 1 << (size.bit_length() - 1) if size else 0)


def _tile(dims: int, grid: tuple[int, ...], batch: int, block_c: int) -> tuple[int, int, int]:
    """A tile of about 256 cells: fewer if cells are wide, more if the call has many cells.

    It has at most as many cells along an axis as the grid, rounded up to a power of two.
    """
    size = 512 if batch * math.prod(grid) >= MANY else 256
    runs = max(1, min(size, 2**14 // block_c) // RUN)
    tile = {
        1: (1, 1, runs * RUN),
        2: (1, runs, RUN),
        3: (min(4, max(runs // 2, 1)), max(runs // 4, 1), RUN),
    }[dims]
    sizes = zip(tile, three_axes(grid), strict=True)
    z, y, x = (min(cells, 1 << (size - 1).bit_length()) for cells, size in sizes)
    return z, y, max(x, RUN)


def too_wide_for_tiles(call: Any, avals: Sequence[Any]) -> str | None:
    """Why a call is too wide for kernels whose blocks of cells hold all channels, or None."""
    if call.op == "neighborhood_attention":
        size, most = avals[0].shape[-1], WIDEST
        return f"it takes heads of up to {most} numbers, got {size}" if size > most else None
    operands = call.operands(avals)
    capability = device.capability()
    exact = ("float32",) if device.has_tf32(capability) else ("float32", "tensorfloat32", "default")
    share = 2 if call.rule.precision in exact else 1
    share *= -(-FITTING // device.shared_memory(capability))
    width, most = _width(operands), WIDEST // share
    if width > most:
        return (
            f"on this device it takes up to {most} numbers a cell with "
            f"precision={call.rule.precision!r}, those of the channels and of each filter rounded "
            f"up to a power of two, got {width}"
        )
    dense = block(operands.channels) * block(operands.perception_size) if operands.dense else 0
    if dense > DENSEST // share:
        return (
            f"on this device it takes dense taps of up to {DENSEST // share} numbers a position "
            f"with precision={call.rule.precision!r}, rounded up to powers of two, got {dense}"
        )
    return None
