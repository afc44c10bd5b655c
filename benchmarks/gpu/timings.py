"""Speed and memory of the backends: the stages speed, profile, memory and train."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import kernels, peers, roofline
from benchmarks.gpu.child import told
from benchmarks.gpu.graphs import ONE_GRAPH, lower
from benchmarks.gpu.items import Asked, Facts, Item, Skipped
from benchmarks.measure import cells, interleaved, jax_run
from nca_kernels.dispatch import BackendUnavailable
from nca_kernels.files import write_text
from nca_kernels.testing import BENCHMARKS, Case

MODES = ("forward", "training")
MEMORY_STEPS = 64
IN_ONE_GRAPH = ", one graph"
QUALITIES = (-2.0, -2.5, -3.0, -3.5)
TRAINING = 600.0  # seconds, if the stage has them


class Timed(NamedTuple):
    """A case, and the steps of a call: more than one if a step takes less time than its launch."""

    case: Case
    steps: int
    small: bool = False  # launches matter

    def __str__(self) -> str:
        return self.case.name


def timed_cases(tiny: bool) -> list[Timed]:
    """The two cases that matter most, then the others."""
    growing, *others = BENCHMARKS
    if tiny:
        return [Timed(replace(growing, name="tiny", grid=(8, 8), batch=(1,)), 2, small=True)]
    large = replace(growing, name="growing_1024", grid=(1024, 1024), batch=(1,))
    return [Timed(large, 8), Timed(growing, 64, small=True), *(Timed(c, 16) for c in others)]


# ---- speed ----


def speed(asked: Asked) -> list[Item]:
    """Items: the device's limits, our backends and PyTorch in turns, then compiled PyTorch."""
    items = [Item("peak", partial(peak, asked.tiny))]
    first = asked.backends[0]
    cases = timed_cases(asked.tiny)
    for timed in cases:
        for mode in MODES:
            names = [*asked.backends, "reference", "torch"]
            if timed.small:
                names[1:1] = [b + IN_ONE_GRAPH for b in asked.backends if b != "xla" or asked.tiny]
            items.append(_speed_item(f"{timed} {mode}", timed, mode, names, asked))
    for timed in cases[:2]:
        for mode in MODES:
            name = f"{timed} {mode}, compiled PyTorch"
            items.append(_speed_item(name, timed, mode, [first, "torch_compiled"], asked))
    return items


def _speed_item(name: str, timed: Timed, mode: str, names: list[str], asked: Asked) -> Item:
    run = partial(in_turns, timed, mode, names, asked)
    low = partial(lower, timed.case, "triton", mode, timed.steps) if "triton" in names else None
    return Item(name, run, low)


def peak(tiny: bool) -> Iterator[Facts]:
    """FLOP/s and bytes/s of this device."""
    size, megabytes, rounds = (64, 1, 1) if tiny else (8192, 4096, 5)
    yield roofline.measure_peak(size, megabytes, rounds)._asdict()


def in_turns(timed: Timed, mode: str, names: list[str], asked: Asked) -> Iterator[Facts]:
    """Seconds of the calls of all that run, and the reasons of the others."""
    runs: dict[str, Callable[[], Any]] = {}
    not_run, broken = {}, []
    for name in names:
        try:
            runs[name] = _prepared(name, timed, mode)
        except Exception as error:  # a peer cannot run the case, memory is short, ...
            not_run[name] = told(error)
            if name in asked.backends and not isinstance(error, BackendUnavailable):
                broken.append(f"{name}: {told(error)}")
    work = roofline.work(timed.case, mode)
    yield {
        "case": timed.case.name,
        "mode": mode,
        "steps": timed.steps,
        "cells": cells(timed.case),
        "work": work._asdict(),
        "not_run": not_run,
    }
    yield {"seconds": interleaved(runs, 2 if asked.tiny else 5, patience=0.5)}
    assert not broken, "; ".join(broken)


def _prepared(name: str, timed: Timed, mode: str) -> Callable[[], Any]:
    """A call that is compiled and has run once."""
    if name.startswith("torch"):
        run = _torch_run(name, timed, mode)
    else:
        backend = name.removesuffix(IN_ONE_GRAPH)
        options = ONE_GRAPH if backend != name else None
        run = jax_run(timed.case, backend, mode, timed.steps, options)
    run()
    return run


def _torch_run(name: str, timed: Timed, mode: str) -> Callable[[], Any]:
    """PyTorch on this device at our precision, after its step was compared with ours."""
    if reason := peers.PEERS[name].missing:
        raise Skipped(reason)
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise Skipped("PyTorch has no CUDA here")
    _tf32(False)
    piece = replace(timed.case, grid=tuple(min(n, 32) for n in timed.case.grid), batch=(1,))
    if reason := peers.check(peers.PEERS[name], piece):
        raise Skipped(reason)
    _tf32(True)
    return peers.PEERS[name].run(timed.case, mode, timed.steps)


def _tf32(allowed: bool) -> None:
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


# ---- profile: the time of each kernel ----


