"""`nca bench`: what its rows say, its gate, and the command from end to end."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import agree, compare, contestants, instructions, measure, peers, report, rows
from benchmarks.cases import FULL, QUICK


def row(seconds, best="cpu", **other):
    return {
        "suite": "step",
        "case": "growing",
        "kind": "rollout",
        "mode": "forward",
        "work": 1000,
        "best": best,
        "ours": ["cpu", "xla"],
        "seconds": seconds,
        "cost": {"flops": 1000.0, "bytes": 100.0, "fires": 0.5},
        "limit": {"flops": 1e12, "bytes": 1e12},
        **other,
    }


def test_figures_of_a_row():
    timed = row({"cpu": [1e-6, 2e-6, 1e-6], "slices": [3e-6, 8e-6, 5e-6]})
    assert rows.nanoseconds(timed, "cpu") == pytest.approx(1.0)
    assert rows.times_slower(timed, "slices") == pytest.approx(4.0)  # of 3, 4 and 5
    assert rows.spread(timed, "slices") == pytest.approx((3.5, 4.5))
    assert rows.of_limit(timed, "cpu") == pytest.approx(0.5)  # 0.5 ns at the limit
    assert rows.of_limit(timed, "cpu", dense=True) == pytest.approx(1.0)
    memory_bound = {**timed, "limit": {"flops": 1e12, "bytes": 1e10}}
    assert rows.of_limit(memory_bound, "cpu") == pytest.approx(10.0)


def noisy(middle, seed, noise=0.02):
    return list(middle * (1 + noise * np.random.default_rng(seed).normal(size=7)))


@pytest.mark.parametrize(
    ("factor", "word"),
    [(1.0, "no difference"), (1.3, "slower"), (0.7, "faster"), (1.06, "no difference")],
)
def test_the_gate(factor, word):
    old = row({"cpu": noisy(1.0, 0), "slices": noisy(4.0, 1)})
    new = row({"cpu": noisy(2 * factor, 2), "slices": noisy(8.0, 3)})  # a machine half as fast
    (verdict,) = compare.compare([old], [new])
    assert verdict["verdict"] == word
    assert verdict["ratio"] == pytest.approx(factor, rel=0.05)
    assert word in compare.table([verdict])


def test_the_gate_says_nothing_of_a_small_change_however_steady():
    old = row({"cpu": noisy(1.0, 0, 1e-4), "slices": noisy(4.0, 1, 1e-4)})
    new = row({"cpu": noisy(1.08, 2, 1e-4), "slices": noisy(4.0, 3, 1e-4)})
    (verdict,) = compare.compare([old], [new])
    assert verdict["verdict"] == "no difference"


def test_the_gate_takes_the_yardstick_in_the_middle():
    old = row({"cpu": noisy(1.0, 0), "slices": noisy(4.0, 1), "torch": noisy(3.0, 2), "cax": [9.0]})
    new = row({"cpu": noisy(1.0, 3), "slices": noisy(2.0, 4), "torch": noisy(3.0, 5), "cax": [5.0]})
    new["seconds"]["reference"] = old["seconds"]["reference"] = noisy(6.0, 6)
    (verdict,) = compare.compare([old], [new])  # slices had a good run, CAX too few rounds
    assert verdict["against"] != "slices"
    assert verdict["verdict"] == "no difference"


def test_the_gate_without_a_yardstick():
    (verdict,) = compare.compare([row({"cpu": [1.0]})], [row({"cpu": [1.0]})])
    assert verdict["verdict"] == "cannot be compared"
    assert compare.compare([], [row({"cpu": [1.0]})]) == []


def test_what_is_slow_takes_part_less_often():
    times = measure.interleaved({"slow": lambda: None}, rounds=5, patience=-1.0)
    assert len(times["slow"]) == 3


@pytest.mark.parametrize("name", list(peers.PEERS))
def test_peers_compute_the_same(name):
    if reason := peers.PEERS[name].missing:
        pytest.skip(reason)
    case = next(case for case in QUICK.values() if peers.PEERS[name].fits(case))
    assert peers.check(peers.PEERS[name], replace(case, grid=(9, 11), batch=(2,))) is None


def test_a_peer_that_differs_is_not_timed():
    case = replace(QUICK["growing"], grid=(6, 6), batch=(1,))
    wrong = peers.PEERS["slices"]._replace(step=lambda case: peers.slices_step(case) * 1.001)
    assert "differs from ours" in peers.check(wrong, case)


def test_a_backend_that_fails_its_check_is_not_timed(monkeypatch):
    def fails(backend, case):
        raise AssertionError("gradient of params: error ratio 0.1")

    monkeypatch.setitem(contestants.CHECKS, "values_and_gradients", fails)
    contestants.nonconforming.cache_clear()
    chosen = contestants.Chosen(("xla",), (), rounds=1, longest=60.0)
    measured = contestants.timed("step", QUICK["growing"], "rollout", "forward", 2, chosen)
    contestants.nonconforming.cache_clear()
    assert "fails its conformance check" in measured["not_run"]["xla"]
    assert "error ratio 0.1" in measured["not_run"]["xla"]
    assert "seconds" not in measured


def nca_bench(*arguments):
    program = "import sys; from nca_models.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, "bench", *arguments], capture_output=True, text=True
    )


def test_the_command(tmp_path):
    first = tmp_path / "first.json"
    small = ["--quick", "--cases", "growing", "--backends", "xla", "--peers", "slices"]
    run = nca_bench(*small, "--rounds", "2", "--json", str(first))
    assert run.returncode == 0, run.stderr
    assert "Growing NCA: 32 x 32, 16 channels, batch 8, 8 steps" in run.stdout
    assert "JAX, slices" in run.stdout
    result = json.loads(first.read_text())
    assert [r["mode"] for r in result["rows"]] == ["forward", "training"]
    assert all(set(r["seconds"]) == {"xla", "slices"} for r in result["rows"])
    again = nca_bench(*small, "--json", str(first), "--resume", "--compare", str(first))
    assert again.returncode == 0, again.stderr
    assert json.loads(first.read_text()) == result  # nothing was measured again
    assert again.stdout.count("no difference") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "grow"], "'grow' is not one of growing,"),
        (["--peers", "tensorflow"], "'tensorflow' is not one of slices,"),
        (["--backends", "pallas"], "pallas cannot run here: "),
        (["--rounds", "0"], "must be at least 1"),
        (["--compare", "nothing.json"], "there is no such file"),
        (["--save", "--quick"], "--save is for whole cases"),
        (["--compare", "pyproject.toml"], "is not a file that --json wrote"),
    ],
)
def test_wrong_input(arguments, said, capsys):
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_every_case_has_a_title_and_a_small_form():
    assert set(FULL) == set(QUICK) == set(report.TITLES)


def test_instructions_of_the_native_kernels():
    """The counts in the results are those of the code, or fewer."""
    if reason := instructions.missing():
        pytest.skip(reason)
    recorded = json.loads(instructions.RESULTS.read_text())["a_cell"]
    for mode, now in instructions.count().items():
        assert now < instructions.BOUND * recorded[mode], (
            f"{mode}: {now:.0f} instructions a cell, {recorded[mode]:.0f} before; if that is "
            "meant, run `python -m benchmarks.instructions --save`"
        )


def test_children_inherit_no_peak():
    """A process reports its own peak of memory, not that of its parent."""
    from benchmarks.large import peak_rss

    if not os.path.exists("/proc/self/status"):
        pytest.skip("there is no /proc here")
    code = "from benchmarks.large import peak_rss; print(peak_rss())"
    ballast = np.ones(300_000_000, np.uint8)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < peak_rss()
    assert ballast.sum() == ballast.size


def test_what_both_ways_of_timing_say():
    """Ratios of `nca bench` beside those of pytest-benchmark."""
    names = {"case_name": "growing", "kind": "rollout", "mode": "forward"}

    def entry(contestant, median):
        stats = {"q1": 0.9 * median, "median": median, "q3": 1.1 * median}
        return {"params": {**names, "contestant": contestant}, "stats": stats}

    found = row({"cpu": [1.0, 1.1], "slices": [4.0, 4.0], "torch": [9.0, 9.0]})
    alone = [entry("cpu", 2.0), entry("slices", 8.0), entry("torch", 40.0), entry("cax", 1.0)]
    slices, torch = agree.agreements([found], alone)
    assert slices.what == "growing rollout forward slices"
    assert slices.alone == pytest.approx((7.2 / 2.2, 4.0, 8.8 / 1.8))
    assert slices.same
    assert not torch.same
    assert "| yes |" in agree.table([slices, torch])
    assert "| no |" in agree.table([slices, torch])


def test_pytest_benchmarks(tmp_path):
    """`pytest benchmarks/` through pytest-benchmark, with what each contestant reaches."""
    out = tmp_path / "alone.json"
    asked = ["--cases=growing", "--backends=xla", "--peers=slices", "--benchmark-max-time=0.1"]
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_step.py", "--quick", "-q", *asked]
    command += [f"--benchmark-json={out}", f"--json={tmp_path / 'rows.json'}", "-k", "forward"]
    # Beside other tests nothing is timed, unless the plugin does not know of them.
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=measure.ROOT.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads(out.read_text())["benchmarks"]
    assert {e["params"]["contestant"] for e in entries} == {"xla", "slices"}
    assert {e["group"] for e in entries} == {"growing, rollout, forward", "growing, step, forward"}
    for e in entries:
        info = e["extra_info"]
        rate = 8 * 32**2 * (8 if e["params"]["kind"] == "rollout" else 1) / e["stats"]["median"]
        assert info["cell_steps_per_second"] == pytest.approx(rate)
        assert 0 < info["percent_of_roofline"] < 100
        assert info["bytes_moved_at_least"] == 128
