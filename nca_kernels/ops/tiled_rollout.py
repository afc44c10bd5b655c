"""``tiled_rollout``: a rollout of a lattice in the host's memory, of which a device sees a tile.

A tile goes to the device together with the cells around it that ``steps_per_pass`` steps depend on
(the halo), takes these steps there, and comes back without its halo. One pass over all tiles
advances the whole lattice, so the device holds a few tiles whatever the size of the lattice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.random import fold_in

from nca_kernels.checks import check_num_steps, check_rollout, check_step
from nca_kernels.ops.parts import PartAxis, PartStep, reach
from nca_kernels.ops.rollout import AfterStep, scan_steps
from nca_kernels.rule import Controls, Rule, RuleParams, wraps


def tiled_rollout(
    rule: Rule,
    params: RuleParams,
    state: np.ndarray,
    key: Any,
    num_steps: int,
    inputs: Array | np.ndarray | None = None,
    backend: str = "auto",
    after_step: AfterStep | None = None,
    *,
    tile: int = 1024,
    steps_per_pass: int = 8,
    donate: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """A rollout of a lattice that only the host's memory holds, tile by tile.

    Equivalent to ``np.asarray(nk.rollout(...))`` with the same arguments, and with the same backend
    the same states to the bit: a cell fires by its position in the whole grid. For running, not for
    training: it has no gradient, and cannot be traced.

    Args:
        rule, params, key, num_steps, inputs, backend: as for :func:`nca_kernels.rollout`.
        state: ``[*batch, *spatial, C]``, a NumPy array (``np.memmap`` is one). Beside it there are
            two more arrays of its size, or one with ``donate``.
        after_step: as for :func:`nca_kernels.rollout`, of a tile, with its positions in
            the whole grid; hashable, or everything is compiled again for each call.
        tile: cells along each grid dim that a tile keeps; smaller dims are whole.
        steps_per_pass: k, the steps that a tile takes at a time. Its halo is as wide as k steps
            reach (3x3 taps: k cells, 2k with alive masking): larger k means that the lattice is
            copied less often, and that more cells are computed twice.
        donate: whether ``state`` may be overwritten.
        progress: called with the number of cell-steps done since its last call.

    Returns:
        The final state, a NumPy array.

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`nca_kernels.rollout`, and for a state
            that is not in the host's memory.
    """
    if not isinstance(state, np.ndarray):
        raise TypeError(
            f"state must be a NumPy array, got {type(state).__name__}: np.asarray(state)"
        )
    for name, value in (("tile", tile), ("steps_per_pass", steps_per_pass)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    check_num_steps(num_steps)
    batch_shape = check_step(rule, params, state, key, inputs, num_steps=num_steps)
    check_rollout(num_steps, "all", "exact", None, False, batch_shape)
    step = PartStep.of(rule, params, state, backend, after_step)
    grid, reaches = state.shape[len(batch_shape) : -1], reach(rule, params)
    learned = (params, Controls.split(rule)[1])
    may_write, spare = donate and state.flags.writeable, None
    for first in range(0, num_steps, steps_per_pass):
        numbers = np.arange(first, min(first + steps_per_pass, num_steps), dtype=np.int32)
        axes = tuple(
            _Axis(size, min(tile, size), len(numbers) * reached, wraps(rule.padding))
            for size, reached in zip(grid, reaches, strict=True)
        )
        sources = _Sources(state, inputs, _masks(key, numbers))
        keys = None if sources.masks is not None else jax.vmap(partial(fold_in, key))(numbers)
        run = partial(_steps, _Plan(step, axes), learned, (numbers, keys))
        new = np.empty(state.shape, state.dtype) if spare is None else spare
        for cells in _pass(run, axes, sources, new):
            if progress is not None:
                progress(len(numbers) * cells)
        spare = state if may_write else None
        state, may_write = new, True
    return state if num_steps or donate else state.copy()


@dataclass(frozen=True)
class _Axis(PartAxis):
    """A grid dim, of which a device sees a window: a tile of ``core`` cells and its halo."""

    @property
    def window(self) -> int:
        return self.size if self.core == self.size else min(self.size, self.core + 2 * self.halo)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """The first cell of each tile, and how many of its cells no tile before it has."""
        for start in range(0, self.size, self.core):
            yield min(start, self.size - self.core), min(self.core, self.size - start)

    def corner(self, start: int) -> int:
        """The first cell of a tile's window: at a true border the border, so that padding works."""
        if self.window == self.size:
            return 0
        first = start - self.halo
        return first if self.periodic else min(max(first, 0), self.size - self.window)


