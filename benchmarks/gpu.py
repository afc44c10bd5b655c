"""Everything that needs a GPU, in one command of under nine minutes; ``make gpu`` runs it.

Conformance of every kernel backend (values, gradients, masks, determinism), then timings against
the reference path and the device's measured limit, the time of each kernel, then peak memory of
training. It needs the Python whose JAX sees the GPU, jax and numpy, and for the Triton kernels
triton and jax-triton; nothing is downloaded. With ``--save`` all goes to
``benchmarks/results/<device>/gpu.json``, part by part as it is found, and the tables that are
printed last to ``gpu.md``. ``--tune`` instead looks for the fastest launches of the benchmark
cases, which takes much longer, and puts them where winners are packaged; interrupted, it goes on
with what is left.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

import nca_kernels as nk
from benchmarks import kernels, roofline
from benchmarks.measure import (
    ROOT,
    STEPS,
    cells,
    device_name,
    interleaved,
    jax_run,
    markdown_table,
    median_ratio,
    provenance,
)
from nca_kernels import tuning
from nca_kernels.files import write_json, write_text
from nca_kernels.testing import (
    ATTENTION,
    ATTENTION_CHECKS,
    BENCHMARKS,
    CHECKS,
    CONFORMANCE,
    TRANSFORMATION_CHECKS,
    Case,
)
from nca_kernels.testing.conformance import check_fate_hangs_on_dead_neighbours

TRANSFORMED = ("plane", "inputs_per_sample", "volume")
MEMORY_STEPS = 64
MINUTES = 9.0
TIMINGS = 200.0  # seconds, at least, for what follows conformance


# ---- conformance: in several processes, because compiling is what takes the time ----


def checks(backend: str) -> list[tuple[str, Any]]:
    """(name, what to call) of every check of a backend on this machine."""
    several = len(jax.devices()) > 1
    by_name = {case.name: case for case in CONFORMANCE}
    found: list[tuple[str, Any]] = [
        (f"{name} {case}", partial(check, backend, case))
        for name, check in CHECKS.items()
        for case in CONFORMANCE
    ]
    for case in CONFORMANCE:
        if case.dtype == "float32" and case.rule.precision == "float32":
            rule = replace(case.smooth().rule, precision="tensorfloat32")
            at_tf32 = partial(CHECKS["values_and_gradients"], backend, replace(case, rule=rule))
            found.append((f"tensorfloat32 {case}", at_tf32))
    found.append(("fate", partial(check_fate_hangs_on_dead_neighbours, backend)))
    for name, check in TRANSFORMATION_CHECKS.items():
        if several or name != "shard_map":
            found += [(f"{name} {c}", partial(check, backend, by_name[c])) for c in TRANSFORMED]
    for name, attention_check in ATTENTION_CHECKS.items():
        if several or name != "shard_map":
            cases = ATTENTION if name == "values_and_gradients" else ATTENTION[2:3]
            found += [
                (f"attention {name} {c.name}", partial(attention_check, backend, c)) for c in cases
            ]
    return found


def run_part(backend: str, part: int, parts: int) -> None:
    """A child's share of the checks; prints one JSON line a check."""
    for name, check in checks(backend)[part::parts]:
        start, error = time.perf_counter(), ""
        try:
            check()
        except Exception as failure:
            error = f"{type(failure).__name__}: {str(failure)[-500:]}"
        row = {"check": name, "seconds": time.perf_counter() - start, "error": error}
        print(json.dumps(row), flush=True)


