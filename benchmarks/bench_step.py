"""Steps, rollouts and attention of each contestant by itself: `pytest benchmarks/`.

Through the fixture of pytest-benchmark, with its options (`--benchmark-json`,
`--benchmark-compare`, `--benchmark-histogram`, `--benchmark-group-by`, ...). `nca bench` times the
same contestants in turn, which gives more precise ratios. Both check a contestant before they time
it, and `python -m benchmarks.agree` compares what they measured.
"""

from __future__ import annotations

import pytest

from benchmarks import cases, rows
from benchmarks.contestants import available, contestants, facts
from benchmarks.measure import STEPS, bytes_kept
from benchmarks.peers import PEERS
from benchmarks.suites import attention

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")


@pytest.mark.parametrize("contestant", [*available(), *PEERS])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("kind", ["rollout", "step"])
@pytest.mark.parametrize("case_name", cases.FULL)
def test_step(case, kind, mode, contestant, chosen, benchmark):
    ours, peer = contestant in available(), PEERS.get(contestant)
    if contestant not in (chosen.backends if ours else chosen.peers):
        pytest.skip("not asked for")
    if peer is not None and (kind == "step" or not peer.fits(case)):
        pytest.skip("it is not written for that")
    steps = STEPS if kind == "rollout" else 1
    only = chosen._replace(
        backends=(contestant,) if ours else (), peers=() if ours else (contestant,)
    )
    runs, not_run = contestants(case, mode, steps, only)
    if contestant in not_run:
        pytest.skip(not_run[contestant])
    benchmark.group = f"{case.name}, {kind}, {cases.MODES[mode]}"
    benchmark(runs[contestant])
    if benchmark.stats is None:  # --benchmark-disable
        return
    row = facts(case, mode, steps) | {"seconds": {contestant: [benchmark.stats["median"]]}}
    benchmark.extra_info |= {
        "cell_steps_per_second": 1e9 / rows.nanoseconds(row, contestant),
        "percent_of_roofline": 100 * rows.of_limit(row, contestant),
        "percent_of_dense_roofline": 100 * rows.of_limit(row, contestant, dense=True),
        "bytes_moved_at_least": row["cost"]["bytes"],
    }
    if ours and mode == "training":
        benchmark.extra_info["bytes_kept_per_cell"] = bytes_kept(case, contestant)


@pytest.mark.parametrize("backend", available())
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("case", attention.CASES, ids=str)
def test_attention(case, mode, backend, chosen, thorough, benchmark):
    if backend not in chosen.backends:
        pytest.skip("not asked for")
    attention.check_conforms(case, backend)
    benchmark.group = f"{attention.NAME}, {case}, {cases.MODES[mode]}"
    benchmark(attention.attention_run(case, backend, mode))
    if benchmark.stats is not None:
        rate = attention.cells_and_heads(case) / benchmark.stats["median"]
        benchmark.extra_info["cells_and_heads_per_second"] = rate
