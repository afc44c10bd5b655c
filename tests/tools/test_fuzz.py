"""Random shapes and rules: fused backends against the reference, values and gradients."""

import json
import os
import subprocess
import sys

import pytest

from nca_kernels import dispatch
from nca_kernels.backends.cpu import library
from tests import ROOT
from tests.tools import fuzz

# A case is compiled once and run once: the compiler's time is all the time.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "tests.tools.fuzz", *args],
        capture_output=True,
        text=True,
        env=os.environ | QUICK,
        cwd=ROOT,
    )


@pytest.mark.skipif(library.missing() is not None, reason=f"no kernels: {library.missing()}")
@pytest.mark.parametrize("part", range(2))
def test_cpu(part):
    out = run("cpu", "--first", str(100 * part), "--cases", "100")
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.skipif(
    bool(library.missing()) or "amx" not in library.instruction_sets(),
    reason="this processor has no tile registers (AMX)",
)
def test_tile_registers():
    """Tile registers compute every case, not only those with large products."""
    out = run("cpu", "--instruction-set", "amx", "--first", "200", "--cases", "100")
    assert out.returncode == 0, out.stdout + out.stderr


def test_triton_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed (it is for Linux only)")
    out = run("triton_interpreted", "--first", "1004", "--cases", "8")
    assert out.returncode == 0, out.stdout + out.stderr


def test_pallas_interpreted():
    out = run("pallas_interpreted", "--first", "1004", "--cases", "8")
    assert out.returncode == 0, out.stdout + out.stderr


def test_xla():
    out = run("xla", "--cases", "15")
    assert out.returncode == 0, out.stdout + out.stderr


def test_interrupted_and_continued(tmp_path):
    """A run goes on where the file stops, and a failure is told with its seed."""
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"backend": "xla", "first": 0, "seeds": 2, "no_verdict": 0,
                                "failures": {"1": "seed 1: state: off"}}))  # fmt: skip
    out = run("xla", "--cases", "3", "--json", str(file))
    assert out.returncode == 1
    assert json.loads(file.read_text())["seeds"] == 3
    assert "3 cases, 0 without verdict, 1 failures" in out.stdout, out.stdout + out.stderr


def test_an_error_is_found(monkeypatch):
    """The check can fail: a state that is off by a little, and a gradient that is."""
    covers = dispatch.covers("xla")
    cases = ((s, fuzz.random_case(s // fuzz.DRAWS, covers)) for s in range(100))
    seed = next(s for s, case in cases if case.dtype == "float32")
    assert fuzz.check_random_case("xla", seed)
    compiled = fuzz._compiled
    for name, wrong in (
        ("state", lambda out, grads: (out * 1.0001, grads)),
        ("gradient", lambda out, grads: (out, grads | {"state": grads["state"] * 1.0001})),
    ):

        def off(case, backend, wrong=wrong):
            run = compiled(case, backend)
            if backend == fuzz.ORACLE:
                return run
            return lambda *args: (*wrong(*run(*args)[:2]), None)

        monkeypatch.setattr(fuzz, "_compiled", off)
        with pytest.raises(AssertionError, match=f"seed {seed}: {name}"):
            fuzz.check_random_case("xla", seed)
