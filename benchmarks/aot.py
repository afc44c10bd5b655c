"""Compiles every Triton kernel ahead of time and tabulates what it takes; needs no GPU.

``python -m benchmarks.aot --save`` compiles the kernels of the benchmark cases, at the launches
that the backend chooses and at every packaged winner, for sm_80, sm_89, sm_90, sm_100 and gfx942,
and writes registers, spills, shared memory, tensor-core instructions and instructions a cell to
``results/aot/``. Triton assembles with its own ptxas, or with the one that ``TRITON_PTXAS_PATH``
and ``TRITON_PTXAS_BLACKWELL_PATH`` name: then the file is named after that, too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # nothing compiles with it

from tqdm import tqdm
from triton.knobs import NvidiaTool

from benchmarks.measure import ROOT, provenance
from nca_kernels import tuning
from nca_kernels.files import write_json
from nca_kernels.testing import ATTENTION, BENCHMARKS, CONFORMANCE
from nca_kernels.testing.cases import AttentionCase, Case
from nca_kernels.testing.triton_aot import TARGETS, compile_job, jobs

PRECISIONS = ("default", "float32", "bfloat16")
CASES: dict[str, Case | AttentionCase] = {c.name: c for c in (*CONFORMANCE, *BENCHMARKS)}
CASES |= {f"update_{c.name}": replace(c, name=f"update_{c.name}") for c in CONFORMANCE}
CASES |= {f"attention_{c.name}": c for c in ATTENTION}
CASES |= {c.name: c for c in BENCHMARKS}
_growing = next(c for c in BENCHMARKS if c.name == "growing")
_large = replace(_growing, name="growing_large", grid=(1024, 1024), batch=(1,))
LARGE = {c.name: c for c in (_large, replace(_large, name="growing_trained", filters=3))}
CASES |= LARGE
DEFAULT = (*(c.name for c in BENCHMARKS), *LARGE, "attention_three_heads")


def at_precision(case: Case | AttentionCase, precision: str) -> Case | AttentionCase | None:
    if isinstance(case, AttentionCase):
        return case if precision == "default" else None
    return replace(case, rule=replace(case.rule, precision=precision))


def all_jobs(
    cases: list[str], targets: list[str], precisions: list[str], **constants: Any
) -> Iterator[tuple]:
    """(target, precision, job) of every kernel, each launch once."""
    devices = ["", *(path.stem for path in sorted(tuning.PACKAGED.glob("*.json")))]
    for target in targets:
        for precision in precisions:
            for name in cases:
                case = at_precision(CASES[name], precision)
                found = [j for d in devices if case for j in jobs(case, target, d, **constants)]
                for job in dict.fromkeys(found):
                    yield target, precision, job


def line(row: dict[str, Any]) -> str:
    tensor = ", ".join(f"{n} {name}" for name, n in row["tensor_instructions"].items()) or "none"
    issued = row.get("warp_instructions_a_cell")
    return (
        f"{row['case']:18} {row['kernel']:28} {row['target']:7} {row['precision']:9} "
        f"{row['registers']:4} registers {row['spill_bytes']:5} B spilled "
        f"{row['shared_bytes']:7} B shared {row['barriers']:4} barriers  {tensor}"
        + (f"  {issued:.0f} warp instructions a cell" if issued else "")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT), choices=sorted(CASES))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--wide", action="store_true", help="64-bit indices, as of huge states")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    rows = []
    constants = {"wide": True} if options.wide else {}
    work = list(all_jobs(options.cases, options.targets, options.precisions, **constants))
    for target, precision, job in tqdm(work, disable=None, unit="kernel"):
        rows.append({**compile_job(job, target), "precision": precision})
        tqdm.write(line(rows[-1]), file=sys.stdout)
    if options.save:
        content = {**provenance("python -m benchmarks.aot --save"), "rows": rows}
        assembler = os.environ.get("TRITON_PTXAS_PATH", "")
        name = f"triton-{content['versions']['triton']}"
        if assembler:
            name += f"-cuda-{NvidiaTool.from_path(assembler).version}"
        write_json(ROOT / "results" / "aot" / f"{name}.json", content)
    if options.json:
        write_json(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
