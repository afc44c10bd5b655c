"""``step``: one fused step of a neural cellular automaton."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array

from nca_kernels.call import StepCall, Weights
from nca_kernels.checks import check_step
from nca_kernels.dispatch import plain, requested
from nca_kernels.ops.bind import bind
from nca_kernels.perception import ConstantTaps, constant_taps
from nca_kernels.rule import Controls, Rule, RuleParams


def step(
    rule: Rule,
    params: RuleParams,
    state: Array,
    key: Any,
    inputs: Array | None = None,
    backend: str = "auto",
    *,
    return_alive: bool = False,
) -> Any:
    """One step: perception, an MLP per cell, a stochastic update and an alive mask, fused.

    Per cell i, with ``taps = params.perception``::

        P_i = perception_activation((taps * state)_i + params.perception_bias)
        u_i = MLP([P_i, inputs_i])            # activation after every layer but the last
        y_i = state_i + step_size * u_i       where the cell fires, else state_i
        out_i = y_i where it is alive, else 0

    A cell fires where ``jax.random.bernoulli(key, rule.fire_rate, state.shape[:-1])`` is true:
    the same bits on every backend. It is alive if the max-pool of the alive channel around it (see
    :class:`Alive`) exceeds the threshold both in ``state`` and in ``y`` (rounded to the state's
    dtype).

    Args:
        rule: what is fixed; static under ``jax.jit``.
        params: what is learned; differentiable. Where the taps are not trained, pass them as the
            NumPy array that ``nk.taps`` gives, from outside of what JAX transforms: Triton's
            kernels then leave out their zeros.
        state: ``[*batch, *spatial, C]`` float32 or bfloat16, with as many spatial dims (1 to 3)
            as the taps have kernel axes; differentiable. Arithmetic is float32 inside.
        key: a JAX random key, from which one mask is drawn for all of ``[*batch, *spatial]`` (for
            a key for each sample use ``jax.vmap``); or, in its place, the mask itself, bool
            ``[*batch, *spatial]``, of the cells that fire, whatever the rule's fire rate.
        inputs: ``[*batch, *spatial, I]`` per cell or ``[*batch, I]`` per sample, joined to the
            perception; differentiable.
        backend: "auto", or a name of ``nk.backends()``; a named backend runs or raises.
        return_alive: also return which cells are alive after the step, bool ``[*batch, *spatial]``:
            those that were not set to 0. All are where the rule has no alive mask.

    Returns:
        The next state, ``[*batch, *spatial, C]``, in the dtype of ``state``; with ``return_alive``
        ``(state, alive)``.

    Raises:
        ValueError, TypeError: for bad arguments, before anything is traced.
        BackendUnavailable: if a backend named by the caller cannot run the call.

    Reverse-mode derivatives only; the backward keeps ``state`` and one byte a cell, and
    recomputes the rest. Equivalent plain JAX: ``backends/reference/plain_step.py``.

    Source: Mordvintsev et al., "Growing Neural Cellular Automata", Distill, 2020.
    """
    check_step(rule, params, state, key, inputs)
    rule, controls = Controls.split(rule)
    constant = constant_taps(params.perception, state.shape[-1])
    statics = {"rule": rule, "backend": requested(backend), "constant": constant}
    return nca_step(params, state, key, inputs, controls, return_alive=return_alive, **statics)


@partial(jax.jit, static_argnames=("rule", "backend", "constant", "return_alive"))
def nca_step(
    params: RuleParams,
    state: Array,
    key: Any,
    inputs: Array | None,
    controls: Controls,
    *,
    rule: Rule,
    backend: str,
    constant: ConstantTaps,
    return_alive: bool,
) -> Any:
    ordinary = plain(backend, "step")
    if ordinary is not None:
        new, alive = ordinary(controls.join(rule), params, state, key, inputs)
        return (new, alive) if return_alive else new
    weights = Weights(params.perception, params.perception_bias, tuple(params.layers))
    statics = StepCall("step", rule, params.perception.ndim - 2, None, constant)
    return bind(
        statics,
        backend,
        state,
        key,
        weights,
        inputs=inputs,
        controls=controls,
        return_alive=return_alive,
    )
