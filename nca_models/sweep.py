"""Sweeps: a training for every combination of some settings' values, and a table of what came out.

`OUT/sweep.csv` has a row for each model that is done, `OUT/<target>-<settings>-s<seed>/` is its
run, and a heat map shows the measure that the system names, where one or two settings are swept.
Models that differ only in their seed or in what they learn train together, as many as fit into
memory. A sweep that was stopped continues where it stopped, also within a training.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nca_models import render, run_folder, systems
from nca_models._files import write_text
from nca_models.training import diagnosis, logging, trainer
from nca_models.training.config import option
from nca_models.training.estimate import available_memory, planned_memory, resident_memory

_SHARE = 0.8  # of the memory, for models that train together


class Model(NamedTuple):
    """One training of a sweep."""

    cells: tuple[str, ...]  # the first of its row in the table: target, swept values, seed
    name: str  # of its folder
    request: run_folder.Request


@dataclass(frozen=True)
class Grid:
    """What a sweep trains: every combination of targets, values and seeds.

    Attributes:
        system: name of the system.
        targets: what is learned, as `nca train --target` takes it; None for the default.
        settings: one or several values of each setting that is not the preset's, by its name.
        seeds: trainings of each combination, with seeds from 0.
        preset: the preset of all other settings.
        together: how many models train together at most; None for as many as fit into memory.
    """

    system: str
    targets: tuple[str | None, ...]
    settings: dict[str, tuple[Any, ...]]
    seeds: int = 1
    preset: str = "small"
    together: int | None = None

    @cached_property
    def swept(self) -> dict[str, tuple[Any, ...]]:
        """The values of the swept settings: those with several values or with a short name."""
        preset, swept = systems.load(self.system).PRESETS[self.preset], {}
        for each in fields(preset):
            values = self.settings.get(each.name, (getattr(preset, each.name),))
            if len(values) > 1 or each.metadata.get("short"):
                swept[each.name] = values
        return swept

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that all models share, apart from those of the preset."""
        return {name: v[0] for name, v in self.settings.items() if name not in self.swept}

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """The names of what is measured."""
        measures: tuple[str, ...] = systems.load(self.system).SystemClass.measures
        return measures

    @property
    def header(self) -> tuple[str, ...]:
        """The names of the table's columns."""
        return (systems.settings(self.system).target_name, *self.swept, "seed", *self.measures)

    def models(self) -> Iterator[list[Model]]:
        """Yield the models, in lists of those whose settings differ only in the seed."""
        short = {f.name: f.metadata.get("short") for f in fields(systems.settings(self.system))}
        for values in product(*self.swept.values()):
            settings = dict(zip(self.swept, values, strict=True))
            parts = [f"{short[name] or name}{value}" for name, value in settings.items()]
            yield [
                Model(
                    (target or "", *map(str, values), str(seed)),
                    "-".join([self.stem(target), *parts, f"s{seed}"]),
                    run_folder.Request(
                        self.system, self.preset, target, self.shared | settings | {"seed": seed}
                    ),
                )
                for target, seed in product(self.targets, range(self.seeds))
            ]

    def stem(self, target: str | None) -> str:
        """Return what a target is called in the names of files."""
        return Path(target).stem if target else self.system


def sweep(grid: Grid, out: Path) -> tuple[Path, list[Path]]:
    """Train the models that `out` lacks, measure them, and write the table and the heat maps.

    Returns:
        The path of the table, and those of the heat maps.

    Raises:
        RunError: `out` is the folder of another sweep, a setting is impossible, or a model does not
            fit into memory.
        Interrupted: on SIGINT or SIGTERM, once the training step is done and a checkpoint saved.
    """
    for first, *_ in grid.models():
        run_folder.configured(first.request)
    out.mkdir(parents=True, exist_ok=True)
    table = out / "sweep.csv"
    _require_same(grid, out)
    rows = _read(table, grid)
    done = {row[: -len(grid.measures)] for row in rows}
    total = math.prod(map(len, grid.swept.values())) * len(grid.targets) * grid.seeds
    with tqdm(total=total, desc="models", unit="model") as shown:
        for alike in grid.models():
            left = [model for model in alike if model.cells not in done]
            shown.update(len(alike) - len(left))
            for models in _groups(grid, left, out):
                for model, figures in zip(models, _train(grid, models, out), strict=True):
                    rows.append((*model.cells, *(f"{figure:.4f}" for figure in figures)))
                    _write(table, grid, rows)
                    shown.update()
    return table, [] if len(grid.swept) > 2 else _draw_maps(grid, rows, out)


