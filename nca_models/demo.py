"""What a run shows when training ends, and how fast the fused step is on this machine."""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from nca_models import render
from nca_models._files import write_text
from nca_models.systems import System
from nca_models.training import logging

_BUDGET = 20.0  # seconds for one measurement, once three pairs are done
_PAIRS = range(3, 12)  # at least and at most


def show(system: System, model: Any, folder: Path) -> tuple[dict[str, float], list[Path]]:
    """Write a finished run's pictures and `metrics.json`; return the metrics and all paths."""
    metrics = measure(system, model, folder)
    render.save_loss_plot(folder / "loss.png", *logging.read(folder / "log.csv"))
    pictures = system.pictures(model, folder)
    others = [folder / name for name in ("loss.png", "metrics.json", "log.csv", "checkpoints")]
    return metrics, pictures + others


def measure(system: System, model: Any, folder: Path) -> dict[str, float]:
    """Write `metrics.json` of a run and return what is in it."""
    last = logging.read(folder / "log.csv")[1][-100:]
    name = f"training, mean of the last {len(last)} steps"
    metrics = {name: logging.log10(sum(last) / len(last))} | system.metrics(model)
    # JSON has no NaN.
    valid = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
    write_text(folder / "metrics.json", json.dumps(valid, indent=2) + "\n")
    return metrics


def speedup(system: System, model: Any, folder: Path) -> dict[str, float]:
    """Measure how many times faster backend "auto" is than "reference", on a batch of the run.

    Both run the same trained model on the same samples, in turns, so that other load on the machine
    weighs on both; the result is the median of the ratios of each pair.

    Returns:
        `{"forward": ratio, "training": ratio}`: the loss, and the loss with its gradient.
    """
    params = nnx.state(model, nnx.Param)
    key = jax.random.key(system.config.seed)
    fresh = system.fresh(key, system.config.batch_size)
    losses = {
        name: _loss(type(system)(replace(system.config, backend=name), folder))
        for name in ("auto", "reference")
    }
    _, samples = jax.jit(losses["auto"])(params, fresh, key)  # grown, as most of the pool is
    forward = {name: jax.jit(loss) for name, loss in losses.items()}
    training = {
        name: jax.jit(jax.value_and_grad(loss, has_aux=True)) for name, loss in losses.items()
    }
    args = (params, samples, key)
    return {"forward": _median_ratio(forward, args), "training": _median_ratio(training, args)}


def _loss(system: System) -> Callable[..., Any]:
    """The system's loss as a function of `(params, samples, key)`, on the system's backend."""
    parts: Any = nnx.split(system.model(nnx.Rngs(0)), nnx.Param, ...)
    graph, _, constants = parts
    return lambda params, *args: system.loss(nnx.merge(graph, params, constants), *args)


def _median_ratio(functions: Mapping[str, Callable[..., Any]], args: tuple[Any, ...]) -> float:
    """How many times longer "reference" takes than "auto": the median over pairs."""
    for function in functions.values():
        jax.block_until_ready(function(*args))  # compiles
    ratios: list[float] = []
    start = time.perf_counter()
    while len(ratios) < _PAIRS.start or (
        len(ratios) < _PAIRS.stop - 1 and time.perf_counter() - start < _BUDGET
    ):
        seconds = {name: _seconds(function, args) for name, function in functions.items()}
        ratios.append(seconds["reference"] / seconds["auto"])
    return statistics.median(ratios)


def _seconds(function: Callable[..., Any], args: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start
