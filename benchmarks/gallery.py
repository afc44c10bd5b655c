"""Trains the small preset of every system, with pictures and figures for ``docs/gallery/``.

``make gallery`` takes about an hour on two cores; trainings that were stopped go on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import ROOT, device_name, provenance
from nca_kernels.files import write_json, write_text
from nca_models import systems

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"
LARGEST = 450_000  # bytes of a picture that is kept
SWEEP_LINE = "sweep dynamics --channels 6 9 12 --hidden 16 32 48 --steps 1000"
SWEEP = SWEEP_LINE.split()
NCA = "import sys; from nca_models.cli import main; sys.exit(main(sys.argv[1:]))"


def train(system: str, runs: Path) -> dict:
    """Trains a system unless it is trained; returns its metrics and the seconds of the training."""
    folder, done = runs / system, runs / system / "gallery.json"
    if not done.exists():
        command = ["train", system, "--preset", "small", "--out", str(folder)]
        resumed = (folder / "config.json").exists()
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", NCA, *command, *(["--resume"] if resumed else [])], check=True
        )
        taken = None if resumed else time.perf_counter() - start
        metrics = json.loads((folder / "metrics.json").read_text())
        record = {"metrics": metrics, "seconds": taken, **provenance("make gallery")}
        write_json(done, record)
    result: dict = json.loads(done.read_text())
    return result


def page(system: str, result: dict, pictures: list[str]) -> list[str]:
    """The part of the gallery that shows a system."""
    title = (systems.load(system).__doc__ or "").splitlines()[0]
    taken = result["seconds"]
    minutes = "" if taken is None else f", {taken / 60:.1f} minutes with all of its pictures"
    lines = [f"## {title}", "", f"`nca train {system} --preset small`{minutes}.", ""]
    for picture in pictures:
        lines += [f"![{Path(picture).stem.replace('_', ' ')}]({picture})", ""]
    measured = systems.load(system).SystemClass.measured
    lines += [f"| | {measured} |", "|---|---|"]
    for name, value in result["metrics"].items():
        lines.append(f"| {name} | {'not finite' if value is None else f'{value:.2f}'} |")
    return [*lines, ""]


def sweep(runs: Path) -> list[str]:
    """Trains nine models of dynamics unless they are trained; returns their part of the gallery."""
    out, done = runs / "sweep", runs / "sweep" / "gallery.json"
    resumed, start = out.exists(), time.perf_counter()
    subprocess.run([sys.executable, "-c", NCA, *SWEEP, "--out", str(out)], check=True)
    if not done.exists():
        taken = None if resumed else time.perf_counter() - start
        write_json(done, {"seconds": taken})
    seconds = json.loads(done.read_text())["seconds"]
    minutes = "" if seconds is None else f" in {seconds / 60:.0f} minutes"
    (GALLERY / "sweep").mkdir(parents=True, exist_ok=True)
    for name in ("motion.png", "sweep.csv"):
        shutil.copy(out / name, GALLERY / "sweep" / name)
    return [
        "## A sweep: motion against channels and hidden units.",
        "",
        f"`nca {SWEEP_LINE}`: nine models, each trained for 1,000 steps{minutes}.",
        "[The table](sweep/sweep.csv) has the loss of each model, and its motion with the spread",
        "over three runs.",
        "",
        "![motion](sweep/motion.png)",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("out/gallery"), help="where to train")
    parser.add_argument("--systems", nargs="+", default=systems.names())
    args = parser.parse_args()
    lines = [
        "# Gallery",
        "",
        "What the small presets learn from data that comes with the packages: a picture, a texture",
        "and scikit-learn's digits. Figures are of digits that training never saw. Made by",
        f"`make gallery` on {device_name()}; figures, commits and versions:",
        f"[gallery.json](../../benchmarks/results/{device_name()}/gallery.json).",
        "",
    ]
    records = {}
    for system in args.systems:
        result = records[system] = train(system, args.runs)
        pictures = []
        (GALLERY / system).mkdir(parents=True, exist_ok=True)
        for path in sorted((args.runs / system).glob("*.*")):
            if path.suffix in (".png", ".gif") and path.stat().st_size <= LARGEST:
                if path.name in ("target.png", "loss.png"):
                    continue
                shutil.copy(path, GALLERY / system / path.name)
                pictures.append(f"{system}/{path.name}")
        lines += page(system, result, pictures)
    lines += sweep(args.runs)
    write_text(GALLERY / "README.md", "\n".join(lines))
    write_json(ROOT / "results" / device_name() / "gallery.json", records)


if __name__ == "__main__":
    main()
