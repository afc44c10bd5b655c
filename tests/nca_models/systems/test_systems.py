"""Every system at tiny size, through the command line; and what is particular to each."""

import json
import signal
from dataclasses import asdict, replace
from pathlib import Path

import imageio.v3 as iio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nca_models import cli, run_folder, systems
from nca_models.data import digits
from nca_models.data.digits import DigitsConfig
from nca_models.data.textures import TextureConfig
from nca_models.modules import Automaton
from nca_models.systems import attention, diffusing, dynamics, growing, self_autoencoding
from nca_models.training import logging, trainer

# The numbers of each paper preset, from the sources that the systems name.
PAPER = {
    "growing": {
        "target_size": 40, "padding": 16, "channels": 16, "hidden": 128, "num_steps": 128,
        "min_steps": 65, "fire_rate": 0.5, "alive_threshold": 0.1, "batch_size": 8,
        "pool_size": 1024, "num_train_steps": 8192, "learning_rate": 1e-3,
        "final_learning_rate": 1e-4, "decay_steps": 2000, "clip_norm": 1.0,
    },
    "diffusing": {
        "target_size": 40, "padding": 16, "channels": 64, "hidden": 256, "num_steps": 64,
        "fire_rate": 0.5, "alive_threshold": 0.1, "batch_size": 8, "pool_size": 0,
        "num_train_steps": 8192, "learning_rate": 1e-3, "final_learning_rate": 1e-4,
        "decay_steps": 2000, "clip_norm": 1.0,
    },
    "dynamics": {  # of the study's widths, 8 to 128 and 16 to 128, one in the middle
        "target_size": 128, "channels": 64, "hidden": 64, "fire_rate": 0.5,
        "num_train_steps": 6000, "learning_rate": 1e-3,
    },
    "self_autoencoding": {
        "target_size": 28, "depth": 42, "channels": 16, "hidden": 256, "num_steps": 96,
        "min_steps": 49,
        "fire_rate": 0.5, "alive_threshold": 0.1, "batch_size": 8, "pool_size": 1024,
        "num_train_steps": 16384, "learning_rate": 1e-3, "final_learning_rate": 5e-4,
        "decay_steps": 2000, "clip_norm": 1.0,
    },
    "attention": {
        "target_size": 28, "channels": 32, "projection": 32, "position": 4, "heads": 4, "qkv": 128,
        "perception": 64, "hidden": 128, "radius": 1, "num_steps": 32, "fire_rate": 0.5,
        "mask_ratio": 0.5, "batch_size": 4, "pool_size": 1024, "num_train_steps": 8196,
        "learning_rate": 1e-3, "final_learning_rate": 1e-4, "decay_steps": 4096, "clip_norm": 1.0,
    },
}  # fmt: skip
TRAINING = {"num_train_steps": 3, "batch_size": 2, "num_steps": 4}
TINY = {
    "growing": replace(
        growing.PRESETS["small"], **TRAINING, target_size=7, padding=1, min_steps=3, pool_size=4
    ),
    "diffusing": replace(
        diffusing.PRESETS["small"],
        **TRAINING,
        target_size=7,
        padding=1,
        min_steps=3,
        pool_size=4,
        damaged_per_batch=1,
    ),
    "dynamics": replace(
        dynamics.PRESETS["small"], **TRAINING, target_size=20, min_steps=3, pool_size=4
    ),
    "self_autoencoding": replace(
        self_autoencoding.PRESETS["small"],
        **TRAINING,
        target_size=6,
        depth=5,
        min_steps=3,
        pool_size=4,
    ),
    "attention": replace(
        attention.PRESETS["small"], **TRAINING, target_size=6, pool_size=4, restarts_per_batch=1
    ),
}
KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("quick_to_compile")


def needs(name):
    """Skip if a package for a system's data or measures is not installed."""
    if issubclass(systems.settings(name), DigitsConfig):
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    if issubclass(systems.settings(name), TextureConfig):
        pytest.importorskip("skimage", reason="scikit-image is not installed")
        pytest.importorskip("cv2", reason="OpenCV is not installed")


def make(name, folder):
    module = systems.load(name)
    needs(name)
    folder.mkdir()
    module.SystemClass.prepare(TINY[name], None, folder)
    return module.SystemClass(TINY[name], folder)


def test_every_system_is_here():
    assert sorted(PAPER) == sorted(TINY) == systems.names()


