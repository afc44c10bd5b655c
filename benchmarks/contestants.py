"""Who is timed on a case: our backends and the peers that compute the right thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax

import nca_kernels as nk
from benchmarks import roofline
from benchmarks.measure import cells, interleaved, jax_run, seconds
from benchmarks.peers import PEERS, check
from benchmarks.rows import Row
from nca_kernels.testing import CHECKS, Case


class Chosen(NamedTuple):
    """What to time: backends and peers by name, and how many seconds one call may take at most."""

    backends: tuple[str, ...]
    peers: tuple[str, ...]
    rounds: int
    longest: float


def best() -> str:
    """The backend that ``"auto"`` takes here."""
    return next(b.name for b in nk.backends() if b.auto)


def available() -> tuple[str, ...]:
    """All backends that run here, the best first."""
    others = [b.name for b in nk.backends() if b.available and b.name != best()]
    return (best(), *others)


@cache
def nonconforming(backend: str, case: Case) -> str | None:
    """Why a backend is not timed, if it is wrong on a small piece of the case."""
    small = replace(case, grid=tuple(min(n, 12) for n in case.grid), batch=(1,))
    try:
        CHECKS["values_and_gradients"](backend, small)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return f"fails its conformance check, so it is not timed: {type(error).__name__}: {first}"
    return None


@cache
def _differs(peer: str, case: Case) -> str | None:
    return PEERS[peer].missing or check(PEERS[peer], case)


def contestants(
    case: Case, mode: str, steps: int, chosen: Chosen
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Compiled calls of those that run, the best backend first; why the others do not."""
    runs: dict[str, Callable[[], Any]] = {}
    not_run: dict[str, str] = {}
    for name in (*chosen.backends, *(p for p in chosen.peers if PEERS[p].fits(case))):
        ours = name in chosen.backends
        try:
            reason = nonconforming(name, case) if ours else _differs(name, case)
            if reason is None:
                make = partial(jax_run, case, name) if ours else partial(PEERS[name].run, case)
                run = make(mode, steps)
                run()
                taken = seconds(run)
                if taken > chosen.longest:
                    reason = f"one call takes {taken:.0f} s, more than {chosen.longest:.0f}"
        except Exception as error:  # a peer cannot run the case, or memory is short
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if reason is None:
            runs[name] = run
        else:
            not_run[name] = reason
    return runs, not_run


def timed(suite: str, case: Case, kind: str, mode: str, steps: int, chosen: Chosen) -> Row:
    """Times all contestants in turn; returns their row."""
    runs, not_run = contestants(case, mode, steps, chosen)
    ours = [b for b in chosen.backends if b in runs]
    row: Row = {"suite": suite, "case": case.name, "kind": kind, "mode": mode}
    row |= {"shape": [*case.batch, *case.grid, case.channels], "steps": steps, "not_run": not_run}
    if not ours:
        return row
    times = interleaved(runs, chosen.rounds, patience=chosen.longest / 12)
    return row | {"best": ours[0], "ours": ours, "seconds": times} | facts(case, mode, steps)


def facts(case: Case, mode: str, steps: int) -> Row:
    """Of a call: its cell-steps, what one of these costs at least, and this machine's limit."""
    work = roofline.work(case, mode)
    cost = {"flops": work.flops, "bytes": work.bytes, "fires": case.rule.fire_rate}
    return {"work": cells(case) * steps, "cost": cost, "limit": machine_limit()}


@cache
def _copy_rate() -> float:
    return roofline.copy_bytes_per_second()


def machine_limit() -> dict[str, float]:
    """FLOP/s and bytes/s of this machine; the former are measured anew for each row.

    On a CPU, ``flops`` is the rate of multiply-adds in vector registers. Where there are tile
    registers, ``tile_flops`` is that of float32 products in them.
    """
    if jax.default_backend() == "cpu":
        tiles = roofline.tile_flops()
        limit = {"flops": roofline.cpu_flops(), "bytes": _copy_rate()}
        return limit if tiles is None else limit | {"tile_flops": tiles}
    peak = _gpu_peak()
    return {"flops": peak.flops["tensorfloat32"], "bytes": peak.bytes}


@cache
def _gpu_peak() -> roofline.Peak:
    return roofline.measure_peak()
