"""Estimates of a training's memory, by XLA's plan, and of its time, by a few steps."""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import psutil

from nca_models.run_folder import RunError
from nca_models.systems import System

# NVIDIA's data sheet: dense TensorFloat-32, which is XLA's default there, and memory's bandwidth.
H200_FLOPS, H200_BYTES = 494.7e12, 4.8e12
_PATIENCE = 60.0  # seconds after which no further step is timed


class TooLarge(RunError):
    """The training does not fit into memory."""


@dataclass(frozen=True)
class Estimate:
    """What a training will take.

    Attributes:
        cells: the cells of a batch.
        cell_steps: the cell-steps of a training step; a forward and its backward count once.
        flops: operations of a training step in which every cell fires, recomputation included.
        memory: bytes at the peak.
        available: bytes that there are; None if unknown.
        seconds: time of a training step, measured on this machine; None if it does not fit.
        limit: seconds of a training step on an H200 at its roofline.
        num_train_steps: training steps of the whole training.
    """

    cells: int
    cell_steps: int
    flops: float
    memory: int
    available: int | None
    seconds: float | None
    limit: float
    num_train_steps: int

    def lines(self) -> list[str]:
        """Return the estimate as lines of text."""
        steps = self.num_train_steps
        out = [
            f"a training step   {self.cells:,} cells, {self.cell_steps:,} cell-steps, "
            f"{self.flops / 1e9:,.0f} GFLOP if every cell fires",
            f"memory            {gigabytes(self.memory)} at the peak"
            + (f", of {gigabytes(self.available)} there are" if self.available else ""),
        ]
        if self.seconds is not None:
            out.append(
                f"time here         {self.seconds:.3g} s a training step, measured; "
                f"{duration(self.seconds * steps)} for {steps:,}"
            )
        out.append(
            f"H200 at its limit {self.limit:.2g} s a training step, computed; "
            f"{duration(self.limit * steps)} for {steps:,}"
        )
        return out


def estimate(trainer: Any, steps: int = 3) -> Estimate:
    """Compile a training step and, if it fits into memory, take a few; nothing is written.

    Args:
        trainer: an `nca_models.training.trainer.Trainer`.
        steps: how many steps are timed, after a first one; fewer if they are long.
    """
    system: System = trainer.system
    config: Any = system.config
    samples = jax.eval_shape(lambda key: system.fresh(key, config.batch_size), trainer.root_key)
    cells = math.prod(samples["state"].shape[:-1])
    cell_steps = cells * config.num_steps
    least = trainer.model(trainer.params).cost()
    compiled = trainer.compiled()
    memory = peak_memory(compiled, trainer.compiled_pool())
    available = available_memory()
    fits = available is None or memory <= available
    return Estimate(
        cells=cells,
        cell_steps=cell_steps,
        flops=cell_steps * least.training_flops,
        memory=memory,
        available=available,
        seconds=_timed(trainer, compiled, steps) if fits else None,
        limit=cell_steps
        * max(least.training_flops / H200_FLOPS, least.training_bytes / H200_BYTES),
        num_train_steps=config.num_train_steps,
    )


def refuse_if_too_large(*compiled: Any) -> None:
    """Raise TooLarge, with the numbers, if one of these compiled calls does not fit into memory."""
    memory, available = peak_memory(*compiled), available_memory()
    if available is not None and memory > available:
        raise TooLarge(
            f"training needs {gigabytes(memory)} and there are {gigabytes(available)}: choose a "
            "smaller --size, --batch-size or --pool-size"
        )


def peak_memory(*compiled: Any) -> int:
    """Bytes that the largest of compiled calls needs, with its arguments and this process."""
    return planned_memory(*compiled) + resident_memory()


def planned_memory(*compiled: Any) -> int:
    """Bytes that XLA plans for the largest of compiled calls, of which any may be None."""
    plans = [call.memory_analysis() for call in compiled if call is not None]
    needed: int = max(
        plan.temp_size_in_bytes
        + plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        for plan in plans
    )
    return needed


def available_memory() -> int | None:
    """Bytes that this process can have on its device, including those that it has already."""
    if jax.default_backend() != "cpu":
        stats = jax.local_devices()[0].memory_stats() or {}
        limit: int | None = stats.get("bytes_limit")
        return limit
    free: int = psutil.virtual_memory().available
    return min(free, _container_limit()) + resident_memory()


def _container_limit() -> int:
    """Bytes that the control group of this process still allows."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        return limit - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or no limit
        return sys.maxsize


def resident_memory() -> int:
    """Bytes that this process has now if it shares its memory with the device, else 0."""
    if jax.default_backend() != "cpu":
        return 0
    resident: int = psutil.Process().memory_info().rss
    return resident


def _timed(trainer: Any, compiled: Any, steps: int) -> float:
    """Mean seconds of a step; the first one counts only if it was so long that no other ran."""
    state, taken = trainer.initial_state(), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, loss = trainer.call(compiled, state)
        jax.block_until_ready(loss)
        taken.append(time.perf_counter() - start)
        if sum(taken) > _PATIENCE:
            break
    counted = taken[1:] or taken
    return sum(counted) / len(counted)


def gigabytes(count: int) -> str:
    """Write a number of bytes in gigabytes."""
    return f"{count / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """Write a number of seconds in the largest unit that fits."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"
