"""How long Growing NCA's training step takes to lower for a GPU, which need not be there.

``python -m benchmarks.lowering --save`` lowers it for compute capability 9.0 in a process of its
own: with an empty cache of Triton's, and again with what the first process left there. Each then
lowers it for a second grid size. The seconds go to ``results/aot/``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # nothing compiles with it

import jax

from benchmarks.measure import ROOT, provenance, rollout_loss
from nca_kernels.files import write_json
from nca_kernels.testing import BENCHMARKS, Case

GROWING = next(case for case in BENCHMARKS if case.name == "growing")
CASES = (GROWING, replace(GROWING, grid=(56, 40), batch=(3,)))
STEPS = 8


def lower(case: Case) -> float:
    """Seconds of lowering the gradient of a rollout, tracing apart."""
    params, state, key, _ = case.arguments()
    loss = rollout_loss(case, "triton", STEPS)

    def total(layers: Any, state: Any) -> Any:
        return loss(layers, params.perception, state, key)[0]

    traced = jax.jit(jax.value_and_grad(total)).trace(params.layers, state)
    start = time.perf_counter()
    traced.lower(lowering_platforms=("cuda",))
    return time.perf_counter() - start


def seconds(cache: str) -> dict[str, float]:
    """Seconds by grid size, in a process of its own with the Triton cache ``cache``."""
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "NCA_CUDA_ARCH": "90"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.lowering", "--child"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps({"x".join(map(str, case.grid)): round(lower(case), 2) for case in CASES}))
        return 0
    with tempfile.TemporaryDirectory() as cache:
        taken = {"empty cache": seconds(cache), "filled cache": seconds(cache)}
    for name, by_grid in taken.items():
        print(f"{name}: " + ", ".join(f"{s} s for {grid} cells" for grid, s in by_grid.items()))
    if options.save:
        facts = provenance("python -m benchmarks.lowering --save")
        path = ROOT / "results" / "aot" / f"lowering-triton-{facts['versions']['triton']}.json"
        write_json(path, {**facts, "seconds": taken})
    return 0


if __name__ == "__main__":
    sys.exit(main())
