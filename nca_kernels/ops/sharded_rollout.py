"""``sharded_rollout``: a rollout of one lattice on many devices.

Every device holds a block of the grid. Before ``steps_per_exchange`` steps it receives from its
neighbours the cells around its block that those steps depend on (the halo), takes the steps on
block and halo, and keeps its block: the halo's cells, wrong from their outer end inwards, never
reach it.

At a true border there is nothing to receive, and a block does not lie in the middle of what its
device steps on but at the end: so the step's own padding is at work there, whatever it is, and not
an imitation of it.

A grid that the mesh does not divide evenly lies in blocks of equal size all the same, which
overlap by a cell here and there; of a cell that two blocks hold, both hold the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from nca_kernels.checks import check_rollout, check_step
from nca_kernels.dispatch import requested
from nca_kernels.ops.parts import PartStep, reach
from nca_kernels.ops.rollout import (
    AfterStep,
    checkpointed_scan,
    numbers_and_keys,
    scan_steps,
    where_sample,
)
from nca_kernels.perception import constant_taps
from nca_kernels.rule import Rule, RuleParams


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
    to the bit: a cell fires by its place in the whole grid. Gradients of the weights are summed in
    another order, so they agree to rounding.

    Args:
        rule, params, state, key, num_steps, inputs, checkpoint, return_states, sample_steps,
            backend, after_step, keep: as for :func:`nca_kernels.rollout`; the weights are on every
            device. ``after_step`` sees a device's part of the state, with the places of that part
            in the whole grid; it must be hashable, and is compiled once if it is equal to the last.
        mesh: the devices, a ``jax.sharding.Mesh``.
        partition_spec: which mesh axes split which dims of ``state``: ``P("data", "x", "y")`` for
            ``[batch, height, width, C]``, say; the channels cannot be split, and batch dims must
            be divisible.
        steps_per_exchange: k, the steps between two exchanges of halos. A halo is as wide as k
            steps reach (3x3 taps: k cells, 2k with alive masking): larger k means fewer, larger
            messages, and cells computed twice.
        overlap: step on the block as it is while its halo is on the way, and after that on strips
            of three halos at each of its ends. Hides slow messages behind the block's own work
            where communication is asynchronous (not on CPUs), for more and smaller kernels.

    Returns:
        As :func:`nca_kernels.rollout`, split as ``partition_spec`` says; along grid dims that are
        not divisible, whole on every device.

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`nca_kernels.rollout`, and for a mesh
            that cannot hold the state, or blocks smaller than a halo.

    The states move between neighbours only, by ``lax.ppermute``; of the weights' gradients there is
    one ``lax.psum``. With ``checkpoint``, "step" stands for ``steps_per_exchange`` steps.
    """
    batch_shape = check_step(rule, params, state, key, inputs)
    check_rollout(num_steps, checkpoint, keep, sample_steps, return_states, batch_shape)
    _check_split(np.shape(state), mesh, partition_spec, steps_per_exchange)
    shape = np.shape(state)
    constant = constant_taps(params.perception, shape[-1])
    plan = _Plan(
        step=PartStep(rule, requested(backend), constant, after_step, shape[:-1], len(batch_shape)),
        axes=_axes_of(rule, params, shape, mesh, partition_spec, steps_per_exchange),
        mesh=mesh,
        num_steps=num_steps,
        steps_per_exchange=steps_per_exchange,
        checkpoint=checkpoint,
        keep=keep,
        return_states=return_states,
        overlap=bool(overlap),
    )
    return _run(plan, params, jnp.asarray(state), key, inputs, sample_steps)


