"""Motion against channels and hidden units: many small trainings, a row of a table for each.

`OUT/sweep.csv` has a row for each model that is done, `OUT/<texture>-c<C>-d<D>/` its run, and
`OUT/motion.png` the heat map. A sweep that was stopped goes on where it was, within a model too.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nca_models import render, run_folder
from nca_models._files import write_text
from nca_models.training import trainer

FIELDS = ("texture", "channels", "hidden", "log10_texture_loss", "motion", "motion_spread")


@dataclass(frozen=True)
class Grid:
    """What a sweep trains: every combination; `steps` training steps each, None: the preset's."""

    textures: tuple[str, ...]
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    preset: str = "small"
    steps: int | None = None


def sweep(grid: Grid, out: Path) -> Path:
    """Train what `out` has not, measure it, and write the table and the heat map.

    Returns:
        The path of the table.

    Raises:
        RunError: `out` is of another grid.
        Interrupted: on SIGINT or SIGTERM, once the training step is done and a checkpoint saved.
    """
    out.mkdir(parents=True, exist_ok=True)
    _require_same(grid, out / "grid.json")
    table = out / "sweep.csv"
    rows = _read(table)
    done = {(row["texture"], int(row["channels"]), int(row["hidden"])) for row in rows}
    models = list(product(grid.textures, grid.channels, grid.hidden))
    for texture, channels, hidden in tqdm(models, desc="models", unit="model"):
        if (texture, channels, hidden) not in done:
            figures = _train(grid, texture, channels, hidden, out)
            row = (texture, channels, hidden, *(f"{figure:.4f}" for figure in figures))
            rows.append(dict(zip(FIELDS, map(str, row), strict=True)))
            _write(table, rows)
    for texture in grid.textures:
        values = {
            (int(row["channels"]), int(row["hidden"])): float(row["motion"])
            for row in rows
            if row["texture"] == texture
        }
        heat = np.array([[values[c, d] for d in grid.hidden] for c in grid.channels])
        name = "motion.png" if len(grid.textures) == 1 else f"motion-{Path(texture).stem}.png"
        render.save_heat_map(
            out / name,
            heat,
            ("hidden units", grid.hidden),
            ("channels", grid.channels),
            f"motion of {Path(texture).stem}, cells per 32 steps",
        )
    return table


def _train(
    grid: Grid, texture: str, channels: int, hidden: int, out: Path
) -> tuple[float, float, float]:
    """The last three of FIELDS of one model; NaN if its training diverges."""
    folder = out / f"{Path(texture).stem}-c{channels}-d{hidden}"
    settings = {"channels": channels, "hidden": hidden, "num_train_steps": grid.steps}
    request = run_folder.Request("dynamics", grid.preset, texture, settings)
    start = run_folder.resume if run_folder.exists(folder) else run_folder.create
    system = start(folder, request)
    try:
        model = trainer.train(system, folder)
    except trainer.Diverged as error:
        tqdm.write(f"{folder}: {error}")
        return math.nan, math.nan, math.nan
    system.pictures(model, folder)
    _, _, late, motion, spread = system.metrics(model).values()
    return late, motion, spread


def _require_same(grid: Grid, path: Path) -> None:
    """A sweep may grow, but what a model is trained with must not change."""
    fixed = {"preset": grid.preset, "steps": grid.steps}
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
