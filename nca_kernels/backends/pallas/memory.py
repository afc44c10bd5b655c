"""What the kernels share: indices, loops, memory, and how JAX calls a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# Positions, and those of cells that a last program has beyond the end, are int32.
MOST_ELEMENTS = 2**31 - 2**10


def block(size: int) -> int:
    """The size of an array in a kernel: a power of two, at least the 16 that products take."""
    return max(16, 1 << (size - 1).bit_length())


def indices(size: int) -> Array:
    """0, 1, ...: [size] int32."""
    return lax.iota(jnp.int32, size)


def divide(a: Array, b: int) -> tuple[Array, Array]:
    """Quotient and remainder of a >= 0."""
    quotient = lax.div(a, jnp.full_like(a, b))
    return quotient, a - quotient * b


def loop(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """``carry = body(i, carry)`` for i below ``count``, which is at least 1."""
    if count == 1:
        return body(jnp.int32(0), carry)

    def turn(i: Array, carry: Any) -> Any:
        return body(i.astype(jnp.int32), carry)  # with x64, JAX may count in int64

    return lax.fori_loop(np.int32(0), np.int32(count), turn, carry)


def load(ref: Any, index: tuple[Any, ...], exists: Array) -> Array:
    """The elements at an index of arrays, 0 where none exists."""
    from jax.experimental.pallas import triton

    return triton.load(ref.at[index], mask=exists, other=jnp.zeros((), ref.dtype))


def load_block(
    ref: Any, index: tuple[Any, ...], row: Array, row_exists: Array, column: Array
) -> Array:
    """Rows [R] and columns [N] of the matrix ``ref[index]`` as float32, 0 outside: [R, N]."""
    exists = row_exists[:, None] & (column < ref.shape[-1])[None, :]
    return load(ref, (*index, row[:, None], column[None, :]), exists).astype(jnp.float32)


def store_block(
    ref: Any, index: tuple[Any, ...], row: Array, row_exists: Array, value: Array
) -> None:
    """Writes [R, N] to rows [R] of the matrix ``ref[index]``, but for columns that it lacks."""
    from jax.experimental.pallas import triton

    column = indices(value.shape[1])
    exists = row_exists[:, None] & (column < ref.shape[-1])[None, :]
    there = ref.at[(*index, row[:, None], column[None, :])]
    triton.store(there, value.astype(ref.dtype), mask=exists)


def call_kernel(
    kernel: Callable[..., None],
    operands: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    programs: int,
    name: str,
    interpret: bool,
) -> list[Array]:
    """Runs ``kernel(*operands, *outputs)``, as references, in so many programs.

    ``interpret``: as XLA's operations on any device, for tests.
    """
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    varying = jax.typeof(jax.tree.leaves(operands)[0]).manual_axis_type  # what shard_map wants
    run = pallas.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(output.shape, output.dtype, manual_axis_type=varying)
            for output in outputs
        ],
        grid=(programs,),
        # Explicit, else some versions of JAX lower through Mosaic.
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )
    return list(run(*operands))


def missing() -> str | None:
    """Why kernels cannot be compiled in this process, or None."""
    try:
        module = import_module("jax.experimental.pallas.triton")
    except ImportError:
        module = None
    if not all(hasattr(module, name) for name in ("CompilerParams", "load", "store")):
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
