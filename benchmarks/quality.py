"""How long a training takes to a quality: log10 of the mean squared error."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nca_models.systems import growing
from nca_models.training.trainer import Trainer

WINDOW = 50  # steps whose mean loss counts


def reached(
    config: growing.Config, qualities: Sequence[float], seconds: float, folder: Path
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Trains Growing NCA until it has reached all ``qualities``, for at most ``seconds``.

    Yields:
        Each quality as it is reached, with the steps and seconds (compiling included) until then.
    """
    folder.mkdir()
    growing.SystemClass.prepare(config, None, folder)
    start = time.perf_counter()
    trainer = Trainer(growing.SystemClass(config, folder))
    compiled, state = trainer.compiled(), trainer.initial_state()
    losses: list[float] = []
    left = sorted(qualities)  # the best first
    while left and time.perf_counter() - start < seconds and len(losses) < config.num_train_steps:
        state, loss = trainer.call(compiled, state)
        losses.append(float(jax.block_until_ready(loss)))
        level = np.log10(np.mean(losses[-WINDOW:]))
        while left and len(losses) >= WINDOW and level <= left[-1]:
            taken = {"steps": len(losses), "seconds": time.perf_counter() - start}
            yield left.pop(), taken
