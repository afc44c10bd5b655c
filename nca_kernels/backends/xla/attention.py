"""``neighborhood_attention`` for XLA: loops over the window, with a single neighbour at a time.

The forward updates a running softmax. The backward computes the weights from the logits and their
log-sum-exp. With ``w_ij`` the weight that cell i gives its neighbour j, ``g_i`` the cotangent of
the output of cell i, and ``e_ij = dot(g_i, v_j)``::

    delta_i = sum_j w_ij e_ij
    dq_i = scale * (sum_j w_ij e_ij k_j - delta_i * sum_j w_ij k_j)
    dk_j = scale * sum_i w_ij (e_ij - delta_i) q_i
    dv_j = sum_i w_ij g_i

Cell j is a neighbour of cell i exactly as often as i is a neighbour of j. So each sum runs over the
window around the cell that it belongs to, and nothing is scattered. A first loop computes the first
two, a second loop the other two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nca_kernels.backends.xla import stencil
from nca_kernels.call import AttentionCall, AttentionOperands
from nca_kernels.rule import compute_dtype, wraps


def forward(call: AttentionCall, platform: str, operands: AttentionOperands) -> list[Array]:
    """``[out [G, B, *S, heads, d], log-sum-exp [G, B, *S, heads]]``."""
    groups = operands.query.shape[:2]
    window = Window(call.radius, call.padding, operands.query.shape[2:-2])
    outs = nca_xla_attention_forward(*map(_fold, operands), window=window)
    return [o.reshape(*groups, *o.shape[1:]) for o in outs]


def backward(
    call: AttentionCall,
    platform: str,
    operands: AttentionOperands,
    saved: Sequence[Array],
    cotangent: Array,
    wrt: tuple[bool, ...],
) -> list[Array]:
    """The gradients ``[G, B, *S, heads, d]`` of query, key and value, where ``wrt`` is True."""
    window = Window(call.radius, call.padding, operands.query.shape[2:-2])
    arrays = map(_fold, (*operands, *saved, cotangent))
    grads = nca_xla_attention_backward(*arrays, window=window, wrt=wrt)
    return [g.reshape(operands.query.shape) for g in grads]


def _fold(array: Array) -> Array:
    """Groups are just more samples: ``[G, B, ...]`` to ``[N, ...]``."""
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


@partial(jax.jit, static_argnames="window")
def nca_xla_attention_forward(
    query: Array, key: Array, value: Array, *, window: Window
) -> list[Array]:
    """``[N, *S, heads, d]`` to the output and the log-sum-exp ``[N, *S, heads]`` of the logits."""
    dtype = compute_dtype(query.dtype)
    wide_query = query.astype(dtype)

    def attend(carry: tuple, inside: Array, key: Array, value: Array) -> tuple:
        highest, total, mixed = carry
        logits = jnp.where(inside, _logits(wide_query, key), -jnp.inf)
        new_highest = jnp.maximum(highest, logits)
        rescale, weight = jnp.exp(highest - new_highest), jnp.exp(logits - new_highest)
        mixed = _times(rescale, mixed) + _times(weight, value)
        return new_highest, rescale * total + weight, mixed

    # A cell is its own neighbour: its logit is a finite start for the maximum.
    start = _logits(wide_query, key.astype(dtype))
    carry = (start, jnp.zeros_like(start), jnp.zeros_like(wide_query))
    highest, total, mixed = window.fold(attend, carry, (key, value), dtype)
    return [_times(1 / total, mixed).astype(query.dtype), highest + jnp.log(total)]


@partial(jax.jit, static_argnames=("window", "wrt"))
def nca_xla_attention_backward(
    query: Array,
    key: Array,
    value: Array,
    lse: Array,
    cotangent: Array,
    *,
    window: Window,
    wrt: tuple[bool, ...],
) -> list[Array]:
    """The gradients ``[N, *S, heads, d]`` that ``wrt`` asks for; ``lse`` ``[N, *S, heads]``."""
    query_wanted, key_wanted, value_wanted = wrt
    d_query = d_key = d_value = None
    delta = jnp.zeros_like(lse)  # the gradient of the values does not need it
    if query_wanted or key_wanted:
        d_query, delta = _query_gradient(query, key, value, lse, cotangent, window)
    if key_wanted or value_wanted:
        attending = (query, cotangent, lse, delta)
        d_key, d_value = _key_value_gradients(key, value, attending, window)
    grads = zip((d_query, d_key, d_value), wrt, strict=True)
    return [g.astype(query.dtype) for g, wanted in grads if wanted and g is not None]


def _query_gradient(
    query: Array, key: Array, value: Array, lse: Array, cotangent: Array, window: Window
) -> tuple[Array, Array]:
    """The gradient of the queries and ``delta``; a cell's neighbours are what it attends to."""
    dtype = lse.dtype
    query, cotangent = query.astype(dtype), cotangent.astype(dtype)

    def add(carry: tuple, inside: Array, key: Array, value: Array) -> tuple:
        delta, with_value, without = carry
        weight = jnp.where(inside, jnp.exp(_logits(query, key) - lse), 0)
        share = weight * _dot(cotangent, value)
        return delta + share, with_value + _times(share, key), without + _times(weight, key)

    carry = (jnp.zeros_like(lse), jnp.zeros_like(query), jnp.zeros_like(query))
    delta, with_value, without = window.fold(add, carry, (key, value), dtype)
    return _scale(query) * (with_value - _times(delta, without)), delta


