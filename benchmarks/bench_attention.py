"""``neighborhood_attention``: this machine's best backend against the others, in turn.

Run with ``make bench``; nanoseconds for each cell and head.
"""

from __future__ import annotations

import statistics

import jax
import numpy as np
import pytest

import nca_kernels as nk
from benchmarks.measure import interleaved, median_ratio
from nca_kernels.testing import AttentionCase
from nca_kernels.testing.attention_conformance import attention, loss

BEST = next(b.name for b in nk.backends() if b.auto)
BACKENDS = [BEST, *(b.name for b in nk.backends() if b.available and b.name != BEST)]
CASES = (
    AttentionCase("plane_d8", (64, 64), batch=(8,), heads=4, head_size=8),
    AttentionCase("plane_d16_radius_2", (64, 64), batch=(8,), heads=4, head_size=16, radius=2),
    AttentionCase("volume_d16", (16, 32, 32), batch=(1,), heads=4, head_size=16),
)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_others(case, mode, benchmark, record, request):
    arrays = case.arguments()

    def run(backend):
        fun = attention(backend, case)
        compiled = jax.jit(fun if mode == "forward" else jax.grad(loss(backend, case), (0, 1, 2)))
        return lambda: jax.block_until_ready(compiled(*arrays))

    runs = {backend: run(backend) for backend in BACKENDS}
    times = interleaved(runs, request.config.getoption("--rounds"))
    benchmark.pedantic(runs[BEST], rounds=3, iterations=1)
    work = int(np.prod((*case.batch, *case.grid))) * case.heads
    row = {"case": case.name, "mode": mode, "best": BEST}
    for name, taken in times.items():
        row[f"{name}_ns"] = 1e9 * statistics.median(taken) / work
        row[f"x_{name}"] = median_ratio(taken, times[BEST])
    row["seconds"] = times
    record(**row)
