"""Triton's PTX has to be of a version that the ptxas which JAX finds can read."""

import os
from pathlib import Path
from unittest import mock

import jax
import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed (it is for Linux only)")

from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402

from nca_kernels.backends.triton import assembler  # noqa: E402

OWN = Path(triton.__file__).parent / "backends/nvidia/bin"


@pytest.fixture
def ptxas(tmp_path, monkeypatch):
    """Makes a ptxas of a version, the only one that JAX could find; None makes none."""

    def make(version, **named):
        os.environ["PATH"] = f"{Path(__file__)}{os.pathsep}{tmp_path}"
        for variable in assembler.TOOLS:
            os.environ.pop(variable, None)
        os.environ.update(named)
        looks = list(assembler._where_jax_looks())[:2]
        monkeypatch.setattr(assembler, "_where_jax_looks", lambda: looks)
        path = tmp_path / "ptxas"
        if version is not None:
            path.write_text(f"#!/bin/sh\necho 'Cuda tools, release {version}, V{version}.1'\n")
            path.chmod(0o755)
        assembler.agree.cache_clear()
        assembler.agree()
        return str(path)

    with mock.patch.dict(os.environ):
        yield make
    assembler.agree.cache_clear()


def test_an_older_ptxas_is_written_for(ptxas):
    path = ptxas("12.5")
    assert [os.environ[name] for name in assembler.TOOLS] == [path, path]
    assert {get_ptxas(80).version, get_ptxas(90).version, get_ptxas(100).version} == {"12.5"}


def test_a_newer_ptxas_changes_nothing(ptxas):
    ptxas("99.0")
    assert not os.environ.keys() & assembler.TOOLS.keys()
    assert str(OWN) not in os.environ["PATH"]


@pytest.mark.parametrize("version", [None, "11.5"])  # the latter is too old for JAX
def test_without_any_jax_gets_tritons(ptxas, version):
    ptxas(version)
    assert os.environ["PATH"].split(os.pathsep)[-1] == str(OWN)
    newest = get_ptxas(100).version
    assert newest == get_ptxas(80).version  # not that of ptxas-blackwell, which JAX cannot find


def test_what_the_user_names_stays(ptxas):
    path = ptxas("12.5", TRITON_PTXAS_PATH="theirs")
    assert os.environ["TRITON_PTXAS_PATH"] == "theirs"
    assert os.environ["TRITON_PTXAS_BLACKWELL_PATH"] == path


def test_where_jax_looks(monkeypatch):
    monkeypatch.setenv("PATH", f"/first{os.pathsep}/second")
    paths = [str(path) for path in assembler._where_jax_looks()]
    assert paths[:3] == ["/first/ptxas", "/second/ptxas", "/usr/local/cuda/bin/ptxas"]
    assert str(Path(jax.__file__).parents[1] / "nvidia/cu13/bin/ptxas") in paths