def _key_value_gradients(
    key: Array, value: Array, attending: tuple[Array, Array, Array, Array], window: Window
) -> tuple[Array, Array]:
    """The gradients of keys and values; a cell's neighbours are those that attend to it.

    ``attending``: query, cotangent, log-sum-exp and delta of every cell.
    """
    dtype = attending[2].dtype
    key, value = key.astype(dtype), value.astype(dtype)

    def add(carry: tuple, _: Array, query: Array, cotangent: Array, *scalars: Array) -> tuple:
        d_key, d_value = carry
        lse, delta = scalars
        # Not masked: outside the grid all four are 0, and so is what they add.
        weight = jnp.exp(_logits(query, key) - lse)
        d_logits = weight * (_dot(cotangent, value) - delta)
        return d_key + _times(d_logits, query), d_value + _times(weight, cotangent)

    carry = (jnp.zeros_like(key), jnp.zeros_like(value))
    d_key, d_value = window.fold(add, carry, attending, dtype)
    return _scale(key) * d_key, d_value


class Window(NamedTuple):
    """The neighbourhood of every cell of a grid."""

    radius: int
    padding: str  # "zeros" or "circular"
    grid: tuple[int, ...]

    def fold(self, body: Callable, carry: Any, arrays: Sequence[Array], dtype: Any) -> Any:
        """Runs ``carry = body(carry, inside, *neighbours)`` for every offset of the window.

        ``neighbours`` are the ``arrays`` ``[N, *S, ...]`` as seen at that offset, in ``dtype``;
        ``inside`` ``[1, *S, 1]`` tells the cells of the grid from what lies outside. The loop is
        not unrolled, so that compile times do not grow with the window and a single neighbour is
        in memory at a time.
        """
        padded = [self._pad(a) for a in (jnp.ones((1, *self.grid, 1), bool), *arrays)]

        def turn(carry: Any, start: Array) -> tuple[Any, None]:
            inside, *shifted = (self._slice(p, start) for p in padded)
            return body(carry, inside, *(s.astype(dtype) for s in shifted)), None

        return lax.scan(turn, carry, jnp.array(self._starts(), jnp.int32))[0]

    def _reach(self) -> list[int]:
        """Cells that the window reaches on each axis: no cell is farther than the grid is wide."""
        return [min(self.radius, size - 1) for size in self.grid]

    def _starts(self) -> list[tuple[int, ...]]:
        """Where in a padded array the neighbours of the first cell lie, ``[K, n]``."""
        axes = []
        for size, reach in zip(self.grid, self._reach(), strict=True):
            offsets = np.arange(-self.radius, self.radius + 1)
            if wraps(self.padding):  # a cell that is a whole grid away is the same cell
                offsets = np.fmod(offsets, size)
            axes.append(reach + offsets[abs(offsets) <= reach])
        return list(product(*axes))

    def _pad(self, array: Array) -> Array:
        """``[N, *S, ...]`` to ``[N, *S + 2*reach, ...]``."""
        inner = array.shape[1 + len(self.grid) :]
        flat = array.reshape(*array.shape[: 1 + len(self.grid)], -1)
        padded = stencil.pad(flat, [(r, r) for r in self._reach()], self.padding)
        return padded.reshape(*padded.shape[:-1], *inner)

    def _slice(self, padded: Array, start: Array) -> Array:
        """The part ``[N, *S, ...]`` of a padded array that begins at cell ``start``."""
        inner = padded.shape[1 + len(self.grid) :]
        zero = jnp.zeros((), jnp.int32)
        starts = [zero, *start, *(zero for _ in inner)]
        return lax.dynamic_slice(padded, starts, (padded.shape[0], *self.grid, *inner))


def _logits(query: Array, key: Array) -> Array:
    return _scale(query) * _dot(query, key)


def _scale(query: Array) -> float:
    return query.shape[-1] ** -0.5


def _dot(a: Array, b: Array) -> Array:
    """Over the head size: ``[..., d]`` twice to ``[...]``."""
    return jnp.einsum("...d,...d->...", a, b, precision=lax.Precision.HIGHEST)


def _times(weight: Array, vector: Array) -> Array:
    """A weight for each head ``[...]`` times its vector ``[..., d]``."""
    return weight[..., None] * vector
