"""JAX assembles Triton's PTX with the ptxas that it finds, which has to know the PTX version."""

import os
from pathlib import Path
from unittest import mock

import jax
import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed (it is for Linux only)")

from triton.backends.nvidia.compiler import get_ptxas, ptx_get_version  # noqa: E402

from nca_kernels.backends.triton import assembler  # noqa: E402

OWN = Path(triton.__file__).parent / "backends/nvidia/bin"


@pytest.fixture
def ptxas(tmp_path, monkeypatch):
    """``ptxas(version)`` makes the only ptxas that JAX could find; with None there is no ptxas."""

    def make(version):
        os.environ["PATH"] = f"{Path(__file__)}{os.pathsep}{tmp_path}"
        looks = list(assembler._where_jax_looks())[:2]
        monkeypatch.setattr(assembler, "_where_jax_looks", lambda: iter(looks))
        if version is not None:
            path = tmp_path / "ptxas"
            path.write_text(f"#!/bin/sh\necho 'Cuda tools, release {version}, V{version}.1'\n")
            path.chmod(0o755)
        assembler.ptx_version.cache_clear()
        return dict(os.environ)

    with mock.patch.dict(os.environ):
        yield make
    assembler.ptx_version.cache_clear()


def test_an_older_ptxas_is_written_for(ptxas):
    before = ptxas("12.5")
    assert {assembler.ptx_version(arch) for arch in (80, 90, 100)} == {85}
    assert dict(os.environ) == before, "other users of Triton in the process are left alone"


@pytest.mark.parametrize("version", ["99.0", "11.5", None])  # JAX rejects one as old as the second
def test_otherwise_triton_chooses(ptxas, version):
    ptxas(version)
    assert {assembler.ptx_version(arch) for arch in (80, 90, 100)} == {None}
    assert assembler.ptx_version(0) is None, "AMD's GPUs take no PTX"


def test_triton_takes_the_version(ptxas):
    """Asked for its own ptxas's version, Triton's compiler writes what it writes by default."""
    ptxas("12.5")
    assert ptx_get_version(get_ptxas(90).version) >= 85


def test_a_ptxas_of_its_own_only_where_jax_finds_none(ptxas, monkeypatch):
    monkeypatch.setattr("jaxlib.gpu_triton.TritonKernelCall", object, raising=False)
    before = ptxas(None)
    assembler.provide_ptxas()
    assert os.environ.pop("PATH") == f"{before.pop('PATH')}{os.pathsep}{OWN}"
    assert dict(os.environ) == before
    before = ptxas("12.5")
    assembler.provide_ptxas()
    assert dict(os.environ) == before


def test_without_jax_for_gpus_nothing_changes(ptxas, monkeypatch):
    monkeypatch.delattr("jaxlib.gpu_triton.TritonKernelCall", raising=False)
    before = ptxas(None)
    assembler.provide_ptxas()
    assert dict(os.environ) == before


def test_where_jax_looks(monkeypatch):
    monkeypatch.setenv("PATH", f"/first{os.pathsep}/second")
    paths = [str(path) for path in assembler._where_jax_looks()]
    assert paths[:3] == ["/first/ptxas", "/second/ptxas", "/usr/local/cuda/bin/ptxas"]
    assert str(Path(jax.__file__).parents[1] / "nvidia/cu13/bin/ptxas") in paths
