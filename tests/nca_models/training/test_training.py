"""The training loop: its steps, its logs, and that a resumed training is the same to the bit."""

import errno
import os
import random
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nca_models import run_folder
from nca_models.systems import growing
from nca_models.training import logging
from nca_models.training.checkpoints import Checkpoints
from nca_models.training.diagnosis import diagnose
from nca_models.training.trainer import (
    Diverged,
    Trainer,
    optimizer,
    train,
    trained_model,
)

TRAIN = """
import sys
from pathlib import Path
from nca_models import run_folder
from nca_models.training.trainer import train
folder = Path(sys.argv[1])
train(run_folder.load(folder), folder, progress=False)
"""


def final_state(folder: Path) -> dict[str, np.ndarray]:
    """All leaves of the newest checkpoint, by their path."""
    template = jax.eval_shape(Trainer(run_folder.load(folder)).initial_state)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state = checkpoints.restore(template)
    leaves = jax.tree.flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(run: Path, other: Path) -> None:
    assert (run / "log.csv").read_bytes() == (other / "log.csv").read_bytes()
    expected, got = final_state(run), final_state(other)
    assert expected.keys() == got.keys()
    assert len(expected) > 10
    for name, leaf in expected.items():
        assert leaf.tobytes() == got[name].tobytes(), name


def test_training_lowers_the_loss_and_logs_every_step(make_run):
    folder = make_run(num_train_steps=60, learning_rate=1e-2, damaged_per_batch=0)
    model = train(run_folder.load(folder), folder, progress=False)
    steps, losses = logging.read(folder / "log.csv")
    assert steps == list(range(1, 61))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    saved = trained_model(run_folder.load(folder), folder)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, saved)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_batch_is_worst_first_with_a_seed_and_damage(make_run, tiny):
    system = growing.SystemClass(replace(tiny, damage="right"), make_run())
    trainer = Trainer(system)
    perfect = jnp.zeros((16, 11, 11, 16)).at[..., -4:].set(system.target)
    noise = jnp.linspace(0, 1, 16)[:, None, None, None]
    pool = {"state": perfect + noise}
    _, batch = trainer._batch(pool, jax.random.key(0), 1.0)
    state = np.asarray(batch["state"])
    np.testing.assert_array_equal(state[0], system.fresh(jax.random.key(0), 1)["state"][0])
    errors = np.asarray(system.errors({"state": state[1:3]}))
    assert errors[0] > errors[1]
    assert state[1:3, :, 6:].all(-1).any()
    assert not state[3, :, 6:].any()
    assert state[3, :, :6].any()


def test_a_low_restart_rate_lets_samples_grow_old(make_run, tiny):
    system = growing.SystemClass(replace(tiny, damaged_per_batch=0), make_run())
    trainer = Trainer(system)
    pool = {"state": jnp.ones((16, 11, 11, 16))}
    seed = np.asarray(system.fresh(jax.random.key(0), 1)["state"][0])
    keys = jax.random.split(jax.random.key(1), 200)
    first = jax.vmap(lambda key: trainer._batch(pool, key, 0.25)[1]["state"][0])(keys)
    restarted = (np.asarray(first) == seed).all((1, 2, 3))
    assert 0.15 < restarted.mean() < 0.35
    assert (np.asarray(first)[~restarted] == 1).all()


def test_several_of_the_worst_give_way_to_fresh_samples(make_run, tiny):
    config = replace(tiny, batch_size=6, restarts_per_batch=3, damaged_per_batch=1)
    system = growing.SystemClass(config, make_run())
    noise = jnp.linspace(0, 1, 16)[:, None, None, None]
    pool = {"state": jnp.zeros((16, 11, 11, 16)).at[..., -4:].set(system.target) + noise}
    indices, batch = Trainer(system)._batch(pool, jax.random.key(0), 1.0)
    seed = system.fresh(jax.random.key(0), 1)["state"][0]
    fresh = np.asarray((batch["state"] == seed).all((1, 2, 3)))
    np.testing.assert_array_equal(fresh, [True] * 3 + [False] * 3)
    assert list(indices) == sorted(map(int, indices), reverse=True), "the noisiest are the worst"
    with pytest.raises(ValueError, match="together more than batch_size"):
        replace(config, restarts_per_batch=6)
    replace(config, restarts_per_batch=6, pool_size=0)  # without a pool, neither applies


def test_the_restart_rate_falls_linearly(make_run, tiny):
    config = replace(tiny, num_train_steps=10, restart_rate=0.9, final_restart_rate=0.4)
    folder = make_run()
    for begin, expected in ((0.0, [0.9, 0.8, 0.65, 0.4]), (0.5, [0.9, 0.9, 0.9, 0.4])):
        late = replace(config, restarts_fall_after=begin)
        trainer = Trainer(growing.SystemClass(late, folder))
        rates = [float(trainer._restart_rate(jnp.int32(step))) for step in (0, 2, 5, 10)]
        np.testing.assert_allclose(rates, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="restarts_fall_after is 1, but must be"):
        replace(config, restarts_fall_after=1)
    with pytest.raises(ValueError, match="final_restart_rate is 0, but must be above 0"):
        replace(config, final_restart_rate=0)


