"""What the `paper` presets take on this machine: a few training steps of each, and the estimate.

``python -m benchmarks.paper --save`` takes about ten minutes on two cores. The steps of each system
run in a process of their own, whose peak of memory is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.large import peak_rss
from benchmarks.measure import ROOT, device_name, provenance
from nca_kernels.files import write_json
from nca_models import systems


def child(name: str) -> None:
    """Estimate and peak of one system, as JSON on standard output."""
    from nca_models.training import estimate
    from nca_models.training.trainer import Trainer

    module = systems.load(name)
    config = module.PRESETS["paper"]
    with tempfile.TemporaryDirectory() as folder:
        module.SystemClass.prepare(config, None, Path(folder))
        estimated = estimate.estimate(Trainer(module.SystemClass(config, Path(folder))))
    print(json.dumps({"system": name, **asdict(estimated), "peak_rss_bytes": peak_rss()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", choices=systems.names())
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    rows = []
    for name in systems.names():
        command = [sys.executable, "-m", "benchmarks.paper", "--child", name]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        row = json.loads(out.splitlines()[-1])
        rows.append(row)
        print(
            f"{name:18} {row['seconds']:7.1f} s a training step, {row['limit']:.1e} s on an H200 "
            f"at its limit; {row['memory'] / 1e9:.1f} GB estimated, "
            f"{row['peak_rss_bytes'] / 1e9:.1f} GB at the peak",
            flush=True,
        )
    if options.save:
        about = provenance("python -m benchmarks.paper --save")
        write_json(ROOT / "results" / device_name() / "paper.json", {**about, "systems": rows})


if __name__ == "__main__":
    main()
