"""``update``: the part of a step that follows the perception, for perceptions of one's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array

from nca_kernels import dispatch
from nca_kernels.checks import check_update
from nca_kernels.ops.bind import bind
from nca_kernels.rule import Rule


def update(
    rule: Rule,
    layers: Any,
    state: Array,
    perception: Array,
    key: Any,
    inputs: Array | None = None,
    backend: str = "auto",
    *,
    num_spatial_dims: int = 2,
) -> Array:
    """MLP, stochastic update and alive mask, with the perception given.

    ``step(rule, params, state, key)`` equals ``update(rule, params.layers, state, P, key)`` where
    ``P`` is the perception, its bias and activation already applied: of ``rule``,
    ``perception_activation`` is not used, and ``padding`` only by the alive pool.

    Args:
        rule, state, key, inputs, backend: as for :func:`nca_kernels.step`.
        layers: one or more ``(W [in, out], b [out] or None)``; differentiable.
        perception: ``[*batch, *spatial, P]``; differentiable.
        num_spatial_dims: how many dims of ``state`` before the last are the grid, 1 to 3.

    Returns:
        The next state, ``[*batch, *spatial, C]``, in the dtype of ``state``.

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`nca_kernels.step`.
    """
    check_update(rule, layers, state, perception, key, inputs, num_spatial_dims)
    return nca_update(
        rule, layers, state, perception, key, inputs, dispatch.requested(backend), num_spatial_dims
    )


@partial(jax.jit, static_argnums=(0, 6, 7))
def nca_update(
    rule: Rule,
    layers: Any,
    state: Array,
    perception: Array,
    key: Any,
    inputs: Array | None,
    backend: str,
    num_spatial_dims: int,
) -> Array:
    plain = dispatch.plain(backend, "update")
    if plain is not None:
        return plain(rule, layers, state, perception, key, inputs, num_spatial_dims)
    return bind(
        "update",
        backend,
        rule,
        state,
        key,
        num_spatial_dims,
        perception=perception,
        inputs=inputs,
        layers=layers,
    )
