"""Interleaved timing, bytes kept for the backward, and result files."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import nca_kernels as nk
from nca_kernels.testing import Case

ROOT = Path(__file__).parent
# The command ``nca``, by this Python.
NCA = [sys.executable, "-c", "import sys; from nca_models.cli import main; sys.exit(main())"]
STEPS = 8
_PAUSE, _LONG_ENOUGH = 0.05, 0.1  # seconds


def seconds(run: Callable[[], Any], calls: int = 1) -> float:
    """Mean wall time of ``calls`` calls; ``run`` must wait for its result."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def interleaved(
    runs: dict[str, Callable[[], Any]], rounds: int, patience: float = math.inf
) -> dict[str, list[float]]:
    """Times all ``runs`` in turn, A B A B ...; in each round for a tenth of a second or one call.

    Before each there is a pause, because PyTorch's threads spin for some milliseconds after their
    work; a short run is then called once untimed, to fill the caches. A run that takes longer than
    ``patience`` seconds takes part in the first three rounds only.
    """
    calls = {}
    for name, run in runs.items():
        run()
        calls[name] = max(1, min(100, round(_LONG_ENOUGH / seconds(run))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            if i >= 3 and times[name][-1] > patience:
                continue
            time.sleep(_PAUSE)
            if calls[name] > 1:
                run()
            times[name].append(seconds(run, calls[name]))
    return times


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """slow / fast for each round that has both: other load of the machine affects both."""
    return [s / f for s, f in zip(slow, fast, strict=False)]


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median of ``ratios``."""
    return statistics.median(ratios(slow, fast))


def rollout_loss(case: Case, backend: str, steps: int) -> Callable:
    """``loss(layers, taps, state, key)``: the mean square of the state after ``steps`` steps."""

    def loss(layers: Any, taps: Any, state: Any, key: Any) -> Any:
        params = nk.RuleParams(taps, None, layers)
        if steps == 1:
            out = nk.step(case.rule, params, state, key, backend=backend)
        elif backend == "reference":  # plain JAX as people write it, whose autodiff keeps all
            out = jax.lax.fori_loop(
                0,
                steps,
                lambda t, s: nk.step(
                    case.rule, params, s, jax.random.fold_in(key, t), backend=backend
                ),
                state,
            )
        else:
            out = nk.rollout(
                case.rule, params, state, key, steps, checkpoint="all", backend=backend
            )
        return jax.numpy.mean(out.astype("float32") ** 2), out

    return loss


def program(case: Case, backend: str, mode: str, steps: int) -> tuple[Callable, tuple]:
    """What is timed, and its arguments: "forward", or "training" with gradients of the layers."""
    params, state, key, _ = case.arguments()
    loss = rollout_loss(case, backend, steps)
    fun = jax.grad(loss, has_aux=True) if mode == "training" else lambda *args: loss(*args)[1]
    taps = params.perception  # closed over, so that those of named filters are constants
    return lambda layers, state, key: fun(layers, taps, state, key), (params.layers, state, key)


def jax_run(
    case: Case, backend: str, mode: str, steps: int, options: dict[str, Any] | None = None
) -> Callable[[], Any]:
    """A compiled call of ``program``, with options of XLA's compiler."""
    fun, args = program(case, backend, mode, steps)
    compiled = jax.jit(fun, compiler_options=options)
    return lambda: jax.block_until_ready(compiled(*args))


def bytes_kept(case: Case, backend: str) -> float:
    """Bytes per cell that differentiating one step keeps for the backward, weights apart."""
    params, state, key, _ = case.arguments()

    def residuals(layers: Any, state: Any) -> Any:
        taps = params.perception
        return jax.vjp(
            lambda p, s: rollout_loss(case, backend, 1)(p, taps, s, key)[1], layers, state
        )[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, params.layers, state))
    weights = {w.size for w in jax.tree.leaves(params)}
    cells = state.size // state.shape[-1]
    per_cell = [a for a in leaves if a.size >= cells and a.size not in weights]
    return sum(a.size * a.dtype.itemsize for a in per_cell) / cells


def cells(case: Case) -> int:
    return int(np.prod((*case.batch, *case.grid)))


def device_name() -> str:
    """A folder name for this machine: its GPU, or its processor and number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind.lower().replace(" ", "-")
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [w for w in model.replace("(R)", "").replace("(TM)", "").split() if w != "Processor"]
    return f"cpu-{'-'.join(words).lower()}-{cores}-cores"


def commit() -> str:
    """What git calls this state of the files; "unknown" without git, or outside of a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def provenance(command: str) -> dict[str, Any]:
    """What identifies a result: command, commit, date, device and versions."""
    versions = {}
    for package in ("jax", "jaxlib", "triton", "flax", "cax", "torch", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device_name(),
        "python": platform.python_version(),
        "versions": versions,
    }


def markdown_table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
