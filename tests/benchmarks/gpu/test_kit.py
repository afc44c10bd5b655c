"""`make gpu-kit`: what it compiles is not compiled again, wherever the kit is taken."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import ROOT

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux only)")

from jaxlib import gpu_triton

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import kit
from nca_kernels.backends.triton.device import ARCHITECTURE

if not hasattr(gpu_triton, "TritonKernelCall"):
    pytest.skip("JAX has no GPU plugin to lower for", allow_module_level=True)

ITEM = "step triton"  # forward and backward, of five kernels
LOWERED = f"""
import json, sys
from benchmarks.gpu.items import Asked
from benchmarks.gpu.rehearsal import Rehearsal

work = Rehearsal(Asked(("triton",), any_device=True))
(item,) = (item for item in work.items("smoke") if item.name == {ITEM!r})
item.lower()
print(json.dumps(list(work.taken().values())))
"""


def options(folder, **changes):
    values = {
        "out": folder, "arch": 90, "device": "", "stages": "smoke", "items": ITEM, "packages": [],
        "jobs": 1, "tiny": True,
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


@pytest.fixture(autouse=True)
def _children_find_what_this_process_does(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    return tmp_path_factory.mktemp("made") / "kit"


@pytest.fixture
def made(made_once):
    """A kit of one item."""
    if not made_once.exists():
        assert kit.make(options(made_once)) == 0
    return made_once


def lowered(folder, scratch):
    """Whether each kernel of the item came from the kit, in another process that lowers it."""
    scratch.mkdir()
    environment = {**os.environ, ARCHITECTURE: "90", "JAX_PLATFORMS": "cpu"}
    environment |= kit.unpack(folder, scratch)
    environment.pop("TRITON_INTERPRET", None)  # set for the tests; with it nothing can be compiled
    run = subprocess.run(
        [sys.executable, "-c", LOWERED], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_making_goes_on(made, capsys):
    """Making a kit a second time compiles nothing that is compiled already."""
    before = (made / kit.ARCHIVE).read_bytes()
    assert kit.make(options(made)) == 0
    assert "smoke: 0 of 1 items" in capsys.readouterr().err
    assert (made / kit.ARCHIVE).read_bytes() == before
    other = kit.sources(options(made, arch=80))
    assert other != kit.sources(options(made))


def test_what_failed_is_tried_again(tmp_path, monkeypatch):
    tried = []

    def compile_kernels(_, results, __):
        tried.append([record["item"] for record in results.records.values()])
        for item, facts in {"fine": {}, "broken": {"error": "no memory"}}.items():
            results.add({"stage": "smoke", "item": item, "kernels": {"folders": []}, **facts})

    monkeypatch.setattr(kit, "compile_kernels", compile_kernels)
    assert kit.make(options(tmp_path / "kit")) == 1
    assert kit.make(options(tmp_path / "kit")) == 1
    assert tried == [[], ["fine"]]


def test_nothing_is_compiled_again(made, tmp_path):
    """This holds for a kit that was moved, too, although its lists of files name the old paths."""
    moved = tmp_path / "moved"
    shutil.copytree(made, moved)
    shutil.rmtree(made.with_name("kit.making"))
    assert lowered(moved, tmp_path / "scratch") == [True] * 5


def test_what_a_kit_lacks_is_compiled(made, tmp_path):
    poor = tmp_path / "poor"
    shutil.copytree(made, poor)
    with zipfile.ZipFile(made / kit.ARCHIVE) as whole:
        names = whole.namelist()
        first = names[0].split("/")[0]
        with zipfile.ZipFile(poor / kit.ARCHIVE, "w") as archive:
            for name in names:
                if not name.startswith(first):
                    archive.writestr(name, whole.read(name))
    assert sorted(lowered(poor, tmp_path / "scratch")) == [False] + [True] * 4


def test_what_is_in_a_kit(made):
    with zipfile.ZipFile(made / kit.ARCHIVE) as archive:
        names = archive.namelist()
    assert {Path(name).suffix for name in names} == set(kit.KEPT)
    about = json.loads((made / kit.DESCRIPTION).read_text())
    assert (about["kernels"], about["items"], about["arch"]) == (5, 1, 90)
    assert about["versions"] == kit.versions()
    assert kit.unfit(made) is None


def test_a_kit_that_is_too_large(tmp_path, monkeypatch, capsys):
    """It is made all the same, and the command says so."""
    monkeypatch.setattr(kit, "MEGABYTES", 0)
    monkeypatch.setattr(kit, "compile_kernels", lambda *_: None)
    assert kit.make(options(tmp_path / "large")) == 1
    assert "it is larger than 0 MB" in capsys.readouterr().err
    assert (tmp_path / "large" / kit.ARCHIVE).exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is none"),
        ({"versions": {**kit.versions(), "triton": "2.0"}}, "it was made for triton 2.0 (here is "),
        ({"versions": {}}, "it was made for python None"),
        ({"versions": kit.versions()}, "it is broken (File is not a zip file)"),
    ],
)
def test_a_kit_for_another_machine(content, said, tmp_path, capsys):
    """A run says so in a line, and goes on without it."""
    if content is not None:
        (tmp_path / kit.DESCRIPTION).write_text(json.dumps(content))
        (tmp_path / kit.ARCHIVE).write_text("cut off")
    environment = command._environment(tmp_path, tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("the kit is left alone: ")
    assert said in out
    assert environment.get("TRITON_CACHE_DIR") == os.environ.get("TRITON_CACHE_DIR")


def test_wheels_are_found(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    folder, scratch = tmp_path / "kit", tmp_path / "scratch"
    (folder / "wheels").mkdir(parents=True)
    scratch.mkdir()
    with zipfile.ZipFile(folder / "wheels" / "absent-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("absent_package.py", "answer = 42\n")
    environment = {**os.environ, **kit.unpack(folder, scratch)}
    code = "import absent_package; print(absent_package.answer)"
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert out.stdout == b"42\n"
