"""Seconds per training step of Growing NCA, trained by ``nca train``.

``python -m benchmarks.training --preset paper --steps 100 --save`` runs the command for one step
and for 101, each in a process of its own; the difference is the time of 100 steps alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import ROOT, device_name, provenance
from nca_kernels.files import write_json


def seconds(preset: str, backend: str, steps: int, folder: Path) -> float:
    """Wall time of one ``nca train``."""
    command = ["train", "growing", "--preset", preset, "--backend", backend, "--steps", str(steps)]
    program = "import sys; from nca_models.cli import main; sys.exit(main(sys.argv[1:]))"
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", program, *command, "--out", str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--backends", nargs="+", default=["auto", "xla"])
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for backend in args.backends:
            first, all_steps = (
                seconds(args.preset, backend, n, Path(folder) / f"{backend}-{n}")
                for n in (1, 1 + args.steps)
            )
            per_step = (all_steps - first) / args.steps
            rows.append({"backend": backend, "steps": args.steps, "seconds_per_step": per_step})
            print(json.dumps(rows[-1]), flush=True)
    if args.save:
        command = f"python -m benchmarks.training --preset {args.preset} --steps {args.steps}"
        path = ROOT / "results" / device_name() / f"training_{args.preset}.json"
        write_json(path, {**provenance(f"{command} --save"), "rows": rows})


if __name__ == "__main__":
    main()
