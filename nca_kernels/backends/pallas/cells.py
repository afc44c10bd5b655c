"""What the kernels share: where cells are, memory, loops, and how JAX calls a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# Positions are int32, also those beyond the end that the last program computes.
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
    """``carry = body(i, carry)`` for i below ``count``."""

    def turn(i: Array, carry: Any) -> Any:
        return body(i.astype(jnp.int32), carry)  # with x64, JAX may count in int64

    return lax.fori_loop(np.int32(0), np.int32(count), turn, carry)


def load(ref: Any, index: tuple[Any, ...], exists: Array) -> Array:
    """The elements at an index made of arrays; 0 where ``exists`` is false."""
    from jax.experimental.pallas import triton

    return triton.load(ref.at[index], mask=exists, other=jnp.zeros((), ref.dtype))


def load_block(ref: Any, index: tuple[Any, ...], row: Array, exists: Array, column: Array) -> Array:
    """Rows [R] and columns [N] of the matrix ``ref[index]`` as float32, 0 outside: [R, N]."""
    column = column[None, :]
    index = (*index, row[:, None], column)
    return load(ref, index, exists[:, None] & (column < ref.shape[-1])).astype(jnp.float32)


def store_block(ref: Any, index: tuple[Any, ...], row: Array, exists: Array, value: Array) -> None:
    """Writes [R, N] to rows [R] of the matrix ``ref[index]``, except columns beyond its end."""
    from jax.experimental.pallas import triton

    column = indices(value.shape[1])[None, :]
    there, mask = ref.at[(*index, row[:, None], column)], exists[:, None] & (column < ref.shape[-1])
    triton.store(there, value.astype(ref.dtype), mask=mask)


def unravel(number: Array, sizes: Sequence[int]) -> tuple[Array, list[Array]]:
    """A number in C order to (which grid of these sizes, the position in it)."""
    position: list[Array] = []
    for size in reversed(sizes):
        number, on_axis = divide(number, size)
        position.insert(0, on_axis)
    return number, position


class Neighbourhoods(NamedTuple):
    """Windows around the cells of grids; those of even sizes are aligned as SAME."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    padding: str  # as in Rule

    def neighbour(self, cell: Array, index: Array) -> tuple[Array, Array]:
        """The cells [T] at an index of the window around cells [T], and whether any is there."""
        number, position = unravel(cell, self.grid)
        inside = jnp.full(cell.shape, True)
        _, offset = unravel(index, self.window)
        for i, size, by, window in zip(position, self.grid, offset, self.window, strict=True):
            on_axis, inside_axis = border(i + (by - (window - 1) // 2), size, self.padding)
            number, inside = number * size + on_axis, inside & inside_axis
        return number, inside


def border(i: Array, size: int, padding: str) -> tuple[Array, Array]:
    """For positions on an axis, maybe outside of it: the cells seen there, and whether any is."""
    inside = (i >= 0) & (i < size)
    if padding == "zeros":
        return jnp.where(inside, i, 0), inside
    if padding == "circular":
        i = i % size
    elif padding == "replicate":
        i = lax.clamp(np.int32(0), i, np.int32(size - 1))
    elif padding == "reflect":
        i = i % max(2 * size - 2, 1)
        i = jnp.minimum(i, 2 * size - 2 - i) if size > 1 else i
    else:
        raise ValueError(f"unknown padding {padding!r}")
    return i, jnp.full(i.shape, True)


def call_kernel(
    kernel: Any, operands: Any, outputs: Any, programs: int, name: str, interpret: bool
) -> list[Array]:
    """Runs ``kernel(*operands, *outputs)``, which gets references, in ``programs`` programs.

    ``interpret``: run it as XLA's operations on any device, for tests.
    """
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    varying = jax.typeof(jax.tree.leaves(operands)[0]).manual_axis_type  # what shard_map wants
    run = pallas.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(o.shape, o.dtype, manual_axis_type=varying) for o in outputs
        ],
        grid=(programs,),
        # Explicit, else some versions of JAX lower through Mosaic.
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )
    return run(*operands)


def missing() -> str | None:
    """Why kernels cannot be compiled in this process, or None."""
    try:
        from jax.experimental.pallas.triton import CompilerParams, load, store  # noqa: F401
    except ImportError:
        return f"jax {jax.__version__} has no Pallas for Triton: pip install triton"
    # Newer JAX must know which GPU it lowers for: one of this machine, or an abstract one.
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    try:
        if device.platform == "gpu" if device is not None else jax.devices("gpu"):
            return None
    except RuntimeError:
        pass
    return (
        "there is no GPU: to lower for one, name it by jax.sharding.use_abstract_mesh and an "
        "AbstractMesh with an abstract_device"
    )
