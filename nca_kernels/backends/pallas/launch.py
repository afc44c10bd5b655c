"""Calls Pallas kernels from JAX: the one place that knows how, and what they see of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nca_kernels.tuning import Launch

PREFIX = "nca_pallas_"  # of the kernels' names in a lowered module


@dataclass(frozen=True)
class Memory:
    """A flat array from some position on: what a pointer is to a Triton kernel."""

    ref: Any
    interpreted: bool
    start: Any = 0  # int or int32 scalar

    def __add__(self, offset: Any) -> Memory:
        return replace(self, start=self.start + offset)

    def load(self, at: Array, mask: Array | None = None) -> Array:
        """The elements at the positions ``at``; 0 where the mask is not set."""
        from jax.experimental.pallas import triton

        there = self.ref.at[_unsigned(self.start + at)]
        if mask is None:
            return triton.load(there)
        zero = jnp.zeros((), self.ref.dtype)
        return triton.load(there, mask=jnp.broadcast_to(mask, at.shape), other=zero)

    def store(self, at: Array, value: Array, mask: Array | None = None) -> None:
        """Writes the elements at the positions ``at``, where the mask is set."""
        from jax.experimental.pallas import triton

        at, value = self.start + at, value.astype(self.ref.dtype)
        mask = None if mask is None else jnp.broadcast_to(mask, at.shape)
        if self.interpreted and mask is not None:
            # There, what is masked out would be written as it was; what is outside is dropped.
            at, mask = jnp.where(mask, at, self.ref.shape[0]), None
        triton.store(self.ref.at[_unsigned(at)], jnp.broadcast_to(value, at.shape), mask=mask)


def _unsigned(at: Array) -> Array:
    """So that no position counts from the end."""
    return at.astype(jnp.uint32)


def launch(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    g: dict[str, Any],
    how: Launch,
    aliases: dict[int, int] | None = None,
    interpret: bool = False,
) -> list[Array]:
    """Runs ``kernel(*inputs, *outputs, g)`` over the grid; returns the outputs.

    Args:
        aliases: inputs, by their index, that are written in place as outputs.
        interpret: as XLA operations on any device, for tests.
    """
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    # Behind a barrier, threads of a program read what others wrote before it.
    barrier = triton.debug_barrier if not interpret else lambda: None
    constants = SimpleNamespace(**g, barrier=barrier)

    def body(*refs: Any) -> None:
        kernel(*(Memory(ref, interpret) for ref in refs), constants)

    body.__name__ = PREFIX + kernel.__name__
    varying = jax.typeof(inputs[0]).manual_axis_type  # what shard_map wants to know
    results = pallas.pallas_call(
        body,
        out_shape=[
            jax.ShapeDtypeStruct((math.prod(o.shape),), o.dtype, manual_axis_type=varying)
            for o in outputs
        ],
        grid=grid,
        input_output_aliases=aliases or {},
        # Explicit, else some versions of JAX lower through Mosaic.
        compiler_params=triton.CompilerParams(num_warps=how.warps, num_stages=how.stages),
        interpret=interpret,
        name=body.__name__,
    )(*(a.reshape(-1) for a in inputs))
    return [r.reshape(o.shape) for r, o in zip(results, outputs, strict=True)]


def missing() -> str | None:
    """Why kernels cannot be compiled in this process, or None."""
    needed = ("CompilerParams", "load", "store", "debug_barrier")
    try:
        module = import_module("jax.experimental.pallas.triton")
    except ImportError:
        module = None
    if not all(hasattr(module, name) for name in needed):
        return f"jax {jax.__version__} has no Pallas for Triton: pip install triton"
    if not _knows_gpu():
        return (
            "there is no GPU: to lower for one, name it by jax.sharding.use_abstract_mesh and an "
            "AbstractMesh with an abstract_device"
        )
    return None


def _knows_gpu() -> bool:
    """Whether there is a GPU, or lowering is for an abstract one, as newer JAX wants to know."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.platform == "gpu"
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False