@pytest.mark.parametrize("name", PAPER)
def test_paper_preset(name):
    config = asdict(systems.load(name).PRESETS["paper"])
    assert {key: config[key] for key in PAPER[name]} == PAPER[name]


@pytest.mark.parametrize("name", systems.names())
def test_from_the_command_line(name, tmp_path, monkeypatch, capsys):
    """The commands train, resume, measure and run a system, and write their files."""
    needs(name)
    monkeypatch.setattr(dynamics, "FRAMES", 3)
    monkeypatch.setitem(systems.load(name).PRESETS, "small", TINY[name])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", name, "--out", "run"]) == 0
    said = capsys.readouterr().out
    for line in said.splitlines():
        if line.startswith("  ") and line.endswith((".png", ".gif")):
            assert iio.imread(tmp_path / "run" / line.strip()).size > 100
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert len(metrics) >= 4
    assert cli.main(["train", name, "--out", "run", "--resume", "--steps", "4"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", name, "run"]) == 0
    said = capsys.readouterr().out
    assert all(words in said for words in list(metrics)[1:])
    film = ["--steps", "3", "--every", "1", "--damage", "half", "--gif", "film.gif"]
    assert cli.main(["run", "run", *film]) == 0
    assert len(iio.imread("film.gif")) == 4
    other = next(n for n in systems.names() if n != name)
    assert cli.main(["eval", other, "run"]) == 2
    assert f"is a run of {name}, not of {other}" in capsys.readouterr().err


@pytest.mark.parametrize("name", systems.names())
def test_samples_and_errors(name, tmp_path):
    system = make(name, tmp_path / "run")
    samples = system.fresh(KEY, 3)
    assert system.errors(samples).shape == (3,)
    model = system.model(nnx.Rngs(0))
    loss, new = nnx.jit(system.loss)(model, samples, KEY)
    assert loss.shape == ()
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, samples)
    again, _ = nnx.jit(system.loss)(model, samples, KEY)
    assert loss == again


def test_rollouts_of_any_automaton():
    """Each step's key is folded, each sample's state is the one after its number of steps."""

    class Counts(Automaton):
        def __call__(self, state, key):
            return state + 1 + jax.random.uniform(key, ())

    state = jnp.zeros((3, 2, 2, 1))
    final, sampled = Counts().rollout(state, KEY, 5, sample_steps=jnp.array([0, 2, 5]))
    noise = [float(jax.random.uniform(jax.random.fold_in(KEY, t), ())) for t in range(5)]
    expected = [n + sum(noise[:n]) for n in (0, 2, 5)]
    np.testing.assert_allclose(sampled[:, 0, 0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(final[:, 0, 0, 0], 3 * [expected[-1]], rtol=1e-6)


def test_settings_of_another_system_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "attention", "--out", "new", "--padding", "3"]) == 2
    assert "attention has no setting padding" in capsys.readouterr().err
    assert cli.main(["train", "attention", "--out", "new", "--data-dir", "nowhere"]) == 2
    assert "attention wants a folder with MNIST's files" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["train", "attention", "--out", "new", "--data-dir", "empty"]) == 2
    assert "has neither mnist.npz nor" in capsys.readouterr().err


