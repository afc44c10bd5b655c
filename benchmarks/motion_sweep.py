"""A sweep after the emergent-dynamics study: motion against channels and hidden units.

``python -m benchmarks.gallery --sweep`` trains it, or what it lacks, and writes its section of the
gallery's page. Every training is in ``benchmarks/results/<device>/motion_sweep.json``.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from scipy.stats import spearmanr

from benchmarks.measure import NCA, provenance
from nca_kernels.files import write_json

COMMAND = (
    "sweep dynamics --targets cracked interlaced --channels 8 16 32 --hidden 16 48 128 --seeds 3 "
    "--steps 1500"
)
RESULTS = "motion_sweep.json"
# What the motion of a training is compared with, from its channels C and its hidden units D.
VARIABLES: dict[str, Callable[[int, int], float]] = {
    "channels C": lambda c, d: c,
    "hidden units D": lambda c, d: d,
    "their product": lambda c, d: c * d,
    "proportion D / C": lambda c, d: d / c,
    "disparity, from D / C to 1 on a logarithmic scale": lambda c, d: abs(math.log(d / c)),
}


def train(out: Path, pictures: Path, results: Path) -> None:
    """Train what the sweep in `out` lacks; its maps go to `pictures`, its figures to `results`."""
    subprocess.run([*NCA, *COMMAND.split(), "--out", str(out)], check=True)
    pictures.mkdir(parents=True, exist_ok=True)
    for path in sorted(out.glob("motion*.png")):
        shutil.copy(path, pictures / path.name)
    save(out / "sweep.csv", results)


def save(table: Path, results: Path) -> None:
    """Write a sweep's table to `results`, with what it was made by."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    write_json(results / RESULTS, {**provenance(f"nca {COMMAND}"), "trainings": rows})


def correlations(rows: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation of the motion of trainings with `VARIABLES`, by texture.

    `rows` are those of a sweep's table, without trainings that diverged.
    """
    found: dict[str, dict[str, float]] = {}
    for texture in dict.fromkeys(row["texture"] for row in rows):
        of_it = [row for row in rows if row["texture"] == texture]
        motion = [float(row["motion"]) for row in of_it]
        shapes = [(int(row["channels"]), int(row["hidden"])) for row in of_it]
        found[texture] = {
            name: float(spearmanr(motion, [variable(*shape) for shape in shapes]).statistic)
            for name, variable in VARIABLES.items()
        }
    return found


def section(pictures: Path, results: Path) -> list[str]:
    """What the gallery's page says of the sweep, if its figures are in `results`."""
    saved = results / RESULTS
    if not saved.exists():
        return []
    trainings = json.loads(saved.read_text())["trainings"]
    rows = [row for row in trainings if math.isfinite(float(row["motion"]))]  # did not diverge
    found = correlations(rows)
    maps = sorted(pictures.glob("motion*.png"))
    distances = sorted(float(row["distance_to_exemplar"]) for row in rows)
    return [
        "## A sweep: motion against channels and hidden units.",
        "",
        f"`nca {COMMAND}`",
        "",
        *[line for path in maps for line in (f"![{path.stem}](sweep/{path.name})", "")],
        "The study after which it is made (arXiv 2404.06406: 128 x 128 cells, 6,000 training",
        "steps, 8 to 128 channels C, 16 to 128 hidden units D, four textures) says that the",
        "disparity of the two and their proportion correlate strongly with the motion. In our",
        f"{len(rows)} trainings, which are smaller and shorter, the rank correlation (Spearman's,",
        "from -1 to 1) of the motion is, with",
        "",
        f"| | {' | '.join(found)} |",
        "|---|" + "---|" * len(found),
        *[
            f"| {name} | {' | '.join(f'{of_texture[name]:.2f}' for of_texture in found.values())} |"
            for name in VARIABLES
        ],
        "",
        f"[{RESULTS}](../../benchmarks/results/{results.name}/{RESULTS}) has every training: its",
        f"loss, its distance to the exemplar ({distances[0]:.2f} to {distances[-1]:.2f}: many are",
        "rough), its motion, and how far that varies over three runs of the same model.",
        "",
    ]
