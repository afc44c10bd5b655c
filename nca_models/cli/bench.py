"""`nca bench`: start the benchmark suite, which is in the repository but not in the package."""

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from nca_models.cli.common import Commands, InputError


def add(commands: Commands) -> None:
    """Add the command, which hands all of its arguments, `--help` too, to benchmarks/."""
    bench = commands.add_parser(
        "bench", help="time backends and peers on this machine", prefix_chars="\0", add_help=False
    )
    bench.add_argument("arguments", nargs="*")
    bench.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise InputError(
            "nca bench needs the repository, which has the suite and its results: clone it and "
            "`pip install -e '.[models,test,peers]'` there"
        )
    if find_spec("pytest") is None:
        raise InputError("nca bench needs pytest: pip install 'nca-kernels[models,test,peers]'")
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", *args.arguments]
    suite = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    while True:
        try:
            return suite.wait()
        except KeyboardInterrupt:  # the suite receives it too, and ends in an orderly way
            continue
