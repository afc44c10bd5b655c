"""`make gpu` on the CPU: what it finds, what it refuses, and what is there after it was cut off."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import pytest

from benchmarks import kernels, measure
from benchmarks.gpu import checks, graphs, report, stages, timings, work
from benchmarks.gpu.items import Asked, Item, Skipped
from benchmarks.gpu.results import LOG, RunResults
from nca_kernels.dispatch import BackendUnavailable
from nca_kernels.testing.compare import assert_close
from nca_kernels.tuning import FIELDS, Launch
from tests import ROOT

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
# As XLA writes them: four launches and a loop in a graph, then a launch.
THUNKS = """\
000: kCommandBuffer\tcommand_buffer
  001: kKernel\tfusion
  002: kWhile\twhile
    condition:
      003: kKernel\tcompare
    body:
      004: kCustomCall\tstep_forward
      005: kCustomCall\tclear_dead
006: kCustomCall\tadd_programs
"""


QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def command(*arguments, **changes):
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": QUICK, **changes}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    """Waits for a process; returns its exit status, standard output and standard error."""
    out, error = process.communicate(timeout=240)
    return process.returncode, out, error


def test_kernels_of_a_profile():
    data = jax.profiler.ProfileData
    profile = data.from_serialized_xspace(data.text_proto_to_serialized_xspace(PROFILE))
    totals = kernels.totals(profile)
    assert list(totals) == ["clear_dead", "step_forward"]
    assert totals["clear_dead"] == (2, pytest.approx(8e-6))
    assert totals["step_forward"] == (1, pytest.approx(5e-6))


def test_a_call_is_profiled():
    product = jax.jit(lambda x: x @ x)
    assert kernels.profiled(lambda: product(jax.numpy.ones((8, 8))).block_until_ready()) == {}


def test_tf32_is_checked_without_kinks():
    """An error that crosses ReLU's zero makes gradients jump, which tells nothing about kernels."""
    named = dict(checks.conformance_checks("xla"))
    smooth = [check for name, check in named.items() if name.startswith("tensorfloat32 ")]
    assert len(smooth) > 40
    for check in smooth:
        rule = check.args[1].rule
        assert rule.precision == "tensorfloat32"
        assert not {rule.activation, rule.perception_activation} & {"relu", "leaky_relu"}


def test_what_a_list_of_thunks_says():
    counted = graphs.counted(THUNKS)
    assert counted == {
        "in_graphs": {"launches": 4, "loops": 1}, "launches": 5, "loops": 1, "graphs": 1,
    }  # fmt: skip
    assert report.graphs(counted) == "in part, 1 graphs with 4 of 5 launches and 1 of 1 loops"
    without = "\n".join(THUNKS.splitlines()[1:]).replace("\n  ", "\n").lstrip()
    assert report.graphs(graphs.counted(without)).startswith("no, 0 graphs")


def test_a_check_has_numbers_when_it_fails():
    ones = jax.numpy.ones(4)

    def off():
        assert_close({"a": ones, "b": 2 * ones}, {"a": ones, "b": ones}, 1e-5, "of ")
        assert_close(ones, ones, 1e-2, "later")

    facts = checks.judged(off)
    assert next(facts) == {
        "ratios": {"of ['a']": [0.0, 1e-5], "of ['b']": [1.0, 1e-5], "later": [0.0, 1e-2]}
    }
    with pytest.raises(AssertionError, match=r"of \['b'\]: error ratio 1 > 1e-05"):
        next(facts)


def test_what_a_backend_does_not_cover_is_skipped():
    def uncovered():
        raise BackendUnavailable("it does Rule.padding 'zeros' only")

    for run in (checks.judged, checks.worst):
        with pytest.raises(Skipped, match=r"it does Rule.padding 'zeros' only"):
            list(work.covered(Item("x", partial(run, uncovered))))


