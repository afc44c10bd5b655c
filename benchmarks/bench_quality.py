"""Time to quality: how long Growing NCA's small preset trains to log10 MSE -2, -3 and -3.5.

Ours is trained, by the command's own trainer, until it is there or its time is up. The others would
take the same steps: a CAX training has the same loss curve (bench_dropin.py holds it to that), so
theirs is the number of steps times the time of one, measured in turns with ours.
"""

from __future__ import annotations

import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from benchmarks.contestants import timed
from benchmarks.measure import STEPS
from nca_kernels.testing import Case
from nca_models.systems import growing
from nca_models.training.trainer import Trainer

QUALITIES = (-2.0, -3.0, -3.5)
MINUTES = 9.0
WINDOW = 50  # steps whose mean loss counts


def _trained(folder) -> dict[str, dict[str, float]]:
    """Steps and seconds (compiling included) to each quality that was reached."""
    preset = growing.PRESETS["small"]
    config = replace(preset, num_train_steps=4 * preset.num_train_steps)
    folder.mkdir()
    growing.SystemClass.prepare(config, None, folder)
    start = time.perf_counter()
    trainer = Trainer(growing.SystemClass(config, folder))
    compiled, state = trainer.compiled(), trainer.initial_state()
    losses: list[float] = []
    reached: dict[str, dict[str, float]] = {}
    while len(reached) < len(QUALITIES) and time.perf_counter() - start < 60 * MINUTES:
        state, loss = trainer.call(compiled, state)
        losses.append(float(jax.block_until_ready(loss)))
        level = np.log10(np.mean(losses[-WINDOW:]))
        for quality in QUALITIES:
            if len(losses) >= WINDOW and level <= quality and f"{quality:g}" not in reached:
                found = {"steps": len(losses), "seconds": time.perf_counter() - start}
                reached[f"{quality:g}"] = found
    return reached


def test_time_to_quality(chosen, record, tmp_path, thorough):
    if record.has("quality", "growing", "small", "training"):
        pytest.skip("measured before")
    config = growing.PRESETS["small"]
    growing.SystemClass.prepare(config, None, tmp_path)
    system = growing.SystemClass(config, tmp_path)
    samples = jax.eval_shape(lambda key: system.fresh(key, config.batch_size), jax.random.key(0))
    batch, *grid, channels = samples["state"].shape
    case = Case(
        "growing",
        tuple(grid),
        batch=(batch,),
        channels=channels,
        filters=("identity", "sobel"),
        hidden=(config.hidden,),
    )
    row = timed("quality", case, "small", "training", STEPS, chosen)
    row |= {"steps_of_training": config.num_steps, "reached": _trained(tmp_path / "trained")}
    record.add(row)
