"""Finds out all that needs a GPU, the most valuable first; see ``benchmarks.gpu``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from zipfile import BadZipFile

from benchmarks.gpu import kit, report
from benchmarks.gpu.items import Asked, Refused, listed
from benchmarks.gpu.results import LOG, RunResults
from benchmarks.gpu.runner import Course, Machinery
from benchmarks.gpu.stages import STAGES
from benchmarks.measure import commit

MINUTES = 9.0


class Ended(BaseException):
    """The run was ended by a signal, whose number it has."""


def main() -> int:
    options = _parser().parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="nca-gpu-") as scratch, _signals_raise():
            return _run(options, Path(scratch))
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 2
    except Ended as ended:
        return 128 + int(ended.args[0])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where all that is found goes")
    add("--stages", default=",".join(STAGES), help=f"some of {','.join(STAGES)}")
    add("--backends", default="", help="the first above all; all that run, if not given")
    add("--items", default="", metavar="TEXT", help="only those whose names contain it")
    add("--minutes", type=float, default=MINUTES, help=f"for all stages ({MINUTES:.0f})")
    add("--kit", type=Path, metavar="DIR", help="made by python -m benchmarks.gpu.kit")
    add("--commit", help="where git cannot tell it")
    add("--resume", action="store_true", help="goes on: what DIR has already is not done again")
    add("--any-device", action="store_true", help="tiny sizes, to try the command itself")
    return parser


def _run(options: argparse.Namespace, scratch: Path) -> int:
    names = listed(options.stages, STAGES)
    results = _results(options)
    environment = _environment(options.kit, scratch)
    course = Course(
        stages={name: STAGES[name] for name in names},
        asked=Asked(
            backends=tuple(name for name in options.backends.split(",") if name),
            tiny=options.any_device,
            any_device=options.any_device,
            out=str(options.out),
        ),
        results=results,
        machinery=Machinery((sys.executable, "-m", "benchmarks.gpu.child"), environment),
        end=time.monotonic() + 60 * options.minutes,
        only=options.items,
        told=report.line,
    )
    status = 0
    try:
        course.run()
    except Ended as ended:
        status = 128 + ended.args[0]
    summary = results.about.get("not_summarized") or report.markdown(results)
    print(f"\n{summary}\nin {options.out}", flush=True)
    broken = any("stderr" in left for left in results.left_out)
    return status or int(broken or bool(results.failed()))


def _results(options: argparse.Namespace) -> RunResults:
    about = {"commit": options.commit or commit()}
    try:
        log = options.out / LOG
        if log.exists() and log.read_text() and not options.resume:
            raise Refused(f"{log.parent} has results already: add --resume, or name another folder")
        results = RunResults(options.out, about, report.summarize)
    except OSError as error:
        raise Refused(f"--out: {options.out} cannot be written: {error}") from error
    return results


def _environment(folder: Path | None, scratch: Path) -> dict[str, str]:
    """The environment of children, which share compiled programs and preallocate no memory."""
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "xla"),
    }
    if folder is None:
        return environment
    reason = kit.unfit(folder)
    try:
        if reason is None:
            return environment | kit.unpack(folder, scratch)
    except (OSError, BadZipFile) as error:
        reason = f"it is broken ({error})"
    print(f"the kit is left alone: {reason}", flush=True)
    return environment


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGINT raise ``Ended``, so that the results are put in order."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
