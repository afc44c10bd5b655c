"""Step and rollout, forward and training: this machine's best backend against all others.

Run with ``make bench``. Every round times all contestants in turn; the figures are medians, the
ratios medians of ratios within a round. On a CPU, the fraction of the machine's peak is measured
in the same run and counts the products of the cells that fire.
"""

from __future__ import annotations

import statistics

import numpy as np
import pytest

import nca_kernels as nk
from benchmarks import peers
from benchmarks.measure import STEPS, bytes_kept, cells, interleaved, jax_run, median_ratio
from benchmarks.roofline import cpu_fraction
from nca_kernels.backends.cpu import library
from nca_kernels.testing import BENCHMARKS, error_ratio

BY_NAME = {case.name: case for case in BENCHMARKS}
BEST = next(b.name for b in nk.backends() if b.auto)
BACKENDS = [BEST, *(b.name for b in nk.backends() if b.available and b.name != BEST)]
# Contestants whose gradients take seconds a step run where a round stays under a minute.
SLOW_TRAINING = {"diffusing": ("cax",)}


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("kind", ["step", "rollout"])
@pytest.mark.parametrize("name", list(BY_NAME))
def test_against_others(name, kind, mode, benchmark, record, request):
    case, steps = BY_NAME[name], 1 if kind == "step" else STEPS
    runs = {b: jax_run(case, b, mode, steps) for b in BACKENDS}
    if kind == "rollout":
        for peer, missing in peers.available().items():
            if missing is None and not (mode == "training" and peer in SLOW_TRAINING.get(name, ())):
                runs[peer] = peers.RUN[peer](case, mode, steps)
    times = interleaved(runs, request.config.getoption("--rounds"))
    benchmark.pedantic(runs[BEST], rounds=3, iterations=1)
    work = cells(case) * steps
    row = {"case": name, "kind": kind, "mode": mode, "best": BEST}
    for contestant, taken in times.items():
        row[f"{contestant}_ns"] = 1e9 * statistics.median(taken) / work
    for contestant in list(runs)[1:]:
        row[f"x_{contestant}"] = median_ratio(times[contestant], times[BEST])
    row[f"{BEST}_cell_steps_per_s"] = work / statistics.median(times[BEST])
    if BEST == "cpu":
        peak = max(library.peak_flops() for _ in range(5))
        seconds_per_cell = statistics.median(times[BEST]) / work
        row |= {"peak_flops": peak, "of_peak": cpu_fraction(case, mode, peak, seconds_per_cell)}
    if mode == "training":
        for backend in (BEST, "reference"):
            row[f"{backend}_bytes_kept"] = bytes_kept(case, backend)
    row["seconds"] = times
    benchmark.extra_info |= {k: v for k, v in row.items() if k != "seconds"}
    record(**row)


@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize("peer", list(peers.STEP))
def test_peers_compute_the_same(peer, name):
    """A peer is timed on the same work: one step with every cell firing agrees with ours."""
    missing = peers.available()[peer]
    if missing:
        pytest.skip(f"{peer} is not installed: {missing}")
    case = BY_NAME[name]
    rule = nk.Rule(**{**vars(case.rule), "fire_rate": 1.0, "precision": "float32"})
    params, state, key, _ = case.arguments()
    ours = nk.step(rule, params, state, key)
    assert error_ratio(peers.STEP[peer](case).astype(np.float32), ours) < 1e-5
