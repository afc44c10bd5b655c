"""``--save`` writes what a suite measured to ``benchmarks/results/<device>/<suite>.json``."""

from __future__ import annotations

import pytest

from benchmarks.measure import ROOT, device_name, provenance, write_json

_rows: dict[str, list[dict]] = {}


def pytest_addoption(parser):
    parser.addoption("--save", action="store_true", help="write benchmarks/results/<device>/*.json")
    parser.addoption("--rounds", type=int, default=7, help="interleaved rounds of each pair")


@pytest.fixture
def record(request):
    """``record(**figures)``: keeps a row for the table and the result file."""
    suite = request.module.__name__.rpartition("bench_")[2]
    return lambda **figures: _rows.setdefault(suite, []).append(figures)


def pytest_sessionfinish(session, exitstatus):
    if not session.config.getoption("--save") or exitstatus:
        return
    for suite, rows in _rows.items():
        path = ROOT / "results" / device_name() / f"{suite}.json"
        command = f"python -m pytest benchmarks/bench_{suite}.py --save"
        write_json(path, {**provenance(command), "rows": rows})


def pytest_terminal_summary(terminalreporter):
    for suite, rows in _rows.items():
        terminalreporter.section(f"{suite}: medians of interleaved rounds")
        for row in rows:
            text = "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else str(v)
                for k, v in row.items()
                if k != "seconds"
            )
            terminalreporter.write_line(text)
