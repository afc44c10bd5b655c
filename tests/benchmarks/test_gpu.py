"""`make gpu` on the CPU: what it finds, and what is left of it when it is cut off."""

import argparse
import json
import time
from dataclasses import replace

import jax
import pytest

from benchmarks import gpu, kernels
from nca_kernels.testing import BENCHMARKS

PROFILE = """
planes {
  name: "/device:GPU:0"
  lines {
    id: 1 name: "Stream #13(Compute)"
    events { metadata_id: 1 duration_ps: 5000000 }
    events { metadata_id: 2 duration_ps: 1000000 }
    events { metadata_id: 2 duration_ps: 7000000 }
  }
  lines { id: 2 name: "XLA Ops" events { metadata_id: 1 duration_ps: 5000000 } }
  event_metadata { key: 1 value { id: 1 name: "step_forward" } }
  event_metadata { key: 2 value { id: 2 name: "clear_dead" } }
}
planes {
  name: "/host:CPU"
  lines { id: 1 name: "Stream" events { metadata_id: 1 duration_ps: 5000000 } }
  event_metadata { key: 1 value { id: 1 name: "python" } }
}
"""


def test_kernels_of_a_profile():
    data = jax.profiler.ProfileData
    profile = data.from_serialized_xspace(data.text_proto_to_serialized_xspace(PROFILE))
    found = kernels.totals(profile)
    assert list(found) == ["clear_dead", "step_forward"]
    assert found["clear_dead"] == (2, pytest.approx(8e-6))
    assert found["step_forward"] == (1, pytest.approx(5e-6))


def test_a_call_is_profiled():
    product = jax.jit(lambda x: x @ x)
    assert kernels.profiled(lambda: product(jax.numpy.ones((8, 8))).block_until_ready()) == {}


def test_tf32_is_checked_without_kinks():
    """An error that crosses ReLU's zero makes gradients jump, which says nothing of kernels."""
    named = {name: check for name, check in gpu.checks("xla") if name.startswith("tensorfloat32 ")}
    assert len(named) > 40
    for check in named.values():
        rule = check.args[1].rule
        assert rule.precision == "tensorfloat32"
        assert not {rule.activation, rule.perception_activation} & {"relu", "leaky_relu"}


def test_a_check_that_fails_is_told(monkeypatch, capsys):
    def fails():
        raise AssertionError("state differs")

    monkeypatch.setattr(gpu, "checks", lambda _: [("good", lambda: None), ("bad", fails)])
    gpu.run_part("xla", 0, 1)
    good, bad = map(json.loads, capsys.readouterr().out.splitlines())
    assert (good["check"], good["error"]) == ("good", "")
    assert (bad["check"], bad["error"]) == ("bad", "AssertionError: state differs")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command with one small case, six seconds of conformance, and results in a folder."""
    case = replace(BENCHMARKS[0], name="tiny", grid=(8, 8), batch=(1,))
    monkeypatch.setattr(gpu, "timed_cases", lambda: [case])
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "TIMINGS", 194.0)
    options = argparse.Namespace(backends=["xla"], save=True, rounds=2, peak=(64, 1), size=16)
    return lambda: gpu.report(options, time.monotonic() + 200)


def test_the_report(tiny, tmp_path, capsys):
    assert tiny() == 0
    (file,) = tmp_path.rglob("gpu.json")
    found = json.loads(file.read_text())
    conformance = found["conformance"]["xla"]
    assert conformance["failed"] == []
    assert conformance["passed"] + conformance["not_run"] == len(gpu.checks("xla"))
    assert conformance["not_run"] > 0  # of many minutes' work
    assert [(row["mode"], row["backend"]) for row in found["rows"]] == [
        ("forward", "xla"), ("forward", "reference"),
        ("training", "xla"), ("training", "reference"),
    ]  # fmt: skip
    assert all(row["x_reference"] > 0 and row["percent_of_limit"] > 0 for row in found["rows"])
    assert found["memory"][0]["backend"] == "xla"
    assert found["not_done"] == []
    (table,) = tmp_path.rglob("gpu.md")
    assert table.read_text().strip() in capsys.readouterr().out


def test_what_was_found_outlives_an_interrupt(tiny, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "conformance", lambda *_: {"passed": 3, "failed": [], "not_run": 0})
    monkeypatch.setattr(gpu, "timings", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny()
    (file,) = tmp_path.rglob("gpu.json")
    assert json.loads(file.read_text())["conformance"]["xla"]["passed"] == 3
