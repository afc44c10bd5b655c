"""Large grids on this machine: peak memory and time of long rollouts, and the cost of a cell.

``python -m benchmarks.large`` takes about ten minutes on two cores. Every rollout runs in a process
of its own, whose peak is measured. The memory that plain JAX would need is what XLA plans for it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nca_kernels as nk
from benchmarks.measure import ROOT, device_name, interleaved, provenance
from nca_kernels.files import write_json

CHANNELS, HIDDEN, STEPS = 16, 128, 64
RULE = nk.Rule()
TILED = "forward, in tiles"
# Grid, mode, checkpoint, and an upper limit of its bytes.
ROLLOUTS: tuple[tuple[tuple[int, ...], str, str, float | None], ...] = (
    ((512, 512), "training", "all", None),
    ((512, 512), "training", "sqrt", None),
    ((1024, 1024), "training", "sqrt", 4e9),
    ((96, 96, 96), "training", "sqrt", 4e9),
    ((2048, 2048), "training", "sqrt", 12e9),
    ((4096, 4096), "forward", "sqrt", 6e9),
    ((4096, 4096), TILED, "sqrt", None),
)
FEW = 16  # steps, where several sizes are compared
SIZES = (128, 256, 512, 1024, 2048)
# A large array is new memory at each call, and every page of it is zeroed when it is first touched.
# Pages of 2 MiB, which some systems give to a program that asks for them, make that cheap.
PAGES = {
    "4 KiB pages": {},
    "2 MiB pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}


def rollout(grid: tuple[int, ...], mode: str, backend: str, steps: int, checkpoint: str) -> Any:
    """``run(params, key)``, jitted: a loss of a rollout from noise, or its gradient."""

    def loss(params: Any, key: Any) -> Any:
        state = jax.random.uniform(key, (*grid, CHANNELS))
        if backend == "reference":  # plain JAX keeps every intermediate
            body = lambda s, t: (
                nk.step(RULE, params, s, jax.random.fold_in(key, t), backend=backend),
                None,
            )
            final = jax.lax.scan(body, state, jnp.arange(steps))[0]
        else:
            final = nk.rollout(RULE, params, state, key, steps, checkpoint=checkpoint)
        return jnp.mean(final**2)

    return jax.jit(jax.grad(loss) if mode == "training" else loss)


def tiled(grid: tuple[int, ...], steps: int) -> Callable[[Any, Any], Any]:
    """The forward of a state in the host's memory, which it overwrites."""

    def run(params: Any, key: Any) -> Any:
        state = np.random.default_rng(0).random((*grid, CHANNELS), np.float32)
        return nk.tiled_rollout(RULE, params, state, key, steps, donate=True)

    return run


def parameters(num_dims: int) -> nk.RuleParams:
    taps = jnp.asarray(nk.taps(("identity", "sobel"), CHANNELS, num_dims))
    keys = jax.random.split(jax.random.key(1))
    first = jax.random.normal(keys[0], (taps.shape[-1], HIDDEN)) * taps.shape[-1] ** -0.5
    last = jax.random.normal(keys[1], (HIDDEN, CHANNELS)) * 0.01
    return nk.RuleParams(taps, None, ((first, jnp.zeros(HIDDEN)), (last, jnp.zeros(CHANNELS))))


def planned_bytes(grid: tuple[int, ...], mode: str, backend: str, checkpoint: str) -> int:
    """What XLA will allocate, compiled but not run."""
    run = rollout(grid, mode, backend, STEPS, checkpoint)
    plan = run.lower(parameters(len(grid)), jax.random.key(0)).compile().memory_analysis()
    planned: int = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
    return planned


def child(grid: tuple[int, ...], mode: str, checkpoint: str) -> None:
    """Runs a rollout twice; prints the peak, and the seconds of the second run, as JSON."""
    tiles = mode == TILED
    run = tiled(grid, STEPS) if tiles else rollout(grid, mode, "auto", STEPS, checkpoint)
    args = (parameters(len(grid)), jax.random.key(0))
    jax.block_until_ready(run(*args))
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_rss_bytes": peak_rss(), "seconds": seconds}))


def peak_rss() -> int:
    """Bytes of this process alone: the peak of `getrusage` starts at that of the parent."""
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("VmHWM:") + 1])


def in_child(what: list[str], environment: dict[str, str]) -> Any:
    """The JSON that this file prints when it runs in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.large", "--child", *what]
    out = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment}
    )
    return json.loads(out.stdout.splitlines()[-1])


def measured(
    grid: tuple[int, ...], mode: str, checkpoint: str, limit: float | None
) -> dict[str, Any]:
    cells = math.prod(grid)
    row: dict[str, Any] = {"grid": grid, "mode": mode, "checkpoint": checkpoint}
    row |= {"steps": STEPS, "limit_bytes": limit}
    row |= in_child([mode, checkpoint, *map(str, grid)], {})
    row["nanoseconds_per_cell_step"] = 1e9 * row["seconds"] / cells / STEPS
    if mode != TILED:
        row["planned_bytes"] = planned_bytes(grid, mode, "auto", checkpoint)
    row["reference_planned_bytes"] = planned_bytes(grid, mode, "reference", checkpoint)
    return row


def repeats(size: int) -> int:
    """Calls in a measurement, so many that the start of the measurement does not matter."""
    return max(1, (512 // size) ** 2)


def cost_of_a_cell(rounds: int = 3) -> list[dict[str, Any]]:
    """Forward and backward of a few steps on squares of several sizes, in turns."""

    def repeated(size: int) -> Callable[[], Any]:
        run = rollout((size, size), "training", "auto", FEW, "sqrt")
        params = parameters(2)
        keys = [jax.random.key(i) for i in range(repeats(size))]
        return lambda: [jax.block_until_ready(run(params, key)) for key in keys]

    runs = {str(size): repeated(size) for size in SIZES}
    times = interleaved(runs, rounds)
    return [
        {
            "size": size,
            "nanoseconds_per_cell_step": 1e9
            * statistics.median(times[str(size)])
            / (size * size * FEW * repeats(size)),
        }
        for size in SIZES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--only-cost", action="store_true", help="the cost of a cell, no rollouts")
    parser.add_argument("--child", nargs="+", metavar="WHAT")
    options = parser.parse_args()
    if options.child:
        if options.child == ["cost"]:
            print(json.dumps(cost_of_a_cell()))
            return
        mode, checkpoint, *sizes = options.child
        child(tuple(map(int, sizes)), mode, checkpoint)
        return
    result: dict[str, Any] = {**provenance("python -m benchmarks.large --save")}
    costs = {label: in_child(["cost"], env) for label, env in PAGES.items()}
    result["cost_of_a_cell"] = costs
    for label, rows in costs.items():
        for row in rows:
            cost = row["nanoseconds_per_cell_step"]
            print(f"{row['size']:5} squared, {label}: {cost:6.1f} ns a cell-step", flush=True)
    result["rollouts"] = []
    for grid, mode, checkpoint, limit in ROLLOUTS:
        row = measured(grid, mode, checkpoint, limit)
        result["rollouts"].append(row)
        print(
            f"{'x'.join(map(str, grid))} {mode}, {checkpoint}, {STEPS} steps: "
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB, {row['seconds']:.1f} s, "
            f"{row['nanoseconds_per_cell_step']:.0f} ns a cell-step; "
            f"plain JAX plans {row['reference_planned_bytes'] / 1e9:.0f} GB",
            flush=True,
        )
    if options.save:
        write_json(ROOT / "results" / device_name() / "large.json", result)


if __name__ == "__main__":
    main()
