"""A training step of each of the five systems as `nca train` takes it, on two backends."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import pytest

from benchmarks.contestants import available
from benchmarks.measure import interleaved, seconds
from nca_models import systems
from nca_models.training.trainer import Trainer


def _training_step(name, backend, folder):
    """A function that takes the next step of a training, and the cell-steps of one such step."""
    module = systems.load(name)
    config = replace(module.PRESETS["small"], backend=backend)
    system = module.SystemClass(config, folder)
    trainer = Trainer(system)
    compiled, state = trainer.compiled(), trainer.initial_state()
    samples = jax.eval_shape(lambda key: system.fresh(key, config.batch_size), trainer.root_key)

    def run():
        nonlocal state
        state, loss = trainer.call(compiled, state)
        jax.block_until_ready(loss)

    return run, math.prod(samples["state"].shape[:-1]) * config.num_steps


@pytest.mark.parametrize("name", systems.names())
def test_a_training_step(name, chosen, record, tmp_path, thorough):
    if record.has("system", name, "training step", "training"):
        pytest.skip("measured before")
    module = systems.load(name)
    module.SystemClass.prepare(module.PRESETS["small"], None, tmp_path)
    asked = [b for b in (available()[0], "xla", "reference") if b in chosen.backends]
    runs, not_run, work = {}, {}, 0
    for backend in dict.fromkeys(asked):
        run, work = _training_step(name, backend, tmp_path)
        run()
        taken = seconds(run)
        if taken < chosen.longest:
            runs[backend] = run
        else:
            not_run[backend] = f"one step takes {taken:.0f} s, more than {chosen.longest:.0f}"
    row = {"suite": "system", "case": name, "kind": "training step", "mode": "training"}
    row |= {"work": work, "best": next(iter(runs)), "ours": list(runs), "not_run": not_run}
    record.add({**row, "seconds": interleaved(runs, chosen.rounds, patience=5.0)})