def untrained(system, folder):
    (folder / "log.csv").write_text("step,loss,log10_loss\n1,1.0,0.0\n")
    return system.model(nnx.Rngs(0))


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    needs("dynamics")
    monkeypatch.setitem(dynamics.PRESETS, "small", TINY["dynamics"])
    monkeypatch.setattr(dynamics, "FRAMES", 3)
    monkeypatch.chdir(tmp_path)
    line = "sweep dynamics --channels 3 4 --hidden 5 6 --textures gravel --steps 2 --out sweep"
    trained = []

    def train(system, folder):
        if len(trained) == 2:
            raise trainer.Interrupted(signal.SIGINT, 1)
        trained.append(folder.name)
        return untrained(system, folder)

    monkeypatch.setattr(trainer, "train", train)
    assert cli.main(line.split()) == 130
    assert "the same command continues" in capsys.readouterr().err
    first = (tmp_path / "sweep/sweep.csv").read_text()
    assert len(first.splitlines()) == 3
    monkeypatch.setattr(trainer, "train", untrained)
    assert cli.main(line.split()) == 0
    whole = (tmp_path / "sweep/sweep.csv").read_text()
    assert whole.startswith(first)
    assert [row.split(",")[1:3] for row in whole.splitlines()[1:]] == [
        ["3", "5"], ["3", "6"], ["4", "5"], ["4", "6"]
    ]  # fmt: skip
    assert iio.imread(tmp_path / "sweep/motion.png").size > 0
    assert cli.main([*line.replace("--steps 2", "--steps 3").split()]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_a_sweep_trains_models_together(tmp_path, monkeypatch, capsys):
    """By vmap over their weights, stopped and continued, each as if it trained alone."""
    needs("dynamics")
    monkeypatch.setitem(dynamics.PRESETS, "small", TINY["dynamics"])
    monkeypatch.setattr(dynamics, "FRAMES", 3)
    monkeypatch.chdir(tmp_path)
    line = "sweep dynamics --channels 4 --hidden 5 --textures gravel brick --seeds 2 --steps 4"
    record, calls = trainer._record, []

    def stops(*args):
        calls.append(args)
        record(*args)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer, "_LOG_EVERY", 1)
    monkeypatch.setattr(trainer, "_record", stops)
    assert cli.main([*line.split(), "--out", "sweep"]) == 130
    assert (tmp_path / "sweep/gravel-c4-d5-s0-and-3-more").is_dir()
    # Models that have begun together go on together, whatever there is room for now.
    assert cli.main([*line.split(), "--together", "3", "--out", "sweep"]) == 0
    rows = (tmp_path / "sweep/sweep.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] + row.split(",")[3] for row in rows] == [
        "gravel0", "gravel1", "brick0", "brick1"
    ]  # fmt: skip
    assert not list((tmp_path / "sweep").glob("*-more"))
    line = line.replace("gravel ", "")
    assert cli.main([*line.split(), "--together", "1", "--out", "alone"]) == 0
    for name in ("brick-c4-d5-s0", "brick-c4-d5-s1"):
        together, alone = (
            logging.read(tmp_path / f / name / "log.csv") for f in ("sweep", "alone")
        )
        assert together[0] == alone[0] == [1, 2, 3, 4]
        np.testing.assert_allclose(together[1], alone[1], rtol=1e-4)
    capsys.readouterr()
    assert cli.main(["eval", "dynamics", "sweep/brick-c4-d5-s1"]) == 0


@pytest.mark.parametrize(
    ("name", "swept", "header"),
    [
        ("growing", "--fire-rate 0.5 1 --damage circle", "target,fire_rate,seed"),
        ("attention", "--heads 1 2 --radius 0 1 --qkv 4", "target,heads,radius,seed"),
        (
            "diffusing",
            "--alive-threshold None 0.1 --noise-rate 0 --final-restart-rate None",
            "target,alive_threshold,seed",
        ),
    ],
)
def test_any_system_is_swept_over_its_settings(name, swept, header, tmp_path, monkeypatch, capsys):
    needs(name)
    monkeypatch.setitem(systems.load(name).PRESETS, "small", TINY[name])
    monkeypatch.setattr(trainer, "train", untrained)
    monkeypatch.chdir(tmp_path)
    line = f"sweep {name} {swept} --together 1 --out sweep"
    assert cli.main(line.split()) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{header},log10_error\n")
    assert said.endswith("sweep/log10_error.png\n")
    rows = said.splitlines()[1:-1]
    assert len(rows) == len(set(rows)) == len(list(Path("sweep").glob(f"{name}-*-s0"))) >= 2
    assert iio.imread("sweep/log10_error.png").size > 0
    assert cli.main([*line.split(), "--seeds", "1"]) == 0
    assert capsys.readouterr().out == said
    for change, words in (
        ("--num-steps 3", "choose another --out"),
        ("--batch-size 2 3 4", "has the columns target"),
        ("--channels 1", "at least"),
        ("--vgg16 none.npz", f"{name} has no setting vgg16"),
    ):
        assert cli.main([*line.split(), *change.split()]) == 2
        assert words in capsys.readouterr().err


# ---- what is particular to each ----


def test_diffusing_starts_between_the_picture_and_noise(tmp_path):
    system = make("diffusing", tmp_path / "run")
    states = system.fresh(KEY, 200)["state"]
    errors = np.sort(np.asarray(system.errors({"state": states})))
    noise = float(system.errors({"state": system.start(KEY, 200)}).mean())
    assert errors[0] < 0.1 * noise
    assert errors[-1] == pytest.approx(noise, rel=0.5)
    assert float(states.min()) == 0.0
    assert float(states.max()) == 1.0
    assert not np.any(states[..., :-4])