def test_without_a_pool_every_batch_is_fresh(make_run, tiny):
    system = growing.SystemClass(replace(tiny, pool_size=0, damaged_per_batch=0), make_run())
    trainer = Trainer(system)
    state, loss = trainer.step(trainer.initial_state(), trainer.root_key)
    assert state.pool is None
    assert int(state.step) == 1
    assert np.isfinite(loss)


def test_optimizer_clips_and_decays(tiny):
    config = replace(tiny, learning_rate=0.5, final_learning_rate=0.05, decay_steps=2)
    adam = optimizer(config)
    params = {"w": jnp.zeros(3)}
    state = adam.init(params)
    moves = []
    for _ in range(4):
        update, state = adam.update({"w": jnp.full(3, 1e6)}, state, params)
        moves.append(-float(update["w"][0]))
    np.testing.assert_allclose(moves, [0.5, 0.275, 0.05, 0.05], rtol=1e-3)
    assert float(jnp.linalg.norm(state[1][0].mu["w"])) < 1.0  # clipped to a norm of 1


def test_normalized_gradients_have_norm_1_each_and_the_rate_decays_to_the_end(tiny):
    config = replace(tiny, decay_steps=None, num_train_steps=2, gradients="normalized")
    adam = optimizer(replace(config, learning_rate=0.5, final_learning_rate=0.1))
    params = {"w": jnp.zeros(4), "b": jnp.zeros(1)}
    state, moves = adam.init(params), []
    for size in (1e-3, 1e6, 1.0):
        gradients = {"w": jnp.full(4, size), "b": jnp.full(1, -7 * size)}
        update, state = adam.update(gradients, state, params)
        moves.append(-float(update["w"][0]))
    np.testing.assert_allclose(moves, [0.5, 0.3, 0.1], rtol=1e-4)
    for mean in jax.tree.leaves(state[1][0].mu):  # Adam's mean of three equal gradients
        assert float(jnp.linalg.norm(mean)) == pytest.approx(1 - 0.9**3, rel=1e-4)


def test_a_diverged_training_says_so(make_run, tiny):
    class Overflowing(growing.SystemClass):
        def loss(self, model, samples, key):
            loss, samples = super().loss(model, samples, key)
            return loss * jnp.where(samples["state"].sum() > 4.5, jnp.nan, 1.0), samples

    folder = make_run()
    with pytest.raises(Diverged, match="nan at step"):
        train(Overflowing(tiny, folder), folder, progress=False)
    assert ",nan,nan,0\n" in (folder / "log.csv").read_text()


def test_a_training_whose_cells_die_says_so_and_logs_it(make_run, capsys):
    changes = {"alive_threshold": 2.0, "num_train_steps": 210}  # no seed is above it
    whole, parts = (
        make_run("whole", **changes),
        make_run("parts", **changes | {"num_train_steps": 13}),
    )
    train(run_folder.load(whole), whole, progress=False)
    (line,) = capsys.readouterr().err.splitlines()
    for words in ("all cells are dead since step 1", "--learning-rate below 0.002"):
        assert words in line
    system = run_folder.load(whole)
    assert diagnose(system, whole) == (line, True)
    assert [int(row["unmoved"]) for row in logging._rows(whole / "log.csv")] == list(range(210))

    train(run_folder.load(parts), parts, progress=False)
    assert diagnose(system, parts) is None  # too early to tell
    request = run_folder.Request("growing", None, None, {"num_train_steps": 210})
    train(run_folder.resume(parts, request), parts, progress=False)
    assert_same_run(whole, parts)
    assert "all cells are dead since step 1" in capsys.readouterr().err


def test_a_training_that_learns_has_no_ailment(make_run, capsys):
    folder = make_run(num_train_steps=60, learning_rate=1e-2, damaged_per_batch=0)
    train(run_folder.load(folder), folder, progress=False)
    assert diagnose(run_folder.load(folder), folder) is None
    assert capsys.readouterr().err == ""
    assert logging.read_unmoved(folder / "log.csv") == 0


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (np.geomspace(1, 0.1, 600), None),
        (np.geomspace(1, 2, 400), None),  # it may rise at first
        (np.geomspace(1, 2, 600), "nothing was learned"),
        (np.geomspace(1, 1e6, 60), "nothing was learned"),
        (np.r_[np.geomspace(2, 1, 50), np.full(199, 0.7)], None),
        (np.r_[np.geomspace(2, 1, 50), np.full(201, 0.7)], "has not moved since step 51"),
        (np.zeros(300), None),  # all is learned
    ],
)
def test_diagnoses(make_run, losses, words):
    folder = make_run()
    with logging.Log(folder, 0) as log:
        for step, loss in enumerate(losses, start=1):
            log.write(step, loss)
    ailment = diagnose(run_folder.load(folder), folder)
    if words is None:
        assert ailment is None
    else:
        assert words in ailment.line
        assert not ailment.dead