def profile(asked: Asked) -> list[Item]:
    first, cases = asked.backends[0], timed_cases(asked.tiny)[:2]
    items = [
        Item(
            f"{timed} {mode} {first}",
            partial(kernel_times, timed, mode, first),
            partial(lower, timed.case, first, mode, timed.steps) if first == "triton" else None,
        )
        for timed in cases
        for mode in MODES
    ]
    for timed in cases if first == "triton" else ():
        items.append(
            Item(
                f"ncu {timed}",
                partial(ncu, timed, asked),
                partial(lower, timed.case, "triton", "training", 1),
            )
        )
    return items


def kernel_times(timed: Timed, mode: str, backend: str) -> Iterator[Facts]:
    """Launches and seconds of each kernel, a step, by JAX's profiler, which sees no graphs."""
    run = jax_run(timed.case, backend, mode, timed.steps)
    run()
    times = {
        name: [launches / timed.steps, seconds / timed.steps]
        for name, (launches, seconds) in kernels.profiled(run).items()
    }
    yield {"case": timed.case.name, "mode": mode, "backend": backend, "kernels": times}
    if not times:
        raise Skipped("the profiler saw no kernels")


def ncu(timed: Timed, asked: Asked) -> Iterator[Facts]:
    """Nsight Compute's report of one launch of each kernel of a training step."""
    tool = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if tool is None:
        raise Skipped("there is no ncu here")
    names = "step_forward|clear_dead|step_backward|add_overlaps|add_programs"
    once = f"from benchmarks.gpu.timings import once; once({timed.case.name!r})"
    command = [tool, "--clock-control", "none", "--set", "full", "--page", "details"]
    command += ["--kernel-name", f"regex:^({names})$", "--launch-count", "5"]
    command += [sys.executable, "-c", once]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    report = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": flags}
    )
    text = f"$ {' '.join(command)}\n{report.stdout}\n{report.stderr}"
    path = Path(asked.out) / f"ncu-{timed.case.name}.txt"
    write_text(path, text[: 8 << 20])
    yield {"report": path.name, "launches": report.stdout.count("Context 1")}
    if report.returncode or "==ERROR==" in text:
        lines = [line for line in text.splitlines() if "==ERROR==" in line]
        raise Skipped(f"ncu says {(lines or text.splitlines()[-1:])[0]}")


def once(name: str) -> None:
    """Launches each kernel of a case's training step once, in a process of its own."""
    (case,) = (timed.case for timed in timed_cases(tiny=False) if timed.case.name == name)
    jax_run(case, "triton", "training", 1)()


# ---- memory ----


def memory(asked: Asked) -> list[Item]:
    return [
        Item(
            f"training {backend}",
            partial(peak_memory, backend, 16 if asked.tiny else 1024),
            partial(lower, _square(1024), backend, "training", MEMORY_STEPS)
            if backend == "triton"
            else None,
        )
        for backend in asked.backends
    ]


def _square(size: int) -> Case:
    return replace(BENCHMARKS[0], name=f"{size}x{size}", grid=(size, size), batch=(1,))


def peak_memory(backend: str, size: int) -> Iterator[Facts]:
    """Peak bytes of this process, which keeps every state of a rollout; also in states."""
    case = _square(size)
    jax_run(case, backend, "training", MEMORY_STEPS)()
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    yield {"backend": backend, "case": case.name, "steps": MEMORY_STEPS, "peak_bytes": peak}
    if peak is None:
        raise Skipped("JAX does not say what memory is in use")
    yield {"states": peak / (cells(case) * case.channels * 4)}


# ---- train: time to quality ----


def train(asked: Asked) -> list[Item]:
    backend = asked.backends[0]
    run = partial(time_to_quality, backend, asked.tiny)
    low = partial(lower_training, backend) if backend == "triton" else None
    return [Item(f"growing, {'small' if asked.tiny else 'paper'} preset, {backend}", run, low)]


def time_to_quality(backend: str, tiny: bool) -> Iterator[Facts]:
    """Wall time of Growing NCA's training to log10 MSE -2, -2.5, ..., -3.5."""
    try:
        from benchmarks.quality import reached
        from nca_models.systems import growing
    except ImportError as error:
        raise Skipped(f"training needs {error.name}: pip install 'nca-kernels[models]'") from error
    config = replace(growing.PRESETS["small" if tiny else "paper"], backend=backend)
    if tiny:
        config = replace(config, target_size=8, num_steps=2, min_steps=2, num_train_steps=60)
    qualities = (0.0,) if tiny else QUALITIES
    passed: Facts = {}
    with tempfile.TemporaryDirectory() as folder:
        for quality, taken in reached(config, qualities, TRAINING, Path(folder, "run")):
            passed[f"{quality:g}"] = taken
            yield {"reached": dict(passed)}


def lower_training(backend: str) -> None:
    from nca_models.systems import growing
    from nca_models.training.trainer import Trainer

    config = replace(growing.PRESETS["paper"], backend=backend)
    with tempfile.TemporaryDirectory() as folder:
        growing.SystemClass.prepare(config, None, Path(folder))
        trainer = Trainer(growing.SystemClass(config, Path(folder)))
    args = trainer.abstract_state(), trainer.root_key
    trainer.step.trace(*args).lower(lowering_platforms=("cuda",))
