"""The training step of Growing NCA, exported for CUDA with the Triton kernels, on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_training_step_exports_for_cuda(tmp_path):
    """Two launches a step forward, three backward, in loops that never wait for the host."""
    pytest.importorskip("triton", reason="Triton is not installed (it is for Linux only)")
    script = Path(__file__).with_name("export_for_cuda.py")
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "90"], capture_output=True, text=True
    )
    if "JAX has no GPU plugin" in run.stderr:
        pytest.skip("Triton's kernels cannot be called without JAX's CUDA plugin; see the Makefile")
    assert run.returncode == 0, run.stderr[-2000:]
    out = json.loads(run.stdout.splitlines()[-1])
    forward = {"step_forward": 1, "clear_dead": 1}
    backward = {"step_backward": 1, "add_overlaps": 1, "add_programs": 1}
    assert out["bytes"] > 0
    assert forward in out["launches"]
    assert backward in out["launches"]
    assert all(piece in (forward, backward) for piece in out["launches"])