def test_weights_that_are_not_finite_are_never_saved(make_run):
    """The loss of the last step is finite, but the step that it led to is not."""

    class Steep(growing.SystemClass):
        def loss(self, model, samples, key):
            loss, samples = super().loss(model, samples, key)
            return loss + 0 * jnp.sqrt(0 * loss), samples  # with a gradient that is not a number

    folder = make_run(num_train_steps=1)
    with pytest.raises(Diverged, match="weights are not finite after step 1"):
        train(Steep(run_folder.load(folder).config, folder), folder, progress=False)
    assert not list((folder / "checkpoints").iterdir())


def test_a_log_of_an_older_version_goes_on(make_run):
    folder = make_run(num_train_steps=7)
    train(run_folder.load(folder), folder, progress=False)
    path = folder / "log.csv"
    expected = path.read_text()
    old = [line.rpartition(",")[0] for line in expected.splitlines()]
    path.write_text("\n".join(old) + "\n")
    assert logging.read_unmoved(path) == 0
    train(run_folder.load(folder), folder, progress=False)
    assert path.read_text() == expected


def test_a_longer_training_continues_to_the_same_bits(make_run):
    whole, parts = make_run("whole", num_train_steps=12), make_run("parts", num_train_steps=7)
    for folder in (whole, parts):
        train(run_folder.load(folder), folder, progress=False)
    request = run_folder.Request("growing", None, None, {"num_train_steps": 12})
    train(run_folder.resume(parts, request), parts, progress=False)
    assert_same_run(whole, parts)


def test_checkpoints_keep_the_last_two_and_read_params_alone(make_run):
    folder = make_run()
    train(run_folder.load(folder), folder, progress=False)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["10", "12"]


def test_changed_settings_are_refused_by_name(make_run):
    folder = make_run()
    for settings in ({"seed": 5}, {"learning_rate": 1.0}, {"num_train_steps": 3}):
        with pytest.raises(run_folder.RunError, match=next(iter(settings))):
            run_folder.resume(folder, run_folder.Request("growing", None, None, settings))
    with pytest.raises(run_folder.RunError, match="target"):
        run_folder.resume(folder, run_folder.Request("growing", None, "cat.png", {}))


def newest(folder: Path) -> int:
    names = [p.name for p in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def test_sigkill_at_three_random_moments_changes_no_bit(make_run):
    settings = {"num_train_steps": 90, "checkpoint_every": 4, "pool_size": 64}
    alone, killed = make_run("alone", **settings), make_run("killed", **settings)
    subprocess.run([sys.executable, "-c", TRAIN, str(alone)], check=True)
    for _ in range(3):
        before = newest(killed)
        process = subprocess.Popen([sys.executable, "-c", TRAIN, str(killed)])
        while newest(killed) <= before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert before < newest(killed) < 90
    with (killed / "log.csv").open("a") as log:
        log.write("77,0.1")  # a row that the kill cut off
    subprocess.run([sys.executable, "-c", TRAIN, str(killed)], check=True)
    assert_same_run(alone, killed)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_and_says_how_to_resume(make_run, name, code):
    folder = make_run(num_train_steps=100_000, checkpoint_every=100_000)
    command = "import sys; from nca_models.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["train", "growing", "--out", str(folder), "--resume"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments], stderr=subprocess.PIPE, text=True
    )
    log, deadline = folder / "log.csv", time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size > 500):
        time.sleep(0.02)
    os.kill(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    step = newest(folder)
    assert f"at step {step}, and saved" in errors
    assert f"--out {folder} --resume" in errors
    assert logging.read(log)[0] == list(range(1, step + 1))


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    with logging.Log(tmp_path, 0) as log:
        for step in range(1, 6):
            log.write(step, 0.1 * step)
    with logging.Log(tmp_path, 3) as log:
        log.write(4, 0.5)
    steps, losses = logging.read(tmp_path / "log.csv")
    assert steps == [1, 2, 3, 4]
    assert losses == pytest.approx([0.1, 0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match="has 4 rows"):
        logging.Log(tmp_path, 9)


def test_a_tensorboard_log_on_a_full_disk_raises_instead_of_waiting(tmp_path, monkeypatch):
    from tensorboardX.event_file_writer import EventsWriter

    def full(self, event):
        raise OSError(errno.ENOSPC, "No space left on device")

    with logging.Log(tmp_path, 0, tensorboard=True) as log:
        monkeypatch.setattr(EventsWriter, "write_event", full)
        with pytest.raises(OSError, match="No space left"):
            log.write(1, 0.5)


def test_tensorboard_hides_the_steps_after_the_checkpoint(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    with logging.Log(tmp_path, 0, tensorboard=True) as log:
        log.write(1, 0.01)
    (first,) = (tmp_path / "tensorboard").iterdir()
    with logging.Log(tmp_path, 1, tensorboard=True) as log:
        log.write(2, 0.001)

    def events(path: Path):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]

    values = {v.tag: v.simple_value for e in events(first) for v in e.summary.value}
    assert values == pytest.approx({"loss": 0.01, "log10_loss": -2.0})
    (second,) = set((tmp_path / "tensorboard").iterdir()) - {first}
    starts = [e.step for e in events(second) if e.session_log.status == SessionLog.START]
    assert starts == [2]
