"""The rows that suites write, one for all that was timed together, and figures computed from them.

A row is a dict::

    suite, case, kind, mode     what was timed; together the row's key
    work                        cell-steps (or what ``unit`` says) of one call
    best                        the contestant that the others are compared with
    seconds                     {contestant: [of each round]}, rounds interleaved
    not_run                     {contestant: why}
    cost                        of a cell-step: {flops, bytes, fires}, fires being a fraction
    limit                       of this machine, in this run: {flops, bytes} a second

All other figures are computed from these.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.measure import median_ratio, ratios

Row = dict[str, Any]
KEY = ("suite", "case", "kind", "mode")


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def nanoseconds(row: Row, name: str) -> float:
    """Nanoseconds of a contestant for each cell-step, the median of the rounds."""
    return 1e9 * statistics.median(row["seconds"][name]) / row["work"]


def times_slower(row: Row, name: str) -> float:
    """How many times slower than the best: the median of the rounds' ratios."""
    return median_ratio(row["seconds"][name], row["seconds"][row["best"]])


def spread(row: Row, name: str) -> tuple[float, float]:
    """The quartiles of the rounds' ratios to the best."""
    low, _, high = quartiles(ratios(row["seconds"][name], row["seconds"][row["best"]]))
    return low, high


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def limit_nanoseconds(row: Row, dense: bool) -> float:
    """A cell-step at the limit: with the MLP of all cells (dense), or of those that fire."""
    flops = row["cost"]["flops"] * (1 if dense else row["cost"]["fires"])
    return 1e9 * max(flops / row["limit"]["flops"], row["cost"]["bytes"] / row["limit"]["bytes"])


def of_limit(row: Row, name: str, dense: bool = False) -> float:
    """A contestant's share of the roofline."""
    return limit_nanoseconds(row, dense) / nanoseconds(row, name)
