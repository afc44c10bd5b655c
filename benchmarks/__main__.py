"""The command `nca bench`: times our backends and the peers on this machine, with progress.

The suites are the files in benchmarks/suites, run by pytest; this asks for them, shows how far they
are, and prints what they found. `pytest benchmarks/` times one contestant after another instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

import nca_kernels as nk
from benchmarks import cases, compare, report
from benchmarks.measure import ROOT
from benchmarks.peers import PEERS

EPILOG = """\
examples:
  nca bench --quick                            a few minutes: every peer that is installed
  nca bench --cases growing --peers cax,torch  one case at full size
  nca bench --save --report                    everything; results and docs/benchmarks.md
  nca bench --quick --compare before.json      did a change make it slower?

A run that was interrupted goes on with --resume. Peers: pip install cax torch, and
pip install --no-deps jax-nca.
"""


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    if options.report and not options.save:  # documents of what is saved already
        print("\n".join(map(str, report.write())))
        return 0
    old = json.loads(options.compare.read_text())["rows"] if options.compare else []
    if not options.resume:  # rows of an older run are not results of this one
        options.json.unlink(missing_ok=True)
    code = _run(options)
    if not options.json.exists():
        return code or 1
    result = json.loads(options.json.read_text())
    print(report.text(result))
    print(f"\nall figures: {options.json}")
    if options.report:
        print("\n".join(map(str, report.write())))
    if options.compare:
        verdicts = compare.compare(old, result["rows"])
        print(f"\nagainst {options.compare}\n{compare.table(verdicts) or 'nothing in common'}")
        if not verdicts or any(v["verdict"] == "slower" for v in verdicts):
            return 1
    return code


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nca bench",
        description=__doc__.split("\n\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small grids, rollouts only: under five minutes")
    add("--cases", help=f"of {','.join(cases.FULL)}; all")
    add("--backends", help="names, separated by commas; all that run here")
    add("--peers", help=f"of {','.join(PEERS)}, or none; all that are installed")
    add("--rounds", type=int, help="interleaved rounds; 7, or 11 if quick")
    add("--json", type=Path, default=Path("out/bench.json"), help="where the figures go")
    add("--resume", action="store_true", help="go on with the --json of an interrupted run")
    add("--save", action="store_true", help="into benchmarks/results/<device>/, a file a case")
    add("--compare", type=Path, metavar="FILE", help="an older --json; exit code 1 if slower")
    add("--report", action="store_true", help="write docs/benchmarks.md of what is saved")
    options = parser.parse_args(argv)
    here = {b.name: b.reason for b in nk.backends()}
    _check(parser, "--cases", options.cases, dict.fromkeys(cases.FULL))
    _check(parser, "--backends", options.backends, here)
    if options.peers != "none":
        options.peers = options.peers and options.peers.replace("jax-nca", "jax_nca")
        _check(parser, "--peers", options.peers, dict.fromkeys(PEERS))
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    if options.compare and not options.compare.is_file():
        parser.error(f"--compare {options.compare}: there is no such file; make one with --json")
    if options.compare and '"rows"' not in options.compare.read_text(errors="replace"):
        parser.error(f"--compare {options.compare}: is not a file that --json wrote")
    if options.save and (options.quick or options.backends or options.peers):
        parser.error("--save is for whole cases: not with --quick, --backends or --peers")
    options.json = options.json.absolute()
    return options


def _check(
    parser: argparse.ArgumentParser, flag: str, text: str | None, allowed: dict[str, Any]
) -> None:
    """Exits with an error if a name is unknown, or cannot run here for a reason in ``allowed``."""
    for name in text.split(",") if text is not None else ():
        if name not in allowed:
            parser.error(f"{flag} {text}: {name!r} is not one of {', '.join(allowed)}")
        if allowed[name]:
            parser.error(f"{flag} {text}: {name} cannot run here: {allowed[name]}")


def _run(options: argparse.Namespace) -> int:
    arguments = ["-oaddopts=", "-pno:terminal", "-pno:cacheprovider", f"--json={options.json}"]
    for flag in ("quick", "resume", "save"):
        arguments += [f"--{flag}"] if getattr(options, flag) else []
    for flag in ("cases", "backends", "peers", "rounds"):
        value = getattr(options, flag)
        arguments += [] if value is None else [f"--{flag}", str(value)]
    progress = Progress()
    suites = sorted(map(str, (ROOT / "suites").glob("[a-z]*.py")))
    code = int(pytest.main([*arguments, "--rootdir", str(ROOT), *suites], plugins=[progress]))
    for text in progress.failures:
        print(text, file=sys.stderr)
    return code


class Progress:
    """A pytest plugin: shows a progress bar and collects failures."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.failures: list[str] = []

    def pytest_collection_finish(self, session: Any) -> None:
        self.bar = tqdm(total=len(session.items), unit="row", dynamic_ncols=True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.bar.set_description(nodeid.rpartition("::")[2])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}\n{report.longreprtext}")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}\n{report.longreprtext}")

    def pytest_runtest_logfinish(self) -> None:
        self.bar.update()

    def pytest_sessionfinish(self) -> None:
        if self.bar is not None:
            self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
