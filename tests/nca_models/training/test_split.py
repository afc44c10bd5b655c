"""A training split over devices or processes is the training on one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from nca_models import cli, systems
from nca_models.run_folder import RunError
from nca_models.training import logging, split, trainer
from tests.nca_models.systems.test_systems import TINY, make, needs

pytestmark = pytest.mark.usefixtures("quick_to_compile")
MESHES = {
    "growing": "data=2,x=2,y=2",
    "diffusing": "x=2,y=4",
    "dynamics": "data=2,y=4",
    "self_autoencoding": "x=2,z=2,y=2",
}


@pytest.mark.parametrize("name", MESHES)
def test_on_eight_devices(name, tmp_path, monkeypatch):
    """Losses of three steps, weights and checkpoints are the same, with and without a pool."""
    needs(name)
    monkeypatch.setitem(TINY, name, replace(TINY[name], target_size=20, learning_rate=1e-4))
    losses = {}
    for folder, mesh in (("one", None), ("many", split.make(split.parse(MESHES[name])))):
        system = make(name, tmp_path / folder)
        model = trainer.train(system, tmp_path / folder, progress=False, split=mesh)
        losses[folder] = logging.read(tmp_path / folder / "log.csv")[1]
        assert {d.id for leaf in jax.tree.leaves(model) for d in leaf.devices()} == {0}
    np.testing.assert_allclose(losses["many"], losses["one"], rtol=1e-5)
    assert trainer.trained_model(system, tmp_path / "many") is not None


def test_a_run_goes_on_with_another_mesh(tmp_path):
    system = make("growing", tmp_path / "run")
    short = type(system)(replace(system.config, num_train_steps=2), tmp_path / "run")
    first = split.make({"data": 2, "x": 3})
    trainer.train(short, tmp_path / "run", progress=False, split=first)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for folder, then in (("run", split.make({"y": 3})), ("other", None)):
        trainer.train(system, tmp_path / folder, progress=False, split=then)
    losses = [logging.read(tmp_path / name / "log.csv")[1] for name in ("run", "other")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


WRONG = [
    ("growing --mesh data", "'data' does not name the axes of a mesh"),
    ("growing --mesh x=2,x=4", "does not name the axes"),
    ("growing --mesh x=0", "does not name the axes"),
    ("growing --mesh x=16", "takes 16 devices, and there are 8; for several on a CPU, set XLA_FL"),
    ("growing --coordinator here:1", "need --mesh"),
    ("growing --mesh x=2 --coordinator here:1", "needs --processes and --process-id"),
    ("growing --mesh data=8 --size 9 --steps 1", "a batch dim of 4, cannot be split over 8"),
    ("growing --mesh x=8 --size 9 --padding 0 --steps 1", "fewer than its halo of 2"),
]


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_what_cannot_be_split(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *line.split(), "--out", "new"]) == 2
    assert words in capsys.readouterr().err


def test_systems_that_cannot_be_split(tmp_path):
    needs("attention")
    assert set(systems.names()) - MESHES.keys() == {"attention"}
    with pytest.raises(RunError, match="AttentionNCA cannot be split"):
        trainer.Trainer(make("attention", tmp_path / "run"), split.make({"data": 2}))


class Processes:
    """`nca train` as several processes with a device each."""

    def __init__(self, count, mesh, folder, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        code = "import sys; from nca_models.cli import main; sys.exit(main(sys.argv[1:]))"
        self.each = [
            subprocess.Popen(
                [sys.executable, "-c", code, "train", "growing", "--out", "run", *options,
                 "--mesh", mesh, "--coordinator", f"127.0.0.1:{port}",
                 "--processes", str(count), "--process-id", str(i)],
                env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
                cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for i in range(count)
        ]  # fmt: skip

    def ends(self, timeout):
        """The exit codes and the output of all processes, once they have ended."""
        said = [process.communicate(timeout=timeout)[0] for process in self.each]
        return [process.returncode for process in self.each], said


SMALL = "--size 8 --padding 2 --batch-size 4 --pool-size 8 --checkpoint-every 5"


def test_a_lost_process_stops_the_others_and_fewer_go_on(tmp_path):
    """One of four is killed: the others stop within seconds, and two continue with equal losses."""
    # The preset's last rate from the first step on: it does not depend on the number of steps.
    small = f"{SMALL} --learning-rate 0.00001".split()
    four = Processes(4, "data=2,x=2", tmp_path, *small, "--steps", "3000")
    log = tmp_path / "run" / "log.csv"
    waited = time.monotonic() + 120
    while time.monotonic() < waited and (not log.exists() or len(log.read_text()) < 250):
        time.sleep(0.1)
    four.each[2].send_signal(signal.SIGKILL)
    lost = time.monotonic()
    codes, said = four.ends(timeout=60)
    assert time.monotonic() - lost < 40
    assert codes[2] == -signal.SIGKILL
    for i in (0, 1, 3):  # JAX's own heartbeat may have noticed it first
        ours = "nca train growing --out run --resume --mesh data=2,x=2" in said[i]
        assert (codes[i], ours) == (1, True) or "another task died" in said[i], said[i]
    names = [folder.name for folder in (tmp_path / "run/checkpoints").iterdir()]
    # Names of checkpoints that were being written are no numbers.
    done = max(int(name) for name in names if name.isdigit())
    steps = done + 10
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace("3000", str(steps)))
    codes, said = Processes(2, "x=2", tmp_path, "--resume").ends(timeout=120)
    assert codes == [0, 0], said
    options = ["--out", str(tmp_path / "one"), "--steps", str(steps)]
    assert cli.main(["train", "growing", *small, *options]) == 0
    losses, expected = (logging.read(tmp_path / name / "log.csv")[1] for name in ("run", "one"))
    assert done >= 5
    np.testing.assert_allclose(losses[:steps], expected, rtol=1e-4)
