"""What a kernel of a step issues for each cell, read off its machine code.

A multiprocessor issues four instructions of warps a cycle at best, so these counts are a bound on
speed that needs no GPU: where they cost more time than bytes and products do, they are what to
work on. It is a count, not a measurement: nothing of latencies, caches and conflicts is in it.
"""

from __future__ import annotations

import math
import re
from typing import Any

from nca_kernels.backends.triton.geometry import Sizes
from nca_kernels.tuning import Launch

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x_\d+):")
# Far branches are calls that do not return.
BRANCH = re.compile(r"\b(?:BRA|CALL\.REL)\b.*`\((\.L_x_\d+)\)")
ALWAYS = re.compile(r"((BRA|CALL\.REL)(\.\w+)* `\(\.L_x|EXIT)")  # without a predicate
TENSOR = r"\b(HGMMA|HMMA|UTCHMMA)"
LOAD = r"\bLDG\b"
LEAVE = r"\b(BRA|EXIT)\b"
Loop = frozenset[int]  # its instructions


def warp_instructions_a_cell(
    kernel: str, code: str, config: Any, sizes: Sizes, launch: Launch, fire_rate: float = 0.5
) -> float | None:
    """Instructions that warps issue for a cell of a grid whose cells are all alive and stay so.

    Args:
        kernel: its name: ``step_forward``, ``clear_dead``, ``step_backward``, ``add_overlaps``.
        code: the kernel's, as nvdisasm prints it.
        config: what it is compiled for, a ``StepConfiguration``.
        sizes, launch: those of the call.
        fire_rate: of the cells, 0 to 1.
    Returns:
        None where loops cannot be told apart: with dense taps, without tensor cores, with alive
        pools of more than 27 positions, and of overlaps with borders other than zeros. None for
        other kernels, too.
    """
    if kernel in ("step_forward", "clear_dead") and config.pool_positions > 27:
        return None
    instructions, after = _parse(code)
    loops = _loops(after)
    if kernel == "clear_dead":  # straight on, but that it may leave where no cell dies
        leaves = next(i for i, text in enumerate(instructions) if re.search(LEAVE, text))
        return (leaves + 1) * launch.warps / config.tile_cells
    if kernel == "add_overlaps" and not config.borders_fold_back:
        turns: dict[Loop, float] = dict.fromkeys(loops, math.ceil(config.edges / launch.rows))
    elif (
        kernel in ("step_forward", "step_backward")
        and not config.perception.dense
        and any(re.search(TENSOR, i) for i in instructions)
    ):
        turns = {
            loop: _turns(loop, instructions, loops, config, launch, fire_rate) for loop in loops
        }
    else:
        return None
    loops = [loop for loop in loops if len(loop) > 1]  # what fills up a kernel's code
    shares = _shares_of_tiles(instructions, after, loops, config, sizes)
    issued = sum(
        shares.get(at, 1.0) * math.prod(turns[loop] for loop in loops if at in loop)
        for at in range(len(instructions))
    )
    return issued * launch.warps / config.tile_cells


def _shares_of_tiles(
    instructions: list[str], after: list[list[int]], loops: list[Loop], config: Any, sizes: Sizes
) -> dict[int, float]:
    """Of tiles with and without a margin, for the instructions that only one kind of them takes.

    Those are the two ways on from a branch, both with loads; the shorter one needs no border.
    """
    inner = 1.0
    grid = (sizes.depth, sizes.height, sizes.width)
    for axis, size in zip(config.axes, grid, strict=True):
        first = range(0, size, axis.tile)
        inside = [axis.before <= i <= size - axis.tile - axis.after for i in first]
        inner *= sum(inside) / len(inside)
    shares: dict[int, float] = {}
    for at, to in enumerate(after):
        around = min((loop for loop in loops if at in loop), key=len, default=frozenset())
        if len(to) == 2 and min(to) > at and around.issuperset(to):
            one, other = (_reachable([start], after, min(around)) for start in to)
            one, other = sorted((one - other, other - one), key=len)
            if all(any(re.search(LOAD, instructions[i]) for i in way) for way in (one, other)):
                shares |= dict.fromkeys(one, inner) | dict.fromkeys(other, 1 - inner)
    return shares


def _turns(
    loop: Loop, instructions: list[str], loops: list[Loop], config: Any, launch: Launch,
    fire_rate: float,
) -> float:  # fmt: skip
    """Turns of a loop for one tile.

    With products: over tiles (if programs have several), in it rows, in it hidden units. Without:
    over the places that a tile reaches, in it (or in rows) positions of the stencil; clearing.
    """
    outside = sum(loop < other for other in loops)

    def has(pattern: str) -> bool:
        return any(re.search(pattern, instructions[at]) for at in loop)

    if has(TENSOR):
        depth = outside + config.one_tile
        if depth == 0:
            return 1
        if depth == 1:
            return _mean_blocks(config, launch, fire_rate)
        return config.mlp.widths[0] / config.mlp.block_h
    if outside + config.one_tile > 1:
        return math.ceil(config.perception.positions / launch.unroll)
    return math.ceil(config.reach / launch.rows) if has(LOAD) else 1


def _mean_blocks(config: Any, launch: Launch, fire_rate: float) -> float:
    """How many blocks of rows a tile's firing cells fill, on average."""
    cells = config.tile_cells
    return sum(
        math.comb(cells, n) * fire_rate**n * (1 - fire_rate) ** (cells - n) * -(-n // launch.rows)
        for n in range(cells + 1)
    )


# ---- control flow ----


def _parse(code: str) -> tuple[list[str], list[list[int]]]:
    """The instructions, and which may come after each."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.search(line):
            instructions.append(found[1])
    after = []
    for at, instruction in enumerate(instructions):
        to = [] if ALWAYS.match(instruction) or at + 1 == len(instructions) else [at + 1]
        if branch := BRANCH.search(instruction):
            to.append(labels[branch[1]])
        after.append(to)
    return instructions, after


def _loops(after: list[list[int]]) -> list[Loop]:
    """Natural loops, by the instruction that they begin with."""
    before: list[list[int]] = [[] for _ in after]
    for at, to in enumerate(after):
        for other in to:
            before[other].append(at)
    # In a loop is what reaches the branch back to its first instruction, but not past that. What
    # is reachable from the kernel's start without the first instruction does not belong to it.
    found: dict[int, set[int]] = {}
    for end, to in enumerate(after):
        for first in to:
            if first <= end:
                body = _reachable([end], before, first) | {first}
                if 0 not in body or first == 0:
                    found.setdefault(first, set()).update(body)
    return [frozenset(body) for body in found.values()]


def _reachable(starts: list[int], edges: list[list[int]], wall: int) -> set[int]:
    seen, todo = {wall}, list(starts)
    while todo:
        at = todo.pop()
        if at not in seen:
            seen.add(at)
            todo += edges[at]
    return seen