@dataclass(frozen=True)
class _Plan:
    """The static facts of the steps of a tile."""

    step: PartStep
    axes: tuple[_Axis, ...]  # of the grid


class _Sources(NamedTuple):
    """What the host has of the whole, or a device of a window."""

    state: Any  # [*batch, *spatial, C]
    inputs: Any  # [*batch, *spatial, I], [*batch, I] or None
    masks: Any  # which cells fire in each step of a pass, [k, *batch, *spatial, 1], or None


def _masks(key: Any, numbers: np.ndarray) -> np.ndarray | None:
    """The masks of the steps ``numbers``, ``[k, *batch, *spatial, 1]``; None if they are drawn."""
    if callable(key):
        return np.stack([np.asarray(key(jnp.int32(t))) for t in numbers])[..., None]
    if key.dtype == np.bool_:
        return np.asarray(key[numbers[0] : numbers[-1] + 1])[..., None]
    return None


class _Tile(NamedTuple):
    """What a device gets to step a tile."""

    window: _Sources
    corners: np.ndarray  # int [dims]: the first cell of the window, in the whole
    starts: np.ndarray  # int [dims]: the first cell of the tile, in the whole


def _pass(
    run: Callable[[_Tile], Array],
    axes: Sequence[_Axis],
    sources: _Sources,
    new: np.ndarray,
) -> Iterator[int]:
    """Fills ``new`` tile by tile; yields the number of cells done."""
    finish: Callable[[], None] | None = None
    for tiles in itertools.product(*(axis.tiles() for axis in axes)):
        starts = [start for start, _ in tiles]
        corners = [axis.corner(start) for axis, start in zip(axes, starts, strict=True)]
        window = _Sources(*(_cut(array, new.ndim, axes, corners) for array in sources))
        out = run(_Tile(window, np.array(corners), np.array(starts)))
        if finish is not None:  # the device has work while the tile before comes back
            finish()
        finish = partial(_put, new, axes, starts, out)
        cells = new.size // new.shape[-1]
        for axis, (_, fresh) in zip(axes, tiles, strict=True):
            cells = cells // axis.size * fresh
        yield cells
    if finish is not None:
        finish()


def _cut(array: Any, ndim: int, axes: Sequence[_Axis], corners: Sequence[int]) -> Any:
    """The windows that begin at ``corners``, of an array ``[..., *batch, *spatial, channels]``.

    Arrays that have fewer than ``ndim`` dims, and so no grid, as they are.
    """
    if array is None or np.ndim(array) < ndim:
        return array
    array = np.asarray(array)
    for dim, (axis, corner) in enumerate(zip(axes, corners, strict=True), -len(axes) - 1):
        window = range(corner, corner + axis.window)
        if window.start >= 0 and window.stop <= axis.size:
            array = np.moveaxis(np.moveaxis(array, dim, 0)[window.start : window.stop], 0, dim)
        else:
            array = array.take(window, dim, mode="wrap")
    return array


def _put(new: np.ndarray, axes: Sequence[_Axis], starts: Sequence[int], tile: Array) -> None:
    cells: list[Any] = [slice(s, s + axis.core) for axis, s in zip(axes, starts, strict=True)]
    new[(..., *cells, slice(None))] = np.asarray(tile)


@partial(jax.jit, static_argnums=0)
def _steps(plan: _Plan, learned: Any, steps: Any, tile: _Tile) -> Array:
    """The cells of a tile after some steps, whose numbers and keys (or None) are ``steps``."""
    num_batch_dims = plan.step.num_batch_dims
    positions = [jnp.arange(size) for size in plan.step.shape[:num_batch_dims]]
    for axis, corner in zip(plan.axes, tile.corners, strict=True):
        positions.append(axis.positions(corner, axis.window))

    state, inputs, masks = tile.window
    sources = steps[1] if masks is None else masks[..., 0]

    def one_step(state: Array, at: Any) -> tuple[Array, None]:
        return plan.step(learned, state, at, inputs, positions), None

    state, _ = scan_steps(one_step, jnp.asarray(state), (steps[0], sources))
    offsets = tile.starts - tile.corners
    for dim, (axis, offset) in enumerate(zip(plan.axes, offsets, strict=True), num_batch_dims):
        state = lax.dynamic_slice_in_dim(state, offset, axis.core, dim)
    return state
