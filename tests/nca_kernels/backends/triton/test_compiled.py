"""The Triton kernels, compiled ahead of time for GPUs that are not here."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import ROOT

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux only)")

from nca_kernels.tuning import VARIANTS

SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB
TENSOR = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
TENSOR["gfx942"] = "v_mfma"
SPILL_FREE = ("sm_80", "sm_90")
# Bytes; only the widest rule spills: launches of it that spill nothing take more instructions.
SPILLED = {("diffusing", "step_forward", "sm_90"): 48, ("diffusing", "step_backward", "sm_90"): 8}
# Warp instructions a cell, growing on sm_90.
ISSUED = {"step_forward": 38, "clear_dead": 4, "step_backward": 115, "add_overlaps": 8}
AWKWARD = (
    "line",
    "three_hidden",
    "no_hidden",
    "dense_replicate",
    "inputs_per_cell",
    "inputs_per_sample",
    "kernel_beyond_grid_circular",
    "volume_circular",
    "bfloat16",
    "update_inputs_per_cell",
    "attention_bfloat16",
)


def compiled(tmp_path, *arguments):
    """Rows of ``benchmarks.aot``, run in a process that can compile: this one interprets."""
    path = tmp_path / "rows.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.aot", "--json", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "--precisions", "default", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(path.read_text())


# All cases with Triton 3.6; with other versions one case, as it shows whether kernels compile.
OLD = version("triton").startswith("3.6.")


@pytest.mark.parametrize("case", ["growing", *(("self_autoencoding", "diffusing") if OLD else ())])
def test_kernels_compile_for_every_target(tmp_path, case):
    """Within a device's shared memory, with tensor cores, on common cards without spills."""
    rows = compiled(tmp_path, "--cases", case)
    assert {row["target"] for row in rows} == set(SHARED)
    for row in rows:
        name = f"{row['case']} {row['kernel']} {row['target']}"
        assert row["shared_bytes"] <= SHARED[row["target"]] << 10, name
        if row["target"] in SPILL_FREE:
            most = SPILLED.get((case, row["kernel"], row["target"]), 0)
            assert row["spill_bytes"] <= most, name
        if row["kernel"] == "step_forward" and case == "growing":
            assert row["tensor_instructions"].get(TENSOR[row["target"]]), name
        if row["target"] == "sm_90" and case == "growing" and row["kernel"] in ISSUED:
            most = ISSUED[row["kernel"]]
            assert most / 4 < row["warp_instructions_a_cell"] < most, name
        if row["kernel"] == "clear_dead":  # before flags are written in place, and for layouts
            assert row["barriers"] > 1, name


# Bytes, on the small grid alone: no launch that is to be tried on a GPU may lose to its spills.
SPILLED_BY_VARIANTS = {"three_programs": 8}


@pytest.mark.skipif(not OLD, reason="variants are for the machine with the H200: Triton 3.6")
def test_variants_compile_without_spills(tmp_path):
    arguments = ("--cases", "growing", "--targets", "sm_90", "--variants")
    rows = [row for row in compiled(tmp_path, *arguments) if row["variant"]]
    names = {kernel: {*changes, "half_tiles"} for kernel, changes in VARIANTS.items()}
    for kernel, expected in names.items():
        assert {row["variant"] for row in rows if row["kernel"] == kernel} == expected
    for row in rows:
        assert row["spill_bytes"] <= SPILLED_BY_VARIANTS.get(row["variant"], 0), row
        assert row["shared_bytes"] <= SHARED["sm_90"] << 10, row


@pytest.fixture(scope="module")
def lowered():
    """What ``lowered_for_cuda.py`` prints, run in a process that can compile."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("lowered_for_cuda.py"))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if "JAX has no GPU plugin" in run.stderr:
        pytest.skip("Triton's kernels cannot be called without JAX's CUDA plugin; see the Makefile")
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


KERNELS = {"step_forward", "clear_dead", "step_backward", "add_overlaps", "add_programs"}


def test_kernels_are_called_as_cuda_graphs_want_it(lowered):
    """XLA captures typed FFI calls in CUDA graphs, and leaves out custom calls of the old kind."""
    assert lowered["calls"] == [["triton_kernel_call_ffi", "API_VERSION_TYPED_FFI"]]


def test_what_is_counted_is_what_jax_runs(lowered):
    assert lowered["same"] == dict.fromkeys(KERNELS, True)


def test_an_older_ptxas_reads_what_jax_hands_it(lowered):
    assert lowered["complaints"] == dict.fromkeys(KERNELS, "")


def test_a_second_grid_size_compiles_nothing(lowered):
    assert lowered["compiled"] == [len(KERNELS), 0]


def test_a_vmap_of_any_size_is_launched(lowered):
    """Members are the first axis of the launch grid, as the others end at 65,535."""
    forward, clear = lowered["grids"]
    assert forward == clear == [70_000, 1, 1]


def test_awkward_cases_compile(tmp_path):
    """Paths through the kernels that the benchmark cases do not take."""
    cases = AWKWARD if OLD else AWKWARD[::3]
    rows = compiled(tmp_path, "--cases", *cases, "--targets", "sm_80")
    assert len(rows) > 3 * len(cases)


def test_indices_beyond_32_bits_compile(tmp_path):
    cases = ("plane_circular", "attention_circular")
    assert compiled(tmp_path, "--cases", *cases, "--targets", "sm_80", "--wide")


def test_says_that_there_is_no_gpu():
    """A process that can compile has no GPU all the same: "auto" must not choose Triton there."""
    code = "from nca_kernels.backends.triton.launch import missing; print(missing())"
    unset = ("TRITON_INTERPRET", "NCA_CUDA_ARCH")
    environment = {k: v for k, v in os.environ.items() if k not in unset} | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    # The latter where the plugin of JAX for CUDA cannot be had.
    assert run.stdout.startswith(("there is no GPU: to compile", "JAX has no GPU plugin"))
