"""A new system is one file: with it alone it is found, trained, resumed, measured and filmed."""

import json
import subprocess
import sys
from dataclasses import fields

import imageio.v3 as iio
import pytest

from nca_models import cli, systems

SYSTEM = '''
"""Fading: cells that start bright learn to reach a brightness."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

import nca_kernels as nk
from nca_models import render
from nca_models.learning import SystemBase
from nca_models.modules import NCA
from nca_models.training.config import TrainConfig, setting

LOWEST = 3


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    target_help: ClassVar[str] = "a brightness from 0 to 1 (default: 0.5)"
    examples: ClassVar[tuple[str, ...]] = ("nca train fading --target 0.3 --width 9 --out fading",)

    width: int = setting(5, lowest=LOWEST, flag="--width", help="width of the grid, in cells")
    num_steps: int = setting(2, help="steps of the automaton in a training step")

    @classmethod
    def check_target(cls, system, target):
        if not 0 <= float(target) <= 1:
            raise ValueError(f"--target {target}: {system} wants a brightness from 0 to 1")


SMALL = Config(
    num_train_steps=5, batch_size=2, pool_size=4, learning_rate=1e-2, final_learning_rate=1e-2,
    decay_steps=1,
)
PRESETS = {"small": SMALL, "medium": SMALL, "paper": SMALL}


class SystemClass(SystemBase):
    measured = "mean squared error"

    def __init__(self, config, folder):
        self.config = config
        self.brightness = float((folder / "brightness.txt").read_text())

    @staticmethod
    def prepare(config, target, folder):
        (folder / "brightness.txt").write_text(target or "0.5")

    @staticmethod
    def resized(config, size):
        raise ValueError("the grid has one size")

    def model(self, rngs):
        return NCA(4, (8,), rule=nk.Rule(alive=None), backend=self.config.backend, rngs=rngs)

    def fresh(self, key, n):
        return {"state": jnp.ones((n, self.config.width, self.config.width, 4))}

    def errors(self, samples):
        return jnp.mean((samples["state"] - self.brightness) ** 2, axis=(1, 2, 3))

    def loss(self, model, samples, key):
        new = {"state": model.rollout(samples["state"], key, self.config.num_steps)}
        return jnp.mean(self.errors(new)), new

    def metrics(self, model):
        return {"fresh": float(self.errors(self.fresh(None, 1))[0])}

    def film_start(self, key, seed):
        return self.fresh(key, 1)["state"]

    def picture(self, state):
        return render.grey(np.asarray(state[..., 0]))

    def pictures(self, model, folder):
        return []
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose files are systems, beside those of the package."""
    monkeypatch.setattr(systems, "__path__", [*systems.__path__, str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(f"{systems.__name__}.{path.stem}", None)


@pytest.fixture
def fading(folder):
    (folder / "fading.py").write_text(SYSTEM)
    return folder


def test_it_is_trained_measured_and_filmed(fading, capsys):
    assert "fading" in systems.names()
    line = "train fading --target 0.25 --width 7 --steps 2 --out run"
    assert cli.main(line.split()) == 0
    assert "training fading for 2 steps" in capsys.readouterr().out
    saved = json.loads((fading / "run/config.json").read_text())
    assert (saved["system"], saved["target"], saved["config"]["width"]) == ("fading", "0.25", 7)
    assert len((fading / "run/log.csv").read_text().splitlines()) == 3
    assert cli.main(["train", "fading", "--out", "run", "--resume", "--steps", "3"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "fading", "run"]) == 0
    assert "  0.56  fresh" in capsys.readouterr().out
    assert (
        cli.main(
            ["run", "run", "--steps", "2", "--every", "1", "--scale", "1", "--gif", "film.gif"]
        )
        == 0
    )
    assert iio.imread("film.gif").shape == (3, 7, 7, 3)


def test_its_help_and_its_refusals(fading, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "for fading, a brightness from 0 to 1",
        "--width N width of the grid, in cells; only for fading",
        "nca train fading --target 0.3",
    ):
        assert words in shown
    for line, words in (
        ("fading --width 2", "argument --width: '2' is not a whole number of at least 3"),
        ("fading --target 7", "--target 7: fading wants a brightness from 0 to 1"),
        ("growing --width 9", "growing has no setting width"),
    ):
        assert cli.main(["train", *line.split(), "--out", "new"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("class Config", "class Settings"), "must define Config"),
        (("PRESETS =", "OTHERS ="), "must define PRESETS"),
        (('"paper": SMALL', ""), "PRESETS lacks paper"),
        (("class SystemClass", "class Fading"), "must define SystemClass"),
        (("width: int", "width int"), "cannot be read"),
        (("width: int", "width: tuple"), "--width cannot be of type tuple"),
        (('flag="--width"', 'flag="--size"'), "conflicting option string"),
        (('flag="--width"', 'flag="--out"'), "conflicting option string"),
    ],
)
def test_a_file_that_is_no_system(folder, capsys, change, words):
    assert change[0] in SYSTEM
    (folder / "fading.py").write_text(SYSTEM.replace(*change))
    assert cli.main(["train", "fading", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "fading" in said
    assert said.count("\n") == 1


def test_settings_are_read_without_jax():
    code = (
        "import sys; from nca_models import systems\n"
        "for name in systems.names(): systems.settings(name)\n"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", systems.names())
def test_settings_that_are_read_are_those_of_the_file(name):
    read, whole = systems.settings(name), systems.load(name).Config
    assert [(f.name, f.type, f.default, f.metadata) for f in fields(read)] == [
        (f.name, f.type, f.default, f.metadata) for f in fields(whole)
    ]
    assert all(setting.metadata["help"] for setting in fields(whole))
