"""Launches of the Triton kernels: what a case gets, others by name, and backends that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from benchmarks.gpu.graphs import lower
from nca_kernels import dispatch, tuning
from nca_kernels.backends import triton
from nca_kernels.backends.triton.configuration import problem_name, step_launch
from nca_kernels.testing import Case
from nca_kernels.tuning import Launch

KERNELS = {"step_forward": "forward", "step_backward": "training"}  # and what runs them
HEURISTIC = replace(triton.ENGINE, device=lambda: "")  # no device has that name, nor any winner
Chosen = tuple[str, Launch]  # the problem, as winners are filed, and the heuristic's launch


def variants(case: Case, kernel: str) -> dict[str, Launch]:
    """Launches by name, other than the heuristic's."""
    heuristic = _chosen(case)[kernel][1]
    named = tuning.variants(kernel, heuristic)
    return {name: launch for name, launch in named.items() if launch != heuristic}


def problem(case: Case, kernel: str) -> str:
    return _chosen(case)[kernel][0]


def backend(kernel: str, launch: Launch) -> str:
    """The name of a backend that launches one of the kernels so, and all else as it is."""
    engine = replace(triton.ENGINE, fixed=lambda call: launch)
    ours = {
        name: partial(function.func, engine) if name == kernel else function
        for name, function in zip(KERNELS, triton.step, strict=True)
    }
    return _register(f"triton {kernel} {launch}", tuple(ours.values()))


@cache
def _chosen(case: Case) -> dict[str, Chosen]:
    """Of each kernel, noted while a case is lowered."""
    chosen: dict[str, Chosen] = {}

    def noting(kernel: str, function: partial) -> Callable:
        def run(call: Any, platform: str, operands: Any, *rest: Any) -> Any:
            launch = step_launch(HEURISTIC, kernel, call, platform, operands, function.func)
            chosen[kernel] = f"{HEURISTIC.name} {problem_name(call, operands)}", launch
            return function(call, platform, operands, *rest)

        return run

    functions = tuple(map(noting, KERNELS, triton.step))
    lower(case, _register(f"triton noted for {case}", functions), "training", 1)
    return chosen


def _register(name: str, functions: Sequence[Callable]) -> str:
    dispatch.register(
        dispatch.Backend(
            name,
            summary="Triton kernels, launched otherwise",
            load=lambda op: functions,
            platforms=("cuda", "rocm"),
            covers=dispatch.covers("triton"),
        )
    )
    return name
