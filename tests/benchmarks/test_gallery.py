"""The gallery's trainings, its tables, and the comparison of recipes."""

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import gallery, motion_sweep, recipes
from nca_models import render, systems
from nca_models.run_folder import Request, configured


def test_every_training_can_be_started():
    every = gallery.trainings(list(gallery.SEEDS), systems.names(), None)
    assert len({one.name for one in every}) == len(every)
    assert every[0].seed == 0
    assert every[0].preset == "small"
    for one in every:
        settings = {"seed": one.seed}
        assert configured(Request(one.system, one.preset, one.target, settings)).seed == one.seed


@pytest.mark.parametrize(
    ("system", "other"),
    [(system, name) for system in recipes.OTHERS for name in recipes.OTHERS[system]],
)
def test_other_recipes_are_settings_of_today(system, other):
    settings = recipes.OTHERS[system][other]
    today = configured(Request(system, "small", None, {}))
    assert configured(Request(system, "small", None, settings)) != today
    assert all(getattr(today, name) != value for name, value in settings.items())


def test_the_spread_of_values():
    assert gallery.spread([1.0]) == "1.00"
    assert gallery.spread([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"
    assert gallery.spread([None, 2.0]) == "2.00"
    assert gallery.spread([None]) == ""
    assert gallery.spread([0.024, 0.1]) == "0.062 (0.024 to 0.100)"
    assert gallery.spread([-0.0001]) == "0.000"


def test_a_table_has_all_measures_and_presets():
    record = {"metrics": {"error": -3.0}, "seconds": 120.0}
    other = {"metrics": {"error": -2.0, "more": 5.0}, "seconds": 60.0}
    lines = gallery.table({"small": [record, other], "medium": [other]}, "log10")
    assert lines[0] == "| log10 | `medium`, 1.0 minutes, 1 seed | `small`, 1.5 minutes, 2 seeds |"
    assert "| error | -2.00 | -2.50 (-3.00 to -2.00) |" in lines
    assert "| more | 5.00 | 5.00 |" in lines


def test_the_tables_of_recipes(tmp_path):
    assert recipes.tables(tmp_path) == ""
    metrics = [{"metrics": {"error": value}} for value in (1.0, 2.0, 3.0)]
    (tmp_path / "recipes.json").write_text(json.dumps({"growing": {"before": metrics}}))
    (tmp_path / "gallery.json").write_text(json.dumps({"growing": {"small": metrics[:1]}}))
    lines = recipes.tables(tmp_path).splitlines()
    assert lines[0] == "| growing | before | now |"
    assert "| error | 2.00 (1.00 to 3.00) | 1.00 |" in lines


def test_the_motion_of_a_sweep_is_compared_with_its_settings(tmp_path):
    assert motion_sweep.section(tmp_path, tmp_path) == []
    shapes = [(c, d) for c in (8, 16, 32) for d in (16, 48, 128)]
    table = ["texture,channels,hidden,distance_to_exemplar,motion"]
    table += [f"cracked,{c},{d},0.1,{d / c}" for c, d in shapes]
    table += [f"wavy,{c},{d},0.4,{-c}" for c, d in shapes] + ["wavy,8,16,nan,nan"]
    (tmp_path / "sweep.csv").write_text("\n".join(table))
    motion_sweep.save(tmp_path / "sweep.csv", tmp_path)
    saved = json.loads((tmp_path / "motion_sweep.json").read_text())
    assert saved["command"].startswith("nca sweep dynamics")
    found = motion_sweep.correlations(saved["trainings"][:-1])
    assert found["cracked"]["proportion D / C"] == pytest.approx(1)
    assert found["wavy"]["channels C"] == pytest.approx(-1)
    assert found["wavy"]["hidden units D"] == pytest.approx(0)
    cracked = found["cracked"]["channels C"]
    lines = motion_sweep.section(tmp_path, tmp_path)
    assert f"| channels C | {cracked:.2f} | -1.00 |" in lines
    assert any(line.startswith("18 trainings") for line in lines)
    assert any("(0.10 to 0.40: " in line for line in lines)


def test_a_large_film_is_thinned(tmp_path, monkeypatch):
    film = np.random.default_rng(0).integers(0, 256, (16, 40, 40, 3), np.uint8)
    render.save_gif(tmp_path / "film.gif", film, fps=20)
    size = (tmp_path / "film.gif").stat().st_size
    for limit, frames, duration in ((size, 16, 50), (size // 2 + 500, 8, 100), (size // 3, 4, 200)):
        monkeypatch.setattr(gallery, "LARGEST", limit)
        gallery.copy(tmp_path / "film.gif", tmp_path / "copy.gif")
        with Image.open(tmp_path / "copy.gif") as copy:
            assert copy.n_frames == frames
            assert copy.info["duration"] == duration
        assert (tmp_path / "copy.gif").stat().st_size <= limit


@pytest.mark.skipif(sys.platform != "linux", reason="threads are bound to cores on Linux only")
def test_a_training_has_a_core_of_its_own():
    before = os.sched_getaffinity(0)
    core = min(before)
    with gallery.on_core(core):
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before
