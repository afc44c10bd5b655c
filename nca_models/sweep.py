"""Motion against channels and hidden units: many small trainings, a row of a table for each.

`OUT/sweep.csv` has a row for each model that is done, `OUT/<texture>-c<C>-d<D>-s<seed>/` its run,
and `OUT/motion.png` the heat map. Models of the same widths train together, as many as fit into
memory. A sweep that was stopped goes on where it was, within a training too.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nca_models import render, run_folder
from nca_models._files import write_text
from nca_models.training import logging, trainer
from nca_models.training.estimate import available_memory, planned_memory, resident_memory

FIELDS = (
    "texture", "channels", "hidden", "seed", "log10_texture_loss", "motion", "motion_spread"
)  # fmt: skip
_SHARE = 0.8  # of the memory, for models that train together


@dataclass(frozen=True)
class Grid:
    """What a sweep trains: every combination.

    Attributes:
        system: name of a system with settings `channels` and `hidden`, whose class has
            `swept(model)`: the last three of `FIELDS`.
        textures: as `nca_models.data.textures` takes them.
        channels, hidden: widths C and D.
        seeds: trainings of each, with seeds from 0.
        preset: whose other settings are taken.
        steps: training steps of a model; None for the preset's.
        vgg16: file of weights, or None for the features of random filters.
        together: models that train together at most; None for as many as fit into memory.
    """

    system: str
    textures: tuple[str, ...]
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    seeds: int = 1
    preset: str = "small"
    steps: int | None = None
    vgg16: str | None = None
    together: int | None = None


class Model(NamedTuple):
    """One training of a sweep; the first fields of its row."""

    texture: str
    channels: int
    hidden: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{Path(self.texture).stem}-c{self.channels}-d{self.hidden}-s{self.seed}"


def sweep(grid: Grid, out: Path) -> Path:
    """Train what `out` has not, measure it, and write the table and the heat map.

    Returns:
        The path of the table.

    Raises:
        RunError: `out` is of another grid, or a model does not fit into memory.
        Interrupted: on SIGINT or SIGTERM, once the training step is done and a checkpoint saved.
    """
    out.mkdir(parents=True, exist_ok=True)
    _require_same(grid, out / "grid.json")
    table = out / "sweep.csv"
    rows = _read(table)
    done = {tuple(row[field] for field in Model._fields) for row in rows}
    widths = list(product(grid.channels, grid.hidden))
    shown = tqdm(total=len(widths) * len(grid.textures) * grid.seeds, desc="models", unit="model")
    with shown:
        for channels, hidden in widths:
            alike = [
                Model(texture, channels, hidden, seed)
                for texture in grid.textures
                for seed in range(grid.seeds)
            ]
            left = [model for model in alike if tuple(map(str, model)) not in done]
            shown.update(len(alike) - len(left))
            for models in _groups(grid, left, out):
                for model, figures in zip(models, _train(grid, models, out), strict=True):
                    row = (*model, *(f"{figure:.4f}" for figure in figures))
                    rows.append(dict(zip(FIELDS, map(str, row), strict=True)))
                    _write(table, rows)
                    shown.update()
    for texture in grid.textures:
        name = "motion.png" if len(grid.textures) == 1 else f"motion-{Path(texture).stem}.png"
        render.save_heat_map(
            out / name,
            _motion(grid, texture, rows),
            ("hidden units", grid.hidden),
            ("channels", grid.channels),
            f"motion of {Path(texture).stem}, cells per 32 steps",
        )
    return table


def _motion(grid: Grid, texture: str, rows: Sequence[dict[str, str]]) -> np.ndarray:
    """Motion `[channels, hidden]`, the mean over the trainings that did not diverge."""
    measured = [
        [float(row["motion"]) for row in rows
         if (row["texture"], row["channels"], row["hidden"]) == (texture, str(c), str(d))]
        for c, d in product(grid.channels, grid.hidden)
    ]  # fmt: skip
    kept = [[value for value in values if math.isfinite(value)] for values in measured]
    means = [float(np.mean(values)) if values else math.nan for values in kept]
    return np.array(means).reshape(len(grid.channels), len(grid.hidden))


def _groups(grid: Grid, models: Sequence[Model], out: Path) -> list[list[Model]]:
    """Models that train together, as many as fit; first those with which a stopped sweep began."""
    groups = [[model] for model in models if (out / model.name / "checkpoints").exists()]
    left = [model for model in models if [model] not in groups]
    for folder in out.glob(f"{left[0].name}-and-*-more") if left else ():
        count = 1 + int(folder.name.split("-")[-2])
        groups.append(left[:count])
        left = left[count:]
        break
    size = grid.together
    if size is None and len(left) > 1:
        first = trainer.Trainer(_open(grid, left[0], out))
        base, each = resident_memory(), planned_memory(first.compiled(), first.compiled_pool())
        room = available_memory()
        size = None if room is None else max(1, int((_SHARE * room - base) / each))
    size = size or len(left) or 1
    return groups + [list(left[i : i + size]) for i in range(0, len(left), size)]


def _open(grid: Grid, model: Model, out: Path) -> Any:
    """The system of a model, its folder made if absent."""
    settings = {
        "channels": model.channels,
        "hidden": model.hidden,
        "seed": model.seed,
        "num_train_steps": grid.steps,
        "vgg16": grid.vgg16,
    }
    request = run_folder.Request(grid.system, grid.preset, model.texture, settings)
    folder = out / model.name
    start = run_folder.resume if run_folder.exists(folder) else run_folder.create
    return start(folder, request)


def _train(grid: Grid, models: Sequence[Model], out: Path) -> Iterator[tuple[float, float, float]]:
    """Of each model the last three of FIELDS; NaN if its training diverges."""
    folders = [out / model.name for model in models]
    opened = [_open(grid, model, out) for model in models]
    try:
        if len(models) == 1:
            trained = [trainer.train(opened[0], folders[0])]
        else:
            folder = out / f"{models[0].name}-and-{len(models) - 1}-more"
            trained = trainer.train_together(opened, folder, folders)
    except trainer.Diverged as error:
        tqdm.write(f"{folders[0]}: {error}")
        yield from [(math.nan, math.nan, math.nan)] * len(models)
        return
    for system, model, folder in zip(opened, trained, folders, strict=True):
        if not math.isfinite(logging.read(folder / "log.csv")[1][-1]):
            tqdm.write(f"{folder}: the loss is not finite")
            yield math.nan, math.nan, math.nan
            continue
        system.pictures(model, folder)
        yield system.swept(model)


def _require_same(grid: Grid, path: Path) -> None:
    """A sweep may grow, but what a model is trained with must not change."""
    fixed = {"preset": grid.preset, "steps": grid.steps, "vgg16": grid.vgg16}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != fixed:
            raise run_folder.RunError(
                f"{path.parent} was started with {before}, not {fixed}: choose another --out"
            )
    write_text(path, json.dumps(fixed) + "\n")


def _read(table: Path) -> list[dict[str, str]]:
    if not table.exists():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(table: Path, rows: Sequence[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(table, text.getvalue())
