"""The results in words: a line for each record, and the tables of ``gpu.md``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.gpu.items import Facts
from benchmarks.gpu.results import RunResults
from benchmarks.measure import markdown_table
from nca_kernels import tuning
from nca_kernels.files import write_json, write_text

MOST = 40  # listed failures
NAMED = 6  # listed items of those that were not done for one reason
FASTER = 0.98  # a launch wins if it takes at most this share of the default's time
Rows = Iterable[list[str]]


# ---- a record in a line ----


def line(record: Facts) -> str:
    """A record as a line, printed as soon as it is there."""
    name, said = f"{record['stage']}: {record['item']}", _said(record)
    if "error" in record:
        last = "".join(f"\n      {text}" for text in _last_lines(record.get("stderr", "")))
        return f"{name}: FAILED, {record['error'][:300]}{last}"
    for key in ("skipped", "cut_off"):
        if key in record:
            ending = f"; {said}" if said else ""
            return f"{name}: {key.replace('_', ' ')}, {record[key][:200]}{ending}"
    kernels = "".join(f", {text}" for text in _kernels([record]))
    return f"{name}: {said or 'ok'} ({record['seconds']:.1f} s{kernels})"


def _kernels(records: Iterable[Facts]) -> Iterator[str]:
    """How many of Triton's kernels came from the cache, if there were any."""
    counts = [record.get("kernels", {}) for record in records]
    from_cache, compiled = (
        sum(count.get(key, 0) for count in counts) for key in ("from_cache", "compiled")
    )
    if from_cache or compiled:
        yield f"kernels: {from_cache} from the cache, {compiled} compiled"


def _said(record: Facts) -> str:
    """Words for those facts that a record has."""
    try:
        return LINES[record["stage"]](record["found"])
    except (KeyError, TypeError):
        return ""


def _last_lines(text: str, count: int = 3) -> list[str]:
    return [line[:200] for line in text.splitlines() if line.strip()][-count:]


def _smoke_line(facts: Facts) -> str:
    if "kernels" in facts:
        return f"the same bits twice of {', '.join(facts['kernels']) or 'no kernel of its own'}"
    if "kind" in facts:
        return ", ".join(
            f"{facts.get(key)}" for key in ("kind", "nvidia-smi", "ptxas") if key in facts
        )
    return "; ".join(f"{name}: {graphs(counted)}" for name, counted in facts.items() if counted)


def graphs(counted: Facts) -> str:
    """Words for the facts of ``graphs.counted``."""
    inside, graphs = counted["in_graphs"], counted["graphs"]
    captured = "yes" if graphs and inside["launches"] == counted["launches"] else "in part"
    return (
        f"{captured if graphs else 'no'}, {graphs} graphs with {inside['launches']} of "
        f"{counted['launches']} launches and {inside['loops']} of {counted['loops']} loops"
    )


def _ratio_line(facts: Facts) -> str:
    worst = worst_ratio(facts)
    return f"error ratio {worst[0]:.1e} of {worst[1]:.0e}" if worst else ""


def worst_ratio(facts: Facts) -> tuple[float, float] | None:
    """(error ratio, limit) of the array that is closest to its limit."""
    pairs = [
        (float("inf") if r is None else r, limit) for r, limit in facts.get("ratios", {}).values()
    ]
    return max(pairs, key=lambda pair: pair[0] / pair[1], default=None)


def _speed_line(facts: Facts) -> str:
    if "flops" in facts:
        rates = [f"{name} {flops / 1e12:.0f} TFLOP/s" for name, flops in facts["flops"].items()]
        return f"copy {facts['bytes'] / 1e12:.2f} TB/s, {', '.join(rates)}"
    times = [f"{name} {1e6 * s:.1f}" for name, s in step_seconds(facts).items()]
    return f"us a step: {', '.join(times)}" + _not_run(facts)


def _not_run(facts: Facts) -> str:
    return "".join(f"; not {name}: {why[:80]}" for name, why in facts["not_run"].items())


def step_seconds(facts: Facts) -> dict[str, float]:
    """The median time of a step, by name."""
    return {n: statistics.median(s) / facts["steps"] for n, s in facts["seconds"].items()}


