"""``sharded_rollout``: a rollout of one lattice on many devices.

Every device holds a block of the grid. Before ``steps_per_exchange`` steps it receives from its
neighbours the cells around its block that those steps depend on (the halo), takes the steps with
that, and keeps its block: the halo goes wrong from its outer end inwards, and the steps end before
that reaches the block.

At a true border there is nothing to receive. A block there does not lie in the middle of its
device's window but at the window's end, so that the step itself pads, whatever its padding is.

A grid that the mesh does not divide evenly still lies in blocks of equal size: some of them overlap
by a cell, and both hold the same bits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from nca_kernels.checks import check_num_steps, check_rollout, check_step
from nca_kernels.ops.parts import PartAxis, PartStep, reach
from nca_kernels.ops.rollout import (
    AfterStep,
    checkpointed_scan,
    scan_steps,
    scanned_steps,
    where_sample,
)
from nca_kernels.rule import Controls, Rule, RuleParams, wraps


def sharded_rollout(
    rule: Rule,
    params: RuleParams,
    state: Array,
    key: Any,
    num_steps: int,
    inputs: Array | None = None,
    checkpoint: str | int = "sqrt",
    return_states: bool = False,
    sample_steps: Array | None = None,
    backend: str = "auto",
    after_step: AfterStep | None = None,
    keep: str = "exact",
    *,
    mesh: Any,
    partition_spec: PartitionSpec,
    steps_per_exchange: int = 1,
    overlap: bool = False,
) -> Any:
    """A rollout with the lattice, the batch or both split over the devices of a mesh.

    Equivalent to ``nk.rollout`` with the same arguments, and with the same backend the same states
    to the bit: a cell fires by its position in the whole grid. Gradients of the weights are summed
    in another order, so they agree to rounding.

    Args:
        rule, params, state, key, num_steps, inputs, checkpoint, return_states, sample_steps,
            backend, after_step, keep: as for :func:`nca_kernels.rollout`; the weights are on every
            device. ``after_step`` sees a device's part of the state, with the positions of that
            part in the whole grid; it must be hashable, and functions that are equal are compiled
            once.
        mesh: the devices, a ``jax.sharding.Mesh``.
        partition_spec: which mesh axes split which dims of ``state``: ``P("data", "x", "y")`` for
            ``[batch, height, width, C]``, say; the channels cannot be split, and batch dims must
            be divisible.
        steps_per_exchange: k, the steps between two exchanges of halos. A halo is as wide as k
            steps reach (3x3 taps: k cells, 2k with alive masking): larger k means fewer, larger
            messages, and cells computed twice.
        overlap: step the block as it is while its halo is on the way, and after that strips of
            three halos at each of its ends. Hides slow messages behind the work on the block where
            communication is asynchronous (not on CPUs), at the price of more and smaller kernels.

    Returns:
        As :func:`nca_kernels.rollout`, split as ``partition_spec`` says; along grid dims that are
        not divisible, whole on every device.

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`nca_kernels.rollout`, and for a mesh
            that cannot hold the state, or blocks smaller than a halo.

    The states move between neighbours only, by ``lax.ppermute``; of the weights' gradients there is
    one ``lax.psum``. With ``checkpoint``, "step" stands for ``steps_per_exchange`` steps.
    """
    check_num_steps(num_steps)
    batch_shape = check_step(rule, params, state, key, inputs, num_steps=num_steps)
    check_rollout(num_steps, checkpoint, keep, sample_steps, return_states, batch_shape)
    _check_split(np.shape(state), mesh, partition_spec, steps_per_exchange)
    plan = _Plan(
        step=PartStep.of(rule, params, state, backend, after_step),
        axes=_axes_of(rule, params, np.shape(state), mesh, partition_spec, steps_per_exchange),
        mesh=mesh,
        num_steps=num_steps,
        steps_per_exchange=steps_per_exchange,
        checkpoint=checkpoint,
        keep=keep,
        return_states=return_states,
        overlap=bool(overlap),
    )
    if callable(key):
        key = lax.map(key, jnp.arange(num_steps))
    learned = (params, Controls.split(rule)[1])
    return _run(plan, learned, jnp.asarray(state), key, inputs, sample_steps)


@dataclass(frozen=True)
class _Axis(PartAxis):
    """A dim of the state, split over the devices of ``names``: each of them keeps ``core`` cells.

    Its halo is 0 where every device has all of the dim, and for batch dims.
    """

    names: tuple[str, ...]  # of mesh axes; empty where every device holds all of the dim
    shards: int  # how many devices that makes

    @property
    def window(self) -> int:
        """Cells that a device steps."""
        return self.core + 2 * self.halo

    @property
    def even(self) -> bool:
        return self.core * self.shards == self.size

    def shard(self) -> Any:
        return lax.axis_index(self.names) if self.names else 0

    def start(self, shard: Any) -> Any:
        """The first position of a block; also of the blocks before the first and after the last."""
        return shard * self.size // self.shards

    def offset(self) -> Any:
        """Where in its window this device's block begins: at the end where the border is true."""
        if self.periodic or not self.halo:
            return self.halo
        shard = self.shard()
        middle = jnp.where(shard == self.shards - 1, 2 * self.halo, self.halo)
        return jnp.where(shard == 0, 0, middle)

    def in_window(self) -> Array:
        """Positions in the whole of the cells of this device's window."""
        return self.positions(self.start(self.shard()) - self.offset(), self.window)


