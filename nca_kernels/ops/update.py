"""``update``: the part of a step that follows the perception, for perceptions of one's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array

from nca_kernels.call import StepCall, Weights
from nca_kernels.checks import check_update
from nca_kernels.dispatch import plain, requested
from nca_kernels.ops.bind import bind
from nca_kernels.rule import Controls, Rule


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
    return_alive: bool = False,
) -> Any:
    """MLP, stochastic update and alive mask, with the perception given.

    ``step(rule, params, state, key)`` equals ``update(rule, params.layers, state, P, key)`` where
    ``P`` is the perception with its bias and activation already applied. The rule's
    ``perception_activation`` is not used, and its ``padding`` only by the alive pool.

    Args:
        rule, state, key, inputs, backend, return_alive: as for :func:`nca_kernels.step`.
        layers: one or more ``(W [in, out], b [out] or None)``; differentiable.
        perception: ``[*batch, *spatial, P]``; differentiable.
        num_spatial_dims: how many dims of ``state`` before the last are the grid, 1 to 3.

    Returns:
        The next state, ``[*batch, *spatial, C]``, in the dtype of ``state``; with ``return_alive``
        ``(state, alive)``.

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`nca_kernels.step`.
    """
    check_update(rule, layers, state, perception, key, inputs, num_spatial_dims=num_spatial_dims)
    rule, controls = Controls.split(rule)
    statics = {"rule": rule, "backend": requested(backend), "num_spatial_dims": num_spatial_dims}
    run = partial(nca_update, return_alive=return_alive, **statics)
    return run(layers, state, perception, key, inputs, controls)


@partial(jax.jit, static_argnames=("rule", "backend", "num_spatial_dims", "return_alive"))
def nca_update(
    layers: Any,
    state: Array,
    perception: Array,
    key: Any,
    inputs: Array | None,
    controls: Controls,
    *,
    rule: Rule,
    backend: str,
    num_spatial_dims: int,
    return_alive: bool,
) -> Any:
    ordinary = plain(backend, "update")
    if ordinary is not None:
        rule = controls.join(rule)
        new, alive = ordinary(rule, layers, state, perception, key, inputs, num_spatial_dims)
        return (new, alive) if return_alive else new
    statics = StepCall("update", rule, num_spatial_dims, None)
    return bind(
        statics,
        backend,
        state,
        key,
        Weights(None, None, layers),
        perception=perception,
        inputs=inputs,
        controls=controls,
        return_alive=return_alive,
    )
