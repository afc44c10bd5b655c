"""Step and rollout, forward and with gradients: our backends against each other and the peers."""

from __future__ import annotations

import pytest

from benchmarks import cases
from benchmarks.contestants import timed
from benchmarks.measure import STEPS, bytes_kept


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("kind", ["rollout", "step"])
@pytest.mark.parametrize("case_name", list(cases.FULL))
def test_against_others(case, kind, mode, chosen, record, pytestconfig):
    if kind == "step" and pytestconfig.getoption("--quick"):
        pytest.skip("not asked for")
    if record.has("step", case.name, kind, mode):
        pytest.skip("measured before")
    if kind == "step":
        chosen = chosen._replace(peers=())  # they are written to run many steps
    row = timed("step", case, kind, mode, 1 if kind == "step" else STEPS, chosen)
    if mode == "training":
        row["bytes_kept"] = {name: bytes_kept(case, name) for name in row.get("ours", [])}
    record.add(row)
    wrong = {name: why for name, why in row["not_run"].items() if name in chosen.backends}
    assert not wrong