@dataclass(frozen=True)
class _Plan:
    """The static facts of a sharded rollout; arguments of that name say what they are."""

    step: PartStep
    axes: tuple[_Axis, ...]  # of the state, without its channels
    mesh: Any
    num_steps: int
    steps_per_exchange: int
    checkpoint: str | int
    keep: str
    return_states: bool
    overlap: bool


def _check_split(
    shape: tuple[int, ...], mesh: Any, spec: PartitionSpec, steps_per_exchange: int
) -> None:
    if not isinstance(mesh, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    if not isinstance(spec, PartitionSpec):
        raise TypeError(
            f"partition_spec must be a jax.sharding.PartitionSpec, got {type(spec).__name__}"
        )
    if isinstance(steps_per_exchange, bool) or not isinstance(steps_per_exchange, int):
        raise TypeError(f"steps_per_exchange must be an int, got {steps_per_exchange!r}")
    if steps_per_exchange < 1:
        raise ValueError(f"steps_per_exchange must be at least 1, got {steps_per_exchange}")
    entries = (*spec, *(None,) * (len(shape) - len(spec)))
    if len(entries) > len(shape) or entries[-1] is not None:
        raise ValueError(
            f"partition_spec must name mesh axes for dims of a state of shape {shape} but not for "
            f"its channels, the last one; got {spec}"
        )
    unknown = [name for names in map(_names, entries) for name in names if name not in mesh.shape]
    if unknown:
        raise ValueError(
            f"partition_spec names {', '.join(map(repr, unknown))}, but the mesh has "
            f"{', '.join(map(repr, mesh.shape))}"
        )


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a partition spec names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _axes_of(
    rule: Rule,
    params: RuleParams,
    shape: tuple[int, ...],
    mesh: Any,
    spec: PartitionSpec,
    steps_per_exchange: int,
) -> tuple[_Axis, ...]:
    """Per dim of the state, without its channels, how it is split.

    Raises:
        ValueError: a batch dim is not divisible, or a block is smaller than its halo.
    """
    entries = (*spec, *(None,) * (len(shape) - len(spec)))
    num_batch_dims = len(shape) + 1 - np.ndim(params.perception)
    axes = []
    for dim, (size, entry) in enumerate(zip(shape[:-1], entries, strict=False)):
        names = _names(entry)
        shards = int(np.prod([mesh.shape[name] for name in names], dtype=int))
        if dim < num_batch_dims:
            if size % shards:
                raise ValueError(
                    f"state dim {dim}, a batch dim of {size}, cannot be split over {shards} "
                    "devices: give a batch that is divisible"
                )
            axes.append(_Axis(size, size // shards, 0, False, names, shards))
            continue
        reached = reach(rule, params)[dim - num_batch_dims]
        halo = reached * steps_per_exchange if shards > 1 else 0
        if halo > size // shards:
            raise ValueError(
                f"state dim {dim} of {size} cells over {shards} devices leaves {size // shards} "
                f"cells to one, fewer than its halo of {halo} (a step reaches {reached}, "
                f"steps_per_exchange is {steps_per_exchange}): split it over fewer devices"
                + (", or exchange more often" if steps_per_exchange > 1 else "")
            )
        core, periodic = -(-size // shards), wraps(rule.padding)
        axes.append(_Axis(size, core, halo, periodic, names, shards))
    return tuple(axes)


@partial(jax.jit, static_argnums=0)
def _run(
    plan: _Plan,
    learned: tuple[RuleParams, Controls],
    state: Array,
    key: Any,
    inputs: Array | None,
    sample_steps: Array | None,
) -> Any:
    """Splits the arrays, steps on every device, and puts the results together."""
    axes, mesh, return_states = plan.axes, plan.mesh, plan.return_states
    names = [axis.names or None for axis in axes]
    cells, samples = PartitionSpec(*names), PartitionSpec(*names[: plan.step.num_batch_dims])
    per_cell = inputs is not None and inputs.ndim == state.ndim
    stacked = PartitionSpec(None, *cells)  # a state, or a mask, for each step
    is_mask = key.dtype == jnp.bool_
    params, controls = learned
    by_sample = jax.tree.map(lambda c: samples if c.ndim else PartitionSpec(), controls)
    mapped = jax.shard_map(
        partial(_on_each_device, plan),
        mesh=mesh,
        in_specs=(
            (PartitionSpec(), by_sample),
            cells,
            stacked if is_mask else PartitionSpec(),
            cells if per_cell else samples,
            samples,
        ),
        out_specs=(cells, stacked if return_states else cells),
    )
    place = partial(_place, mesh)
    blocks = place(_in_blocks(state, axes), cells)
    learned = (params, jax.tree.map(place, controls, by_sample))
    if is_mask:
        key = place(_in_blocks(jnp.asarray(key), axes, leading=1), stacked)
    if inputs is not None and per_cell:
        inputs = place(_in_blocks(inputs, axes), cells)
    elif inputs is not None:
        inputs = place(inputs, samples)
    if sample_steps is not None:
        sample_steps = place(sample_steps, samples)
    final, second = mapped(learned, blocks, key, inputs, sample_steps)
    whole = PartitionSpec(*(name if axis.even else None for name, axis in zip(names, axes)))
    final = _whole(place(final, whole), axes)
    if return_states:
        second = _whole(place(second, PartitionSpec(None, *whole)), axes, leading=1)
    elif sample_steps is not None:
        second = _whole(place(second, whole), axes)
    return final if second is None else (final, second)


def _on_each_device(
    plan: _Plan, learned: Any, block: Array, key: Any, inputs: Any, sample_steps: Any
) -> Any:
    """A device's block after all steps, and its states or samples."""
    axes, num_steps = plan.axes, plan.num_steps
    used = tuple(name for axis in axes for name in axis.names)
    # Marked here, and not in each step, so that gradients are summed over the devices only once.
    learned = jax.tree.map(lambda w: _varying(w, used), learned)
    parts = _parts(axes, plan.overlap)
    inputs_of_parts = [inputs] * len(parts)
    if inputs is not None and inputs.ndim == block.ndim:
        window = _window(inputs, axes)
        inputs_of_parts = [part.take(inputs, window) for part in parts]

    def one_step(carry: tuple[list[Array], Any], at: Any) -> tuple[Any, Any]:
        (states, sampled), (t, source) = carry, at
        sources = [source] * len(parts)
        if source.dtype == jnp.bool_:
            mask = source[..., None]
            mask_window = _window(mask, axes)
            sources = [part.take(mask, mask_window)[..., 0] for part in parts]
        states = [
            plan.step(learned, state, (t, fire), inputs, part.positions)
            for part, state, fire, inputs in zip(
                parts, states, sources, inputs_of_parts, strict=True
            )
        ]
        block = _whole_block(parts, states)
        if sample_steps is not None:
            sampled = where_sample(sample_steps == t + 1, block, sampled)
        return (states, sampled), block if plan.return_states else None

    def exchange_and_step(carry: tuple[Array, Any], steps: Any) -> Any:
        block, sampled = carry
        window = _window(block, axes)
        states = [part.take(block, window) for part in parts]
        (states, sampled), outs = scan_steps(one_step, (states, sampled), steps)
        return (_whole_block(parts, states), sampled), outs

    carry = (block, block if sample_steps is not None else None)
    steps = scanned_steps(key, num_steps)

    def exchanges(carry: Any, first: int, last: int, each: int) -> Any:
        grouped = jax.tree.map(lambda s: s[first:last].reshape(-1, each, *s.shape[1:]), steps)
        carry, states = checkpointed_scan(
            exchange_and_step, carry, grouped, plan.checkpoint, plan.keep
        )
        return carry, states.reshape(-1, *block.shape) if plan.return_states else None

    whole = num_steps - num_steps % plan.steps_per_exchange
    carry, states = exchanges(carry, 0, whole, plan.steps_per_exchange)
    if whole < num_steps:
        carry, more = exchanges(carry, whole, num_steps, num_steps - whole)
        states = jnp.concatenate([states, more]) if plan.return_states else None
    final, sampled = carry
    return final, states if plan.return_states else sampled


def _window(block: Array, axes: Sequence[_Axis]) -> Array:
    """A device's block with the halo that its neighbours send it, one dim after the other.

    What a dim's halo brings is part of what is sent along the next one, so that corners arrive.
    """
    for dim, axis in enumerate(axes):
        if not axis.halo:
            continue
        halo, shard, shards = axis.halo, axis.shard(), axis.shards
        take = partial(lax.dynamic_slice_in_dim, block, slice_size=halo, axis=dim)
        after = axis.start(shard + 1) - axis.start(shard) - halo
        before = axis.start(shard - 1) + axis.core - axis.start(shard)
        pairs = [(i, (i + 1) % shards) for i in range(shards if axis.periodic else shards - 1)]
        left = lax.ppermute(take(after), axis.names, pairs)
        right = lax.ppermute(take(before), axis.names, [(b, a) for a, b in pairs])
        if axis.periodic:
            block = jnp.concatenate([left, block, right], dim)
        else:  # of this the first device takes the end, the last one the beginning
            padded = jnp.concatenate([right, left, block, right, left], dim)
            start = 2 * halo - axis.offset()
            block = lax.dynamic_slice_in_dim(padded, start, axis.window, dim)
    return block


class _Extent(NamedTuple):
    """Along one dim, the cells that a part sees, and those of them that it keeps.

    What differs from device to device is traced.
    """

    begin: Any  # the first cell that it sees, in the window
    size: int  # how many it sees
    kept_from: Any  # the first cell that it keeps, among those that it sees
    kept_size: int  # how many it keeps
    target: int  # the first cell that it keeps, in the block


@dataclass(frozen=True)
class _Part:
    """Cells that a device steps at once, and those of them that it keeps.

    ``is_block``: it is the block without a halo, which can be stepped before the halo is there.
    """

    axes: tuple[_Axis, ...]
    extents: tuple[_Extent, ...]  # by dim
    is_block: bool

    def take(self, block: Array, window: Array) -> Array:
        """The cells that the part sees."""
        if self.is_block:
            return block
        for dim, extent in enumerate(self.extents):
            if extent.size < window.shape[dim]:
                window = lax.dynamic_slice_in_dim(window, extent.begin, extent.size, dim)
        return window

    @property
    def positions(self) -> list[Array]:
        """Which cells of the whole state the part sees, by dim."""
        return [
            lax.dynamic_slice_in_dim(axis.in_window(), extent.begin, extent.size)
            for axis, extent in zip(self.axes, self.extents, strict=True)
        ]

    def put(self, block: Array | None, state: Array) -> Array:
        """``block`` with the cells that the part keeps of its ``state``."""
        for dim, extent in enumerate(self.extents):
            if extent.kept_size < state.shape[dim]:
                state = lax.dynamic_slice_in_dim(state, extent.kept_from, extent.kept_size, dim)
        if block is None:
            return state
        return lax.dynamic_update_slice(block, state, (*(e.target for e in self.extents), 0))


def _parts(axes: tuple[_Axis, ...], overlap: bool) -> list[_Part]:
    """The window, of which the block is kept; or the block, and strips that mend its ends."""
    whole = tuple(_Extent(0, a.window, a.offset(), a.core, 0) for a in axes)
    if not overlap:
        return [_Part(axes, whole, is_block=False)]
    block = tuple(_Extent(a.offset(), a.core, 0, a.core, 0) for a in axes)
    parts = [_Part(axes, block, is_block=True)]
    for dim, axis in enumerate(axes):
        width = 3 * axis.halo  # the cells of its middle come out right, and those at a true border
        for end in (0, axis.core - axis.halo) if axis.halo else ():
            first = axis.offset() + end
            begin = jnp.clip(first - axis.halo, 0, axis.window - width)
            strip = _Extent(begin, width, first - begin, axis.halo, end)
            parts.append(_Part(axes, (*whole[:dim], strip, *whole[dim + 1 :]), is_block=False))
    return parts


def _whole_block(parts: list[_Part], states: list[Array]) -> Array:
    block: Array | None = None
    for part, state in zip(parts, states, strict=True):
        block = part.put(block, state)
    assert block is not None
    return block


def _varying(array: Array, names: tuple[str, ...]) -> Array:
    """``array``, marked as one that differs over the mesh axes ``names``."""
    missing = tuple(n for n in names if n not in jax.typeof(array).manual_axis_type.varying)
    return lax.pcast(array, missing, to="varying") if missing else array


def _in_blocks(array: Array, axes: Sequence[_Axis], leading: int = 0) -> Array:
    """The whole grid as blocks of equal size in a row, overlapping where they must.

    ``leading`` dims come before those of ``axes``.
    """
    for dim, axis in enumerate(axes, start=leading):
        if not axis.even:
            starts = np.arange(axis.shards)[:, None] * axis.size // axis.shards
            array = jnp.take(array, (starts + np.arange(axis.core)).ravel(), axis=dim)
    return array


def _place(mesh: Any, array: Array, spec: PartitionSpec) -> Array:
    """``array``, split as ``spec`` says where the mesh wants that to be said (explicit axes)."""
    explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
    return jax.reshard(array, jax.NamedSharding(mesh, spec)) if explicit else array


def _whole(array: Array, axes: Sequence[_Axis], leading: int = 0) -> Array:
    """The whole grid again, from what :func:`_in_blocks` gives."""
    for dim, axis in enumerate(axes, start=leading):
        if not axis.even:
            starts = np.arange(axis.shards) * axis.size // axis.shards
            position = np.arange(axis.size)
            shard = np.searchsorted(starts, position, side="right") - 1
            array = jnp.take(array, shard * axis.core + position - starts[shard], axis=dim)
    return array
