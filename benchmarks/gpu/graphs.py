"""Whether XLA puts the launches of a rollout into CUDA graphs.

XLA decides that after compiling, for its *thunks*, which the runtime executes one after the other.
A dump shows each as a line "<indent><number>: <kind> ...", with the contents of a graph or a loop
indented below it. By default a loop is not part of a graph, each of its turns is a graph, and fewer
than five launches do not become one.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.items import Facts, Item, Skipped
from benchmarks.measure import program
from nca_kernels.testing import Case
from nca_kernels.testing.compare import assert_same_bits

# The loop itself goes into a graph as well, and any number of launches is enough.
ONE_GRAPH = {
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
}
STEPS = 16  # so many that they are a loop: fewer are unrolled
GRAPH = "kCommandBuffer"
HOLDS = (GRAPH, "kSequential", "kWhile", "kConditional")  # kinds that launch nothing themselves
THUNK = re.compile(r"^(\s*)\d+: (k\w+)")
EVIDENCE = 3000  # characters


def items(backend: str, case: Case, modes: Sequence[str]) -> list[Item]:
    """Whether a backend's rollouts are captured, with XLA's own options and with ``ONE_GRAPH``."""
    return [
        Item(
            f"graphs of {mode} {backend}",
            partial(captured, backend, case, mode),
            partial(lower, case, backend, mode, STEPS) if backend == "triton" else None,
        )
        for mode in modes
    ]


def lower(case: Case, backend: str, mode: str, steps: int) -> None:
    """A program for CUDA, without a device."""
    fun, args = program(case, backend, mode, steps)
    jax.jit(fun).trace(*args).lower(lowering_platforms=("cuda",))


def captured(backend: str, case: Case, mode: str) -> Iterator[Facts]:
    fun, args = program(case, backend, mode, STEPS)
    outs = []
    for name, options in {"default": {}, "one graph": ONE_GRAPH}.items():
        thunks, compiled = _compiled(fun, args, options)
        outs.append(compiled(*args))
        yield {name: None if thunks is None else counted(thunks) | {"evidence": thunks[:EVIDENCE]}}
    assert_same_bits(outs[1], outs[0], "in one graph")
    if thunks is None:
        raise Skipped("XLA wrote no list of thunks, which it does on GPUs")


def _compiled(fun: Any, args: tuple, options: dict[str, Any]) -> tuple[str | None, Any]:
    """What XLA makes of a program, as text, and the program."""
    with tempfile.TemporaryDirectory() as folder:
        dump: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = jax.jit(fun).lower(*args).compile(compiler_options={**options, **dump})
        after = [*Path(folder).glob("*thunk_sequence_after_thunk_passes*.txt")]
        files = after or [*Path(folder).glob("*thunk_sequence*.txt")]  # which no pass has changed
        text = max((file.read_text() for file in files), key=len, default=None)
    return text, compiled


def counted(thunks: str) -> Facts:
    """How many launches and loops are in graphs, of how many; and how many graphs there are."""
    inside = {"launches": 0, "loops": 0}
    total = {**inside, "graphs": 0}
    graph = None  # the indent of the one that lines belong to
    for line in thunks.splitlines():
        if not (thunk := THUNK.match(line)):
            continue
        indent, kind = len(thunk[1]), thunk[2]
        if graph is not None and indent <= graph:
            graph = None
        name = {GRAPH: "graphs", "kWhile": "loops"}.get(kind, None if kind in HOLDS else "launches")
        if name:
            total[name] += 1
        if graph is not None and name in inside:
            inside[name] += 1
        if kind == GRAPH and graph is None:
            graph = indent
    return {"in_graphs": inside, **total}
