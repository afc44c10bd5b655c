"""Other launches of the Triton kernels: the stage variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import jax

from benchmarks.gpu.graphs import lower
from benchmarks.gpu.items import Asked, Facts, Item
from benchmarks.gpu.timings import Timed, timed_cases
from benchmarks.measure import interleaved, jax_run
from nca_kernels import dispatch, tuning
from nca_kernels.backends import triton
from nca_kernels.backends.triton.configuration import problem_name, step_launch
from nca_kernels.testing import Case, error_ratio, tolerance
from nca_kernels.tuning import Launch

KERNELS = {"step_forward": "forward", "step_backward": "training"}  # and what runs them
HEURISTIC = replace(
    triton.ENGINE, device=lambda: ""
)  # a name that no device has, and so without winners
Chosen = tuple[
    str, Launch
]  # the name of the problem in files of winners, and the heuristic's launch


def variants(asked: Asked) -> list[Item]:
    """Items: each named launch against the default, forward and backward, at both sizes."""
    if asked.backends[0] != "triton":
        return []
    return [
        Item(
            f"{timed} {kernel} {name}",
            partial(variant, timed, kernel, name, asked.tiny),
            partial(lower_variant, timed, kernel, name),
        )
        for timed in timed_cases(asked.tiny)[:2]
        for kernel in KERNELS
        for name in launches(timed.case, kernel)
    ]


def variant(timed: Timed, kernel: str, name: str, tiny: bool) -> Iterator[Facts]:
    """A variant's launch, its error against the default's step, and the times of both in turns."""
    launch, mode = launches(timed.case, kernel)[name], KERNELS[kernel]
    backend = register(kernel, launch)
    yield {
        "case": timed.case.name,
        "kernel": kernel,
        "variant": name,
        "problem": _chosen(timed.case)[kernel][0],
        "launch": asdict(launch),
    }
    errors = jax.tree.map(error_ratio, _one_step(timed, backend, mode), _default(timed, mode)[1])
    worst, limit = max(jax.tree.leaves(errors)), tolerance(timed.case.dtype, "tensorfloat32")
    yield {"error": worst}
    assert worst <= limit, f"it computes something else: error ratio {worst:.1e} > {limit:.1e}"
    run = jax_run(timed.case, backend, mode, timed.steps)
    runs = {"default": _default(timed, mode)[0], name: run}
    yield {"seconds": interleaved(runs, 2 if tiny else 5)}


def lower_variant(timed: Timed, kernel: str, name: str) -> None:
    backend = register(kernel, launches(timed.case, kernel)[name])
    lower(timed.case, backend, KERNELS[kernel], timed.steps)


@cache
def _default(timed: Timed, mode: str) -> tuple[Callable[[], Any], Any]:
    """The call with the default launch, and the result of a step."""
    run = jax_run(timed.case, "triton", mode, timed.steps)
    run()
    return run, _one_step(timed, "triton", mode)


def _one_step(timed: Timed, backend: str, mode: str) -> Any:
    return jax_run(timed.case, backend, mode, 1)()


# ---- launches, and backends that use them ----


def launches(case: Case, kernel: str) -> dict[str, Launch]:
    """The launches of variants by name, without the heuristic's."""
    heuristic = _chosen(case)[kernel][1]
    named = tuning.variants(kernel, heuristic)
    return {name: launch for name, launch in named.items() if launch != heuristic}


def register(kernel: str, launch: Launch) -> str:
    """Registers a backend that launches one kernel in another way; returns its name."""
    engine = replace(triton.ENGINE, fixed=lambda call: launch)
    functions = [
        partial(function.func, engine) if name == kernel else function
        for name, function in zip(KERNELS, triton.step, strict=True)
    ]
    return _register(f"triton {kernel} {launch}", functions)


@cache
def _chosen(case: Case) -> dict[str, Chosen]:
    """The launch of each kernel, recorded while a case is lowered."""
    chosen: dict[str, Chosen] = {}

    def noting(kernel: str, function: partial) -> Callable:
        def run(call: Any, platform: str, operands: Any, *rest: Any) -> Any:
            launch = step_launch(HEURISTIC, kernel, call, platform, operands, function.func)
            chosen[kernel] = f"{HEURISTIC.name} {problem_name(call, operands)}", launch
            return function(call, platform, operands, *rest)

        return run

    functions = list(map(noting, KERNELS, triton.step))
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
