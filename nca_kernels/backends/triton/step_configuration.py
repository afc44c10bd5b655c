"""What the kernels of a step are compiled for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import jax
import numpy as np

from nca_kernels.backends.triton.geometry import RUN, Axis, Sizes, block
from nca_kernels.backends.triton.weights import MLP, PackedWeights, Perception
from nca_kernels.call import Operands, StepCall, three_axes
from nca_kernels.fire_mask import threshold
from nca_kernels.tuning import Launch


@dataclass(frozen=True)
class Wanted:
    """Which gradients are asked for; ``sources``: a given perception's, and those of inputs."""

    state: bool = False
    weights: bool = False
    taps: bool = False
    perception_bias: bool = False
    sources: tuple[bool, bool] = (False, False)

    @property
    def anything(self) -> bool:
        return self.state or self.weights or any(self.sources)


@dataclass(frozen=True)
class Scratch:
    """Each program's own memory, and where things lie in it, in numbers of 32 bits.

    Backward it begins with what the tile's active cells contribute to the state, a row of
    ``contribution`` numbers for each behind a row of zeros.

    Args:
        contribution: numbers of a row: by tap ``[K, BC]`` or by filter ``[F, BP]``.
        rows_at: where each cell of the tile and around it has its row.
        lanes_at: the lanes that have rows.
        flags_at: each lane's flags.
        words_at: words of who lives.
        hidden_at: hidden layers, but the last, of a block of rows.
        gradient_at: gradients of all hidden layers of a block of rows.
        size: of all.
    """

    contribution: int
    rows_at: int
    lanes_at: int
    flags_at: int
    words_at: int
    hidden_at: tuple[int, ...]
    gradient_at: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class StepConfiguration:
    """All that the kernels of a ``step`` or an ``update`` are compiled for.

    Kernels read it as their constant ``config``; see :class:`.constants.CompileTime`.

    Args:
        z, y, x: the axes of tiles.
        aligned: 16, 4, 2 or 1, what the grid's width is a multiple of.
        one_group: whether there is a single group.
        one_tile: whether each program has a single tile.
        int64_indices: whether an array is too large for indices of 32 bits.
        channels: of the state.
        padding, activation, perception_activation, negative_slope, step_size: those of the rule.
        fire_source: what says who fires: "all", a "key", or a "mask".
        fire_per_group: 1 if each group has its own key or mask, 0 if they share one: a factor.
        fire_threshold: what random bits of a cell that fires are below.
        alive: whether there is alive masking.
        alive_channel, alive_threshold: those of the rule, the channel counted from 0.
        alive_radius: how far the alive pool reaches.
        weights_per_group: 1 if each group has its own weights, 0 if they share one set: a factor.
        perception, mlp, wanted: see there.
        precision: of products: bfloat16, tf32, tf32x3 or ieee.
        rounds_by_instruction: whether one instruction rounds to TF32.
        rows: cells that go through products at a time.
        unroll, hoist_invariants: as of :class:`nca_kernels.tuning.Launch`.
        contributions_by_tap: whether a program keeps what cells contribute to the state tap by
            tap, backward, and not by filter.
        weights_in_shared_memory, weight_gradients_in_registers: whether a program keeps them there.
        add_rows, add_columns: the block of programs and weights that ``add_programs`` adds up.
    """

    z: Axis
    y: Axis
    x: Axis
    aligned: int
    one_group: bool
    one_tile: bool
    int64_indices: bool
    channels: int
    padding: str
    activation: str
    perception_activation: str
    negative_slope: float
    step_size: float
    fire_source: str
    fire_per_group: int
    fire_threshold: int
    alive: bool
    alive_channel: int
    alive_threshold: float
    alive_radius: int
    weights_per_group: int
    perception: Perception
    mlp: MLP
    wanted: Wanted
    precision: str
    rounds_by_instruction: bool
    rows: int
    unroll: int
    hoist_invariants: bool
    contributions_by_tap: bool
    weights_in_shared_memory: bool
    weight_gradients_in_registers: bool
    add_rows: int = 32
    add_columns: int = 64

    @property
    def block_c(self) -> int:
        return block(self.channels)

    # ---- borders ----

    @property
    def zeros_outside(self) -> bool:
        """Whether the perception sees zeros outside the grid, and else some cell."""
        return self.padding == "zeros"

    @property
    def borders_fold_back(self) -> bool:
        """Whether positions outside the grid show cells, which get gradients from there."""
        return self.padding != "zeros"

    @property
    def pool_wraps(self) -> bool:
        """Whether the alive pool sees cells across borders.

        Where paddings other than circular show it a cell, that cell is in its window anyway.
        """
        return self.padding == "circular"

    @property
    def pool_padding(self) -> str:
        """What :func:`.cells.border` is to do for the alive pool."""
        return "circular" if self.pool_wraps else "zeros"

    # ---- tiles ----

    @property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        return self.z, self.y, self.x

    @property
    def tile_cells(self) -> int:
        return math.prod(axis.tile for axis in self.axes)

    @property
    def runs(self) -> int:
        """Of 16 cells, in a tile."""
        return self.tile_cells // RUN

    @property
    def runs_x(self) -> int:
        return self.x.tile // RUN

    @property
    def runs_with_halo(self) -> int:
        """Runs that tell the fate of a tile's cells, rounded up to a power of two."""
        return block(self.z.with_halo * self.y.with_halo * self.runs_x)

    @property
    def pool_positions(self) -> int:
        """Of the alive pool's window."""
        return math.prod(axis.pool for axis in self.axes)

    @property
    def reach(self) -> int:
        """How many positions a tile's cells contribute to: the tile and some around it."""
        return math.prod(axis.reach for axis in self.axes)

    @property
    def around(self) -> int:
        """How many positions may contribute to those."""
        return math.prod(axis.around for axis in self.axes)

    @property
    def edges(self) -> int:
        """How many of a tile's cells other tiles contribute to."""
        return self.tile_cells - math.prod(axis.tile - axis.edge for axis in self.axes)

    @property
    def has_overlaps(self) -> bool:
        """Whether tiles contribute to gradients of each other's cells, or across borders."""
        reaches = self.perception.filters > 0 and self.reach > self.tile_cells
        return self.wanted.state and reaches

    # ---- memory ----

    @cached_property
    def packed(self) -> PackedWeights:
        return PackedWeights(self.perception, self.mlp)

    @cached_property
    def scratch(self) -> Scratch:
        by_tap = self.perception.positions * self.block_c
        contribution = by_tap if self.contributions_by_tap else self.perception.columns
        rows_at = (1 + self.tile_cells) * contribution
        lanes_at = rows_at + self.around if self.wanted.anything else 0
        flags_at = lanes_at + self.tile_cells
        words_at = flags_at + self.tile_cells
        hidden = self.mlp.widths[:-1]
        written = hidden[:-1]  # the last one goes by in blocks, forward
        gradients = hidden if written and self.wanted.anything else ()
        sizes = [self.rows * width for width in (*written, *gradients)]
        at = list(accumulate(sizes, initial=words_at + self.runs_with_halo))
        return Scratch(
            contribution=contribution,
            rows_at=rows_at,
            lanes_at=lanes_at,
            flags_at=flags_at,
            words_at=words_at,
            hidden_at=tuple(at[: len(written)]),
            gradient_at=tuple(at[len(written) : -1]),
            size=at[-1],
        )


