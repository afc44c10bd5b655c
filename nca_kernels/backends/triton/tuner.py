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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nca_kernels.call import AttentionOperands, Operands
from nca_kernels.tuning import FIELDS, Launch, candidates, user_folder, winner_of, write_winner

ROUNDS = 20
LONG_ENOUGH = 0.005  # seconds of a round, in one call or in several: a launch takes microseconds
MOST_CALLS = 50
ATTENTION_FIELDS = ("rows", "warps", "stages")  # what launches of attention depend on
log = logging.getLogger("nca_kernels")
_tuned: dict[tuple[str, str, str], Launch] = {}  # once a process and problem


class Tunable(NamedTuple):
    """A kernel of a call; ``op`` runs that, as ``(engine, call, platform, operands, ...)``."""

    engine: Any  # a configuration.Engine
    kernel: str
    call: Any
    platform: str
    operands: Operands | AttentionOperands
    op: Callable[..., Any]


def tuned(tunable: Tunable, problem: str, heuristic: Launch) -> Launch:
    """The fastest of :func:`nca_kernels.tuning.candidates` around the heuristic's launch.

    Args:
        problem: the name that the winner is filed under. What the user's file has is not tuned
            again, so that a program that was interrupted goes on.

    Raises:
        RuntimeError: none of them runs.
    """
    kernel, operands = tunable.kernel, tunable.operands
    key = tunable.engine.device(), kernel, problem
    if key not in _tuned:
        fastest_launch = winner_of(user_folder(), *key)
        if fastest_launch is None:
            fields = ATTENTION_FIELDS if isinstance(operands, AttentionOperands) else FIELDS
            launches = candidates(heuristic, fields)
            log.warning("tuning %s for %s: %d launches ...", kernel, problem, len(launches))
            with jax.ensure_compile_time_eval():
                prepare = _preparation(tunable)
                fastest_launch = fastest({launch: partial(prepare, launch) for launch in launches})
            if fastest_launch is None:
                raise RuntimeError(f"no launch of {kernel} runs on {key[0]} for {problem}")
            path = write_winner(*key, fastest_launch)
            log.warning("%s, written to %s", fastest_launch, path)
        _tuned[key] = fastest_launch
    return _tuned[key]


def fastest(runs: dict[Launch, Callable[[], Callable[[], Any]]]) -> Launch | None:
    """The launch with the lowest median time, or None if none of them runs.

    All are timed in turns, round by round, so that none is favoured by when it is measured.

    Args:
        runs: for each launch a function that prepares it and returns what is timed.
    """
    timed = {}
    for launch, prepare in runs.items():
        try:
            run = prepare()
            jax.block_until_ready(run())
        except Exception as error:  # too much shared memory, a launch that does not compile, ...
            log.info("skipped: %s", str(error).splitlines()[-1:])
            continue
        calls = max(1, min(MOST_CALLS, int(LONG_ENOUGH / seconds(run, 1))))
        timed[launch] = partial(seconds, run, calls)
    times = [[time_it() for time_it in timed.values()] for _ in range(ROUNDS)]
    medians = np.median(np.reshape(times, (ROUNDS, -1)), axis=0)
    return list(timed)[int(np.argmin(medians))] if timed else None


def seconds(run: Callable[[], Any], calls: int) -> float:
    """Seconds of one call, from many that the device is given before it is waited for."""
    start = time.perf_counter()
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def _preparation(tunable: Tunable) -> Callable[[Launch], Callable[[], Any]]:
    """``launch -> a call of the compiled op`` on random operands, all of whose cells are alive."""
    engine, kernel, call, platform, operands, op = tunable
    random = np.random.default_rng(0)

    def like(array: Any) -> Any:
        if array.dtype == np.bool_:
            return jnp.ones(array.shape, array.dtype)
        if array.dtype == np.uint32:
            return jnp.asarray(random.integers(0, 2**32, array.shape, np.uint32))
        return jnp.asarray(0.5 + 0.1 * random.normal(size=array.shape), array.dtype)

    arrays = jax.tree.map(like, operands)
    avals = [jax.typeof(a) for a in jax.tree.leaves(arrays)]
    cotangent, *saved = map(like, call.outputs(avals))
    floating = jax.tree.map(lambda a: jnp.issubdtype(a.dtype, jnp.floating), arrays)
    if getattr(call, "constant_taps", None):
        floating = floating._replace(weights=floating.weights._replace(taps=False))
    wrt = tuple(jax.tree.leaves(floating))

    def prepare(launch: Launch) -> Callable[[], Any]:
        fixed = replace(engine, fixed=lambda call: launch)
        if kernel.endswith("_forward"):
            compiled = jax.jit(lambda arrays: op(fixed, call, platform, arrays))
            return lambda: compiled(arrays)
        compiled = jax.jit(lambda arrays, d: op(fixed, call, platform, arrays, saved, d, wrt))
        return lambda: compiled(arrays, cotangent)

    return prepare
