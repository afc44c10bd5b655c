"""``rollout``: many steps, keeping only the states that the checkpointing asks for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nca_kernels.checks import check_num_steps, check_rollout, check_step
from nca_kernels.ops.step import step
from nca_kernels.rule import Rule, RuleParams

AfterStep = Callable[..., Array]


def rollout(
    rule: Rule,
    params: RuleParams,
    state: Array,
    key: Any,
    num_steps: Any,
    inputs: Array | None = None,
    checkpoint: str | int = "sqrt",
    return_states: bool = False,
    sample_steps: Array | None = None,
    backend: str = "auto",
    after_step: AfterStep | None = None,
    keep: str = "exact",
    *,
    max_steps: int | None = None,
) -> Any:
    """``num_steps`` steps; step ``t`` (from 0) uses ``jax.random.fold_in(key, t)``.

    Equivalent to::

        for t in range(num_steps):
            new = nk.step(rule, params, state, jax.random.fold_in(key, t), inputs)
            state = new if after_step is None else after_step(state, new, positions)

    Args:
        rule, params, state, inputs, backend: as for :func:`nca_kernels.step`.
        key: a JAX random key; or which cells fire, as masks ``[T, *batch, *spatial]``, or as a
            function of the step's number (int32, traced) that returns ``[*batch, *spatial]``; bool.
        num_steps: T, at least 0; static, or with ``max_steps`` an int32 that may be traced.
        checkpoint: which states the backward keeps: "all" (T of them), "sqrt" (about 2*sqrt(T),
            for one more forward) or an int n (one in n, and n more while going back). Never
            perceptions or hidden layers.
        return_states: also return every state.
        sample_steps: int ``[*batch]``, each from 0 to T: also return each sample's state after
            that many steps, without keeping the trajectory.
        after_step: what happens to the state after each step, cell by cell, such as a wall:
            ``(state before the step, state after it, positions) -> state``. ``positions`` has for
            each grid dim the indices of the cells, int32, shaped to broadcast with the states. A
            function of five arguments, or with keyword arguments ``step`` and ``key``, also gets
            the step's number t, int32, and a key for noise of its own,
            ``fold_in(fold_in(key, t), 1)`` (None where masks take the place of the key).
        keep: how the states of ``checkpoint`` wait for the backward: "exact"; "bfloat16" (float32
            states take half the memory; values are untouched, gradients within a few percent); or
            "host" (in the memory of the host, from where they come back one by one). The last two
            run a step's forward again even with ``checkpoint="all"``.
        max_steps: the most that ``num_steps`` can be, static, so that a program for any number of
            steps is compiled once. Steps beyond ``num_steps`` are skipped, not computed, unless
            ``num_steps`` is mapped over by ``jax.vmap``; ``return_states`` repeats the final state
            for them.

    Returns:
        The final state; ``(final, states [T, *batch, *spatial, C])`` with ``return_states``
        (``[max_steps, ...]`` if that is given);
        ``(final, sampled [*batch, *spatial, C])`` with ``sample_steps``.

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`nca_kernels.step`.
    """
    most = num_steps if max_steps is None else max_steps
    check_num_steps(num_steps, max_steps)
    batch_shape = check_step(rule, params, state, key, inputs, num_steps=most)
    check_rollout(most, checkpoint, keep, sample_steps, return_states, batch_shape)
    grid = state.shape[len(batch_shape) : -1]
    end_step = AfterStepCaller(after_step)

    def one_step(carry: tuple[Array, Any], at: Any) -> tuple[tuple[Array, Any], Array | None]:
        (before, sampled), (t, source) = carry, at

        def advance(before: Array) -> Array:
            fire = key(t) if callable(key) else source
            after = step(rule, params, before, fire, inputs, backend)
            return end_step(before, after, list(map(jnp.arange, grid)), t, source)

        if max_steps is None:
            state = advance(before)
        else:
            state = lax.cond(t < num_steps, advance, lambda before: before, before)
        if sample_steps is not None:
            sampled = where_sample(sample_steps == t + 1, state, sampled)
        return (state, sampled), state if return_states else None

    state = jnp.asarray(state)
    carry = (state, state if sample_steps is not None else None)
    steps = scanned_steps(key, most)
    (final, sampled), states = checkpointed_scan(one_step, carry, steps, checkpoint, keep)
    if return_states:
        return final, states
    return final if sample_steps is None else (final, sampled)


def scanned_steps(key: Any, num_steps: int) -> tuple[Array, Any]:
    """The number of every step, ``int32 [T]``, and its key or its mask, ``[T, ...]``.

    None if a function says which cells fire.
    """
    numbers = jnp.arange(num_steps)
    if callable(key):
        return numbers, None
    if key.dtype == jnp.bool_:
        return numbers, jnp.asarray(key)
    return numbers, jax.vmap(partial(jax.random.fold_in, key))(numbers)


@dataclass(frozen=True)
class AfterStepCaller:
    """Calls ``after_step``, if there is one, with as many of its arguments as it takes."""

    after_step: AfterStep | None

    def __call__(
        self, before: Array, after: Array, positions: Sequence[Array], t: Array, source: Any
    ) -> Array:
        """The state that a step ends with; ``source``: the step's key, a mask or None."""
        if self.after_step is None:
            return after
        is_key = source is not None and source.dtype != jnp.bool_
        noise_key = jax.random.fold_in(source, 1) if is_key else None
        parameters = inspect.signature(self.after_step).parameters.values()
        required = [p for p in parameters if p.kind in _POSITIONAL and p.default is p.empty]
        arguments = [before, after, broadcast_positions(positions)]
        if len(required) == 5:
            return self.after_step(*arguments, t, noise_key)
        by_name = {"step": t, "key": noise_key}
        named = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        return self.after_step(*arguments, **{n: v for n, v in by_name.items() if n in named})


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def checkpointed_scan(
    body: Callable, carry: Any, steps: Any, checkpoint: str | int, keep: str
) -> Any:
    """``lax.scan(body, carry, steps)`` whose backward keeps the carries ``checkpoint`` names."""
    # Between two of these, what a single step keeps (its input state) lives for a moment only.
    num_steps = _length(steps)
    if isinstance(checkpoint, int):
        every = checkpoint
    else:
        every = 1 if checkpoint == "all" else math.isqrt(max(num_steps - 1, 0)) + 1
    body = jax.checkpoint(body, prevent_cse=False, policy=_saves_kernel_outputs)
    if keep == "exact" and (every == 1 or num_steps <= every):
        return scan_steps(body, carry, steps)

    def segment(carry: Any, steps: Any) -> Any:
        return scan_steps(body, carry, steps)

    segment = jax.checkpoint(segment) if keep == "exact" else _keeping(segment, keep)
    whole = num_steps - num_steps % every
    in_segments = jax.tree.map(lambda s: s[:whole].reshape(-1, every, *s.shape[1:]), steps)
    carry, outs = lax.scan(segment, carry, in_segments)
    outs = jax.tree.map(lambda o: o.reshape(-1, *o.shape[2:]), outs)
    if whole == num_steps:
        return carry, outs
    last = partial(scan_steps, body) if keep == "exact" else segment
    carry, rest = last(carry, jax.tree.map(lambda s: s[whole:], steps))
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outs, rest)


