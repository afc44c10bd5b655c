"""Step and rollout, forward and training: xla against the reference and the peers.

Run with ``make bench``. Every round times all contestants in turn; the figures are medians, the
ratios medians of ratios within a round.
"""

from __future__ import annotations

import statistics

import numpy as np
import pytest

import nca_kernels as nk
from benchmarks import peers
from benchmarks.measure import STEPS, bytes_kept, cells, interleaved, jax_run, median_ratio
from nca_kernels.testing import BENCHMARKS, error_ratio

BY_NAME = {case.name: case for case in BENCHMARKS}
# Contestants whose gradients take seconds a step run where a round stays under a minute.
SLOW_TRAINING = {"diffusing": ("cax",)}


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("kind", ["step", "rollout"])
@pytest.mark.parametrize("name", list(BY_NAME))
def test_against_others(name, kind, mode, benchmark, record, request):
    case, steps = BY_NAME[name], 1 if kind == "step" else STEPS
    runs = {b: jax_run(case, b, mode, steps) for b in ("xla", "reference")}
    if kind == "rollout":
        for peer, missing in peers.available().items():
            if missing is None and not (mode == "training" and peer in SLOW_TRAINING.get(name, ())):
                runs[peer] = peers.RUN[peer](case, mode, steps)
    rounds = request.config.getoption("--rounds")
    times = interleaved(runs, rounds)
    benchmark.pedantic(runs["xla"], rounds=3, iterations=1)
    work = cells(case) * steps
    row = {"case": name, "kind": kind, "mode": mode}
    for contestant, taken in times.items():
        row[f"{contestant}_ns"] = 1e9 * statistics.median(taken) / work
    for contestant in list(runs)[1:]:
        row[f"x_{contestant}"] = median_ratio(times[contestant], times["xla"])
    row["xla_cell_steps_per_s"] = work / statistics.median(times["xla"])
    if mode == "training":
        for backend in ("xla", "reference"):
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
