"""What the recipes of the `small` presets changed: each beside others, over three seeds.

``python -m benchmarks.recipes --save`` trains the settings of before, and others that were tried,
by ``nca sweep``. Those of today are trained by
``python -m benchmarks.gallery --presets small``. All are measured alike, by ``nca eval``, and
``nca bench --report`` puts them side by side in docs/recipes.md. The texture loss of `dynamics` is
no setting, so that it is not here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.gallery import spread
from benchmarks.measure import NCA, ROOT, device_name, provenance
from nca_kernels.files import write_json
from nca_models import systems
from nca_models.training.config import option

SEEDS = 3
# Of each system, what else was trained: the settings that are not those of today.
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "growing": {"before": {"num_train_steps": 5000, "final_learning_rate": 1e-4}},
    "diffusing": {
        "before": {
            "num_train_steps": 5000,
            "learning_rate": 2e-3,
            "final_learning_rate": 1e-4,
            "min_steps": 48,
            "pool_size": 0,
            "damaged_per_batch": 0,
            "alive_threshold": 0.1,
            "noise_rate": 0.0,
            "gradients": "clipped",
        },
        "with an alive mask": {
            "num_train_steps": 6000,
            "learning_rate": 4e-3,
            "damaged_per_batch": 2,
            "alive_threshold": 0.1,
            "noise_rate": 0.0,
            "final_restart_rate": 1.0,
            "gradients": "clipped",
        },
    },
    "self_autoencoding": {
        "before": {
            "alive_threshold": 0.1,
            "hidden": 96,
            "num_steps": 28,
            "min_steps": 20,
            "learning_rate": 2e-3,
            "final_learning_rate": 2e-4,
        },
    },
    "attention": {
        "before": {"final_learning_rate": 1e-4, "pool_size": 128, "restarts_per_batch": 1},
        "without a pool": {"pool_size": 0},
    },
}


def train(system: str, other: str, out: Path) -> list[dict[str, Any]]:
    """Trains and measures a system with settings of `OTHERS`, with a record for each seed."""
    names = {each.name: option(each) for each in fields(systems.settings(system))}
    settings = OTHERS[system][other]
    words = [word for name, value in settings.items() for word in (names[name], str(value))]
    command = ["sweep", system, *words, "--seeds", str(SEEDS)]
    subprocess.run([*NCA, *command, "--out", str(out)], check=True)
    records: list[dict[str, Any]] = []
    for config in sorted(out.glob("*/config.json")):
        subprocess.run([*NCA, "eval", system, str(config.parent)], check=True)
        metrics = json.loads((config.parent / "metrics.json").read_text())
        about = provenance(f"nca {' '.join(command)}")
        records.append({"seed": len(records), "metrics": metrics, **about})
    return records


def tables(results: Path) -> str:
    """The tables of docs/recipes.md, of a device's folder of results; empty if it has none."""
    if not (results / "recipes.json").exists():
        return ""
    others, today = (
        json.loads((results / f"{name}.json").read_text()) for name in ("recipes", "gallery")
    )
    return "\n\n".join(
        table(system, {**recipes, "now": today.get(system, {}).get("small", [])})
        for system, recipes in others.items()
    )


def table(system: str, recipes: dict[str, list[dict[str, Any]]]) -> str:
    """A table of what was measured of a system: a column for each recipe."""
    lines = [f"| {system} | {' | '.join(recipes)} |", "|---|" + "---|" * len(recipes)]
    for name in dict.fromkeys(
        name for seeds in recipes.values() for r in seeds for name in r["metrics"]
    ):
        cells = [
            spread([r["metrics"].get(name) for r in of_seeds]) for of_seeds in recipes.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--runs", type=Path, default=Path("out/recipes"), help="where to train")
    add("--systems", nargs="+", default=list(OTHERS), choices=list(OTHERS))
    names = sorted({name for others in OTHERS.values() for name in others})
    add("--only", nargs="+", default=names, choices=names, help="which of their recipes")
    add("--save", action="store_true", help="into benchmarks/results/<device>/recipes.json")
    args = parser.parse_args()
    results = ROOT / "results" / device_name()
    saved = results / "recipes.json"
    records: dict[str, Any] = json.loads(saved.read_text()) if saved.exists() else {}
    wanted = [(system, name) for system in args.systems for name in OTHERS[system]]
    for system, other in (one for one in wanted if one[1] in args.only):
        out = args.runs / f"{system}-{other.replace(' ', '-')}"
        records.setdefault(system, {})[other] = trained = train(system, other, out)
        print(f"\n{system}, {other}: medians of {SEEDS} seeds, and their range")
        for name in trained[0]["metrics"]:
            print(f"  {spread([r['metrics'].get(name) for r in trained]):>24}  {name}")
        if args.save:
            write_json(saved, records)


if __name__ == "__main__":
    main()