def conformance(backend: str, deadline: float) -> dict[str, Any]:
    """Counts, failures, and what a deadline left out."""
    parts = max(1, min(8, (os.cpu_count() or 2) // 2))
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", backend]
    children = [
        subprocess.Popen(
            [*command, str(i), str(parts)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for i in range(parts)
    ]
    rows = []
    for child in children:
        try:
            out, _ = child.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            out, _ = child.communicate()
        rows += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    failed = [row for row in rows if row["error"]]
    left = len(checks(backend)) - len(rows)
    for row in failed:
        print(f"  FAILED {backend} {row['check']}: {row['error'][:300]}")
    print(f"  {backend}: {len(rows) - len(failed)} passed, {len(failed)} failed, {left} not run")
    return {"passed": len(rows) - len(failed), "failed": failed, "not_run": left}


# ---- timings ----


def timed_cases() -> list[Case]:
    growing = BENCHMARKS[0]
    return [
        replace(growing, name="growing_seed", batch=(1,)),
        *BENCHMARKS,
        replace(growing, name="growing_1024", grid=(1024, 1024), batch=(1,)),
        replace(growing, name="growing_2048", grid=(2048, 2048), batch=(1,)),
    ]


def timings(
    case: Case, mode: str, backends: list[str], rounds: int, peak: roofline.Peak
) -> list[dict[str, Any]]:
    """Interleaved rounds of all backends; ratios to the reference, fractions of the limit."""
    runs = {}
    for backend in (*backends, "reference"):
        try:
            run = jax_run(case, backend, mode, STEPS)
            run()
            runs[backend] = run
        except Exception as error:  # out of memory, a launch that does not fit, ...
            print(f"  {case.name} {mode} {backend}: {str(error).splitlines()[-1][:150]}")
    times = interleaved(runs, rounds)
    rows = []
    for backend, own in times.items():
        step = statistics.median(own) / STEPS
        row = {
            "case": case.name,
            "mode": mode,
            "backend": backend,
            "us_per_step": 1e6 * step,
            "ps_per_cell": 1e12 * step / cells(case),
            "percent_of_limit": 100
            * roofline.fraction(case, mode, peak, "tensorfloat32", step / cells(case)),
        }
        if "reference" in times:
            row["x_reference"] = median_ratio(times["reference"], own)
        rows.append(row)
    return rows


def times_table(rows: list[dict[str, Any]]) -> str:
    head = ["case", "mode", "backend", "us a step", "ps a cell", "% of limit", "x reference"]
    body = []
    for row in rows:
        figures = [f"{row['us_per_step']:.1f}", f"{row['ps_per_cell']:.1f}"]
        ratio = f"{row['x_reference']:.1f}" if "x_reference" in row else "-"
        names = [row["case"], row["mode"], row["backend"]]
        body.append([*names, *figures, f"{row['percent_of_limit']:.0f}", ratio])
    return markdown_table(head, body)


def kernel_times(case: Case, mode: str, backend: str) -> list[dict[str, Any]]:
    """Every kernel of a rollout, by the profiler: launches and time a step."""
    run = jax_run(case, backend, mode, STEPS)
    run()
    return [
        {
            "case": case.name,
            "mode": mode,
            "backend": backend,
            "kernel": name,
            "launches_per_step": launches / STEPS,
            "us_per_step": 1e6 * seconds / STEPS,
        }
        for name, (launches, seconds) in kernels.profiled(run).items()
    ]


def kernels_table(rows: list[dict[str, Any]]) -> str:
    head = ["case", "mode", "backend", "kernel", "launches a step", "us a step"]
    return markdown_table(head, [
        [row["case"], row["mode"], row["backend"], f"`{row['kernel'][:40]}`",
         f"{row['launches_per_step']:.2f}", f"{row['us_per_step']:.1f}"]
        for row in rows
    ])  # fmt: skip


# ---- memory ----


def peak_memory(backend: str, size: int) -> None:
    """A child: peak bytes of a training step of ``size**2`` cells, in states of that size."""
    case = replace(BENCHMARKS[0], grid=(size, size), batch=(1,))
    jax_run(case, backend, "training", MEMORY_STEPS)()
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    state = cells(case) * case.channels * 4
    print(json.dumps({"backend": backend, "peak_bytes": peak, "states": peak / state}))


def memory(backends: list[str], size: int) -> list[dict[str, Any]]:
    """Peak memory with every state kept (``checkpoint="all"``), each in its own process."""
    rows = []
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    for backend in backends:
        command = [sys.executable, "-m", "benchmarks.gpu", "--memory", backend, str(size)]
        out = subprocess.run(command, capture_output=True, text=True, env=environment)
        lines = [line for line in out.stdout.splitlines() if line.startswith("{")]
        if lines:
            rows.append(json.loads(lines[-1]))
            print(f"  {backend}: {rows[-1]['states']:.1f} states for {MEMORY_STEPS} steps")
        else:
            rows.append({"backend": backend, "error": out.stderr[-500:]})
            print(f"  {backend}: {out.stderr.splitlines()[-1:]}")
    return rows


# ---- the command ----


def tune() -> None:
    """Winners of the benchmark cases, into the package."""
    os.environ[tuning.TUNE], os.environ[tuning.FOLDER] = "1", str(tuning.PACKAGED)
    for case in timed_cases()[1:]:  # without the seed, which a launch hardly matters to
        print(case.name, flush=True)
        jax_run(case, "triton", "training", STEPS)()


class Results:
    """What was found so far; with a folder, kept there as it grows."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.found: dict[str, Any] = provenance("make gpu")

    def add(self, **parts: Any) -> None:
        self.found.update(parts)
        if self.folder is not None:
            write_json(self.folder / "gpu.json", self.found)

    def tables(self) -> str:
        texts = [times_table(self.found["rows"])]
        if self.found["kernels"]:
            texts.append(kernels_table(self.found["kernels"]))
        if self.found["not_done"]:
            texts.append(f"Not done: {'; '.join(self.found['not_done'])}.")
        text = "\n\n".join(texts)
        if self.folder is not None:
            write_text(self.folder / "gpu.md", text + "\n")
        return text


def report(options: argparse.Namespace, deadline: float) -> int:
    ours = options.backends or [
        b.name for b in nk.backends() if b.available and b.name != "reference"
    ]
    results = Results(ROOT / "results" / device_name() if options.save else None)
    print(f"conformance on {device_name()}: {', '.join(ours)}", flush=True)
    found: dict[str, Any] = {}
    for left, backend in zip(range(len(ours), 0, -1), ours, strict=True):
        now = time.monotonic()
        found[backend] = conformance(backend, now + (deadline - TIMINGS - now) / left)
        results.add(conformance=found)
    print("the limit of this device", flush=True)
    peak = roofline.measure_peak(*options.peak)
    print(f"  copy {peak.bytes / 1e12:.2f} TB/s, " + ", ".join(
        f"{name} {flops / 1e12:.0f} TFLOP/s" for name, flops in peak.flops.items()
    ), flush=True)  # fmt: skip
    results.add(peak=peak._asdict())
    _time(results, ours, options, deadline, peak)
    print(f"peak memory, {options.size}x{options.size}, {MEMORY_STEPS} steps", flush=True)
    results.add(memory=memory(ours, options.size))
    print(f"\n{STEPS} steps, medians of {options.rounds} interleaved rounds; the limit counts "
          f"every cell as if it fired, products in TF32\n\n{results.tables()}")  # fmt: skip
    return 1 if any(f["failed"] for f in found.values()) else 0


def _time(
    results: Results,
    ours: list[str],
    options: argparse.Namespace,
    deadline: float,
    peak: roofline.Peak,
) -> None:
    """Times of all cases, then of the kernels of our first backend, as far as time allows."""
    rows: list[dict[str, Any]] = []
    launched: list[dict[str, Any]] = []
    left_out = []
    todo = [(case, mode) for case in timed_cases() for mode in ("forward", "training")]
    for case, mode in todo:
        if time.monotonic() > deadline - 75:
            left_out.append(f"times of {case.name} {mode}, for lack of time")
            continue
        rows += timings(case, mode, ours, options.rounds, peak)
        results.add(rows=rows, kernels=launched, not_done=left_out)
    for case, mode in todo:
        if time.monotonic() > deadline - 45:
            left_out.append(f"kernels of {case.name} {mode}, for lack of time")
            continue
        try:
            launched += kernel_times(case, mode, ours[0])
        except Exception as error:  # the profiler does not run on every machine
            left_out.append(f"kernels, as the profiler says {str(error).splitlines()[-1:]}")
            break
    results.add(rows=rows, kernels=launched, not_done=left_out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    names = [b.name for b in nk.backends()]
    parser.add_argument("--backends", nargs="+", choices=names, help="instead of all that can run")
    parser.add_argument("--size", type=int, default=1024, help="of the grid for peak memory")
    parser.add_argument("--peak", type=int, nargs=2, default=(8192, 4096), metavar="N")
    parser.add_argument("--part", nargs=3, metavar=("BACKEND", "I", "N"), help="of the checks")
    parser.add_argument("--memory", nargs=2, metavar=("BACKEND", "SIZE"), help="measured alone")
    parser.add_argument("--any-device", action="store_true", help="to try the command itself")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    alone = options.part or options.memory
    if jax.default_backend() != "gpu" and not (options.any_device or alone):
        print(
            f"no GPU: JAX runs on {jax.default_backend()}; make gpu needs a machine with one, "
            "and PYTHON=... naming the Python whose JAX sees it",
            file=sys.stderr,
        )
        return 2
    if options.part:
        run_part(options.part[0], *map(int, options.part[1:]))
        return 0
    if options.memory:
        peak_memory(options.memory[0], int(options.memory[1]))
        return 0
    if options.tune:
        tune()
        return 0
    return report(options, deadline)


if __name__ == "__main__":
    sys.exit(main())
