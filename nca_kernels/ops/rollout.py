"""``rollout``: many steps, keeping only the states that the checkpointing asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nca_kernels.ops.step import step
from nca_kernels.rule import Rule, RuleParams, check_rollout, check_step

AfterStep = Callable[[Array, Array, Sequence[Array]], Array]


def rollout(
    rule: Rule,
    params: RuleParams,
    state: Array,
    key: Any,
    num_steps: int,
    inputs: Array | None = None,
    checkpoint: str | int = "sqrt",
    return_states: bool = False,
    sample_steps: Array | None = None,
    backend: str = "auto",
    after_step: AfterStep | None = None,
) -> Any:
    """``num_steps`` steps; step ``t`` (from 0) uses ``jax.random.fold_in(key, t)``.

    Equivalent to::

        for t in range(num_steps):
            new = nk.step(rule, params, state, jax.random.fold_in(key, t), inputs)
            state = new if after_step is None else after_step(state, new, places)

    Args:
        rule, params, state, key, inputs, backend: as for :func:`nca_kernels.step`.
        num_steps: T, at least 0; static.
        checkpoint: which states the backward keeps: "all" (T of them), "sqrt" (about 2*sqrt(T),
            for one more forward) or an int n (one in n, and n more while going back). Never
            perceptions or hidden layers.
        return_states: also return every state.
        sample_steps: int ``[*batch]``, each from 0 to T: also return each sample's state after
            that many steps, without keeping the trajectory.
        after_step: what happens to the state after each step, cell by cell, such as a wall:
            ``(state before the step, state after it, places) -> state``. ``places`` has for each
            grid dim the indices of the cells, int32, shaped to broadcast with the states.

    Returns:
        The final state; ``(final, states [T, *batch, *spatial, C])`` with ``return_states``;
        ``(final, sampled [*batch, *spatial, C])`` with ``sample_steps``.

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`nca_kernels.step`.
    """
    batch_shape = check_step(rule, params, state, key, inputs)
    check_rollout(num_steps, checkpoint, sample_steps, return_states, batch_shape)
    grid = state.shape[len(batch_shape) : -1]

    def one_step(carry: tuple[Array, Any], t: Array) -> tuple[tuple[Array, Any], Array | None]:
        before, sampled = carry
        state = step(rule, params, before, jax.random.fold_in(key, t), inputs, backend)
        if after_step is not None:
            state = after_step(before, state, broadcast_places(map(jnp.arange, grid)))
        if sample_steps is not None:
            sampled = where_sample(sample_steps == t + 1, state, sampled)
        return (state, sampled), state if return_states else None

    state = jnp.asarray(state)
    carry = (state, state if sample_steps is not None else None)
    steps = jnp.arange(num_steps)
    (final, sampled), states = checkpointed_scan(one_step, carry, steps, checkpoint)
    if return_states:
        return final, states
    return final if sample_steps is None else (final, sampled)


def checkpointed_scan(body: Callable, carry: Any, steps: Array, checkpoint: str | int) -> Any:
    """``lax.scan(body, carry, steps)``, keeping the carry of one step in ``every``."""
    # Between two kept states a step's own residuals (its input state) live for a moment only.
    num_steps = len(steps)
    if isinstance(checkpoint, int):
        every = checkpoint
    else:
        every = 1 if checkpoint == "all" else math.isqrt(max(num_steps - 1, 0)) + 1
    body = jax.checkpoint(body, prevent_cse=False, policy=_saves_kernel_outputs)
    if every == 1 or num_steps <= every:
        return _scan(body, carry, steps)

    @jax.checkpoint
    def segment(carry: Any, steps: Array) -> Any:
        return _scan(body, carry, steps)

    whole = num_steps - num_steps % every
    carry, outs = lax.scan(segment, carry, steps[:whole].reshape(-1, every))
    outs = jax.tree.map(lambda o: o.reshape(-1, *o.shape[2:]), outs)
    if whole == num_steps:
        return carry, outs
    carry, rest = _scan(body, carry, steps[whole:])
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outs, rest)


# A kernel cannot write where it reads. With one step an iteration, XLA copies each new state to
# where the loop's carry lives; two steps write from there to another buffer and back.
_scan = partial(lax.scan, unroll=2)


def broadcast_places(places: Iterable[Array]) -> list[Array]:
    """Of each grid dim the places ``[n]``, with dims of 1 for the dims after it, channels too."""
    listed = list(places)
    return [p.reshape(-1, *(1,) * (len(listed) - dim)) for dim, p in enumerate(listed)]


def _saves_kernel_outputs(primitive: Any, *args: Any, **params: Any) -> bool:
    """A step's kernel runs once going forward; of plain JAX steps nothing inside is kept."""
    return primitive.name == "nca_step_forward"


def where_sample(chosen: Array, state: Array, otherwise: Array) -> Array:
    """Per sample: ``chosen [*batch]`` selects between two ``[*batch, *spatial, C]``."""
    chosen = chosen.reshape(*chosen.shape, *(1,) * (state.ndim - chosen.ndim))
    return jnp.where(chosen, state, otherwise)