def step_configuration(
    call: StepCall,
    operands: Operands,
    launch: Launch,
    *,
    precision: str,
    rounds_by_instruction: bool,
    wanted: Operands | None = None,
) -> tuple[StepConfiguration, Sizes]:
    """What the kernels of a ``step`` or ``update`` are compiled for, and the call's sizes.

    Args:
        precision, rounds_by_instruction: as of :class:`StepConfiguration`.
        wanted: of a backward, the gradients that are asked for, as flags; None of a forward.
    """
    rule, channels, fire = call.rule, operands.channels, operands.fire
    alive, radius = rule.alive, 1 if rule.alive is None else rule.alive.radius
    sizes, axes = _sizes_and_axes(operands, launch, radius)
    perception, mlp = _perception(call, operands, launch), _mlp(operands, launch)
    by_tap = math.prod(launch.tile) * perception.positions * block(channels)
    weights = mlp.block_h * (perception.parts * perception.part + block(channels))
    in_shared_memory = mlp.one_block and weights <= launch.weights_in_shared_memory
    gradients = _wanted(wanted)
    sums_fit = mlp.one_block and perception.parts == 1 and launch.weight_gradients_in_registers
    config = StepConfiguration(
        *axes,
        aligned=next(n for n in (16, 4, 2, 1) if sizes.width % n == 0),
        one_group=sizes.groups == 1,
        one_tile=sizes.programs == sizes.tiles,
        int64_indices=False,
        channels=channels,
        padding=rule.padding,
        activation=rule.activation,
        perception_activation=rule.perception_activation,
        negative_slope=float(rule.negative_slope),
        step_size=float(rule.step_size),
        fire_source=operands.fire_source,
        fire_per_group=int(fire is not None and fire.shape[0] > 1),
        fire_threshold=threshold(rule.fire_rate),
        alive=alive is not None,
        alive_channel=0 if alive is None else alive.channel % channels,
        # As the reference compares: in float32.
        alive_threshold=0.0 if alive is None else float(np.float32(alive.threshold)),
        alive_radius=radius,
        weights_per_group=int(operands.weight_groups > 1),
        perception=perception,
        mlp=mlp,
        wanted=gradients,
        precision=precision,
        rounds_by_instruction=rounds_by_instruction,
        rows=launch.rows,
        unroll=launch.unroll,
        hoist_invariants=launch.hoist_invariants,
        # Of constant taps, of which many are zero, little is gathered of each filter.
        contributions_by_tap=not perception.constant and by_tap <= launch.contributions_by_tap,
        weights_in_shared_memory=wanted is None and in_shared_memory,
        weight_gradients_in_registers=gradients.weights and sums_fit,
    )
    return replace(config, int64_indices=_largest_array(config, sizes) >= 2**31), sizes