def _keeping(segment: Callable, keep: str) -> Callable:
    """``segment(carry, steps)``, its carry for the backward stored as ``keep`` says."""

    def pack(leaf: Array) -> Array:
        if keep == "host":
            return jax.device_put(leaf, jax.memory.Space.Host)
        if leaf.dtype != jnp.float32:
            return leaf
        # As integers: XLA on a CPU widens a whole bfloat16 array to write one state to it.
        return lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16)

    def unpack(packed: Array, dtype: Any) -> Array:
        if keep == "host":
            return jax.device_put(packed, jax.memory.Space.Device)
        if packed.dtype != jnp.uint16:
            return packed
        return lax.bitcast_convert_type(packed, jnp.bfloat16).astype(dtype)

    def run(carry: Any, steps: Any) -> Any:
        # A custom VJP cannot close over values that are being traced: they become arguments.
        traced, out = jax.make_jaxpr(segment, return_shape=True)(carry, steps)
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, carry)

        def pure(captured: Any, carry: Any, steps: Any) -> Any:
            leaves = jax.core.eval_jaxpr(traced.jaxpr, captured, *jax.tree.leaves((carry, steps)))
            return jax.tree.unflatten(jax.tree.structure(out), leaves)

        def forward(captured: Any, carry: Any, steps: Any) -> Any:
            return pure(captured, carry, steps), (captured, jax.tree.map(pack, carry), steps)

        def backward(residuals: Any, cotangent: Any) -> Any:
            captured, packed, steps = residuals
            carry = jax.tree.map(unpack, packed, dtypes)
            _, pull = jax.vjp(lambda *args: pure(args[0], args[1], steps), captured, carry)
            return *pull(cotangent), None

        call = jax.custom_vjp(pure)
        call.defvjp(forward, backward)
        return call(traced.consts, carry, steps)

    return run


# Up to this many steps are written out instead of looped over. The backward then finds each state
# where its kernel wrote it, while a loop copies all states into one array and out of it again.
_UNROLLED = 12  # "sqrt" makes segments of 12 out of 144 steps


def scan_steps(body: Callable, carry: Any, steps: Any) -> Any:
    """``lax.scan(body, carry, steps)``, unrolled as far as it spares copies of the state."""
    # A kernel cannot write where it reads. With a single step in an iteration, XLA copies each new
    # state to the loop's carry; two steps write from the carry to another buffer and back.
    length = _length(steps)
    return lax.scan(body, carry, steps, unroll=2 if length > _UNROLLED else max(length, 1))


def _length(steps: Any) -> int:
    return int(jax.tree.leaves(steps)[0].shape[0])


def broadcast_positions(positions: Sequence[Array]) -> list[Array]:
    """The positions ``[n]`` along each grid dim, shaped to broadcast with ``[*spatial, C]``."""
    return [p.reshape(-1, *(1,) * (len(positions) - dim)) for dim, p in enumerate(positions)]


def _saves_kernel_outputs(primitive: Any, *args: Any, **params: Any) -> bool:
    """Keeps what a step's kernel computed, so that it does not run again; nothing else."""
    return primitive.name == "nca_step_forward"


def where_sample(chosen: Array, state: Array, otherwise: Array) -> Array:
    """Per sample: ``chosen [*batch]`` selects between two ``[*batch, *spatial, C]``."""
    chosen = chosen.reshape(*chosen.shape, *(1,) * (state.ndim - chosen.ndim))
    return jnp.where(chosen, state, otherwise)
