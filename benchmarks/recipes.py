"""What the recipes of the `small` presets changed: each against the one before, over three seeds.

``python -m benchmarks.recipes --save`` trains the settings of before, by ``nca sweep``: half an
hour on two cores. Those of today are trained by ``python -m benchmarks.gallery --presets small``.
Both are measured alike, by ``nca eval``, and ``nca bench --report`` puts them side by side in
docs/recipes.md. The texture loss of `dynamics` is no setting, so that it is not here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.gallery import NCA, spread
from benchmarks.measure import ROOT, device_name, provenance
from nca_kernels.files import write_json
from nca_models import systems
from nca_models.training.config import option

SEEDS = 3
# Settings of before that are not those of today; what changed is in docs/recipes.md.
BEFORE: dict[str, dict[str, Any]] = {
    "growing": {"num_train_steps": 5000, "final_learning_rate": 1e-4},
    "diffusing": {
        "num_train_steps": 5000,
        "learning_rate": 2e-3,
        "final_learning_rate": 1e-4,
        "min_steps": 48,
        "pool_size": 0,
        "damaged_per_batch": 0,
    },
    "self_autoencoding": {
        "alive_threshold": 0.1,
        "hidden": 96,
        "num_steps": 28,
        "min_steps": 20,
        "learning_rate": 2e-3,
        "final_learning_rate": 2e-4,
    },
    "attention": {"final_learning_rate": 1e-4},
}


def before(system: str, runs: Path) -> list[dict[str, Any]]:
    """Trains and measures the settings of before, with a record for each seed."""
    out = runs / system
    names = {each.name: option(each) for each in fields(systems.settings(system))}
    words = [word for name, value in BEFORE[system].items() for word in (names[name], str(value))]
    command = ["sweep", system, *words, "--seeds", str(SEEDS)]
    subprocess.run([*NCA, *command, "--out", str(out)], check=True)
    records: list[dict[str, Any]] = []
    for config in sorted(out.glob("*/config.json")):
        subprocess.run([*NCA, "eval", system, str(config.parent)], check=True)
        metrics = json.loads((config.parent / "metrics.json").read_text())
        about = provenance(f"nca {' '.join(command)}")
        records.append({"seed": len(records), "metrics": metrics, **about})
    return records


def table(results: Path) -> str:
    """The table of docs/recipes.md, of a device's folder of results; empty if it has none."""
    if not (results / "recipes.json").exists():
        return ""
    then, now = (
        json.loads((results / f"{name}.json").read_text()) for name in ("recipes", "gallery")
    )
    lines = ["| system | measured | before | now |", "|---|---|---|---|"]
    for system, records in then.items():
        today = [record["metrics"] for record in now[system]["small"]]
        for i, name in enumerate(records[0]["metrics"]):
            columns = [
                spread([metrics.get(name) for metrics in of_seeds])
                for of_seeds in ([record["metrics"] for record in records], today)
            ]
            lines.append(f"| {'' if i else system} | {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--runs", type=Path, default=Path("out/recipes"), help="where to train")
    add("--systems", nargs="+", default=list(BEFORE), choices=list(BEFORE))
    add("--save", action="store_true", help="into benchmarks/results/<device>/recipes.json")
    args = parser.parse_args()
    results = ROOT / "results" / device_name()
    saved = results / "recipes.json"
    records: dict[str, Any] = json.loads(saved.read_text()) if saved.exists() else {}
    for system in args.systems:
        records[system] = before(system, args.runs)
        print(f"\n{system} before: medians of {SEEDS} seeds, and their range")
        for name in records[system][0]["metrics"]:
            print(f"  {spread([r['metrics'].get(name) for r in records[system]]):>24}  {name}")
        if args.save:
            write_json(saved, records)


if __name__ == "__main__":
    main()