def share_of_default(facts: Facts) -> float:
    """A variant's time as a share of the default's, the median of the rounds."""
    ratios = map(
        lambda a, b: a / b, facts["seconds"][facts["variant"]], facts["seconds"]["default"]
    )
    return statistics.median(ratios)


def _variant_line(facts: Facts) -> str:
    return f"{100 * share_of_default(facts):.1f}% of the default's time"


def _profile_line(facts: Facts) -> str:
    if "report" in facts:
        return f"{facts['launches']} launches in {facts['report']}"
    times = [f"{name[:30]} {1e6 * s:.1f}" for name, (_, s) in list(facts["kernels"].items())[:6]]
    return f"us a step: {', '.join(times)}" if times else ""


def _memory_line(facts: Facts) -> str:
    gigabytes = facts["peak_bytes"] / 1e9
    return f"{gigabytes:.2f} GB, {facts['states']:.1f} states for {facts['steps']} steps"


def _train_line(facts: Facts) -> str:
    reached = facts.get("reached", {})
    return ", ".join(
        f"log10 MSE {quality} in {taken['seconds']:.0f} s ({taken['steps']} steps)"
        for quality, taken in reached.items()
    )


LINES: dict[str, Callable[[Facts], str]] = {
    "smoke": _smoke_line,
    "paths": _ratio_line,
    "conformance": _ratio_line,
    "speed": _speed_line,
    "variants": _variant_line,
    "profile": _profile_line,
    "memory": _memory_line,
    "train": _train_line,
}


# ---- summaries ----


def summarize(results: RunResults) -> None:
    """Writes ``gpu.json``, ``gpu.md`` and, where launches won, ``<device>.json``."""
    records = list(results.records.values())
    write_json(
        results.folder / "gpu.json",
        {**results.about, "left_out": results.left_out, "records": records},
    )
    write_text(results.folder / "gpu.md", markdown(results))
    if launches := winners(results.of("variants")):
        name = tuning.file_name(results.about["device"])
        write_json(results.folder / f"{name}.json", launches, sort_keys=True)


def winners(records: Iterable[Facts]) -> dict[str, dict[str, Any]]:
    """The fastest variants by kernel and problem, in the form of ``nca_kernels/tuning``."""
    best: dict[tuple[str, str], tuple[float, Facts]] = {}
    for facts in (record["found"] for record in records if _is_done(record)):
        problem, share = (facts["kernel"], facts["problem"]), share_of_default(facts)
        if share < best.get(problem, (FASTER, {}))[0]:
            best[problem] = share, facts["launch"]
    launches: dict[str, dict[str, Any]] = {}
    for (kernel, name), (_, launch) in best.items():
        launches.setdefault(kernel, {})[name] = launch
    return launches


def _is_done(record: Facts) -> bool:
    return not {"error", "skipped", "cut_off"} & record.keys()


def markdown(results: RunResults) -> str:
    """The text of ``gpu.md``: all tables, and the items that were not done."""
    about, failed = results.about, results.failed()
    done = sum(map(_is_done, results.records.values()))
    versions = ", ".join(f"{name} {v}" for name, v in about.get("versions", {}).items())
    parts = [
        f"# {about.get('device', 'no device')}",
        f"Commit {about['commit']}, Python {about.get('python')}, {versions}.",
        "; ".join(
            [f"{done} items done, {len(failed)} failed", *_kernels(results.records.values())]
        ),
        "\n".join(f"* {line(record)}" for record in failed[:MOST]),
    ]
    for stage, table in TABLES.items():
        if texts := [*table(results.of(stage))]:
            parts += [f"## {stage}", *texts]
    return "\n\n".join(filter(None, [*parts, *_not_done(results)])) + "\n"


def _not_done(results: RunResults) -> Iterator[str]:
    """Lines on what was not done, by stage and reason, with the first items."""
    items: dict[tuple[str, str], list[str]] = {}
    for record in results.records.values():
        for key in ("skipped", "cut_off"):
            if key in record:
                said = f" ({_said(record)})" if _said(record) else ""
                reason = f"{key.replace('_', ' ')}: {record[key]}{said}"
                items.setdefault((record["stage"], reason), []).append(record["item"])
    for left in results.left_out:
        items.setdefault((left["stage"], f"left out: {left['reason']}"), []).extend(left["items"])
    if items:
        yield "## Not done"
        yield "\n".join(
            f"* {stage}: {_counted(names)}{reason}" for (stage, reason), names in items.items()
        )