def _draw_maps(grid: Grid, rows: Sequence[tuple[str, ...]], out: Path) -> list[Path]:
    """Draw the heat map of each target; its rows are the first setting, its columns the second."""
    measure, unit = systems.load(grid.system).SystemClass.mapped
    column = grid.header.index(measure)
    none = ("", ("",))  # an axis without a setting
    rows_axis, columns_axis = [*grid.swept.items(), none, none][:2]
    paths = []
    for target in grid.targets:
        measured = [
            [float(row[column]) for row in rows if row[: len(cells)] == cells]
            for cells in ((target or "", *map(str, v)) for v in product(*grid.swept.values()))
        ]
        finite = [[value for value in values if math.isfinite(value)] for values in measured]
        means = np.array([np.mean(values) if values else math.nan for values in finite])
        spreads = [np.std(values, ddof=1) if len(values) > 1 else math.nan for values in finite]
        stem = grid.stem(target)
        path = out / (f"{measure}.png" if len(grid.targets) == 1 else f"{measure}-{stem}.png")
        shape = len(rows_axis[1]), len(columns_axis[1])
        title = f"{measure} of {stem}, {unit}"
        if grid.seeds > 1:
            title += f"\nmean and standard deviation of {grid.seeds} trainings"
        values, deviations = means.reshape(shape), np.array(spreads).reshape(shape)
        render.save_heat_map(path, values, columns_axis, rows_axis, title, deviations)
        paths.append(path)
    return paths


def _groups(grid: Grid, models: Sequence[Model], out: Path) -> list[list[Model]]:
    """Group the models that train together; those with which a stopped sweep began come first."""
    groups = [[model] for model in models if (out / model.name / "checkpoints").exists()]
    left = [model for model in models if [model] not in groups]
    for folder in out.glob(f"{left[0].name}-and-*-more") if left else ():
        count = 1 + int(folder.name.split("-")[-2])
        groups.append(left[:count])
        left = left[count:]
        break
    if not left:
        return groups
    system = run_folder.open_run(out / left[0].name, left[0].request)
    size = grid.together
    if size is None and len(left) > 1:
        first = trainer.Trainer(system)
        base, each = resident_memory(), planned_memory(first.compiled(), first.compiled_pool())
        room = available_memory()
        size = None if room is None else max(1, int((_SHARE * room - base) / each))
    size = size or len(left)
    apart = getattr(system, "learned", None) is None  # targets cannot be trained together
    by_target = groupby(left, lambda model: model.request.target if apart else None)
    parts = [list(part) for _, part in by_target]
    return groups + [part[i : i + size] for part in parts for i in range(0, len(part), size)]


def _train(grid: Grid, models: Sequence[Model], out: Path) -> Iterator[tuple[float, ...]]:
    """Train models together and yield the measures of each; NaN where a training diverges."""
    diverged = (math.nan,) * len(grid.measures)
    folders = [out / model.name for model in models]
    opened = [run_folder.open_run(out / model.name, model.request) for model in models]
    try:
        if len(models) == 1:
            trained = [trainer.train(opened[0], folders[0])]
        else:
            folder = out / f"{folders[0].name}-and-{len(models) - 1}-more"
            trained = trainer.train_together(opened, folder, folders)
    except trainer.Diverged as error:
        tqdm.write(f"{folders[0]}: {error}")
        yield from [diverged] * len(models)
        return
    for system, model, folder in zip(opened, trained, folders, strict=True):
        if not math.isfinite(logging.read(folder / "log.csv")[1][-1]):
            tqdm.write(f"{folder}: the loss is not finite")
            yield diverged
            continue
        if ailment := diagnosis.diagnose(system, folder):
            tqdm.write(f"{folder}: {ailment.line}")
        system.pictures(model, folder)
        yield system.swept(model)


def _require_same(grid: Grid, out: Path) -> None:
    """Refuse (RunError) what changes the settings that all models share; a sweep may grow."""
    path, declared = out / "grid.json", fields(systems.settings(grid.system))
    options = {each.name: option(each).removeprefix("--") for each in declared}
    shared = {"preset": grid.preset} | {options[name]: v for name, v in grid.shared.items()}
    if path.exists():
        try:
            before = {**json.loads(path.read_text(encoding="utf-8"))}
        except (ValueError, TypeError) as error:
            raise run_folder.RunError(f"{path} is not a sweep's settings ({error})") from error
        if before != shared:
            raise run_folder.RunError(
                f"{out} was started with {before}, not {shared}: choose another --out"
            )
    write_text(path, json.dumps(shared) + "\n")


def _read(table: Path, grid: Grid) -> list[tuple[str, ...]]:
    """Read the rows of a table; refuse (RunError) a table of other columns."""
    if not table.exists():
        return []
    try:
        with table.open(encoding="utf-8", newline="") as file:
            header, *rows = map(tuple, csv.reader(file))
    except (ValueError, csv.Error) as error:
        raise run_folder.RunError(f"{table} is not a sweep's table ({error})") from error
    if header != grid.header:
        raise run_folder.RunError(
            f"{table} has the columns {', '.join(header)}, not {', '.join(grid.header)}: choose "
            "another --out"
        )
    return rows


def _write(table: Path, grid: Grid, rows: Sequence[tuple[str, ...]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([grid.header, *rows])
    write_text(table, text.getvalue())
