"""Time to quality: how long Growing NCA's small preset trains to log10 MSE -2, -3 and -3.5.

Ours is trained by the command's own trainer until it has reached the quality, or its time is up,
with three seeds. The others would take the same number of steps, as a CAX training has the same
loss curve, which dropin.py checks. Their time is therefore the number of steps times the time of
one step, measured in turns with ours.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import jax
import pytest

from benchmarks.contestants import timed
from benchmarks.measure import STEPS
from benchmarks.quality import reached
from nca_kernels.testing import Case
from nca_models.systems import growing

CASE = "growing"  # the file that the rows belong to

QUALITIES = (-2.0, -3.0, -3.5)
MINUTES, SEEDS = 6.0, 3


def _trained(folder) -> dict[str, dict[str, Any]]:
    """Steps and seconds (compiling included) to each quality that all seeds reached: medians."""
    preset = growing.PRESETS["small"]
    steps = preset.num_train_steps  # the rate is that of the preset, and then stays the last one
    longer = replace(preset, num_train_steps=2 * steps, decay_steps=steps)
    milestones = [
        dict(reached(replace(longer, seed=seed), QUALITIES, 60 * MINUTES, folder / str(seed)))
        for seed in range(SEEDS)
    ]
    return {
        f"{quality:g}": {
            unit: statistics.median(of_seed[quality][unit] for of_seed in milestones)
            for unit in ("steps", "seconds")
        }
        | {"seeds": [of_seed[quality] for of_seed in milestones]}
        for quality in QUALITIES
        if all(quality in of_seed for of_seed in milestones)
    }


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
    trained = tmp_path / "trained"
    trained.mkdir()
    row |= {"steps_of_training": config.num_steps, "reached": _trained(trained)}
    record.add(row)
