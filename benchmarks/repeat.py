"""Is a figure the same twice? ``python -m benchmarks.repeat --save`` takes seven minutes.

``nca bench --quick`` runs two times, in processes of its own, and the second run is compared with
the first as ``--compare`` compares any two.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import compare
from benchmarks.measure import ROOT, device_name, provenance
from nca_kernels.files import write_json


def verdicts(folder: Path) -> list[dict[str, Any]]:
    """Of the second of two runs, whose figures lie in ``folder``."""
    runs = []
    for name in ("first.json", "second.json"):
        command = [sys.executable, "-m", "benchmarks", "--quick", "--json", str(folder / name)]
        subprocess.run(command, check=True, cwd=ROOT.parent, stdout=subprocess.DEVNULL)
        runs.append(json.loads((folder / name).read_text())["rows"])
    return compare.compare(*runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="into benchmarks/results/<device>/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = verdicts(Path(folder))
    print(compare.table(found))
    if args.save:
        about = provenance("python -m benchmarks.repeat --save")
        write_json(ROOT / "results" / device_name() / "repeat.json", {**about, "verdicts": found})


if __name__ == "__main__":
    main()
