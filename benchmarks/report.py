"""What the result files say: for a terminal, for docs/benchmarks.md, and the README's table.

``nca bench --report`` writes the documents; nothing in them is written by hand.
"""

from __future__ import annotations

import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import halo, plots, recipes, rows
from benchmarks.cases import MODES, TITLES
from benchmarks.compare import TOLERANCE
from benchmarks.measure import ROOT, markdown_table
from benchmarks.peers import PEERS
from benchmarks.rows import Row
from benchmarks.suites.quality import MINUTES, QUALITIES
from nca_kernels.files import write_text

DOCS = ROOT.parent / "docs"


# ---- one result, in words ----


def title(name: str, versions: dict[str, str] | None = None) -> str:
    """The name of a contestant as readers see it, a peer's with its version."""
    if name not in PEERS:
        return f"`{name}`" if versions is not None else f"{name} (ours)"
    package = {"torch_compiled": "torch", "jax_nca": "jax-nca"}.get(name, name)
    version = (versions or {}).get(package, "").split("+")[0]
    return f"{PEERS[name].title} {version}".strip()


def times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:,.0f}x"


def share(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.095 else f"{fraction:.1%}"


def shape(row: Row) -> str:
    batch, *grid, channels = row["shape"]
    return f"{' x '.join(map(str, grid))}, {channels} channels, batch {batch}"


def contestants(pair: list[Row]) -> list[str]:
    """The names of all contestants of a forward row and a training row."""
    return list(dict.fromkeys(name for row in pair for name in row.get("seconds", ())))


def text(run: dict[str, Any]) -> str:
    """A run's rollouts for a terminal."""
    out = []
    for case in TITLES:
        pair = [_find(run["rows"], "step", case, "rollout", mode) for mode in MODES]
        timed = [row for row in pair if row is not None and "seconds" in row]
        if not timed:
            continue
        first = timed[0]
        out.append(f"\n{TITLES[case]}: {shape(first)}, {first['steps']} steps")
        out.append(f"  {'':20}" + "".join(f"{MODES[row['mode']]:>34}" for row in timed))
        for name in contestants(timed):
            cells = [
                f"{rows.nanoseconds(row, name):14,.0f} ns {times(rows.times_slower(row, name)):>8} "
                f"{share(rows.of_limit(row, name)):>7}"
                if name in row["seconds"]
                else f"{'-':>34}"
                for row in timed
            ]
            out.append(f"  {title(name):20}" + "".join(cells))
        for name, reason in {k: v for row in timed for k, v in row["not_run"].items()}.items():
            out.append(f"  {title(name):20} not timed: {reason}")
    timed = [row for row in run["rows"] if "limit" in row]
    if timed:
        limit = timed[-1]["limit"]
        out.append(
            f"\nns: of a cell and step, medians of interleaved rounds; x: times slower than "
            f"{timed[0]['best']};\n%: of this machine's limit ({limit['flops'] / 1e9:,.0f} GFLOP/s "
            f"and {limit['bytes'] / 1e9:,.0f} GB/s, measured in this run), the MLP\n"
            "counted for the cells that fire."
        )
    return "\n".join(out)


# ---- saved results ----


def _find(all_rows: list[Row], *key: str) -> Row | None:
    return next((row for row in all_rows if rows.key(row) == key), None)


class DeviceResults:
    """The saved results of one device: the rows of its files, and their provenance."""

    def __init__(self, folder: Path):
        self.device = folder.name
        self.files = {}
        for path in sorted(folder.glob("*.json")):
            content = json.loads(path.read_text())
            if any("suite" in row for row in content.get("rows", ())):
                self.files[path.stem] = content
        self.rows: list[Row] = [row for file in self.files.values() for row in file["rows"]]
        self.large, self.paper, self.repeat = (
            json.loads(path.read_text()) if path.exists() else None
            for path in (folder / f"{name}.json" for name in ("large", "paper", "repeat"))
        )

    def of_suite(self, suite: str) -> list[Row]:
        return [row for row in self.rows if row["suite"] == suite]

    def find(self, *key: str) -> Row | None:
        return _find(self.rows, *key)

    @property
    def versions(self) -> dict[str, str]:
        versions: dict[str, str] = next(iter(self.files.values()))["versions"]
        return versions


@cache
def all_results() -> list[DeviceResults]:
    """The results of every device for which there are files of this suite."""
    folders = sorted(path for path in (ROOT / "results").iterdir() if path.is_dir())
    return [results for results in map(DeviceResults, folders) if results.files]


# ---- Markdown ----


def speed_table(results: DeviceResults, kind: str = "rollout") -> str:
    """All contestants of all cases: time, ratio to the best, shares of the limit."""
    body = []
    for case in TITLES:
        pair = [row for mode in MODES if (row := results.find("step", case, kind, mode))]
        pair = [row for row in pair if "seconds" in row]
        for name in contestants(pair):
            for row in pair:
                if name in row["seconds"]:
                    low, high = rows.spread(row, name)
                    body.append([
                        f"{TITLES[case]}, {shape(row)}",
                        MODES[row["mode"]],
                        title(name, results.versions),
                        f"{rows.nanoseconds(row, name):,.0f}",
                        f"{times(rows.times_slower(row, name))} ({low:.2f} to {high:.2f})",
                        share(rows.of_limit(row, name)),
                        share(rows.of_limit(row, name, dense=True)),
                    ])  # fmt: skip
    head = ["case", "", "", "ns", "times the best", "of the limit", "dense"]
    return markdown_table(head, body)


def not_timed(results: DeviceResults) -> str:
    lines = {
        f"- {TITLES[row['case']]}, {MODES[row['mode']]}: {title(name, results.versions)}: {reason}"
        for row in results.of_suite("step")
        for name, reason in row["not_run"].items()
    }
    return "\n".join(sorted(lines))


def systems_table(results: DeviceResults) -> str:
    body = []
    for row in results.of_suite("system"):
        for name in row["seconds"]:
            per_step = rows.nanoseconds(row, name) * row["work"] / 1e9
            slower = times(rows.times_slower(row, name))
            ns = f"{rows.nanoseconds(row, name):,.0f}"
            body.append([row["case"], title(name, {}), f"{per_step:.3g}", ns, slower])
    return markdown_table(["system", "", "s a training step", "ns", "times the best"], body)


def life_table(results: DeviceResults) -> str:
    body = [
        [
            title(row["kind"], {}),
            MODES[row["mode"]],
            f"{rows.nanoseconds(row, 'all'):,.0f}",
            f"{rows.times_slower(row, 'tenth_alive'):.2f}",
            f"{1 / rows.times_slower(row, 'all_fire'):.2f}",
        ]
        for row in results.of_suite("life")
    ]
    return markdown_table(["", "", "ns", "a tenth alive", "half fire, to all fire"], body)


def attention_table(results: DeviceResults) -> str:
    body = [
        [
            row["kind"],
            MODES[row["mode"]],
            title(name, {}),
            f"{rows.nanoseconds(row, name):,.0f}",
            times(rows.times_slower(row, name)),
        ]
        for row in results.of_suite("attention")
        for name in row["seconds"]
    ]
    return markdown_table(["case", "", "", "ns a cell and head", "times the best"], body)


def dropin_line(results: DeviceResults) -> str:
    row = results.find("dropin", "cax", "training step", "training")
    curve = results.find("dropin", "cax", "loss curve", "training")
    lines = []
    if row:
        lines.append(
            "A training step of CAX's Growing NCA takes "
            f"{rows.nanoseconds(row, 'cax'):,.0f} ns a cell and step as it is, and "
            f"{rows.nanoseconds(row, 'accelerated'):,.0f} ns with `accelerate`: "
            f"{times(rows.times_slower(row, 'cax'))}."
        )
        if "cax_matmul" in row["seconds"]:
            lines.append(
                "With matrix products for its 1x1 convolutions and nothing else changed, plain CAX "
                f"takes {rows.nanoseconds(row, 'cax_matmul'):,.0f} ns: "
                f"{times(rows.times_slower(row, 'cax_matmul'))}."
            )
    if curve:
        lines.append(
            f"The losses of {curve['steps']} steps differ by at most "
            f"{curve['largest_error']:.1e} of their value."
        )
    return "\n".join(lines)


def memory_table(results: DeviceResults) -> str:
    planned = {row["kind"]: row["planned_states"] for row in results.of_suite("memory")}
    names = {"all": '`checkpoint="all"`', "sqrt": '`checkpoint="sqrt"`', "reference": "plain JAX"}
    head = ["steps", *(names[kind] for kind in planned)]
    counts = list(next(iter(planned.values())))
    body = [[count, *(f"{states[count]:.0f}" for states in planned.values())] for count in counts]
    return markdown_table(head, body)


def kept_line(results: DeviceResults) -> str:
    row = results.find("step", "growing", "step", "training")
    if row is None:
        return ""
    figures = ", ".join(f"{title(n, {})} {b:,.0f}" for n, b in row["bytes_kept"].items())
    return (
        f"Bytes that the backward of a step keeps for each cell (16 float32 channels): {figures}."
    )


def rollouts_table(large: dict[str, Any]) -> str:
    """The rollouts of large.json: peaks of processes, times, and what plain JAX needs."""
    body = [
        [
            " x ".join(map(str, row["grid"])),
            f"training, `{row['checkpoint']}`" if row["mode"] == "training" else row["mode"],
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
            f"{row['seconds']:.0f} s",
            f"{row['nanoseconds_per_cell_step']:.0f}",
            f"{row['reference_planned_bytes'] / 1e9:.0f} GB",
        ]
        for row in large["rollouts"]
    ]
    head = ["grid", f"{large['rollouts'][0]['steps']} steps", "peak memory", "time",
            "ns a cell-step", "plain JAX needs"]  # fmt: skip
    return markdown_table(head, body)


def paper_table(paper: dict[str, Any]) -> str:
    """The training steps of paper presets, from paper.json."""
    body = [
        [
            row["system"],
            f"{row['cell_steps']:,}",
            f"{row['seconds']:.1f} s",
            f"{row['seconds'] * row['num_train_steps'] / 3600:.1f} h",
            f"{row['limit'] * row['num_train_steps'] / 60:.1f} min",
            f"{row['memory'] / 1e9:.1f} GB",
            f"{row['peak_rss_bytes'] / 1e9:.1f} GB",
        ]
        for row in paper["systems"]
    ]
    head = ["system", "cell-steps a training step", "time of it", "whole training",
            "an H200 at its limit", "memory, estimated", "measured"]  # fmt: skip
    return markdown_table(head, body)


def quality_table(results: DeviceResults) -> str:
    row = results.find("quality", "growing", "small", "training")
    if row is None:
        return ""
    reached = row["reached"]
    head = ["log10 MSE", "training steps", "`auto`, trained"]
    others = [name for name in row["seconds"] if name != row["best"]]
    head += [f"{title(name, results.versions)}, computed" for name in others]
    body = [
        [f"{quality}", *(_over_seeds(at, *unit) for unit in (("steps", ""), ("seconds", " s")))]
        + [f"{at['steps'] * _training_step(row, name):,.0f} s" for name in others]
        for quality, at in reached.items()
    ]
    missed = ", ".join(f"{q:g}" for q in QUALITIES if f"{q:g}" not in reached)
    note = f"\n\nNot reached in {MINUTES:.0f} minutes: {missed}." if missed else ""
    return markdown_table(head, body) + note


def _over_seeds(taken: dict[str, Any], unit: str, symbol: str) -> str:
    """What a quality took, and of several seeds the least and the most."""
    text = f"{taken[unit]:,.0f}{symbol}"
    if each := [seed[unit] for seed in taken.get("seeds", ())]:
        text += f" ({min(each):,.0f} to {max(each):,.0f})"
    return text


def _training_step(row: Row, name: str) -> float:
    """Seconds of a training step: a rollout of its length, at the measured time of a cell-step."""
    return rows.nanoseconds(row, name) / 1e9 * row["work"] / row["steps"] * row["steps_of_training"]


def repeat_line(repeat: dict[str, Any]) -> str:
    ratios = sorted(v["ratio"] for v in repeat["verdicts"] if v["ratio"] is not None)
    words = [v["verdict"] for v in repeat["verdicts"]]
    return (
        "Two runs of `nca bench --quick`, one after the other "
        f"(`python -m benchmarks.repeat --save`): {len(ratios)} figures of our backends, each "
        f"relative to another contestant of its run, are {ratios[0]:.2f} to {ratios[-1]:.2f} times "
        f"those of the first run, {ratios[len(ratios) // 2]:.2f} times in the median. `nca bench "
        f'--compare` calls {words.count("no difference")} of them "no difference", which is a '
        f"change of less than {TOLERANCE:.0%}."
    )


def readme_table() -> str:
    """The README's table: nanoseconds per cell and step of the best, and of others with ratios."""
    results = headline()
    timed = results.find("step", "growing", "rollout", "training")
    assert timed is not None
    contestants = (
        "cpu",
        "xla",
        "slices",
        "reference",
        "cax",
        "cax_matmul",
        "torch",
        "torch_compiled",
    )
    shown = [name for name in contestants if name in timed["seconds"]]
    names = (title(name, results.versions) for name in shown)
    head = [f"`{results.device}`", *names, "`cpu`, of the limit"]
    body = []
    for case in ("growing", "diffusing", "self_autoencoding"):
        for mode in MODES:
            row = results.find("step", case, "rollout", mode)
            assert row is not None
            name = f"{TITLES[case]}, {shape(row)}: {MODES[mode]}"
            cells = [_readme_cell(row, contestant) for contestant in shown]
            body.append([name, *cells, share(rows.of_limit(row, row["best"]))])
    return markdown_table(head, body)


def _readme_cell(row: Row, name: str) -> str:
    if name not in row["seconds"]:
        return "not timed"
    taken = f"{rows.nanoseconds(row, name):,.0f}"
    if name == row["best"]:
        return f"**{taken}**"
    return f"{taken} ({times(rows.times_slower(row, name))})"


def readme_memory() -> str:
    """A sentence on the largest training that was measured, and on plain JAX beside it."""
    large = headline().large
    assert large is not None
    row = next(r for r in large["rollouts"] if r["grid"] == [1024, 1024])
    return (
        f"A training step of {row['steps']} steps over 1024 x 1024 cells of 16 channels takes "
        f"{row['peak_rss_bytes'] / 1e9:.1f} GB at the peak, the whole process counted, with "
        f'`checkpoint="{row["checkpoint"]}"`; plain JAX needs '
        f"{row['reference_planned_bytes'] / 1e9:.0f} GB by XLA's own plan."
    )


def readme_dropin() -> str:
    """How much faster `accelerate` makes a CAX training, and the compat module jax-nca's."""
    results = headline()
    cax = results.find("dropin", "cax", "training step", "training")
    jax_nca = results.find("step", "jax_nca", "rollout", "training")
    assert cax is not None
    assert jax_nca is not None
    before, after = (rows.nanoseconds(cax, name) / 1e3 for name in ("cax", "accelerated"))
    careful, plain = (rows.times_slower(cax, name) for name in ("cax_matmul", "cax"))
    return (
        f"A training step of CAX's Growing NCA is {careful:.0f} times faster with it than in the "
        "best plain JAX, which is the same CAX system with its 1x1 convolutions written as matrix "
        f"products, and {plain:.0f} times faster than as CAX writes it ({before:.0f} to "
        f"{after:.2f} microseconds a cell and step): most of that is XLA's gradient of 1x1 "
        "convolutions on a CPU. The loss curve is the same. The gradient of jax-nca's NCA, which "
        f"has such convolutions too, is {rows.times_slower(jax_nca, 'jax_nca'):.0f} times faster."
    )


def large_table() -> str:
    """The table of large rollouts on the device of ``headline``."""
    large = headline().large
    assert large is not None
    return rollouts_table(large)


def large_cost() -> str:
    """The same device's picture of the cost of a cell, and a link to its figures."""
    device = headline().device
    return (
        f"![time of a cell-step against the side of the grid](plots/cost_of_a_cell-{device}.png)"
        f"\n\n[Figures](../benchmarks/results/{device}/large.json), by `python -m benchmarks.large "
        "--save`."
    )


def headline() -> DeviceResults:
    """The results that the README quotes: of a device with all of them, large grids too."""
    whole = (results for results in all_results() if results.large is not None)
    return next(
        results for results in whole if results.find("step", "growing", "rollout", "forward")
    )


# ---- the documents ----


def tiles(limits: list[dict[str, float]]) -> str:
    """A sentence on what tile registers reach; empty where there are none."""
    rates = [limit["tile_flops"] for limit in limits if "tile_flops" in limit]
    if not rates:
        return ""
    return f" In tile registers, which `cpu` uses: {statistics.median(rates) / 1e9:,.0f} GFLOP/s."


def markdown() -> str:
    """The text of docs/benchmarks.md."""
    parts = [_HEAD]
    for results in all_results():
        about = next(iter(results.files.values()))
        limits = [row["limit"] for row in results.rows if "limit" in row]
        versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
        parts += [
            f"## {results.device}",
            f"Commit {about['commit']}, {about['date']}, Python {about['python']}, {versions}. "
            f"Limit: {min(x['flops'] for x in limits) / 1e9:,.0f} to "
            f"{max(x['flops'] for x in limits) / 1e9:,.0f} GFLOP/s, "
            f"{limits[0]['bytes'] / 1e9:,.1f} GB/s." + tiles(limits),
            "### Rollouts of 8 steps\n\n`nca bench --save`\n",
            f"![speed](plots/speedup-{results.device}.png)",
            speed_table(results),
            not_timed(results),
            f"![roofline](plots/roofline-{results.device}.png)",
            "### Single steps",
            speed_table(results, "step"),
            "### A CAX training with one line added",
            dropin_line(results),
            "### A training step of each system\n\nThe `small` presets, as `nca train` takes them.",
            systems_table(results),
            "### Work follows life",
            "How the time of a step of Growing NCA changes if only a tenth of the cells live, and "
            "if only half of them fire.",
            life_table(results),
            "### `neighborhood_attention`",
            attention_table(results),
            "### Memory",
            kept_line(results),
            "The peak memory of a gradient by XLA's plan, in units of a state of the grid:",
            memory_table(results),
            f"![memory](plots/memory-{results.device}.png)",
        ]
        if results.large:
            parts += [
                "Peak memory of whole processes, and time (`python -m benchmarks.large --save`):",
                rollouts_table(results.large),
                f"![cost of a cell](plots/cost_of_a_cell-{results.device}.png)",
            ]
        if results.paper:
            parts += [
                "### The `paper` presets\n\nA few training steps of each were measured; the "
                "estimates are those of `nca train --estimate` before a training starts (`python "
                "-m benchmarks.paper --save`). The H200's time is computed from its data sheet.",
                paper_table(results.paper),
            ]
        parts += [
            "### Time to quality",
            "How long Growing NCA, preset `small`, is trained until the mean loss of 50 steps "
            "reaches a value: the median of several seeds, with the range in brackets. Peers take "
            "the same steps; their times are computed from the time of one step.",
            quality_table(results),
        ]
        if results.repeat:
            parts += ["### The same run twice", repeat_line(results.repeat)]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


_HEAD = """\
# Benchmarks

This page is written by `nca bench --report` from [benchmarks/results](../benchmarks/results/);
nothing here is typed by hand. Times are nanoseconds per cell and step, and medians of interleaved
rounds: all contestants of a case are timed in turn, and a ratio is the median (and the quartiles)
of the ratios in each round. Before it is timed, a backend has to pass its conformance check on a
piece of the case, and a peer's step is compared with ours.

*Of the limit* is the share of this machine's roofline: the time that the least work takes at the
rates of multiply-adds and of memory that were measured in the same run. On a CPU these are
multiply-adds in vector registers; where there are tile registers (AMX), float32 products are faster
in them, and their rate is given too. The MLP is counted for the cells that fire; in the column
*dense* it is counted for all cells, as code that computes every cell would need. `slices` is plain
JAX as a careful user writes it, with shifted slices and matrix products; `reference` is plain JAX
with convolutions."""


def generated() -> dict[Path, dict[str, str]]:
    """The generated blocks of other documents, by path and by name; see ``filled``."""
    readme, large = ROOT.parent / "README.md", DOCS / "large.md"
    return {
        DOCS / "recipes.md": {"recipes": recipes.tables(ROOT / "results" / headline().device)},
        readme: {
            "speed": readme_table(),
            "memory": readme_memory(),
            "dropin": readme_dropin(),
        },
        large: {
            "rollouts": large_table(),
            "cost": large_cost(),
            "halos": halo.halos(),
            "lattices": halo.lattices(),
        },
    }


def filled(document: str, blocks: dict[str, str]) -> str:
    """A document with each block from ``<!-- NAME: nca bench --report -->`` on replaced."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: nca bench --report -->\n", "\n<!-- end -->"
        head, rest = document.split(begin)
        document = head + begin + block + end + rest.split(end, 1)[1]
    return document


def write() -> list[Path]:
    """Writes the documents and the plots; returns their paths."""
    all_results.cache_clear()
    written = [DOCS / "benchmarks.md"]
    write_text(written[0], markdown())
    for results in all_results():
        written += plots.write(results, DOCS / "plots")
    for path, blocks in generated().items():
        write_text(path, filled(path.read_text(), blocks))
        written.append(path)
    return written
