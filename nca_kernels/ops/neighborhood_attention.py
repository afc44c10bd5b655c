"""``neighborhood_attention``: every cell attends to the cells around it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from nca_kernels.call import AttentionCall, AttentionOperands
from nca_kernels.checks import check_attention
from nca_kernels.dispatch import plain, requested
from nca_kernels.primitive import differentiable_op

OP = "neighborhood_attention"


def neighborhood_attention(
    q: Array,
    k: Array,
    v: Array,
    radius: int = 1,
    num_spatial_dims: int = 2,
    backend: str = "auto",
    *,
    padding: str = "zeros",
) -> Array:
    """Softmax attention of every cell over its neighbourhood, the cell itself included.

    Per cell i and head, over the ``(2*radius + 1)^n`` cells j of the Moore neighbourhood::

        logits_ij = dot(q_i, k_j) / sqrt(d)
        out_i = sum_j softmax_j(logits_i)_j * v_j

    Equivalent plain JAX in 1-D, with ``padding="zeros"``::

        i = jnp.arange(size)[:, None] + jnp.arange(-radius, radius + 1)     # [S, K]
        inside = (i >= 0) & (i < size)
        logits = jnp.einsum("...shd,...skhd->...shk", q, k[..., i, :, :]) / d**0.5
        logits = jnp.where(inside[:, None], logits, -jnp.inf)
        out = jnp.einsum("...shk,...skhd->...shd", jax.nn.softmax(logits), v[..., i, :, :])

    Time and memory grow linearly with the cells: no backend but ``reference`` ever holds all
    neighbours of all cells.

    Args:
        q, k, v: queries, keys and values, ``[*batch, *spatial, heads, d]``, float32 or bfloat16,
            all of one shape and dtype; differentiable. Arithmetic is float32 inside.
        radius: how many cells the neighbourhood reaches on every axis, at least 0; static.
        num_spatial_dims: how many dims before the heads are the grid, 1 to 3.
        backend: "auto", or a name of ``nk.backends()``; a named backend runs or raises.
        padding: "zeros": cells outside the grid are not attended to. "circular": the grid wraps
            around; every offset counts once, so a window larger than the grid meets a cell
            several times.

    Returns:
        ``[*batch, *spatial, heads, d]`` in the dtype of ``q``.

    Raises:
        ValueError, TypeError: for bad arguments, before anything is traced.
        BackendUnavailable: if a backend named by the caller cannot run the call.

    Reverse-mode derivatives only; the backward keeps ``q``, ``k``, ``v`` and the log-sum-exp of
    the logits, a float32 for each cell and head, and recomputes the rest. Plain JAX for any
    number of dims: ``backends/reference/plain_attention.py``.

    Source: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023; in cellular automata,
    Tesfaldet et al., "Attention-based Neural Cellular Automata", NeurIPS 2022.
    """
    check_attention(q, k, v, radius, num_spatial_dims, padding)
    statics = AttentionCall(OP, int(radius), num_spatial_dims, padding, None)
    return nca_neighborhood_attention(q, k, v, statics=statics, backend=requested(backend))


@partial(jax.jit, static_argnames=("statics", "backend"))
def nca_neighborhood_attention(
    q: Array, k: Array, v: Array, *, statics: AttentionCall, backend: str
) -> Array:
    ordinary = plain(backend, OP)
    if ordinary is not None:
        return ordinary(q, k, v, statics.radius, statics.num_spatial_dims, statics.padding)
    per_sample = q.shape[q.ndim - statics.num_spatial_dims - 2 :]  # (*S, heads, d)
    samples = math.prod(q.shape[: q.ndim - len(per_sample)])
    if samples == 0:
        return jnp.zeros_like(q)
    operands = AttentionOperands(*(a.reshape(1, samples, *per_sample) for a in (q, k, v)))
    call = replace(statics, treedef=jax.tree.structure(operands))
    return bind(call, backend, operands)[0].reshape(q.shape)


bind = differentiable_op(OP)
