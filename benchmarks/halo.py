"""The best width of a halo, and the largest lattice on many GPUs: the tables of docs/large.md.

``nca bench --report`` puts them there. They are a model, not a measurement: a step runs at a share
of an H200's roofline, links are as fast as their makers state, and each message takes a fixed time.
"""

from __future__ import annotations

import json
import math

import nca_kernels as nk
from benchmarks.large import CHANNELS, STEPS, parameters
from benchmarks.measure import ROOT, markdown_table
from nca_models.training.estimate import H200_BYTES, H200_FLOPS

REACH = 2  # cells that a step with alive masking depends on: one of perception, one of the pool
SHARE = 0.5  # of the roofline that kernels are taken to reach
MEMORY = 141e9  # bytes of an H200
LINKS = {"NVLink 4 (8 GPUs)": (450e9, 10e-6), "InfiniBand NDR (more)": (50e9, 20e-6)}
WIDTHS = (1, 2, 4, 8, 16)


def seconds_per_cell(cost: nk.Cost) -> float:
    """Time of a cell-step in training: forward twice (``checkpoint="sqrt"``), backward once."""
    flops = cost.training_flops + cost.forward_flops
    moved = cost.training_bytes + cost.forward_bytes
    return max(flops / H200_FLOPS, moved / H200_BYTES) / SHARE


def efficiency(side: int, dims: int, k: int, link: tuple[float, float], cell: float) -> float:
    """Time of a step without neighbours, divided by its time with halos for ``k`` steps."""
    bandwidth, latency = link
    halo, window = REACH * k, side + 2 * REACH * k
    alone = k * side**dims * cell
    work = k * window**dims * cell
    faces = sum(halo * side ** (dims - 1 - d) * window**d for d in range(dims))
    # Both directions at once; in the forward, the recomputed forward, and the backward.
    sending = 3 * (faces * CHANNELS * 4 / bandwidth + 2 * dims * latency)
    return alone / (work + sending)


def bytes_per_cell() -> dict[int, float]:
    """Bytes of training with ``checkpoint="sqrt"``, by dims: measured on the largest grid."""
    measured = {}
    for path in sorted((ROOT / "results").glob("*/large.json")):
        for row in json.loads(path.read_text())["rollouts"]:
            if row["mode"] == "training" and row["checkpoint"] == "sqrt":
                measured[len(row["grid"])] = row["peak_rss_bytes"] / math.prod(row["grid"])
    return measured


def halos() -> str:
    """Markdown: the share of a device's time that goes into its own cells."""
    parts = []
    for dims, blocks in ((2, (256, 1024, 4096)), (3, (64, 128, 256))):
        cell = seconds_per_cell(nk.cost(parameters(dims)))
        body = [
            [name, f"{side}^{dims}"]
            + [
                f"{efficiency(side, dims, k, link, cell):.0%}" if 2 * k <= side else ""
                for k in WIDTHS
            ]
            for name, link in LINKS.items()
            for side in blocks
        ]
        head = [f"{dims}-D, {1e12 * cell:.0f} ps a cell-step", "block"]
        parts.append(markdown_table([*head, *(f"k = {k}" for k in WIDTHS)], body))
    return "\n\n".join(parts)


def lattices() -> str:
    """Markdown: the largest lattices that train on so many GPUs."""
    bytes_needed = bytes_per_cell()
    body = []
    for count in (1, 8, 64, 1024):
        sides = [math.floor((count * MEMORY / bytes_needed[dims]) ** (1 / dims)) for dims in (2, 3)]
        body.append([f"{count:,}", f"{sides[0]:,}^2", f"{sides[1]:,}^3"])
    head = ["GPUs", f"2-D, {STEPS} steps, C = {CHANNELS}", "3-D"]
    return markdown_table(head, body)


if __name__ == "__main__":
    print(f"{halos()}\n\n{lattices()}")
