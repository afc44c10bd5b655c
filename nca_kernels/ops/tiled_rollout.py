"""``tiled_rollout``: a rollout of a lattice in the host's memory, of which a device sees a tile.

A tile is taken with the cells around it that ``steps_per_pass`` steps depend on (the halo), goes to
the device, takes these steps there, and comes back without them. One pass over all tiles advances
the whole lattice, so the device holds a few tiles whatever the size of the lattice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nca_kernels.checks import check_rollout, check_step
from nca_kernels.dispatch import requested
from nca_kernels.ops.parts import PartStep, reach
from nca_kernels.ops.rollout import AfterStep, numbers_and_keys, scan_steps
from nca_kernels.perception import constant_taps
from nca_kernels.rule import Rule, RuleParams


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
    the same states to the bit: a cell fires by its place in the whole grid. For running, not for
    training: it has no gradient, and cannot be traced.

    Args:
        rule, params, key, num_steps, inputs, backend: as for :func:`nca_kernels.rollout`.
        state: ``[*batch, *spatial, C]``, a NumPy array (``np.memmap`` is one). Beside it there are
            two more arrays of its size, or one with ``donate``.
        after_step: as for :func:`nca_kernels.rollout`, of a tile, with the places of the tile in
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
    batch_shape = check_step(rule, params, state, key, inputs)
    check_rollout(num_steps, "all", "exact", None, False, batch_shape)
    grid, reaches = state.shape[len(batch_shape) : -1], reach(rule, params)
    constant = constant_taps(params.perception, state.shape[-1])
    step = PartStep(
        rule, requested(backend), constant, after_step, state.shape[:-1], len(batch_shape)
    )
    steps = numbers_and_keys(key, num_steps)
    may_write, spare = donate and state.flags.writeable, None
    for first in range(0, num_steps, steps_per_pass):
        some = jax.tree.map(lambda s: s[first : first + steps_per_pass], steps)  # noqa: B023
        count = len(some[0])
        axes = tuple(
            _Axis(size, min(tile, size), count * reached, rule.padding == "circular")
            for size, reached in zip(grid, reaches, strict=True)
        )
        run = partial(_steps, step, axes, params, some)
        new = np.empty(state.shape, state.dtype) if spare is None else spare
        for cells in _pass(run, axes, state, new, inputs):
            if progress is not None:
                progress(count * cells)
        spare = state if may_write else None
        state, may_write = new, True
    return state if num_steps or donate else state.copy()


@dataclass(frozen=True)
class _Axis:
    """A grid dim: of each tile the device sees a window, the tile and its halo."""

    size: int
    tile: int
    halo: int
    periodic: bool

    @property
    def window(self) -> int:
        return self.size if self.tile == self.size else min(self.size, self.tile + 2 * self.halo)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Of each tile its first place and how many of its places no tile before it has."""
        for start in range(0, self.size, self.tile):
            yield min(start, self.size - self.tile), min(self.tile, self.size - start)

    def corner(self, start: int) -> int:
        """First place of a window: at a true border the border itself, so that padding meets it."""
        if self.window == self.size:
            return 0
        first = start - self.halo
        return first if self.periodic else min(max(first, 0), self.size - self.window)

    def places(self, corner: Any) -> Array:
        """Which places of the whole dim a window shows."""
        return (corner + jnp.arange(self.window)) % self.size


def _pass(
    run: Callable[..., Array],
    axes: Sequence[_Axis],
    state: np.ndarray,
    new: np.ndarray,
    inputs: Any,
) -> Iterator[int]:
    """Fills ``new`` tile by tile; yields the number of cells done."""
    per_cell = inputs is not None and np.ndim(inputs) == state.ndim
    inputs = np.asarray(inputs) if per_cell else inputs
    waiting: Callable[[], None] | None = None
    for tiles in itertools.product(*(axis.tiles() for axis in axes)):
        starts = [start for start, _ in tiles]
        corners = [axis.corner(start) for axis, start in zip(axes, starts, strict=True)]
        seen = _window(inputs, axes, corners) if per_cell else inputs
        out = run(_window(state, axes, corners), seen, np.array(corners), np.array(starts))
        if waiting is not None:  # the device has work while the tile before comes back
            waiting()
        waiting = partial(_put, new, axes, starts, out)
        cells = new.size // new.shape[-1]
        for axis, (_, fresh) in zip(axes, tiles, strict=True):
            cells = cells // axis.size * fresh
        yield cells
    if waiting is not None:
        waiting()


def _window(array: np.ndarray, axes: Sequence[_Axis], corners: Sequence[int]) -> np.ndarray:
    for dim, (axis, corner) in enumerate(zip(axes, corners, strict=True), -len(axes) - 1):
        places = range(corner, corner + axis.window)
        if places.start >= 0 and places.stop <= axis.size:
            array = np.moveaxis(np.moveaxis(array, dim, 0)[places.start : places.stop], 0, dim)
        else:
            array = array.take(places, dim, mode="wrap")
    return array


def _put(new: np.ndarray, axes: Sequence[_Axis], starts: Sequence[int], tile: Array) -> None:
    places: list[Any] = [slice(s, s + axis.tile) for axis, s in zip(axes, starts, strict=True)]
    new[(..., *places, slice(None))] = np.asarray(tile)


@partial(jax.jit, static_argnums=(0, 1))
def _steps(
    step: PartStep,
    axes: tuple[_Axis, ...],
    params: RuleParams,
    steps: Any,
    window: Array,
    inputs: Array | None,
    corners: Array,
    starts: Array,
) -> Array:
    """The tile of a window after some steps."""
    batch_shape = step.shape[: step.num_batch_dims]
    places = [jnp.arange(size) for size in batch_shape]
    places += [axis.places(corner) for axis, corner in zip(axes, corners, strict=True)]

    def one_step(state: Array, at: Any) -> tuple[Array, None]:
        return step(params, state, at[1], inputs, places), None

    window, _ = scan_steps(one_step, window, steps)
    for dim, axis in enumerate(axes, len(batch_shape)):
        offset = starts[dim - len(batch_shape)] - corners[dim - len(batch_shape)]
        window = lax.dynamic_slice_in_dim(window, offset, axis.tile, dim)
    return window
