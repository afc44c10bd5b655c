"""Trains the presets of every system, with pictures and figures for ``docs/gallery/``.

``make gallery`` trains `small` with three seeds and `medium` with one: an evening on two cores,
each of which has a training of its own. A training that was stopped goes on, one that is done is
kept. ``--redo`` measures and draws those that are done once more, as their code may have changed;
``--page`` only writes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence
from tqdm import tqdm

from benchmarks import motion_sweep
from benchmarks.measure import NCA, ROOT, device_name, provenance
from nca_kernels.files import write_json, write_text
from nca_models import systems

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"
LARGEST = 1_300_000  # bytes of a film that is kept whole
SEEDS = {"medium": 1, "small": 3}  # trainings of each preset, with seeds from 0
TARGETS = {"dynamics": ("brick", "cracked", "crystalline", "gravel")}
NOT_SHOWN = ("target.png", "elsewhere.png", "loss.png")


@dataclass(frozen=True)
class Training:
    """One training of the gallery."""

    system: str
    preset: str
    target: str | None
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name, and its own."""
        parts = [self.system, *([self.target] if self.target else []), self.preset]
        return "-".join([*parts, f"s{self.seed}"])

    @property
    def command(self) -> list[str]:
        """The arguments of ``nca`` that train it, without the folder."""
        target = ["--target", self.target] if self.target else []
        return ["train", self.system, "--preset", self.preset, *target, "--seed", str(self.seed)]

    def record(self, runs: Path, core: int, redo: bool) -> None:
        """Trains it on a core, unless it is trained, and writes what was measured to its folder.

        What the training says goes to a file beside the folder.
        """
        folder = runs / self.name
        done = folder / "gallery.json"
        if done.exists() and not redo:
            return
        resumed = ["--resume"] if (folder / "config.json").exists() else []
        words = [*self.command, "--out", str(folder), *resumed]
        runs.mkdir(parents=True, exist_ok=True)
        parts = (
            runs / f"{self.name}.seconds"
        )  # of the processor, for each part of a training that was stopped
        with (runs / f"{self.name}.log").open("a") as log, on_core(core):
            training = subprocess.Popen([*NCA, *words], stdout=log, stderr=log)
            _, status, used = os.wait4(training.pid, 0)
        if not done.exists():
            with parts.open("a") as file:
                print(used.ru_utime + used.ru_stime, file=file)
        if status:
            raise RuntimeError(f"{self.name} failed or was stopped: see {log.name}")
        seconds = sum(map(float, parts.read_text().split()))
        metrics = json.loads((folder / "metrics.json").read_text())
        about = provenance(f"nca {' '.join(self.command)}")
        write_json(done, {"metrics": metrics, "seconds": seconds, "cores": 1, **about})


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Bind this thread, and the processes that it starts, to a core where that can be done."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def trainings(presets: list[str], names: list[str], seeds: int | None) -> list[Training]:
    """What is trained: the quick presets first, and the first seed of everything before others."""
    every = [
        Training(system, preset, target, seed)
        for preset in presets
        for system in names
        for target in TARGETS.get(system, (None,))
        for seed in range(seeds or SEEDS[preset])
    ]
    return sorted(every, key=lambda one: (one.seed, one.preset != "small"))


