"""Everything that needs a GPU, in one command: conformance, then timings against the reference.

``make gpu`` runs it with the Python whose JAX sees the GPU; it needs jax and numpy only, and
works offline. With ``--save`` the figures go to ``benchmarks/results/<device>/gpu.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from typing import Any

import jax

import nca_kernels as nk
from benchmarks.measure import (
    ROOT,
    STEPS,
    cells,
    device_name,
    interleaved,
    jax_run,
    median_ratio,
    provenance,
    write_json,
)
from nca_kernels.testing import BENCHMARKS, CHECKS, CONFORMANCE, TRANSFORMATION_CHECKS

TRANSFORMED = ("plane", "inputs_per_sample", "volume")


def conformance(backend: str) -> list[dict[str, Any]]:
    """Every check that fails, with its message."""
    by_name = {case.name: case for case in CONFORMANCE}
    jobs = [(name, check, case) for name, check in CHECKS.items() for case in CONFORMANCE]
    for name, check in TRANSFORMATION_CHECKS.items():
        if name == "shard_map" and len(jax.devices()) < 2:
            print(f"  {backend}: shard_map skipped: it needs two devices")
            continue
        jobs += [(name, check, by_name[case]) for case in TRANSFORMED]
    failures = []
    for name, check, case in jobs:
        try:
            check(backend, case)
        except Exception as error:
            failures.append({"check": name, "case": case.name, "error": str(error)[:500]})
            print(f"  FAILED {backend} {name} {case.name}: {str(error)[:200]}")
    print(f"  {backend}: {len(jobs) - len(failures)} passed, {len(failures)} failed")
    return failures


def timings(backend: str, rounds: int) -> list[dict[str, Any]]:
    """Nanoseconds per cell-step and the ratio to the reference, interleaved."""
    growing = BENCHMARKS[0]
    large = replace(growing, name="growing_1024", grid=(1024, 1024), batch=(1,))
    rows = []
    for case in (*BENCHMARKS, large):
        for mode in ("forward", "training"):
            runs = {b: jax_run(case, b, mode, STEPS) for b in (backend, "reference")}
            times = interleaved(runs, rounds)
            row: dict[str, Any] = {
                "case": case.name,
                "mode": mode,
                "backend": backend,
                "ns": 1e9 * statistics.median(times[backend]) / (cells(case) * STEPS),
                "x_reference": median_ratio(times["reference"], times[backend]),
            }
            print(
                "  {case:18} {mode:9} {backend:8} {ns:9.3f} ns  {x_reference:6.2f}x".format(**row)
            )
            rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        print(
            f"no GPU: JAX runs on {jax.default_backend()}; make gpu needs a machine with one, "
            "and PYTHON=... naming the Python whose JAX sees it",
            file=sys.stderr,
        )
        return 2
    ours = [b.name for b in nk.backends() if b.available and b.name != "reference"]
    print(f"conformance on {device_name()}: {', '.join(ours)}")
    failures = {backend: conformance(backend) for backend in ours}
    print(f"per cell-step, {STEPS} steps, median of {options.rounds} interleaved rounds")
    rows = [row for backend in ours for row in timings(backend, options.rounds)]
    if options.save:
        content = {**provenance("make gpu"), "failures": failures, "rows": rows}
        write_json(ROOT / "results" / device_name() / "gpu.json", content)
    return 1 if any(failures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
