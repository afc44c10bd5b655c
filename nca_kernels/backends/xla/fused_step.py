"""``step`` and ``update`` for XLA: the forward, and a backward that recomputes from the state.

Depthwise perceptions are filter-major inside (``f*C + c``, see :mod:`.stencil`); the parameters
are reordered on the way in and their gradients on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nca_kernels.backends.xla import stencil
from nca_kernels.backends.xla.active_rows import Mlp
from nca_kernels.call import Operands, StepCall, Weights
from nca_kernels.fire_mask import fires
from nca_kernels.rule import Rule, compute_dtype


def forward(call: StepCall, platform: str, operands: Operands) -> list[Array]:
    """``[new state [G, B, *S, C]]``, and with alive masking the mask ``[G, B, *S]``."""
    run_group = partial(nca_xla_forward, rule=call.rule, platform=platform)
    operands = _draw_mask(call.rule, operands)
    groups = operands.groups
    if operands.weight_groups > 1:
        return _map_groups(run_group, (operands,), platform)
    # With one set of weights, groups are just more samples.
    if operands.fire is not None:
        mask = jnp.broadcast_to(operands.fire, operands.state.shape[:-1])
        operands = operands._replace(fire=mask)
    weights = jax.tree.map(lambda w: w[0], operands.weights)
    state, fire, perception, inputs = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), operands[:-1]
    )
    outs = run_group(Operands(state, fire, perception, inputs, weights))
    return [o.reshape(groups, -1, *o.shape[1:]) for o in outs]


def backward(
    call: StepCall,
    platform: str,
    operands: Operands,
    saved: Sequence[Array],
    cotangent: Array,
    wrt: tuple[bool, ...],
) -> list[Array]:
    """The gradients ``[G, ...]`` of the operands that ``wrt`` (a flag for each array) asks for."""
    run_group = partial(nca_xla_backward, rule=call.rule, platform=platform, wrt=wrt)
    operands = _draw_mask(call.rule, operands)
    return _map_groups(run_group, (operands, list(saved), cotangent), platform)


@partial(jax.jit, static_argnames=("rule", "platform"))
def nca_xla_forward(operands: Operands, *, rule: Rule, platform: str) -> list[Array]:
    """One group, without a group axis; ``operands.fire`` is the mask ``[B, *S]`` or None."""
    state, needed, alive = operands.state, operands.fire, None
    if rule.alive is not None:
        alive = _is_alive(rule, state)
        # A dead cell's update matters to the fate of living neighbours, and to no other cell.
        near = stencil.max_pool(alive.astype(jnp.float32), rule.padding, rule.alive.radius) > 0
        needed = near if needed is None else needed & near

    def compute() -> list[Array]:
        dtype = compute_dtype(state.dtype)
        reordered = _filter_major(operands, dtype)
        mlp = _mlp(rule, reordered, platform)
        update = mlp.update(_rows(rule, reordered), None if needed is None else needed.reshape(-1))
        new_state = state.astype(dtype) + rule.step_size * update.reshape(state.shape)
        return _clear_dead(rule, new_state.astype(state.dtype), alive)

    return _if_any(needed, platform, compute, lambda: _clear_dead(rule, state, alive))


@partial(jax.jit, static_argnames=("rule", "platform", "wrt"))
def nca_xla_backward(
    operands: Operands,
    saved: list[Array],
    cotangent: Array,
    *,
    rule: Rule,
    platform: str,
    wrt: tuple[bool, ...],
) -> list[Array]:
    """The gradients of one group that ``wrt`` asks for, in the order of the operands."""
    original = operands
    dtype = compute_dtype(original.state.dtype)
    operands = _filter_major(operands, dtype)
    d_new = cotangent.astype(dtype)
    active = operands.fire
    if rule.alive is not None:
        (alive,) = saved
        d_new = jnp.where(alive[..., None], d_new, 0)
        active = alive if active is None else active & alive
    asked = jax.tree.unflatten(jax.tree.structure(original), wrt)

    def compute() -> Operands:
        d_rows, d_layers = _mlp(rule, operands, platform).gradients(
            _rows(rule, operands),
            rule.step_size * d_new.reshape(-1, d_new.shape[-1]),
            None if active is None else active.reshape(-1),
        )
        grads = _rows_backward(rule, operands, d_rows, d_new, asked.weights.taps is True)
        return grads._replace(weights=grads.weights._replace(layers=tuple(d_layers)))

    def nothing() -> Operands:
        shapes = jax.eval_shape(compute)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)._replace(state=d_new)

    grads = _if_any(active, platform, compute, nothing)._replace(fire=operands.fire)
    grads = _channel_major(grads, original)
    leaves = zip(jax.tree.leaves(grads), jax.tree.leaves(original), wrt, strict=True)
    return [grad.astype(operand.dtype) for grad, operand, wanted in leaves if wanted]


def _rows(rule: Rule, operands: Operands) -> Array:
    """The input of the MLP, ``[N, P + I]``: the perception before its activation, the inputs."""
    state, dtype = operands.state, compute_dtype(operands.state.dtype)
    taps, perception_bias, _ = operands.weights
    if taps is None:
        perception = operands.perception.astype(dtype)
    else:
        perception = stencil.perceive(state.astype(dtype), taps, rule.padding, rule.precision)
        if perception_bias is not None:
            perception += perception_bias.reshape((1,) * (state.ndim - 1) + (-1,))
    rows = perception.reshape(-1, perception.shape[-1])
    if operands.inputs is None:
        return rows
    inputs = operands.inputs.astype(dtype)
    if inputs.ndim < state.ndim:  # per sample: the same for every cell
        inputs = inputs.reshape(inputs.shape[0], *(1,) * (state.ndim - 2), -1)
    inputs = jnp.broadcast_to(inputs, (*state.shape[:-1], inputs.shape[-1]))
    return jnp.concatenate([rows, inputs.reshape(rows.shape[0], -1)], axis=1)


def _rows_backward(
    rule: Rule, operands: Operands, d_rows: Array, d_new: Array, taps_wanted: bool
) -> Operands:
    """Gradients of what the rows are made of, and of the state.

    Args:
        d_rows: the gradient of the rows, ``[N, P + I]``.
        d_new: the gradient of the new state, ``[B, *S, C]``.
        taps_wanted: whether to compute the gradient of the taps; otherwise it is 0.
    """
    grid, size = d_new.shape[:-1], d_rows.shape[1]
    if operands.inputs is not None:
        size -= operands.inputs.shape[-1]
    d_perception, d_inputs = d_rows[:, :size].reshape(*grid, size), None
    if operands.inputs is not None:
        d_inputs = d_rows[:, size:].reshape(*grid, -1)
        if operands.inputs.ndim < d_new.ndim:
            d_inputs = jnp.sum(d_inputs, axis=tuple(range(1, d_new.ndim - 1)))
    grads = Operands(d_new, None, d_perception, d_inputs, Weights(None, None, ()))
    taps, bias, _ = operands.weights
    if taps is None:
        return grads
    state = operands.state.astype(d_new.dtype)
    where = (d_perception, state, taps, rule.padding, rule.precision)
    d_taps = stencil.taps_gradient(*where) if taps_wanted else jnp.zeros_like(taps)
    d_bias = None if bias is None else jnp.sum(d_perception, range(len(grid)))
    return grads._replace(
        state=d_new + stencil.perceive_transpose(*where),
        perception=None,
        weights=Weights(d_taps, d_bias, ()),
    )


def _if_any(active: Array | None, platform: str, compute: Callable, nothing: Callable) -> Any:
    """``compute()`` if any cell is active, else ``nothing()``; on other platforms ``compute()``.

    Branches are cheap on a CPU only. There the branch also separates the steps of an unrolled loop,
    because XLA fuses nothing across it. Otherwise each step would be computed again inside the
    stencil of the next, and compile times would explode.
    """
    if active is None or platform != "cpu":
        return compute()
    return lax.cond(jnp.any(active), compute, nothing)


def _clear_dead(rule: Rule, state: Array, alive: Array | None) -> list[Array]:
    """``[new state]``, or ``[new state, alive]``; ``alive`` is the mask before the update."""
    if alive is None:
        return [state]
    alive = alive & _is_alive(rule, state)
    return [jnp.where(alive[..., None], state, jnp.zeros_like(state)), alive]


def _mlp(rule: Rule, operands: Operands, platform: str) -> Mlp:
    """The layers of one group; a perception that the caller computed has its activation already."""
    taps = operands.weights.taps
    return Mlp(rule, operands.weights.layers, 0 if taps is None else taps.shape[-1], platform)


def _is_alive(rule: Rule, state: Array) -> Array:
    assert rule.alive is not None
    plane = state[..., rule.alive.channel].astype(compute_dtype(state.dtype))
    return stencil.max_pool(plane, rule.padding, rule.alive.radius) > rule.alive.threshold


# ---- groups ----


def _draw_mask(rule: Rule, operands: Operands) -> Operands:
    """Replaces key data ``[G or 1, 2]`` by the mask ``[G or 1, B, *S]``."""
    fire = operands.fire
    if fire is None or fire.dtype == jnp.bool_:
        return operands
    shape = operands.state.shape[1:-1]
    if fire.shape[0] == 1:
        mask = fires(fire[0], rule.fire_rate, shape)[None]
    else:
        mask = jax.vmap(lambda key: fires(key, rule.fire_rate, shape))(fire)
    return operands._replace(fire=mask)


def _map_groups(fun: Callable, args: Any, platform: str) -> Any:
    """``fun`` on every group: in turn on a CPU, else on all groups at once.

    In turn, the number of blocks of each group follows its number of active cells.
    """
    leaves, treedef = jax.tree.flatten(args)
    groups = max(a.shape[0] for a in leaves)
    if groups == 1:
        outs = fun(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda o: o[None], outs)
    mapped = [a.shape[0] == groups for a in leaves]

    def on_group(arrays: list[Array]) -> Any:
        rest = iter(arrays)
        merged = [next(rest) if m else a[0] for a, m in zip(leaves, mapped, strict=True)]
        return fun(*jax.tree.unflatten(treedef, merged))

    arrays = [a for a, m in zip(leaves, mapped, strict=True) if m]
    return lax.map(on_group, arrays) if platform == "cpu" else jax.vmap(on_group)(arrays)


# ---- the order of depthwise perceptions ----


def _filter_major(operands: Operands, dtype: Any) -> Operands:
    """Weights in ``dtype``, those of a depthwise perception from ``c*F + f`` to ``f*C + c``."""
    weights = jax.tree.map(lambda w: w.astype(dtype), operands.weights)
    operands = operands._replace(weights=weights)
    return _reorder(operands, operands, lambda channels, filters: (channels, filters))


def _channel_major(grads: Operands, operands: Operands) -> Operands:
    """Gradients back to the order of the operands."""
    return _reorder(grads, operands, lambda channels, filters: (filters, channels))


def _reorder(values: Operands, operands: Operands, split: Callable) -> Operands:
    """Transposes the perception axis of taps, bias and first layer, seen as ``split(C, F)``."""
    taps, channels = operands.weights.taps, operands.state.shape[-1]
    if taps is None or taps.shape[-2] != 1:
        return values
    size = taps.shape[-1]
    shape = split(channels, size // channels)

    def swap(array: Array, axis: int) -> Array:
        axis %= array.ndim
        unflat = array.reshape(*array.shape[:axis], *shape, *array.shape[axis + 1 :])
        return jnp.swapaxes(unflat, axis, axis + 1).reshape(array.shape)

    taps, bias, ((weight, first_bias), *rest) = values.weights
    weight = jnp.concatenate([swap(weight[:size], 0), weight[size:]])
    bias = None if bias is None else swap(bias, -1)
    layers = ((weight, first_bias), *rest)
    return values._replace(weights=Weights(swap(taps, -1), bias, layers))
