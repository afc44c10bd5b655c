"""The command `nca`, as a user meets it."""

import json
import os
import shlex
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from nca_models import _files, cli, demo
from nca_models.systems import growing
from nca_models.training import trainer

TRAIN = "train growing --size 7 --padding 2 --batch-size 4 --pool-size 8 --damaged-per-batch 1"

WRONG = [
    ("", "COMMAND"),
    ("fly", "invalid choice: 'fly'"),
    ("train", "system"),
    ("train growing", "--out"),
    ("train shrinking --out new", "invalid choice: 'shrinking'"),
    ("train growing --out new --preset huge", "'huge'"),
    ("train growing --out new --steps 0", "at least 1"),
    ("train growing --out new --steps many", "'many' is not a whole number"),
    ("train growing --out new --seed -1", "at least 0"),
    ("train growing --out new --learning-rate nan", "not a number above 0"),
    ("train growing --out new --target nowhere.png", "nowhere.png: no such file"),
    ("train growing --out new --target text.png", "cannot be read as an image"),
    ("train growing --out new --target clear.png", "transparent"),
    ("train growing --out new --target old", "is a folder"),
    ("train growing --out new --target https://a.b/c.png", "c.png: addresses are not fetched"),
    ("train growing --out new --target file:///a.png", "download it, and give the file"),
    ("train dynamics --out new --target s3://bucket/a.png", "addresses are not fetched"),
    ("train growing --out new --target data:image/png;base64,AA==", "are not fetched"),
    ("train attention --out new --data-dir http://a.b/mnist", "addresses are not fetched"),
    ("sweep growing --out new --targets http://a.b/c.png", "addresses are not fetched"),
    (f"train growing --out new --target {'a' * 400}.png", "File name too long"),
    ("train growing --out new --target /dev/null", "is a device"),
    ("train growing --out new --damage fire", "'fire'"),
    ("sweep diffusing --out new --noise-rate -1", "not a number of at least 0"),
    ("sweep diffusing --out new --noise-rate nan", "not a number of at least 0"),
    ("sweep diffusing --out new --noise-rate 0 2", "noise_rate is 2.0, but must be between"),
    ("sweep diffusing --out new --fire-rate 0", "not a number above 0"),
    ("train growing --out new --batch-size 9000", "pool_size"),
    ("train growing --out new --backend abacus", "abacus: no such backend"),
    ("train growing --out new --colour red", "--colour"),
    ("train growing --out text.png", "is a file"),
    ("train growing --out old", "add --resume"),
    ("train growing --out new --resume", "no run to resume"),
    ("train growing --out old --resume --seed 7", "seed 0, not 7"),
    ("train growing --out old --resume --preset paper", "preset small, not paper"),
    ("train attention --out old --resume", "system growing, not attention"),
    ("train growing --out old --resume --vgg16 w.npz", "a run of growing, without vgg16"),
    ("demo --out old", "add --resume"),
    ("run nowhere", "holds no run"),
    ("run old --gif film.mp4", "must end in .gif"),
    ("run old --gif no/film.gif", "there is no folder"),
    ("run old --steps 5 --damage half --damage-at 9", "--damage-at 9"),
    ("run old --damage-at 9", "--damage must say what"),
    ("run old --every 0", "at least 1"),
    ("run old --scale 2/3", "neither a whole number nor one over one"),
    ("run old --tile 0", "at least 1"),
    ("run old --steps 5", "no checkpoint yet"),
    ("run broken", "not a run's settings"),
    ("run partial", "lacks"),
]