def collected(runs: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What was measured, by system (with its target) and preset: a record for each seed."""
    records: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for one in trainings(list(SEEDS), systems.names(), 10):
        done = runs / one.name / "gallery.json"
        if done.exists():
            subject = one.system if one.target is None else f"{one.system}, {one.target}"
            by_preset = records.setdefault(subject, {})
            by_preset.setdefault(one.preset, []).append(
                {"seed": one.seed, **json.loads(done.read_text())}
            )
    return records


def table(by_preset: dict[str, list[dict[str, Any]]], measured: str) -> list[str]:
    """A table of what was measured: the median over the seeds, and their range."""
    presets = [preset for preset in SEEDS if preset in by_preset]
    names = dict.fromkeys(
        name for preset in presets for record in by_preset[preset] for name in record["metrics"]
    )
    lines = [f"| {measured} | {' | '.join(map(heading(by_preset), presets))} |"]
    lines.append("|---|" + "---|" * len(presets))
    for name in names:
        cells = [spread([r["metrics"].get(name) for r in by_preset[p]]) for p in presets]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def heading(by_preset: dict[str, list[dict[str, Any]]]) -> Any:
    """A function that says of a preset how long it took, and of how many seeds."""

    def text(preset: str) -> str:
        records = by_preset[preset]
        taken = [record["seconds"] for record in records if record["seconds"] is not None]
        minutes = f", {statistics.median(taken) / 60:.1f} minutes" if taken else ""
        seeds = "1 seed" if len(records) == 1 else f"{len(records)} seeds"
        return f"`{preset}`{minutes}, {seeds}"

    return text


def spread(values: list[float | None]) -> str:
    """The median of values, and from where to where they go if there are several.

    Small values, such as the distances of textures, have three decimals, others two.
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    decimals = 3 if max(map(abs, known)) < 0.2 else 2
    three = statistics.median(known), min(known), max(known)
    # 0 is added because a value that is rounded to zero would otherwise keep its sign.
    median, least, most = (f"{round(value, decimals) + 0.0:.{decimals}f}" for value in three)
    return median if len(known) == 1 else f"{median} ({least} to {most})"


def pictures(runs: Path, one: Training) -> list[str]:
    """Copies the pictures of a training, and returns their lines of the page."""
    folder = GALLERY / one.name
    shutil.rmtree(folder, ignore_errors=True)
    lines = []
    for path in sorted((runs / one.name).glob("*.*")):
        if path.suffix in (".png", ".gif") and path.name not in NOT_SHOWN:
            folder.mkdir(parents=True, exist_ok=True)
            copy(path, folder / path.name)
            title = f"{one.name}: {path.stem.replace('_', ' ')}"
            lines += [f"![{title}]({one.name}/{path.name})", ""]
    return lines


def copy(source: Path, path: Path) -> None:
    """Copies a picture; of a film that is too large every other frame, and so on until it fits."""
    shutil.copy(source, path)
    every = 1
    while path.suffix == ".gif" and path.stat().st_size > LARGEST:
        every *= 2
        with Image.open(source) as film:
            duration = film.info["duration"]
            first, *frames = [frame.copy() for frame in ImageSequence.Iterator(film)][::every]
        first.save(path, save_all=True, append_images=frames, duration=every * duration, loop=0)


def page(runs: Path) -> str:
    """The gallery: of every system its pictures and its table."""
    records, device = collected(runs), device_name()
    lines = [
        "# Gallery",
        "",
        "What the presets learn from data that comes with the packages: a picture, textures and",
        "scikit-learn's digits, which have 8 x 8 pixels and are enlarged. `small` takes minutes,",
        "`medium` up to an hour; the tables say how long on one core. It is measured with what",
        "training never saw: other random numbers, other digits. Figures are medians over seeds,",
        f"with ranges in brackets. Made by `make gallery` on {device};",
        "with commits and versions they are in",
        f"[gallery.json](../../benchmarks/results/{device}/gallery.json).",
        "",
    ]
    for system in systems.names():
        module = systems.load(system)
        lines += [f"## {(module.__doc__ or '').splitlines()[0]}", ""]
        for target in TARGETS.get(system, (None,)):
            subject = system if target is None else f"{system}, {target}"
            lines += [f"### {target.capitalize()}", ""] if target else []
            for preset in (p for p in SEEDS if p in records.get(subject, {})):
                one = Training(system, preset, target, 0)
                lines += [f"`nca {' '.join(one.command)}`", "", *pictures(runs, one)]
            lines += table(records.get(subject, {}), module.SystemClass.measured)
    lines += motion_sweep.section(GALLERY / "sweep", ROOT / "results" / device)
    write_json(ROOT / "results" / device / "gallery.json", records)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--runs", type=Path, default=Path("out/gallery"), help="where to train")
    add("--systems", nargs="+", default=systems.names(), choices=systems.names())
    add("--presets", nargs="+", default=list(SEEDS), choices=systems.PRESET_NAMES)
    add("--seeds", type=int, help=f"trainings of each preset; {SEEDS}")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at once; one a core")
    add("--redo", action="store_true", help="measure and draw what is trained once more")
    add("--sweep", action="store_true", help="train the sweep instead, or what it lacks")
    add("--page", action="store_true", help="only write the page and the results")
    args = parser.parse_args()
    if args.sweep:
        results = ROOT / "results" / device_name()
        motion_sweep.train(args.runs / "sweep", GALLERY / "sweep", results)
    wanted = [] if args.page or args.sweep else trainings(args.presets, args.systems, args.seeds)
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    for core in cores[: args.jobs]:
        free.put(core)

    def record(one: Training) -> None:
        core = free.get()
        try:
            one.record(args.runs, core, args.redo)
        finally:
            free.put(core)

    with ThreadPoolExecutor(min(len(cores), args.jobs)) as pool:
        bar = {"total": len(wanted), "unit": "training", "disable": not wanted}
        list(tqdm(pool.map(record, wanted), **bar))
    write_text(GALLERY / "README.md", page(args.runs))


if __name__ == "__main__":
    main()