def test_a_whole_course(tmp_path):
    """All stages run, with tiny items and without git; a second run finds nothing left to do."""
    folder = tmp_path / "out"
    arguments = ["--out", folder, "--any-device", "--backends", "xla", "--commit", "abc"]
    status, out, error = finished(command(*arguments, PATH=""))
    assert (status, error) == (0, "")
    _check_files(folder, out)
    _check_facts(folder)
    before = (folder / LOG).read_text().splitlines()
    status, _, error = finished(command(*arguments))
    assert status == 2
    assert "add --resume" in error
    status, out, _ = finished(command(*arguments, "--resume", "--stages", "smoke,paths"))
    assert status == 0
    assert "paths: 0 of 2 items" in out
    done = [line for line in before if not json.loads(line).get("partial")]
    assert (folder / LOG).read_text().splitlines() == done


def _check_files(folder, out):
    summary = json.loads((folder / "gpu.json").read_text())
    assert {record["stage"] for record in summary["records"]} == set(stages.STAGES) - {"variants"}
    assert summary["commit"] == "abc"
    assert summary["backends"] == ["xla"]
    assert summary["versions"]["jax"] == jax.__version__
    assert (folder / "gpu.md").read_text().strip() in out
    assert not any("error" in record for record in summary["records"])
    assert len(list(folder.iterdir())) <= 8


def _check_facts(folder):
    records = map(json.loads, (folder / LOG).read_text().splitlines())
    facts = {r["item"]: r["found"] for r in records if not r.get("partial")}
    assert facts["inputs_per_sample xla"]["ratios"].keys() > {"state"}
    training = facts["tiny training"]
    assert list(training["seconds"]) == ["xla", "xla, one graph", "reference"]
    assert all(time > 0 for times in training["seconds"].values() for time in times)
    assert "torch" in training["seconds"] or "torch" in training["not_run"]
    assert facts["peak"]["flops"]["tensorfloat32"] > 0
    assert facts["growing, small preset, xla"]["reached"]["0"]["steps"] >= 50
    assert "| tiny | training | reference |" in (folder / "gpu.md").read_text()


def test_a_path_in_tritons_interpreter(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed (it is for Linux only)")
    arguments = ["--out", tmp_path / "out", "--any-device", "--backends", "triton_interpreted"]
    arguments += ["--stages", "paths", "--items", "line"]
    status, out, error = finished(command(*arguments, TRITON_INTERPRET="1"))
    assert (status, error) == (0, "")
    assert "constant_taps_line triton_interpreted: error ratio" in out


def test_cut_off_by_a_signal(tmp_path):
    folder = tmp_path / "out"
    process = command("--out", folder, "--any-device", "--backends", "xla", "--stages", "paths")
    for _ in range(600):
        time.sleep(0.05)
        if (folder / "gpu.json").exists():  # children are there, and at work
            break
    process.send_signal(signal.SIGTERM)
    status, out, error = finished(process)
    assert (status, error) == (128 + signal.SIGTERM, "")
    json.loads((folder / "gpu.json").read_text())
    assert (folder / "gpu.md").read_text().strip() in out
    assert {path.name for path in folder.iterdir()} == {LOG, "gpu.json", "gpu.md"}


def test_without_a_gpu(tmp_path):
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU, and what is tested is a machine without one")
    for _ in range(2):  # nothing is left that would stop the second
        status, out, error = finished(command("--out", tmp_path / "out"))
        assert (status, out) == (2, "")
        assert error.count("\n") == 1
        assert error.startswith("no GPU: JAX runs on cpu; ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "smoke,fly"], "--stages: there is no fly, but smoke, paths, speed"),
        (["--backends", "cuda", "--any-device"], "there is no backend 'cuda': triton, pallas"),
        (["--backends", "pallas", "--any-device"], "backend 'pallas' cannot run here: "),
    ],
)
def test_what_is_refused(arguments, said, tmp_path):
    status, _, error = finished(command("--out", tmp_path / "out", *arguments))
    assert status == 2
    assert error.startswith(said)
    assert error.count("\n") == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    status, out, error = finished(command("--out", tmp_path / "file" / "out"))
    assert (status, out) == (2, "")
    assert error.startswith(f"--out: {tmp_path}/file/out cannot be written: ")


def test_a_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert measure.commit() == "unknown"


