"""``neighborhood_attention`` in ordinary JAX: all neighbours gathered, softmax, autodiff."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nca_kernels.perception import border_index, offsets
from nca_kernels.rule import compute_dtype

einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def neighborhood_attention(
    q: Array, k: Array, v: Array, radius: int, num_spatial_dims: int, padding: str
) -> Array:
    """Every cell attends to its neighbours. ``q``, ``k``, ``v`` ``[*batch, *S, heads, d]``."""
    grid = q.shape[q.ndim - num_spatial_dims - 2 : -2]
    index = neighbours(grid, radius, padding)  # [cells, K]
    batch = q.shape[: q.ndim - num_spatial_dims - 2]
    flat = (*batch, len(index), *q.shape[-2:])
    dtype = compute_dtype(q.dtype)
    query, key, value = (a.astype(dtype).reshape(flat) for a in (q, k, v))
    key, value = (jnp.take(a, jnp.maximum(index, 0), axis=-3) for a in (key, value))

    logits = einsum("...chd,...cnhd->...chn", query, key) * q.shape[-1] ** -0.5
    inside = jnp.asarray(index >= 0).reshape((1,) * len(batch) + (len(index), 1, -1))
    weights = jax.nn.softmax(jnp.where(inside, logits, -jnp.inf), axis=-1)
    out = einsum("...chn,...cnhd->...chd", weights, value)
    return out.astype(q.dtype).reshape(q.shape)


def neighbours(grid: tuple[int, ...], radius: int, padding: str) -> np.ndarray:
    """For every cell in C order its neighbours' numbers, ``[cells, K]``; -1 for none."""
    axes = [border_index(size, radius, radius, padding) for size in grid]
    cells = np.indices(grid).reshape(len(grid), -1)  # [n, cells]
    columns = []
    for offset in offsets([2 * radius + 1] * len(grid)):
        there = [axis[i + o] for axis, i, o in zip(axes, cells, offset, strict=True)]
        number = np.ravel_multi_index(there, grid, mode="wrap")
        columns.append(np.where(np.min(there, axis=0) < 0, -1, number))
    return np.stack(columns, axis=-1)
