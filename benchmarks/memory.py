"""Peak memory of one training step of a long rollout, each backend in a process of its own.

``python -m benchmarks.memory`` measures 64 steps of 512x512x16 with ``checkpoint="sqrt"``, and the
reference as plain JAX keeps it; what the reference would need beyond this machine's memory is
taken from XLA's own analysis of the compiled program.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

import nca_kernels as nk
from benchmarks.measure import ROOT, device_name, provenance, write_json
from nca_kernels.testing import BENCHMARKS


def training_step(size: int, steps: int, backend: str, checkpoint: str) -> Any:
    """The compiled gradient of a rollout, lowered from shapes only, and its abstract arguments."""
    growing = BENCHMARKS[0]
    params = replace(growing, grid=(8, 8)).arguments().params  # the weights do not depend on it

    def loss(params: Any, key: Any) -> Any:
        state = jax.random.normal(key, (1, size, size, growing.channels))
        if checkpoint == "none":  # plain JAX: autodiff keeps every intermediate
            body = lambda s, t: (
                nk.step(growing.rule, params, s, jax.random.fold_in(key, t), backend=backend),
                None,
            )
            final = jax.lax.scan(body, state, jnp.arange(steps))[0]
        else:
            final = nk.rollout(
                growing.rule, params, state, key, steps, checkpoint=checkpoint, backend=backend
            )
        return jnp.mean(final**2)

    args = (params, jax.random.key(0))
    return jax.jit(jax.grad(loss)).lower(*args).compile(), args


def analysed_bytes(compiled: Any) -> int:
    """What XLA will allocate for the call."""
    stats = compiled.memory_analysis()
    return stats.temp_size_in_bytes + stats.argument_size_in_bytes + stats.output_size_in_bytes


def child(size: int, steps: int, backend: str, checkpoint: str, run: bool) -> None:
    compiled, args = training_step(size, steps, backend, checkpoint)
    row = {
        "backend": backend,
        "checkpoint": checkpoint,
        "xla_analysis_bytes": analysed_bytes(compiled),
    }
    if run:
        jax.block_until_ready(compiled(*args))
        row["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("BACKEND", "CHECKPOINT", "RUN"))
    options = parser.parse_args()
    if options.child:
        backend, checkpoint, run = options.child
        return child(options.size, options.steps, backend, checkpoint, run == "run")
    rows = []
    for backend, checkpoint, run in (
        ("xla", "sqrt", "run"),
        ("xla", "all", "run"),
        ("reference", "none", "analyse"),
    ):
        command = [sys.executable, "-m", "benchmarks.memory", "--size", str(options.size)]
        command += ["--steps", str(options.steps), "--child", backend, checkpoint, run]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(out.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    if options.save:
        reproduce = (
            f"python -m benchmarks.memory --size {options.size} --steps {options.steps} --save"
        )
        content = {
            **provenance(reproduce),
            "size": options.size,
            "steps": options.steps,
            "rows": rows,
        }
        write_json(ROOT / "results" / device_name() / "memory.json", content)


if __name__ == "__main__":
    main()
