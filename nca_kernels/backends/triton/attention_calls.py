"""``neighborhood_attention`` by blocks of rows: one launch forward, two backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from nca_kernels.backends.triton.configuration import Engine, attention_launch
from nca_kernels.backends.triton.geometry import Sizes
from nca_kernels.call import AttentionCall, AttentionOperands, three_axes
from nca_kernels.tuning import Launch

Shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class WindowAxis:
    """One axis of the window; ``near``: it reaches less far outside the grid than that is wide."""

    size: int
    near: bool


@dataclass(frozen=True)
class AttentionConfiguration:
    """All that the kernels of ``neighborhood_attention`` are compiled for.

    Kernels read it as their constant ``config``; see :class:`.constants.CompileTime`.

    Args:
        z, y, x: the window's axes.
        padding, heads, head_size: of the call.
        rows: heads of cells that a program has.
        int64_indices: whether an array is too large for indices of 32 bits.
    """

    z: WindowAxis
    y: WindowAxis
    x: WindowAxis
    padding: str
    heads: int
    head_size: int
    rows: int
    int64_indices: bool

    @property
    def window(self) -> int:
        """Cells of the window."""
        return self.z.size * self.y.size * self.x.size

    @property
    def block_d(self) -> int:
        """The power of two that holds a head."""
        return 1 << (self.head_size - 1).bit_length()

    @property
    def scale(self) -> float:
        """Of the logits."""
        return float(self.head_size**-0.5)


def attention_configuration(
    call: AttentionCall, operands: AttentionOperands, launch: Launch
) -> tuple[AttentionConfiguration, Sizes]:
    """What kernels are compiled for, and the call's sizes: groups are just more samples."""
    groups, batch, *grid, heads, head_size = operands.query.shape
    z, y, x = (
        WindowAxis(size=reach, near=call.radius < size)
        for reach, size in zip(
            three_axes((2 * call.radius + 1,) * len(grid)), three_axes(grid), strict=True
        )
    )
    wide = math.prod(operands.query.shape) >= 2**31
    config = AttentionConfiguration(z, y, x, call.padding, heads, head_size, launch.rows, wide)
    return config, Sizes(*three_axes(grid), samples=groups * batch)


def forward(
    engine: Engine, call: AttentionCall, platform: str, operands: AttentionOperands
) -> list[Array]:
    """``[out [G, B, *S, heads, d], log-sum-exp [G, B, *S, heads]]``."""
    launch = attention_launch(engine, "attention_forward", call, platform, operands, forward)
    shape = operands.query.shape
    out, lse = _runner(engine, call, operands, launch)(
        engine.attention_kernels().attention_forward,
        [a.reshape(-1) for a in operands],
        [
            Shape((math.prod(shape),), operands.query.dtype),
            Shape((math.prod(shape[:-1]),), jnp.float32),
        ],
    )
    return [out.reshape(shape), lse.reshape(shape[:-1])]


def backward(
    engine: Engine,
    call: AttentionCall,
    platform: str,
    operands: AttentionOperands,
    saved: Sequence[Array],
    cotangent: Array,
    wrt: tuple[bool, ...],
) -> list[Array]:
    """The gradients ``[G, B, *S, heads, d]`` of those of query, key and value in ``wrt``."""
    launch = attention_launch(engine, "attention_backward", call, platform, operands, backward)
    run, kernels = _runner(engine, call, operands, launch), engine.attention_kernels()
    shape = operands.query.shape
    arrays = [a.reshape(-1) for a in (*operands, *saved, cotangent)]
    vectors = Shape((math.prod(shape),), operands.query.dtype)
    numbers = Shape((math.prod(shape[:-1]),), jnp.float32)
    d_query, delta = run(kernels.attention_backward_query, arrays, [vectors, numbers])
    d_key = d_value = None
    if wrt[1] or wrt[2]:
        d_key, d_value = run(
            kernels.attention_backward_key_value, [*arrays, delta], [vectors, vectors]
        )
    grads = zip((d_query, d_key, d_value), wrt, strict=True)
    return [d.reshape(shape) for d, wanted in grads if wanted and d is not None]


def _runner(
    engine: Engine, call: AttentionCall, operands: AttentionOperands, launch: Launch
) -> partial[list[Array]]:
    """``(kernel, inputs, outputs)`` runs a kernel of the call."""
    config, sizes = attention_configuration(call, operands, launch)
    programs = -(-sizes.cells * config.heads // config.rows)
    return partial(engine.run_kernel, programs=programs, config=config, sizes=sizes, launch=launch)
