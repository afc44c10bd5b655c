"""Runs of other versions, damaged ones, and disks that are full: a line that says what to do."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import jax
import numpy as np
import pytest

from nca_models import cli, run_folder
from nca_models.training.checkpoints import Checkpoints
from nca_models.training.trainer import Trainer, train


def settings(**changes):
    return lambda saved: saved["config"].update(changes)


CONFIGS = {
    "a setting more": (settings(ema_decay=0.99), "growing has no setting ema_decay"),
    "a setting less": (lambda s: s["config"].pop("alive_threshold"), "lacks the setting alive"),
    "text for a number": (settings(hidden="128"), "hidden is '128', but must be a whole number"),
    "a fraction": (settings(hidden=1.5), "must be a whole number"),
    "a truth value": (settings(hidden=True), "must be a whole number"),
    "nothing": (settings(channels=None), "channels is None"),
    "not finite": (settings(learning_rate=float("nan")), "must be a finite number"),
    "a number for a text": (settings(damage=3), "must be a text"),
    "an object": (settings(seed={}), "seed is {}"),
    "an impossible value": (settings(batch_size=0), "at least 1"),
    "another preset": (lambda s: s.update(preset="large"), "preset 'large'"),
    "no preset": (lambda s: s.update(preset=None), "preset cannot be null"),
    "another system": (lambda s: s.update(system="swarming"), "no system 'swarming'"),
    "no name of a system": (lambda s: s.update(system=[]), "no system []"),
    "a path as a system": (lambda s: s.update(system="growing.x"), "no system 'growing.x'"),
    "a target of numbers": (lambda s: s.update(target=[1]), "target cannot be [1]"),
    "a list of settings": (lambda s: s.update(config=[]), "config cannot be []"),
    "a backend that is gone": (settings(backend="cuda"), "cuda: no such backend"),
}
COMMANDS = ("run run --steps 2", "eval growing run", "train growing --out run --resume")


def assert_one_line(arguments, capfd, *words, code=2):
    """Run the command, which is to fail with one line that has these words."""
    assert cli.main(arguments) == code
    _, err = capfd.readouterr()
    err = "".join(line for line in err.splitlines(True) if not line.startswith("\r"))
    assert err.startswith("nca: ")
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("change", "words"), CONFIGS.values(), ids=list(CONFIGS))
def test_settings_of_another_version(
    make_run, tmp_path, monkeypatch, capfd, command, change, words
):
    monkeypatch.chdir(tmp_path)
    path = make_run() / "config.json"
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))
    assert_one_line(command.split(), capfd, words)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, b"\xff"])
def test_settings_that_are_none(make_run, tmp_path, monkeypatch, capfd, text):
    monkeypatch.chdir(tmp_path)
    (make_run() / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for command in COMMANDS:
        assert_one_line(command.split(), capfd, "run/config.json is not a run's settings")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 10 and 12."""
    from tests.nca_models.conftest import TINY

    folder = tmp_path_factory.mktemp("trained") / "run"
    changes = {name: value for name, value in vars(TINY).items() if name != "backend"}
    run_folder.create(folder, run_folder.Request("growing", None, None, changes))
    train(run_folder.load(folder), folder, progress=False)
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_that_lacks_or_cuts_any_file_is_refused_or_right(trained, run):
    template = jax.eval_shape(Trainer(run_folder.load(trained)).initial_state)
    with Checkpoints(trained / "checkpoints", read_only=True) as checkpoints:
        expected = jax.tree.leaves(checkpoints.restore(template))
    refused = []
    files = [path for path in (trained / "checkpoints/12").rglob("*") if path.is_file()]
    for file, size in product(files, (None, 1)):  # gone, or the first third
        damaged = run / file.relative_to(trained)
        if size is None:
            damaged.unlink()
        else:
            os.truncate(damaged, file.stat().st_size * size // 3)
        try:
            with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
                leaves = jax.tree.leaves(checkpoints.restore(template))
        except run_folder.RunError as error:
            refused.append(str(error))
        else:
            for leaf, right in zip(leaves, expected, strict=True):
                np.testing.assert_array_equal(leaf, right)
        shutil.copy(file, damaged)
    assert len(refused) >= 8
    for line in refused:
        assert "\n" not in line
        assert "remove that folder to go on from step 10" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_checkpoint_is_one_line_and_the_one_before_it_goes_on(run, capfd, command):
    shutil.rmtree(run / "checkpoints/12/model")
    assert_one_line(command.split(), capfd, "run/checkpoints/12", "go on from step 10")
    shutil.rmtree(run / "checkpoints/12")
    assert cli.main(command.split()) == 0


@pytest.mark.parametrize(
    ("file", "content", "command", "words"),
    [
        ("log.csv", None, "train growing --out run --resume", "log.csv has 0 rows"),
        ("log.csv", b"step,loss\n\xff", "train growing --out run --resume", "cannot be read"),
        ("log.csv", None, "eval growing run", "log.csv: cannot be read"),
        ("log.csv", b"step,loss,log10_loss\n1,many,", "eval growing run", "cannot be read"),
        ("target.png", None, "run run", "target.png: no such file"),
        ("target.png", b"", "eval growing run", "cannot be read as an image"),
        ("checkpoints", b"", "run run", "no checkpoint yet"),
    ],
)
def test_a_file_that_is_gone_or_damaged_is_one_line(run, capfd, file, content, command, words):
    path = run / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert_one_line(command.split(), capfd, words)


MOUNT = 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"'
FULL = """
import contextlib, io, json, os, shutil, sys
from dataclasses import replace
from pathlib import Path
from nca_models import cli
from nca_models.systems import growing

growing.PRESETS["small"] = replace(growing.PRESETS["small"], num_steps=6, min_steps=4, hidden=8)
os.chdir(sys.argv[1])
TRAIN = (
    "train growing --size 7 --padding 2 --batch-size 4 --pool-size 8 --damaged-per-batch 1 "
    "--steps 6 --checkpoint-every 2 --out "
)

def leave(room):
    Path("filler").unlink(missing_ok=True)
    disk = os.statvfs(".")
    Path("filler").write_bytes(bytes(max(0, disk.f_bavail * disk.f_bsize - room)))

def run(line):
    err, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = cli.main(line.split())
    lines = [line for line in err.getvalue().splitlines() if line and line[0] != chr(13)]
    lines = [line for line in lines if not line.startswith(("training:", "running:"))]
    return {"code": code, "lines": lines}

said = {"whole": run(TRAIN + "whole")}
log = Path("whole/log.csv").read_text()
for room in map(int, sys.argv[2:]):
    leave(room)
    first = run(TRAIN + "run")
    again = run(TRAIN + "run --resume") if Path("run").exists() else first
    Path("filler").unlink()
    then = run(TRAIN + "run" + " --resume" * Path("run").exists())
    said[room] = [first, again, then, Path("run/log.csv").read_text() == log]
    shutil.rmtree("run")
leave(0)
for suffix in ("gif", "png", "mp4"):
    said[suffix] = run(f"run whole --steps 4 --{suffix} film.{suffix}")
said["eval"] = run("eval growing whole")
said["files"] = sorted(os.listdir())
print(json.dumps(said))
"""


def on_a_small_disk(folder: Path, *command: str, mount=MOUNT) -> subprocess.CompletedProcess[str]:
    """Run a command where `folder` is a file system of 2 MB, or skip the test."""
    folder.mkdir(exist_ok=True)
    words = ["unshare", "-rm", "bash", "-c", mount, str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"]).returncode:
        pytest.skip("no file system can be mounted here")
    return subprocess.run([*words, *command], capture_output=True, text=True)


def test_a_disk_that_is_full_is_one_line_and_the_run_goes_on_once_there_is_room(tmp_path):
    rooms = ("4096", "8192", "100000", "200000")
    folder = tmp_path / "disk"
    result = on_a_small_disk(folder, sys.executable, "-c", FULL, str(folder), *rooms)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said.pop("whole") == {"code": 0, "lines": []}
    assert said.pop("files") == ["filler", "whole"]
    for room in rooms:
        first, again, then, same = said.pop(room)
        for each in (first, again):
            assert each["code"] == 1
            assert len(each["lines"]) == 1, each
            assert "No space left on device" in each["lines"][0]
            assert "make room there" in each["lines"][0]
        assert then == {"code": 0, "lines": []}
        assert same
    assert set(said) == {"gif", "png", "mp4", "eval"}
    for each in said.values():
        assert each["code"] == 1
        assert len(each["lines"]) == 1, each
        assert "No space left on device; make room there" in each["lines"][0]


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(run, tmp_path):
    """A read-only run is filmed elsewhere; training and a film in it are refused in a line."""
    code = "import sys; from nca_models.cli import main; sys.exit(main(sys.argv[1:]))"
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    (tmp_path / "film").mkdir()

    def nca(line):
        return on_a_small_disk(run, sys.executable, "-c", code, *line.split(), mount=mount)

    result = nca("run run --steps 2 --gif film/film.gif")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "film" / "film.gif").exists()
    for line in (
        "run run --steps 2",
        "train growing --out run --resume --steps 14",
        "train growing --out run/new",
    ):
        result = nca(line)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        (said,) = [line for line in result.stderr.splitlines() if line.startswith("nca: ")]
        assert "Read-only file system; choose another place" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
def test_an_output_that_is_full_is_one_line():
    code = "import sys; from nca_models.cli import main; sys.exit(main(sys.argv[1:]))"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code, "doctor"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 1
    assert result.stderr == "nca: No space left on device; make room there\n"
