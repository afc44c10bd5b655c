"""Instructions of the native kernels for each cell: the same on a busy machine and an idle one.

``python -m benchmarks.instructions --save`` builds the kernels without JAX, for AVX2 (which
valgrind knows), and counts the instructions of a call under valgrind's cachegrind. CI counts them
again and refuses a rise of more than ``BOUND``; the counts depend a little on the compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measure import ROOT, provenance
from nca_kernels.files import write_json

BOUND = 1.05
RESULTS = ROOT / "results" / "instructions.json"
SOURCES = ROOT.parent / "nca_kernels" / "backends" / "cpu" / "src"
CELLS = 32 * 32
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-ffp-contract=fast", "-mavx2", "-mfma"]
DEFINED = ["-DNCA_ISA=avx2", "-DNCA_X86"]


def missing() -> str | None:
    """Why nothing can be counted here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the counts are of x86-64, and this is {platform.machine()}"
    for program in (_compiler(), "valgrind"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return None


def count() -> dict[str, float]:
    """Instructions a cell of a forward and of a backward step of Growing NCA."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as two:
        program = Path(folder) / "steps"
        sources = [ROOT / "instructions.cpp", SOURCES / "kernels.cpp", SOURCES / "parallel.cpp"]
        objects = [program.with_name(f"{source.stem}.o") for source in sources]
        list(two.map(_compile, sources, objects))
        subprocess.run([_compiler(), *objects, "-o", program], check=True)
        modes = ("forward", "backward")
        once, twice = (
            list(two.map(lambda mode, n=calls: _instructions(program, mode, n), modes))
            for calls in (1, 2)
        )
    return {mode: (b - a) / CELLS for mode, a, b in zip(modes, once, twice, strict=True)}


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _compile(source: Path, to: Path) -> None:
    command = [_compiler(), *FLAGS, *DEFINED, f"-I{SOURCES}", "-c", str(source), "-o", str(to)]
    subprocess.run(command, check=True, capture_output=True)


def _instructions(program: Path, mode: str, calls: int) -> int:
    """Instructions of a whole run of the program."""
    options = ["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    command = ["valgrind", *options, str(program), mode, str(calls)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    counted = re.search(r"I\s+refs:\s+([\d,]+)", said)
    assert counted is not None, said
    return int(counted.group(1).replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if reason := missing():
        raise SystemExit(reason)
    counts = count()
    before = json.loads(RESULTS.read_text())["a_cell"] if RESULTS.exists() else {}
    for mode, instructions in counts.items():
        change = f", {instructions / before[mode]:.3f} of what it was" if mode in before else ""
        print(f"{mode:9} {instructions:8.1f} instructions a cell{change}")
    if options.save:
        command = [_compiler(), "--version"]
        version = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        about = provenance("python -m benchmarks.instructions --save")
        write_json(RESULTS, {**about, "compiler": version.splitlines()[0], "a_cell": counts})


if __name__ == "__main__":
    main()
