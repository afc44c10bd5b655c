"""Finds the fastest launch of a call's kernels on this device: ``NCA_TUNE=1``.

Runs while the call that asks for it is lowered, on random operands of its shapes; the winner is
written to the user's file of the device, see :mod:`nca_kernels.tuning`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nca_kernels.rule import AttentionOperands, Operands
from nca_kernels.tuning import FIELDS, Launch, candidates, write_winner

ROUNDS = 20
ATTENTION_FIELDS = ("rows", "warps", "stages")  # what launches of attention depend on
log = logging.getLogger("nca_kernels")
_tuned: dict[tuple[str, str, str], Launch] = {}  # once a process and problem


def tuned(
    engine: Any,
    kernel: str,
    problem: str,
    call: Any,
    platform: str,
    operands: Operands | AttentionOperands,
    heuristic: Launch,
) -> Launch:
    """The fastest of :func:`nca_kernels.tuning.candidates` around the heuristic's launch."""
    device = engine.device()
    if (device, kernel, problem) in _tuned:
        return _tuned[device, kernel, problem]
    fields = ATTENTION_FIELDS if isinstance(operands, AttentionOperands) else FIELDS
    launches = candidates(heuristic, fields)
    with jax.ensure_compile_time_eval():
        run = _runner(engine, kernel, call, platform, operands)
        times = {how: seconds(partial(run, how)) for how in launches}
    best = min(times, key=lambda how: times[how])
    if times[best] == float("inf"):
        raise RuntimeError(f"no launch of {kernel} runs on {device} for {problem}")
    path = write_winner(device, kernel, problem, best)
    log.info("tuned %s for %s: %s, written to %s", kernel, problem, best, path)
    _tuned[device, kernel, problem] = best
    return best


def seconds(run: Callable[[], Callable[[], Any]]) -> float:
    """The median time of a call of what ``run`` prepares; infinite if it cannot run."""
    try:
        prepared = run()
        jax.block_until_ready(prepared())
    except Exception as error:  # too much shared memory, a launch that does not compile, ...
        log.info("skipped: %s", str(error).splitlines()[-1:])
        return float("inf")
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(prepared())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _runner(
    engine: Any, kernel: str, call: Any, platform: str, operands: Operands | AttentionOperands
) -> Callable[[Launch], Callable[[], Any]]:
    """``launch -> a call of the compiled op`` on random operands, all of whose cells are alive."""
    from nca_kernels.tiled import attention, step

    op: Any = attention if isinstance(operands, AttentionOperands) else step
    random = np.random.default_rng(0)

    def like(array: Any) -> Any:
        if array.dtype == np.bool_:
            return jnp.ones(array.shape, array.dtype)
        if array.dtype == np.uint32:
            return jnp.asarray(random.integers(0, 2**32, array.shape, np.uint32))
        return jnp.asarray(0.5 + 0.1 * random.normal(size=array.shape), array.dtype)

    own = jax.tree.map(like, operands)
    avals = [jax.typeof(a) for a in jax.tree.leaves(own)]
    cotangent, *saved = map(like, call.outputs(avals))
    floating = jax.tree.map(lambda a: jnp.issubdtype(a.dtype, jnp.floating), own)
    if getattr(call, "constant_taps", None):
        floating = floating._replace(taps=False)
    wrt = tuple(jax.tree.leaves(floating))

    def prepare(how: Launch) -> Callable[[], Any]:
        fixed = replace(engine, fixed=lambda call: how)
        if kernel.endswith("_forward"):
            compiled = jax.jit(lambda own: op.forward(fixed, call, platform, own))
            return lambda: compiled(own)
        compiled = jax.jit(lambda own, d: op.backward(fixed, call, platform, own, saved, d, wrt))
        return lambda: compiled(own, cotangent)

    return prepare