def _counted(names: list[str]) -> str:
    listed = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return (
        f"{len(names)} items ({listed}), " if len(names) > 1 else "".join(f"{n}, " for n in names)
    )


def _lines(records: list[Facts]) -> Iterator[str]:
    if done := [record for record in records if _is_done(record)]:
        yield "\n".join(f"* {line(record)}" for record in done)


def _ratios(records: list[Facts]) -> Iterator[str]:
    """Ratios by item and by backend, whose name an item's name ends with."""
    cells: dict[str, dict[str, str]] = {}
    backends = list(dict.fromkeys(record["item"].rsplit(" ", 1)[1] for record in records))
    for record in records:
        name, backend = record["item"].rsplit(" ", 1)
        worst = worst_ratio(record["found"])
        said = f"{worst[0]:.1e} of {worst[1]:.0e}" if worst else "to the bit"
        failed = f"FAILED {said if worst else ''}".strip()
        cells.setdefault(name, {})[backend] = said if _is_done(record) else failed
    if cells:
        yield "The largest error ratio of an array, and its limit."
        rows = [[name, *(of.get(b, "-") for b in backends)] for name, of in cells.items()]
        yield markdown_table(["", *backends], rows)


def _counts(records: list[Facts]) -> Iterator[str]:
    backends = [record["item"].rsplit(" ", 1)[1] for record in records if _is_done(record)]
    if backends:
        counts = [f"{backend} {backends.count(backend)}" for backend in dict.fromkeys(backends)]
        yield f"Passed: {', '.join(counts)}."


def _speed(records: list[Facts]) -> Iterator[str]:
    all_facts = [record["found"] for record in records]
    peak = next((f for f in all_facts if "flops" in f), None)
    if peak:
        yield f"Of this device: {_speed_line(peak)}."
    rows = [row for f in all_facts if "seconds" in f for row in _speed_rows(f, peak)]
    if rows:
        yield (
            "Medians of rounds in turn. The limit counts every cell as if it fired, with products "
            "in TF32."
        )
        head = ["case", "mode", "by", "us a step", "ps a cell", "of the limit", "to the first"]
        yield markdown_table(head, rows)


def _speed_rows(facts: Facts, peak: Facts | None) -> Rows:
    times = step_seconds(facts)
    first = next(iter(times.values()), 0.0)
    for name, seconds in times.items():
        cell = seconds / facts["cells"]
        share = f"{100 * _least(facts['work'], peak) / cell:.0f}%" if peak else "-"
        figures = [f"{1e6 * seconds:.1f}", f"{1e12 * cell:.1f}", share, f"{seconds / first:.2f}"]
        yield [facts["case"], facts["mode"], name, *figures]


def _least(work: Facts, peak: Facts) -> float:
    """Seconds of a cell-step at the device's limit."""
    flops = work["flops"] / peak["flops"]["tensorfloat32"]
    return float(max(flops, work["bytes"] / peak["bytes"]))


def _variants(records: list[Facts]) -> Iterator[str]:
    all_facts = [record["found"] for record in records if "seconds" in record["found"]]
    rows = [
        [f["case"], f["kernel"], f["variant"], _variant_line(f), f"{f['error']:.1e}"]
        for f in all_facts
    ]
    if rows:
        yield "Of the time of a whole call: forward, or training for kernels of the backward."
        yield markdown_table(["case", "kernel", "launch", "time", "difference"], rows)


def _profile(records: list[Facts]) -> Iterator[str]:
    rows = [
        [f["case"], f["mode"], f"`{name[:40]}`", f"{launches:.2f}", f"{1e6 * seconds:.1f}"]
        for f in (record["found"] for record in records)
        for name, (launches, seconds) in f.get("kernels", {}).items()
    ]
    if rows:
        yield markdown_table(["case", "mode", "kernel", "launches a step", "us a step"], rows)


TABLES: dict[str, Callable[[list[Facts]], Iterator[str]]] = {
    "smoke": _lines,
    "paths": _ratios,
    "speed": _speed,
    "variants": _variants,
    "profile": _profile,
    "conformance": _counts,
    "memory": _lines,
    "train": _lines,
}
