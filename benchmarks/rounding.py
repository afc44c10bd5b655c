"""How far products of TF32 are off, case by case, in Triton's interpreter; needs no GPU.

``python -m benchmarks.rounding --save`` computes values and gradients of the conformance cases with
``precision="tensorfloat32"`` twice, as NVIDIA's tensor cores would: with operands rounded to the
nearest, as the kernels round them, and with operands cut off, as the hardware does by itself. It
prints the largest error ratios against float32, and writes all of them to
``results/<device>/rounding.json``. Where an activation has a kink, a small error may move a hidden
unit across it, which changes the whole gradient of that unit. The same cases with SiLU for ReLU
show the effect of rounding alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import jax
from tqdm import tqdm

from benchmarks.measure import ROOT, device_name, markdown_table, provenance
from nca_kernels.files import write_json
from nca_kernels.testing import CONFORMANCE, Case, error_ratio, tolerance
from nca_kernels.testing.conformance import ORACLE, value_and_gradients
from tests.tools import triton_host

CUT_OFF = "triton_cut_off"


def errors(case: Case) -> dict[str, dict[str, float]]:
    """The error ratios of the state and of each gradient, by backend."""
    arguments = case.arguments()
    rules = {p: replace(case.rule, precision=p) for p in ("float32", "tensorfloat32")}
    expected = value_and_gradients(ORACLE, replace(case, rule=rules["float32"]), arguments)
    ratios = {}
    for backend in (triton_host.NAME, CUT_OFF):
        out = value_and_gradients(
            backend, replace(case, rule=rules["tensorfloat32"]), arguments, calls=1
        )
        named = zip(
            jax.tree_util.tree_flatten_with_path(out)[0], jax.tree.leaves(expected), strict=True
        )
        ratios[backend] = {
            jax.tree_util.keystr(path): error_ratio(got, want) for (path, got), want in named
        }
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    triton_host.register()
    # Triton's products know this name and the kernels do not, so that they round nothing.
    triton_host.register(CUT_OFF, "rounds nothing", precision=lambda *_: "TF32")
    chosen = [c for c in CONFORMANCE if c.dtype == "float32" and c.rule.precision == "float32"]
    kinds = {"": chosen, "smooth": [case.smooth() for case in chosen]}
    rows = {
        kind: {case.name: errors(case) for case in tqdm(cases, disable=None, unit="case")}
        for kind, cases in kinds.items()
    }
    columns = [(kind, which) for kind in kinds for which in (triton_host.NAME, CUT_OFF)]
    for kind, which in columns:
        worst = [max(by_backend[which].values()) for by_backend in rows[kind].values()]
        states = [by_backend[which]["[0]"] for by_backend in rows[kind].values()]
        limit = tolerance("float32", "tensorfloat32")
        print(
            f"{which} {kind}: state {statistics.median(states):.1e}, at most {max(states):.1e}; "
            f"worst of all {statistics.median(worst):.1e} in the median case, at most "
            f"{max(worst):.1e}, above {limit:g} in {sum(w > limit for w in worst)} of {len(worst)}"
        )
    body = [
        [name, *(f"{max(rows[kind][name][which].values()):.1e}" for kind, which in columns)]
        for name in rows[""]
    ]
    head = ["case", "rounded", "cut off", "smooth, rounded", "smooth, cut off"]
    print(markdown_table(head, body))
    if options.save:
        content = {**provenance("python -m benchmarks.rounding --save"), "error_ratios": rows}
        write_json(ROOT / "results" / device_name() / "rounding.json", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