def test_some_fresh_samples_of_diffusing_are_noise_alone(tmp_path):
    system = make("diffusing", tmp_path / "run")
    system.config = replace(system.config, noise_rate=0.0)
    blends = system.fresh(KEY, 200)["state"]
    system.config = replace(system.config, noise_rate=0.5)
    mixed = system.fresh(KEY, 200)["state"]
    changed = np.any(np.asarray(blends != mixed), axis=(1, 2, 3))
    assert 0.4 < changed.mean() < 0.6
    outside = np.asarray(system.target[..., 3] == 0)
    alone = np.asarray(mixed)[changed][:, outside][..., -1]
    assert (alone > 0).mean() == pytest.approx(0.5, abs=0.02), "there is nothing but noise"
    with pytest.raises(ValueError, match="noise_rate is 2"):
        replace(system.config, noise_rate=2.0)


def test_the_wall_has_one_hole_and_the_face_stays(tmp_path):
    system = make("self_autoencoding", tmp_path / "run")
    model = system.model(nnx.Rngs(0))
    model.layers[-1].bias[...] = jnp.full(16, 0.3)  # everything changes
    state = system.fresh(KEY, 2)["state"].at[..., -1].add(0.5)
    after = model(state, KEY)
    wall = np.array(after[..., 2, :])
    assert np.any(wall[:, 3, 3])
    wall[:, 3, 3] = 0
    assert not np.any(wall)
    np.testing.assert_array_equal(after[..., 0, -1], state[..., 0, -1])
    assert np.any(np.asarray(after[..., -1, :] != state[..., -1, :]))
    final = model.rollout(state, KEY, 3)
    np.testing.assert_array_equal(final[..., 0, -1], state[..., 0, -1])
    assert isinstance(model.perception, nnx.Param), "the taps are trained, too"


def test_attention_masks_half_of_the_pixels_and_runs_on_large_grids(tmp_path):
    system = make("attention", tmp_path / "run")
    images = jnp.ones((50, 6, 6))
    state, masked = system._masked(KEY, images, 0.5)
    np.testing.assert_array_equal(state[..., -1], ~masked)
    assert 0.4 < float(masked.mean()) < 0.6
    model = system.model(nnx.Rngs(0))
    assert model(jnp.zeros((1, 256, 256, 16)), KEY).shape == (1, 256, 256, 16)


def test_attention_sees_radius_cells_and_no_more(tmp_path):
    system = make("attention", tmp_path / "run")
    model = system.model(nnx.Rngs(0))
    moved = model.perceive(jnp.zeros((6, 6, 16)).at[2, 2].set(1.0)) - model.perceive(
        jnp.zeros((6, 6, 16))
    )
    reached = np.argwhere(np.any(np.asarray(moved) != 0, axis=-1))
    assert {tuple(map(int, cell)) for cell in reached} == {
        (y, x) for y in (1, 2, 3) for x in (1, 2, 3)
    }


def test_digits_of_a_run_are_kept_with_it(tmp_path):
    system = make("attention", tmp_path / "run")
    saved = digits.load(tmp_path / "run/digits.npz")
    np.testing.assert_array_equal(saved.train_images, system.data.train_images)


def test_films_on_other_grids(tmp_path, monkeypatch, capsys):
    """`nca run --size`: a picture in more room, a texture on a larger torus; digits stay."""
    needs("dynamics")
    monkeypatch.chdir(tmp_path)

    def start(name):
        monkeypatch.setitem(systems.load(name).PRESETS, "small", TINY[name])
        return run_folder.create(tmp_path / name, run_folder.Request(name, None, None, {}))

    for name, side in (("growing", 15), ("dynamics", 33)):
        system = start(name)
        trainer.train(system, tmp_path / name, progress=False)
        line = ["run", name, "--size", str(side), "--steps", "5", "--scale", "1", "--every", "2"]
        assert cli.main([*line, "--gif", "film.gif", "--mp4", "film.mp4"]) == 0
        assert iio.imread("film.gif").shape == (4, side, side, 3)
        even = side + side % 2
        assert iio.imread("film.mp4", plugin="FFMPEG").shape == (4, even, even, 3)
        assert cli.main([*line, "--png", "strip.png"]) == 0
        assert iio.imread("strip.png").shape == (side, 4 * side + 3 * 8, 3)
    capsys.readouterr()
    assert cli.main(["run", "growing", "--size", "6"]) == 2
    assert "--size 6: 6 is below the picture's own size of 7" in capsys.readouterr().err
    start("attention")
    assert cli.main(["run", "attention", "--size", "50"]) == 2
    assert "digits are 6 x 6 here, and stay so" in capsys.readouterr().err