def _sizes_and_axes(
    operands: Operands, launch: Launch, radius: int
) -> tuple[Sizes, tuple[Axis, Axis, Axis]]:
    grid, kernel = three_axes(operands.grid), three_axes(operands.kernel)
    z, y, x = (
        Axis(
            tile,
            stencil,
            pool=2 * radius + 1 if size > 1 else 1,
            near=max(stencil // 2, 2 * radius) < size,
        )
        for size, tile, stencil in zip(grid, launch.tile, kernel, strict=True)
    )
    tiles = operands.samples * math.prod(
        -(-size // tile) for size, tile in zip(grid, launch.tile, strict=True)
    )
    programs = max(1, min(tiles, -(-launch.programs // operands.groups)))
    return Sizes(*grid, operands.samples, operands.groups, tiles, programs), (z, y, x)


def _perception(call: StepCall, operands: Operands, launch: Launch) -> Perception:
    dense, filters = operands.dense, operands.filters
    block_p = block(operands.perception_size if dense else operands.channels)
    widest = block(max(filters, 1) * block_p)
    return Perception(
        positions=math.prod(operands.kernel) if filters else 0,
        filters=filters,
        dense=dense,
        block_p=block_p,
        side_by_side=filters > 1 and widest <= launch.side_by_side,
        bias=operands.weights.perception_bias is not None,
        taps=call.constant_taps or (),
    )


def _mlp(operands: Operands, launch: Launch) -> MLP:
    hidden, sources = operands.hidden_widths, (operands.given_size, operands.input_size)
    block_h = min(launch.block_h, block(max(hidden, default=1)))
    widths = (-(-width // block_h) * block_h for width in hidden)
    return MLP(
        widths=(*widths, block(operands.channels)),
        block_h=block_h,
        source_sizes=sources,
        block_s=min(64, block(max(*sources, 1))),
        inputs_per_cell=operands.inputs is None or operands.inputs_per_cell,
    )


def _wanted(flags: Operands | None) -> Wanted:
    if flags is None:
        return Wanted()
    return Wanted(
        state=flags.state is True,
        weights=any(jax.tree.leaves(flags.weights)),
        taps=flags.weights.taps is True,
        perception_bias=flags.weights.perception_bias is True,
        sources=(flags.perception is True, flags.inputs is True),
    )


def _largest_array(config: StepConfiguration, sizes: Sizes) -> int:
    """Numbers of the largest array that kernels index."""
    return sizes.groups * max(
        sizes.cells * max(config.channels, *config.mlp.source_sizes),
        sizes.tiles * config.reach * config.channels,
        sizes.programs * max(config.scratch.size, config.packed.size),
    )