@dataclass(frozen=True)
class _Axis:
    """One dim of the state, batch or grid; ``shards`` devices hold ``block`` places of it each."""

    size: int
    names: tuple[str, ...]  # of mesh axes; empty where every device holds all of it
    shards: int
    halo: int  # places received on either side
    periodic: bool

    @property
    def block(self) -> int:
        return -(-self.size // self.shards)

    @property
    def window(self) -> int:
        """Places that a device steps on."""
        return self.block + 2 * self.halo

    @property
    def even(self) -> bool:
        return self.block * self.shards == self.size

    def shard(self) -> Any:
        return lax.axis_index(self.names) if self.names else 0

    def start(self, shard: Any) -> Any:
        """First place of a block; also of the one before the first, and after the last."""
        return shard * self.size // self.shards

    def offset(self) -> Any:
        """Where in its window this device's block begins: at the end where the border is true."""
        if self.periodic or not self.halo:
            return self.halo
        shard = self.shard()
        middle = jnp.where(shard == self.shards - 1, 2 * self.halo, self.halo)
        return jnp.where(shard == 0, 0, middle)

    def places(self) -> Array:
        """Which places of the whole dim this device's window shows; beyond a true border, any."""
        places = self.start(self.shard()) - self.offset() + jnp.arange(self.window)
        return places % self.size if self.periodic else places


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
            axes.append(_Axis(size, names, shards, 0, False))
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
        axes.append(_Axis(size, names, shards, halo, rule.padding == "circular"))
    return tuple(axes)


@partial(jax.jit, static_argnums=0)
def _run(
    plan: _Plan,
    params: RuleParams,
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
    more = PartitionSpec(None, *cells) if return_states else cells
    mapped = jax.shard_map(
        partial(_on_each_device, plan),
        mesh=mesh,
        in_specs=(PartitionSpec(), cells, PartitionSpec(), cells if per_cell else samples, samples),
        out_specs=(cells, more),
    )
    place = partial(_place, mesh)
    blocks = place(_in_blocks(state, axes), cells)
    if inputs is not None and per_cell:
        inputs = place(_in_blocks(inputs, axes), cells)
    elif inputs is not None:
        inputs = place(inputs, samples)
    if sample_steps is not None:
        sample_steps = place(sample_steps, samples)
    final, other = mapped(params, blocks, key, inputs, sample_steps)
    whole = PartitionSpec(*(name if axis.even else None for name, axis in zip(names, axes)))
    final = _whole(place(final, whole), axes)
    if return_states:
        other = _whole(place(other, PartitionSpec(None, *whole)), axes, leading=1)
    elif sample_steps is not None:
        other = _whole(place(other, whole), axes)
    return final if other is None else (final, other)


def _on_each_device(
    plan: _Plan, params: RuleParams, block: Array, key: Any, inputs: Any, sample_steps: Any
) -> Any:
    """A device's block after all steps, and its states or samples."""
    axes, num_steps = plan.axes, plan.num_steps
    used = tuple(name for axis in axes for name in axis.names)
    if used:  # once, so that their gradients are summed over the devices once
        params = jax.tree.map(lambda w: lax.pcast(w, used, to="varying"), params)
    parts = _parts(axes, plan.overlap)
    seen = [inputs] * len(parts)
    if inputs is not None and inputs.ndim == block.ndim:
        window = _window(inputs, axes)
        seen = [part.take(inputs, window) for part in parts]

    def one_step(carry: tuple[list[Array], Any], at: Any) -> tuple[Any, Any]:
        (states, sampled), (t, key) = carry, at
        states = [
            plan.step(params, state, key, inputs, part.places)
            for part, state, inputs in zip(parts, states, seen, strict=True)
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
    steps = numbers_and_keys(key, num_steps)

    def exchanges(carry: Any, first: int, last: int, each: int) -> Any:
        some = jax.tree.map(lambda s: s[first:last].reshape(-1, each, *s.shape[1:]), steps)
        carry, states = checkpointed_scan(
            exchange_and_step, carry, some, plan.checkpoint, plan.keep
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
        before = axis.start(shard - 1) + axis.block - axis.start(shard)
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


@dataclass(frozen=True)
class _Part:
    """Cells that a device steps on at once, and which of them it keeps.

    By dim: where the part begins in the window, how long it is, where in it begins what is kept,
    how long that is, and where that lies in the block. ``begins`` is None for the block itself,
    which is there before the halo is.
    """

    axes: tuple[_Axis, ...]
    begins: list[Any] | None
    sizes: list[int]
    kept_from: list[Any]
    kept: list[int]
    lies_at: list[int]

    def take(self, block: Array, window: Array) -> Array:
        if self.begins is None:
            return block
        for dim, (begin, size) in enumerate(zip(self.begins, self.sizes, strict=True)):
            if size < window.shape[dim]:
                window = lax.dynamic_slice_in_dim(window, begin, size, dim)
        return window

    @property
    def places(self) -> list[Array]:
        """Which places of the whole state, by dim."""
        begins = self.begins or [axis.offset() for axis in self.axes]
        return [
            lax.dynamic_slice_in_dim(axis.places(), begin, size)
            for axis, begin, size in zip(self.axes, begins, self.sizes, strict=True)
        ]

    def put(self, block: Array | None, state: Array) -> Array:
        """``block`` with what is kept of this part."""
        for dim, (begin, size) in enumerate(zip(self.kept_from, self.kept, strict=True)):
            if size < state.shape[dim]:
                state = lax.dynamic_slice_in_dim(state, begin, size, dim)
        return (
            state if block is None else lax.dynamic_update_slice(block, state, (*self.lies_at, 0))
        )


def _parts(axes: tuple[_Axis, ...], overlap: bool) -> list[_Part]:
    """The window, of which the block is kept; or the block, and strips that mend its ends."""
    blocks, none = [axis.block for axis in axes], [0] * len(axes)
    if not overlap:
        windows = [axis.window for axis in axes]
        offsets = [axis.offset() for axis in axes]
        return [_Part(axes, list(none), windows, offsets, list(blocks), list(none))]
    parts = [_Part(axes, None, blocks, none, blocks, none)]
    for dim, axis in enumerate(axes):
        width = 3 * axis.halo  # of which the middle is right, or what lies at a true border
        for end in (0, axis.block - axis.halo) if axis.halo else ():
            strip = _parts(axes, overlap=False)[0]
            at = axis.offset() + end
            begin = jnp.clip(at - axis.halo, 0, axis.window - width)
            strip.begins[dim], strip.sizes[dim] = begin, width  # type: ignore[index]
            strip.kept_from[dim], strip.kept[dim], strip.lies_at[dim] = at - begin, axis.halo, end
            parts.append(strip)
    return parts


def _whole_block(parts: list[_Part], states: list[Array]) -> Array:
    block: Array | None = None
    for part, state in zip(parts, states, strict=True):
        block = part.put(block, state)
    assert block is not None
    return block


def _in_blocks(array: Array, axes: Sequence[_Axis]) -> Array:
    """The whole grid as blocks of equal size in a row, overlapping where they must."""
    for dim, axis in enumerate(axes):
        if not axis.even:
            starts = np.arange(axis.shards)[:, None] * axis.size // axis.shards
            array = jnp.take(array, (starts + np.arange(axis.block)).ravel(), axis=dim)
    return array


def _place(mesh: Any, array: Array, spec: PartitionSpec) -> Array:
    """``array``, split as ``spec`` says where the mesh wants that to be said (explicit axes)."""
    explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
    return jax.reshard(array, jax.NamedSharding(mesh, spec)) if explicit else array


def _whole(array: Array, axes: Sequence[_Axis], leading: int = 0) -> Array:
    """What :func:`_in_blocks` took apart; ``leading`` dims come before those of ``axes``."""
    for dim, axis in enumerate(axes, start=leading):
        if not axis.even:
            starts = np.arange(axis.shards) * axis.size // axis.shards
            place = np.arange(axis.size)
            shard = np.searchsorted(starts, place, side="right") - 1
            array = jnp.take(array, shard * axis.block + place - starts[shard], axis=dim)
    return array
