"""Shared by the tests of nca_models: a training small enough for a test."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from nca_models.systems import growing

TINY = growing.Config(
    target_size=7,
    padding=2,
    hidden=8,
    num_steps=6,
    min_steps=4,
    batch_size=4,
    pool_size=16,
    damaged_per_batch=1,
    damage="mixed",
    num_train_steps=12,
    learning_rate=2e-3,
    final_learning_rate=1e-3,
    decay_steps=10,
    checkpoint_every=5,
)


@pytest.fixture
def tiny() -> growing.Config:
    return TINY


@pytest.fixture
def picture(tmp_path) -> Path:
    """An RGB image file of odd, unequal sides."""
    image = Image.linear_gradient("L").resize((53, 31)).convert("RGB")
    image.putpixel((5, 5), (255, 0, 0))
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def make_run(tmp_path):
    """Make a run's folder, untrained, without the command line."""

    def make(name="run", **changes) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = replace(TINY, **changes)
        growing.SystemClass.prepare(config, None, folder)
        saved = {"system": "growing", "preset": "small", "target": None, "config": asdict(config)}
        (folder / "config.json").write_text(json.dumps(saved))
        return folder

    return make
