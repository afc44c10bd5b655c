"""Whether `nca bench` and `pytest benchmarks/` say the same: the ratios of both, side by side.

    nca bench --quick --json out/interleaved.json
    pytest benchmarks/ --quick --benchmark-json out/alone.json
    python -m benchmarks.agree out/interleaved.json out/alone.json

The first times contestants in turn, the second one after another. They agree on a contestant if the
quartiles of its ratio to the best backend overlap, or its medians differ by less than what
`nca bench --compare` calls no difference. --save writes the table to the results of the device.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import rows
from benchmarks.compare import TOLERANCE
from benchmarks.measure import ROOT, device_name, markdown_table, provenance
from nca_kernels.files import write_json


class Agreement(NamedTuple):
    """The quartiles (low, median, high) of a contestant's ratio to the best, both ways."""

    what: str
    in_turn: tuple[float, float, float]
    alone: tuple[float, float, float]

    @property
    def same(self) -> bool:
        overlap = self.in_turn[0] <= self.alone[2] and self.alone[0] <= self.in_turn[2]
        return overlap or abs(self.alone[1] / self.in_turn[1] - 1) < TOLERANCE


def agreements(interleaved: list[rows.Row], alone: list[dict[str, Any]]) -> list[Agreement]:
    """For each contestant that both have timed.

    Args:
        interleaved: rows of `nca bench`.
        alone: the entries of pytest-benchmark's JSON.
    """
    names = ("case_name", "kind", "mode", "contestant")
    stats = {tuple(entry["params"].get(name) for name in names): entry["stats"] for entry in alone}
    found = []
    for row in interleaved:
        key = (row["case"], row["kind"], row["mode"])
        best = stats.get((*key, row.get("best")))
        for name in row.get("seconds", ()):
            if best is None or name == row["best"] or (*key, name) not in stats:
                continue
            ratios = rows.ratios(row["seconds"][name], row["seconds"][row["best"]])
            mine = stats[*key, name]
            apart = (mine["q1"] / best["q3"], mine["median"] / best["median"],
                     mine["q3"] / best["q1"])  # fmt: skip
            found.append(Agreement(" ".join((*key, name)), rows.quartiles(ratios), apart))
    return found


def table(found: list[Agreement]) -> str:
    """A row for each contestant: its ratio to the best backend, and the quartiles."""

    def text(low: float, middle: float, high: float) -> str:
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    body = [[a.what, text(*a.in_turn), text(*a.alone), "yes" if a.same else "no"] for a in found]
    return markdown_table(["", "in turn", "one after another", "agree"], body)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agree",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("interleaved", type=Path, help="what nca bench --json wrote")
    parser.add_argument("alone", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--save", action="store_true", help="into the results of this device")
    options = parser.parse_args(argv)
    interleaved = json.loads(options.interleaved.read_text())["rows"]
    found = agreements(interleaved, json.loads(options.alone.read_text())["benchmarks"])
    print(table(found))
    apart = sum(not a.same for a in found)
    print(f"{len(found) - apart} of {len(found)} agree")
    if options.save:
        about = provenance("python -m benchmarks.agree --save")
        rows_of_table = [agreement._asdict() for agreement in found]
        folder = ROOT / "results" / device_name()
        write_json(folder / "agree.json", {**about, "agreements": rows_of_table})
    return 0 if found and not apart else 1


if __name__ == "__main__":
    sys.exit(main())
