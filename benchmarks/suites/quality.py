"""Time to quality: how long Growing NCA's small preset trains to log10 MSE -2, -3 and -3.5.

Ours is trained by the command's own trainer until it has reached the quality, or its time is up.
The others would take the same number of steps, as a CAX training has the same loss curve, which
dropin.py checks. Their time is therefore the number of steps times the time of one step,
measured in turns with ours.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from benchmarks.contestants import timed
from benchmarks.measure import STEPS
from benchmarks.quality import reached
from nca_kernels.testing import Case
from nca_models.systems import growing

QUALITIES = (-2.0, -3.0, -3.5)
MINUTES = 9.0


def _trained(folder) -> dict[str, dict[str, float]]:
    """Steps and seconds (compiling included) to each quality that was reached."""
    preset = growing.PRESETS["small"]
    steps = preset.num_train_steps  # the rate is that of the preset, and then stays the last one
    config = replace(preset, num_train_steps=4 * steps, decay_steps=steps)
    milestones = reached(config, QUALITIES, 60 * MINUTES, folder)
    return {f"{quality:g}": taken for quality, taken in milestones}


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