@pytest.mark.parametrize(("line", "words"), WRONG, ids=[line or "nothing" for line, _ in WRONG])
def test_wrong_input_is_one_line_and_exit_code_2(
    make_run, tmp_path, monkeypatch, capsys, line, words
):
    monkeypatch.chdir(tmp_path)
    make_run("old")
    for name, text in (("broken", "{"), ("partial", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "text.png").write_text("not an image")
    Image.new("RGBA", (3, 3)).save(tmp_path / "clear.png")
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("nca: ")
    assert words in err
    assert not (tmp_path / "new").exists()


def test_wrong_input_is_refused_before_jax_starts():
    code = (
        "import sys; from nca_models.cli import main; code = main(['train', 'growing', '--out', "
        "'x', '--target', 'nowhere.png']); sys.exit(90 if 'jax' in sys.modules else code)"
    )
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 2


def test_missing_flax_names_the_extra():
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'flax' else find(name, *a)\n"
        "import nca_models"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert 'flax: run `pip install "nca-kernels[models]"`' in result.stderr


@pytest.mark.parametrize("command", ["", "train", "run", "eval", "sweep", "demo", "doctor"])
def test_help_explains_every_option(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: nca" in capsys.readouterr().out


def test_the_first_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 24


def test_train_an_odd_picture_resume_and_film(tmp_path, picture, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = replace(growing.PRESETS["small"], num_steps=6, min_steps=4, hidden=8)
    monkeypatch.setitem(growing.PRESETS, "small", preset)
    assert cli.main(f"{TRAIN} --target {picture.name} --out run --steps 6".split()) == 0
    said = capsys.readouterr().out
    assert "grown from one cell" in said
    assert "growth.gif" in said
    assert Image.open("run/target.png").size == (7, 7)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["target"] == picture.name
    assert config["config"]["num_train_steps"] == 6
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert np.isfinite(metrics["training, mean of the last 6 steps"])
    assert len(metrics) == 14  # null where so short a training overflows in 1,000 steps

    assert cli.main(["train", "growing", "--out", "run", "--resume", "--steps", "8"]) == 0
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 1 + 8

    capsys.readouterr()
    film = ["--steps", "9", "--every", "3", "--scale", "4", "--damage", "circle"]
    assert cli.main(["run", "run", *film, "--png", "a.png", "--gif", "a.gif"]) == 0
    assert capsys.readouterr().out.split() == ["a.gif", "a.png"]
    assert iio.imread("a.png").shape == (44, 4 * 44 + 3 * 8, 3)
    assert iio.improps("a.gif", index=None).shape[1:3] == (44, 44)

    larger = ["--size", "31", "--steps", "10", "--every", "5", "--damage", "half"]
    assert cli.main(["run", "run", *larger, "--scale", "1/2", "--png", "whole.png"]) == 0
    assert cli.main(["run", "run", *larger, "--scale", "1/2", "--tile", "9", "--png", "b.png"]) == 0
    assert iio.imread("b.png").shape == (16, 3 * 16 + 2 * 8, 3)
    np.testing.assert_array_equal(iio.imread("b.png"), iio.imread("whole.png"))


def test_demo(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setitem(growing.PRESETS, "small", tiny)
    monkeypatch.setattr(demo, "_BUDGET", 0.0)
    folder = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(folder), "--steps", "5"]) == 0
    said = capsys.readouterr().out
    for words in ("forward: ", "training: ", "times faster", "mean of the last 5 steps"):
        assert words in said
    files = {"growth.gif", "growth.png", "target_and_result.png", "loss.png", "checkpoints"}
    assert files <= {path.name for path in folder.iterdir()}
    assert all(name in said for name in files)


def test_a_picture_from_a_pipe(tmp_path, picture, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    preset = replace(growing.PRESETS["small"], num_steps=6, min_steps=4, hidden=8)
    monkeypatch.setitem(growing.PRESETS, "small", preset)
    Image.new("RGB", (5, 5), "red").save("other.png")
    for name in ("pipe", "again"):
        os.mkfifo(name)

    def train(line, pipe, file):
        _files.piped.cache_clear()
        content = Path(file).read_bytes()
        threading.Thread(target=Path(pipe).write_bytes, args=(content,), daemon=True).start()
        return cli.main([*line.split(), "--out", "run", "--target", pipe])

    assert train(f"{TRAIN} --steps 2", "pipe", picture) == 0
    assert Image.open("run/target.png").size == (7, 7)
    assert json.loads(Path("run/config.json").read_text())["target"].startswith("a pipe with SHA-")
    assert cli.main(["train", "growing", "--out", "run", "--resume", "--steps", "3"]) == 0
    assert train("train growing --resume --steps 4", "again", picture) == 0
    capsys.readouterr()
    assert train("train growing --resume --steps 5", "again", "other.png") == 2
    assert "was started with target a pipe with SHA-256" in capsys.readouterr().err


def test_a_training_whose_cells_died_does_not_end_as_if_all_were_well(make_run, tmp_path, capsys):
    folder = make_run(alive_threshold=2.0, num_train_steps=30)  # no seed is above it
    assert cli.main(["train", "growing", "--out", str(folder), "--resume"]) == 1
    out, err = capsys.readouterr()
    assert "growth.gif" in out
    assert err.splitlines()[-1].startswith("nca: all cells are dead since step 1, ")


def test_suggested_commands_are_read_by_a_shell(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("-it's a 🦎 $run", 'two\n"lines" & more'):
        make_run(name, num_train_steps=1)
        assert cli.main(["train", "growing", f"--out={name}", "--resume"]) == 0
        suggested = capsys.readouterr().out.split("now try: ")[1]
        words = shlex.split(suggested)
        assert words[:2] == ["nca", "run"]
        assert Path(words[2]) == Path(name)
        assert cli.main([*words[1:], "--steps", "2"]) == 0
        assert Path(words[-1]).is_file()

        def fails(*_, **__):
            raise trainer.Interrupted(2, 1)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "train", fails)
            options = ["--resume", "--tensorboard", "--mesh", "data=1"]
            assert cli.main(["train", "growing", f"--out={name}", *options]) == 130
        words = shlex.split(capsys.readouterr().err.split("continue with: ")[1])
        assert Path(words[words.index("--out") + 1]) == Path(name)
        assert set(options) <= set(words)
        assert cli.main(words[1:]) == 0
        capsys.readouterr()


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for words in ("Python 3", "jax ", "flax ", "devices", "reference", "available", '"auto" picks'):
        assert words in said


def test_a_backend_that_is_not_here(capsys, monkeypatch, tmp_path):
    import nca_kernels as nk

    row = nk.backends()[0]._replace(name="triton", available=False, reason="no NVIDIA GPU")
    monkeypatch.setattr(nk, "backends", lambda: [row])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "growing", "--out", "new", "--backend", "triton"]) == 2
    assert "triton: not available here (no NVIDIA GPU)" in capsys.readouterr().err


def test_a_backend_that_cannot_run_the_call_is_one_line(capsys, monkeypatch):
    import nca_kernels as nk

    def fails(args):
        raise nk.BackendUnavailable("cpu: no such padding;\nuse xla")

    monkeypatch.setattr(cli.doctor, "_doctor", fails)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "nca: cpu: no such padding; use xla\n"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("grid.json", "{", "is not a sweep's settings"),
        ("grid.json", "[]", "is not a sweep's settings"),
        ("sweep.csv", "", "is not a sweep's table"),
    ],
)
def test_a_damaged_sweep_is_one_line(tmp_path, capsys, file, content, words):
    (tmp_path / file).write_text(content)
    assert cli.main(["sweep", "growing", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{tmp_path / file} {words}" in err


def test_estimate(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(f"{TRAIN} --estimate".split()) == 0
    out = capsys.readouterr().out
    assert "484 cells, 17,424 cell-steps" in out
    assert "s a training step, measured" in out
    assert "H200 at its limit" in out
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(tmp_path, capsys, monkeypatch):
    from nca_models.training import estimate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "available_memory", lambda: 1_000_000)
    assert cli.main(f"{TRAIN} --estimate".split()) == 2
    captured = capsys.readouterr()
    assert "0.0 GB there are" in captured.out
    assert captured.err == "nca: it does not fit into memory\n"
    assert cli.main(f"{TRAIN} --out new".split()) == 2
    assert "choose a smaller --size" in capsys.readouterr().err
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_nothing_stays_of_a_run_without_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert cli.main(["train", "attention", "--data-dir", "empty", "--out", "new"]) == 2
    assert "neither mnist.npz" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
