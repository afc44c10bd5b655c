"""Are figures the same in a second run? ``python -m benchmarks.repeat --save``: seven minutes.

``nca bench --quick`` runs twice, each time in a process of its own, and the second run is compared
with the first as by ``--compare``.
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
    """The verdicts on the second of two runs, whose figures go to ``folder``."""
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
        outcome = verdicts(Path(folder))
    print(compare.table(outcome))
    if args.save:
        about = provenance("python -m benchmarks.repeat --save")
        write_json(ROOT / "results" / device_name() / "repeat.json", {**about, "verdicts": outcome})


if __name__ == "__main__":
    main()
