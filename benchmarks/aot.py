"""Compiles every Triton kernel ahead of time and tabulates what it takes; needs no GPU.

``python -m benchmarks.aot --save`` compiles the kernels of the benchmark cases, at the launches
that the backend chooses, at every packaged winner and, for Growing NCA, at the named variants of
:func:`nca_kernels.tuning.variants`, for sm_80, sm_89, sm_90, sm_100 and gfx942. The tables of
``results/aot/`` list registers, spills, shared memory and instructions a cell; ``--json`` writes
all of these figures. Triton assembles with its own ptxas, or with the one that
``TRITON_PTXAS_PATH`` and ``TRITON_PTXAS_BLACKWELL_PATH`` name. In that case the name of the file
has its version.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # nothing compiles with it

from tqdm import tqdm
from triton.knobs import NvidiaTool

from benchmarks.measure import ROOT, markdown_table, provenance
from nca_kernels import tuning
from nca_kernels.files import write_json, write_text
from nca_kernels.testing import ATTENTION, BENCHMARKS, CONFORMANCE
from nca_kernels.testing.cases import AttentionCase, Case
from tests.tools.triton_aot import TARGETS, compile_job, jobs

PRECISIONS = ("default", "float32", "bfloat16")
CASES: dict[str, Case | AttentionCase] = {c.name: c for c in (*CONFORMANCE, *BENCHMARKS)}
CASES |= {f"update_{c.name}": replace(c, name=f"update_{c.name}") for c in CONFORMANCE}
CASES |= {f"attention_{c.name}": c for c in ATTENTION}
CASES |= {c.name: c for c in BENCHMARKS}
_growing = next(c for c in BENCHMARKS if c.name == "growing")
_large = replace(_growing, name="growing_large", grid=(1024, 1024), batch=(1,))
VARIED = ("growing", "growing_large")
VARIANT_TARGETS, VARIANT_PRECISIONS = ("sm_80", "sm_90"), ("default", "bfloat16")
LARGE = {c.name: c for c in (_large, replace(_large, name="growing_trained", filters=3))}
CASES |= LARGE
DEFAULT = (*(c.name for c in BENCHMARKS), *LARGE, "attention_three_heads")


def at_precision(case: Case | AttentionCase, precision: str) -> Case | AttentionCase | None:
    if isinstance(case, AttentionCase):
        return case if precision == "default" else None
    return replace(case, rule=replace(case.rule, precision=precision))


def all_jobs(
    cases: list[str], targets: list[str], precisions: list[str], **changes: Any
) -> Iterator[tuple]:
    """Each launch of every kernel once: (target, precision, variant or "", job)."""
    devices = ["", *(path.stem for path in sorted(tuning.PACKAGED.glob("*.json")))]
    for target in targets:
        for precision in precisions:
            for name in cases:
                case = at_precision(CASES[name], precision)
                found = [j for d in devices if case for j in jobs(case, target, d, **changes)]
                for job in dict.fromkeys(found):
                    yield target, precision, "", job


def variant_jobs(targets: list[str], precisions: list[str]) -> Iterator[tuple]:
    """As :func:`all_jobs`: Growing NCA's kernels at the launches that are to be tried on a GPU."""
    for target, precision, name in product(targets, precisions, VARIED):
        case = at_precision(CASES[name], precision)
        for job in jobs(case, target) if case else ():
            if job.name not in tuning.VARIANTS:
                continue
            for variant, launch in tuning.variants(job.name, job.launch).items():
                varied = jobs(case, target, fixed=partial(_always, launch)) if case else []
                yield target, precision, variant, next(j for j in varied if j.name == job.name)


def _always(launch: tuning.Launch, call: Any) -> tuning.Launch:
    return launch


def line(row: dict[str, Any]) -> str:
    tensor = ", ".join(f"{n} {name}" for name, n in row["tensor_instructions"].items()) or "none"
    issued = row.get("warp_instructions_a_cell")
    return (
        f"{row['case']:18} {row['kernel']:28} {row['variant']:14} {row['target']:7} "
        f"{row['precision']:9} "
        f"{row['registers']:4} registers {row['spill_bytes']:5} B spilled "
        f"{row['shared_bytes']:7} B shared {row['barriers']:4} barriers  {tensor}"
        + (f"  {issued:.0f} warp instructions a cell" if issued else "")
    )


def summary(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Tables of all rows, one for each precision and one of the variants."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    text = [
        f"# Triton kernels, compiled ahead of time\n\nCommit {facts['commit']}, {facts['date']}: "
        f"`{facts['command']}`, Python {facts['python']}, {versions}. Counted, not measured: of "
        "each kernel the registers of a thread, the bytes that spill from them if any do, KB of "
        "shared memory, and the instructions that warps issue for a cell where they can be counted "
        "(all cells alive, half of them fire)."
    ]
    for precision in dict.fromkeys(row["precision"] for row in rows):
        chosen = [r for r in rows if r["precision"] == precision and not r["variant"]]
        text += [f"## precision={precision!r}", _table(chosen, ("case", "kernel"))]
    varied = [row for row in rows if row["variant"]]
    if varied:
        text += [
            "## Variants\n\nLaunches that are to be measured against the heuristic's.",
            _table(varied, ("case", "kernel", "variant", "precision")),
        ]
    return "\n\n".join(text) + "\n"


def _table(rows: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    """A line for each kernel, a column for each target."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(row[name] for name in names), {})[row["target"]] = _cell(row)
    body = [[*line, *(cells.get(t, "") for t in targets)] for line, cells in lines.items()]
    return markdown_table([*names, *targets], body)


def _cell(row: dict[str, Any]) -> str:
    spilled = f" +{row['spill_bytes']} B" if row["spill_bytes"] else ""
    issued = row.get("warp_instructions_a_cell")
    return f"{row['registers']}{spilled}, {row['shared_bytes'] / 1024:.0f} KB" + (
        f", {issued:.1f}" if issued else ""
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT), choices=sorted(CASES))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--variants", action="store_true", help="launches to be tried, too")
    parser.add_argument("--wide", action="store_true", help="64-bit indices, as of huge states")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    rows = []
    changes = {"int64_indices": True} if options.wide else {}
    work = list(all_jobs(options.cases, options.targets, options.precisions, **changes))
    if options.variants or options.save:
        targets = [t for t in VARIANT_TARGETS if t in options.targets]
        work += variant_jobs(targets, [p for p in VARIANT_PRECISIONS if p in options.precisions])
    for target, precision, variant, job in tqdm(work, disable=None, unit="kernel"):
        row = {**compile_job(job, target), "precision": precision, "variant": variant}
        rows.append(row)
        tqdm.write(line(row), file=sys.stdout)
    if options.save:
        facts = provenance("python -m benchmarks.aot --save")
        assembler = os.environ.get("TRITON_PTXAS_PATH", "")
        name = f"triton-{facts['versions']['triton']}"
        if assembler:
            name += f"-cuda-{NvidiaTool.from_path(assembler).version}"
        write_text(ROOT / "results" / "aot" / f"{name}.md", summary(rows, facts))
    if options.json:
        write_json(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