def _variant(case, share, **changes):
    facts = {
        "case": case, "kernel": "step_forward", "variant": "other", "problem": case,
        "launch": {"rows": share}, "error": 1e-6, "seconds": {"default": [1.0], "other": [share]},
    }  # fmt: skip
    return {"stage": "variants", "item": f"{case} {share}", "found": facts, "seconds": 1, **changes}


def test_launches_that_win(tmp_path):
    """Winners, in the form of packaged ones: the fastest of each problem, if right and faster."""
    results = RunResults(tmp_path, {"commit": "c", "device": "NVIDIA H200"}, report.summarize)
    for record in (
        _variant("a", 0.9),
        _variant("a", 0.7),
        _variant("a", 0.5, error="it computes something else"),
        _variant("b", 0.99),
    ):
        results.add(record)
    written = json.loads((tmp_path / "nvidia-h200.json").read_text())
    assert written == {"step_forward": {"a": {"rows": 0.7}}}
    assert (
        "| a | step_forward | other | 70.0% of the default's time | 1.0e-06 |"
        in (tmp_path / "gpu.md").read_text()
    )


def test_a_failure_is_told_and_keeps_its_numbers(tmp_path):
    results = RunResults(tmp_path, {"commit": "c"}, report.summarize)
    facts = {"found": {"ratios": {"state": [0.5, 1e-5]}}, "seconds": 1.0}
    facts["kernels"] = {"from_cache": 5, "compiled": 2}
    died = {"error": "its process died of SIGABRT", "stderr": "CUDA_ERROR_ILLEGAL_ADDRESS\n"}
    results.add({"stage": "paths", "item": "plane triton", **facts, **died})
    results.add({"stage": "train", "item": "x", "found": {}, "seconds": 1.0, "cut_off": "late"})
    for item in ("dense pallas", "volume pallas"):
        results.add({"stage": "paths", "item": item, **facts, "skipped": "it does 2-D only"})
    results.leave_out("memory", ["a", "b"], "the time was over")
    text = (tmp_path / "gpu.md").read_text()
    assert "0 items done, 1 failed; kernels: 15 from the cache, 6 compiled" in text
    assert "paths: plane triton: FAILED, its process died of SIGABRT\n      CUDA_ERROR" in text
    assert "| plane | FAILED 5.0e-01 of 1e-05 |" in text
    assert "## train" not in text
    assert "* train: x, cut off: late" in text
    assert "* paths: 2 items (dense pallas, volume pallas), skipped: it does 2-D only" in text
    assert "* memory: 2 items (a, b), left out: the time was over" in text
    assert "not_summarized" not in results.about


@pytest.mark.parametrize("error", ["", "==ERROR== no permission"])
def test_what_nsight_compute_reports(error, tmp_path, monkeypatch):
    """Nsight Compute leaves a file, and the number of launches in it is reported."""
    tool = tmp_path / "ncu"
    tool.write_text(
        "#!/bin/sh\n"
        f"[ -n '{error}' ] && echo '{error}' && exit 1\n"
        'echo "step_forward (264, 1, 1)x(128, 1, 1), Context 1"\n'
        'echo "of $XLA_FLAGS"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    facts = timings.ncu(timings.timed_cases(tiny=True)[0], Asked(out=str(tmp_path)))
    assert next(facts) == {"report": "ncu-tiny.txt", "launches": 0 if error else 1}
    if error:
        with pytest.raises(Skipped, match="ncu says ==ERROR== no permission"):
            next(facts)
    else:
        assert not list(facts)
        assert "--xla_gpu_enable_command_buffer=" in (tmp_path / "ncu-tiny.txt").read_text()


def test_a_summary_that_fails_stops_nothing(tmp_path):
    def broken(_):
        raise KeyError("seconds")

    results = RunResults(tmp_path, {}, broken)
    results.add({"stage": "speed", "item": "x", "found": {}})
    assert results.about["not_summarized"] == "KeyError: 'seconds'"
    assert json.loads((tmp_path / LOG).read_text())["item"] == "x"


def test_launch_fields_are_those_of_tuning():
    """The facts of a variant hold those fields of its launch that a file of winners may hold."""
    from dataclasses import asdict

    assert tuple(asdict(Launch())) == FIELDS
