"""``neighborhood_attention`` by blocks of rows: one launch forward, two backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nca_kernels.backends.triton.configuration import Engine, attention_launch
from nca_kernels.call import AttentionCall, AttentionOperands
from nca_kernels.tuning import Launch

Shape = jax.ShapeDtypeStruct


def attention_constants(
    call: AttentionCall, operands: AttentionOperands, how: Launch
) -> dict[str, Any]:
    """Sizes of a call; groups are just more samples. Missing axes have one cell."""
    groups, batch, *grid, heads, size = operands.query.shape
    missing = 3 - len(grid)
    windows = (1,) * missing + (2 * call.radius + 1,) * len(grid)
    cells = groups * batch * math.prod(grid)
    return {
        **dict(zip(("depth", "height", "width"), (1,) * missing + tuple(grid), strict=True)),
        **dict(zip(("window_z", "window_y", "window_x"), windows, strict=True)),
        **{
            f"near_{axis}": call.radius < size
            for axis, size in zip("zyx", (1,) * missing + tuple(grid), strict=True)
        },
        "window": math.prod(windows),
        "padding": call.padding,
        "samples": groups * batch,
        "cells": cells,
        "heads": heads,
        "head_size": size,
        "block_d": 1 << (size - 1).bit_length(),
        "scale": size**-0.5,
        "rows": how.rows,
        "wide": cells * heads * size >= 2**31,
    }


def forward(
    engine: Engine, call: AttentionCall, platform: str, operands: AttentionOperands
) -> list[Array]:
    """``[out [G, B, *S, heads, d], log-sum-exp [G, B, *S, heads]]``."""
    how = attention_launch(engine, "attention_forward", call, platform, operands, forward)
    g = attention_constants(call, operands, how)
    shape = operands.query.shape
    out, lse = engine.launch(
        engine.attention_kernels().attention_forward,
        [a.reshape(-1) for a in operands],
        [
            Shape((math.prod(shape),), operands.query.dtype),
            Shape((g["cells"] * g["heads"],), jnp.float32),
        ],
        _programs(g),
        g,
        how,
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
    how = attention_launch(engine, "attention_backward", call, platform, operands, backward)
    g = attention_constants(call, operands, how)
    kernels = engine.attention_kernels()
    shape, dtype = operands.query.shape, operands.query.dtype
    arrays = [a.reshape(-1) for a in (*operands, *saved, cotangent)]
    vectors = Shape((math.prod(shape),), dtype)
    numbers = Shape((g["cells"] * g["heads"],), jnp.float32)
    d_query, delta = engine.launch(
        kernels.attention_backward_query, arrays, [vectors, numbers], _programs(g), g, how
    )
    d_key = d_value = None
    if wrt[1] or wrt[2]:
        d_key, d_value = engine.launch(
            kernels.attention_backward_key_value,
            [*arrays, delta],
            [vectors, vectors],
            _programs(g),
            g,
            how,
        )
    grads = zip((d_query, d_key, d_value), wrt, strict=True)
    return [d.reshape(shape) for d, wanted in grads if wanted and d is not None]


def _programs(g: dict[str, Any]) -> tuple[int, ...]:
    return -(-g["cells"] * g["heads"] // g["rows"]), 1
