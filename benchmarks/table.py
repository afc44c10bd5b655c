"""The README's table of speed, of the results of ``make bench``: ``python -m benchmarks.table``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT

RESULTS = ROOT / "results" / "cpu-amd-epyc-2-cores" / "step.json"
CASES = {
    "growing": "growing, 72x72x16, batch 8",
    "diffusing": "diffusing, 72x72x64, batch 8",
    "self_autoencoding": "3-D, 28x28x42x16",
}
OTHERS = {
    "xla": "`xla`",
    "slices": "JAX, slices",
    "reference": "JAX, convolutions",
    "cax": "CAX {cax}",
    "torch": "PyTorch {torch}",
}


def table(path: Path = RESULTS) -> str:
    """Markdown: nanoseconds per cell and step of the best backend, and of others with ratios."""
    results = json.loads(path.read_text())
    versions = {k: v.split("+")[0] for k, v in results["versions"].items()}
    names = [name.format(**versions) for name in OTHERS.values()]
    rows = {(r["case"], r["mode"]): r for r in results["rows"] if r["kind"] == "rollout"}
    lines = [
        f"| | **`cpu`** | of peak | {' | '.join(names)} |",
        "|" + "---|" * (len(names) + 3),
    ]
    for case, text in CASES.items():
        for mode, label in (("forward", f"{text}: forward"), ("training", "forward and backward")):
            row = rows[case, mode]
            cells = [label, f"**{row['cpu_ns']:,.0f}**", f"{row['of_peak']:.0%}"]
            lines.append(f"| {' | '.join([*cells, *(_cell(row, name) for name in OTHERS)])} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str) -> str:
    if f"{name}_ns" not in row:
        return "not timed"
    ratio = row[f"x_{name}"]
    return f"{row[f'{name}_ns']:,.0f} ({ratio:.{1 if ratio < 10 else 0}f}x)"


if __name__ == "__main__":
    print(table())
