"""The gate: what two result files say about each other."""

from __future__ import annotations

from typing import Any

from benchmarks import rows
from benchmarks.rows import Row

# Machines drift by this much between runs, and pairs within a run by far less.
TOLERANCE = 0.05


def verdict(old: Row, new: Row, name: str) -> dict[str, Any]:
    """Of one contestant: how its distance to a yardstick that both runs have has changed.

    The yardstick is another contestant, timed in the same rounds: seconds of two runs cannot be
    compared, ratios within a run can. ``slower`` and ``faster`` need the quartiles of the two
    runs' ratios to be apart and their medians to differ by more than 5 %.
    """
    yardstick = _yardstick(old, new, name)
    if yardstick is None:
        return {"contestant": name, "verdict": "cannot be compared", "ratio": None}
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
        "contestant": name,
        "against": yardstick,
        "ratio": ratio,
        "spread": (low / old_high, high / old_low),
        "verdict": word,
    }


def _yardstick(old: Row, new: Row, name: str) -> str | None:
    """The steadiest other contestant of both: code that is not ours, else the reference."""
    both = [n for n in new["seconds"] if n in old["seconds"] and n != name]
    for candidate in ("slices", "torch", "reference", "jax_nca", "cax", "xla", *both):
        if candidate in both:
            return candidate
    return None


def compare(old: list[Row], new: list[Row]) -> list[dict[str, Any]]:
    """Verdicts on our backends, of every row that both runs have."""
    before = {rows.key(row): row for row in old if "seconds" in row}
    found = []
    for row in new:
        if rows.key(row) not in before or "best" not in row:
            continue
        for name in row.get("ours", [row["best"]]):
            if name != "reference" and name in before[rows.key(row)]["seconds"]:
                what = " ".join(rows.key(row))
                found.append({"what": what, **verdict(before[rows.key(row)], row, name)})
    return found


def table(verdicts: list[dict[str, Any]]) -> str:
    """For people."""
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
