"""The gate: compares two result files, and says what became slower or faster."""

from __future__ import annotations

from typing import Any

from benchmarks import rows
from benchmarks.rows import Row

# Ratios of unchanged code differ by about this much from run to run (see repeat.py), as memory lies
# elsewhere and the machine is warmer. Within a run they are far steadier.
TOLERANCE = 0.10


def verdict(old: Row, new: Row, name: str) -> dict[str, Any]:
    """How one contestant's time, as a ratio to those of others, has changed between two runs.

    Seconds of two runs cannot be compared; ratios to a yardstick that was timed in the same rounds
    can. Code that is not ours is the yardstick. Of several yardsticks the median change counts,
    since one of them may itself have had a bad run. ``slower`` and ``faster`` need the quartiles of
    the two runs' ratios to be apart, and their medians to differ by more than ``TOLERANCE``.
    """
    changes = sorted(
        (_change(old, new, name, yardstick) for yardstick in _yardsticks(old, new, name)),
        key=lambda change: change["ratio"],
    )
    if not changes:
        return {"contestant": name, "verdict": "cannot be compared", "ratio": None}
    return {"contestant": name, **changes[len(changes) // 2]}


def _change(old: Row, new: Row, name: str, yardstick: str) -> dict[str, Any]:
    (low, middle, high), (old_low, old_middle, old_high) = (
        rows.quartiles(rows.ratios(row["seconds"][name], row["seconds"][yardstick]))
        for row in (new, old)
    )
    ratio = middle / old_middle
    word = "no difference"
    if low > old_high and ratio > 1 + TOLERANCE:
        word = "slower"
    if high < old_low and ratio < 1 / (1 + TOLERANCE):
        word = "faster"
    return {
        "against": yardstick,
        "ratio": ratio,
        "spread": (low / old_high, high / old_low),
        "verdict": word,
    }


def _yardsticks(old: Row, new: Row, name: str) -> list[str]:
    """The other contestants of both runs that took part in every round, if they are not ours; else
    the reference, else any."""
    both = [n for n in new["seconds"] if n in old["seconds"] and n != name]
    steady = [n for n in both if len(new["seconds"][n]) == len(new["seconds"][name])]
    ours = new.get("ours", [new.get("best")])
    others = [n for n in steady if n not in ours]
    return others or [n for n in both if n == "reference"] or both


def compare(old: list[Row], new: list[Row]) -> list[dict[str, Any]]:
    """Verdicts on our backends, for every row that both runs have."""
    before = {rows.key(row): row for row in old if "seconds" in row}
    verdicts = []
    for row in new:
        if rows.key(row) not in before or "best" not in row:
            continue
        for name in row.get("ours", [row["best"]]):
            if name != "reference" and name in before[rows.key(row)]["seconds"]:
                what = " ".join(rows.key(row))
                verdicts.append({"what": what, **verdict(before[rows.key(row)], row, name)})
    return verdicts


def table(verdicts: list[dict[str, Any]]) -> str:
    """The verdicts as lines of text."""
    lines = []
    for v in verdicts:
        if v["ratio"] is None:
            lines.append(f"{v['what']:45} {v['contestant']:10} {v['verdict']}")
            continue
        low, high = v["spread"]
        lines.append(
            f"{v['what']:45} {v['contestant']:10} {v['ratio']:.2f} ({low:.2f} to {high:.2f}) "
            f"of the time that it took, against {v['against']}: {v['verdict']}"
        )
    return "\n".join(lines)
