"""``neighborhood_attention`` as calls of the native kernels, in ``src/attention.hpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nca_kernels.backends.cpu import library
from nca_kernels.call import AttentionCall, AttentionOperands


def forward(call: AttentionCall, platform: str, operands: AttentionOperands) -> list[Array]:
    """``[out [G, B, *S, heads, d], log-sum-exp [G, B, *S, heads]]``."""
    library.load()
    query = operands.query
    results = [
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32),
    ]
    run = jax.ffi.ffi_call(library.target("attention_forward"), results)
    return list(run(*operands, **_attributes(call, query)))


def backward(
    call: AttentionCall,
    platform: str,
    operands: AttentionOperands,
    saved: Sequence[Array],
    cotangent: Array,
    wrt: tuple[bool, ...],
) -> list[Array]:
    """The gradients ``[G, B, *S, heads, d]`` of query, key and value, where ``wrt`` is True."""
    library.load()
    query = operands.query
    shapes = [query.shape if wanted else (0,) for wanted in wrt]
    results = [jax.ShapeDtypeStruct(shape, query.dtype) for shape in shapes]
    run = jax.ffi.ffi_call(library.target("attention_backward"), results)
    grads = run(*operands, *saved, cotangent, **_attributes(call, query))
    return [grad for grad, wanted in zip(grads, wrt, strict=True) if wanted]


def _attributes(call: AttentionCall, query: Array) -> dict[str, Any]:
    groups, batch, *grid, heads, head_size = query.shape
    missing = 3 - len(grid)  # a plane has depth 1, a line is a row along x
    sizes, radii = [1] * missing + grid, [0] * missing + [call.radius] * len(grid)
    values = {
        "grid": sizes,
        "radius": radii,
        "samples": groups * batch,
        "heads": heads,
        "head_size": head_size,
    }
    return {"padding": call.padding, **library.integers(values)}
