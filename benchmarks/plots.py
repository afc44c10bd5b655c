"""The pictures of docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import rows
from benchmarks.cases import MODES, TITLES
from benchmarks.peers import PEERS

if TYPE_CHECKING:
    from benchmarks.report import DeviceResults


def write(results: DeviceResults, folder: Path) -> list[Path]:
    """Draws all pictures of one device; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for draw in (speedup, roofline, memory, *([cost_of_a_cell] if results.large else [])):
        path = folder / f"{draw.__name__}-{results.device}.png"
        draw(results).savefig(path, dpi=120)
        written.append(path)
    return written


def _figure(width: float, height: float, columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _name(contestant: str) -> str:
    return PEERS[contestant].title if contestant in PEERS else contestant


def _rollouts(results: DeviceResults, mode: str) -> list[rows.Row]:
    each = [results.find("step", case, "rollout", mode) for case in TITLES]
    return [row for row in each if row is not None and "seconds" in row]


def speedup(results: DeviceResults) -> Figure:
    """Times slower than the best, for each contestant: bars on a logarithmic axis."""
    figure, axes = _figure(9, 5, 2)
    for ax, (mode, title) in zip(axes, MODES.items(), strict=True):
        labels, values, colors = [], [], []
        for row in _rollouts(results, mode):
            for name in row["seconds"]:
                labels.append(f"{TITLES[row['case']]}: {_name(name)}")
                values.append(rows.times_slower(row, name))
                colors.append("tab:gray" if name in PEERS or name == "reference" else "tab:green")
        at = list(range(len(labels)))[::-1]
        ax.barh(at, values, color=colors, left=0)
        for y, value in zip(at, values, strict=True):
            ax.text(value * 1.05, y, f"{value:.1f}" if value < 10 else f"{value:.0f}",
                    va="center", fontsize=6)  # fmt: skip
        ax.set_yticks(at, labels, fontsize=6)
        ax.set_xscale("log")
        ax.set_xlim(0.8, max(values) * 2)
        ax.set(title=title, xlabel=f"time, of that of {row['best']}")
    return figure


def roofline(results: DeviceResults) -> Figure:
    """Rates of all contestants below the roofline of the machine."""
    figure, axes = _figure(9, 4, 2)
    markers = dict(zip(TITLES, "os^D", strict=True))
    for ax, (mode, title) in zip(axes, MODES.items(), strict=True):
        shown = _rollouts(results, mode)
        limit = shown[0]["limit"]
        for rate, style, label in (
            ("flops", "k-", "limit, measured"),
            ("tile_flops", "k--", "in tile registers"),
        ):
            if rate not in limit:
                continue
            reach = [0.5, limit[rate] / limit["bytes"], 400]
            roof = [min(limit[rate], limit["bytes"] * x) / 1e9 for x in reach]
            ax.plot(reach, roof, style, label=label)
        colors: dict[str, str] = {}
        for row in shown:
            flops = row["cost"]["flops"] * row["cost"]["fires"]
            for name in row["seconds"]:
                colors.setdefault(name, f"C{len(colors)}")
                ax.plot(flops / row["cost"]["bytes"], flops / rows.nanoseconds(row, name),
                        markers[row["case"]], color=colors[name], markersize=5)  # fmt: skip
        for name, color in colors.items():
            ax.plot([], [], "s", color=color, label=_name(name))
        for case, marker in markers.items():
            ax.plot([], [], marker, color="k", fillstyle="none", label=TITLES[case])
        ax.set(xscale="log", yscale="log", title=title, xlabel="FLOP a byte, at least")
        ax.set_ylabel("GFLOP/s, of cells that fire")
    axes[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def memory(results: DeviceResults) -> Figure:
    """Memory at the peak, in states, against the number of steps."""
    figure, axes = _figure(4.5, 3, 1)
    for row in results.of_suite("memory"):
        name = "plain JAX" if row["kind"] == "reference" else f'checkpoint="{row["kind"]}"'
        axes[0].plot(list(map(int, row["planned_states"])), row["planned_states"].values(), "o-",
                     label=name)  # fmt: skip
    axes[0].set(xscale="log", yscale="log", xlabel="steps", ylabel="memory, in states of the grid")
    axes[0].legend(fontsize=8)
    return figure


def cost_of_a_cell(results: DeviceResults) -> Figure:
    """Time of a training's cell-step against the side of the grid."""
    assert results.large is not None
    figure, axes = _figure(4.5, 3, 1)
    for label, costs in results.large["cost_of_a_cell"].items():
        sizes = [cost["size"] for cost in costs]
        taken = [cost["nanoseconds_per_cell_step"] for cost in costs]
        axes[0].plot(sizes, taken, "o-", label=label)
    axes[0].set_xscale("log", base=2)
    axes[0].set_ylim(0, 1.1 * axes[0].dataLim.y1)
    axes[0].set_xticks(sizes, [str(size) for size in sizes])
    axes[0].set(xlabel="side of the grid, cells", ylabel="ns a cell-step, with the backward")
    axes[0].legend(fontsize=8)
    return figure
