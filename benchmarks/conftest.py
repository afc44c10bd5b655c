"""Options of the suites, and the file to which each row is written as soon as it is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cases, rows
from benchmarks.contestants import Chosen, available
from benchmarks.measure import ROOT, device_name, provenance
from benchmarks.peers import PEERS
from nca_kernels.files import write_json


def pytest_addoption(parser):
    group = parser.getgroup("nca bench")
    group.addoption("--quick", action="store_true", help="small grids, rollouts only")
    group.addoption("--cases", help="names, separated by commas")
    group.addoption("--backends", help="names, separated by commas; all that run here")
    group.addoption("--peers", help="names, separated by commas, or none; all that are installed")
    group.addoption("--rounds", type=int, help="interleaved rounds")
    group.addoption("--json", type=Path, default=Path("out/bench.json"), help="where rows go")
    group.addoption("--resume", action="store_true", help="keep the rows that are there")
    group.addoption("--save", action="store_true", help="also to results/<device>/<case>.json")


def names(option: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names of an option: none of them for "none", all known ones if it was not given."""
    if option is None:
        return known
    return () if option == "none" else tuple(option.split(","))


@pytest.fixture(scope="session")
def chosen(pytestconfig) -> Chosen:
    """Who is timed, and how often."""
    option = pytestconfig.getoption
    quick = option("--quick")
    return Chosen(
        names(option("--backends"), available()),
        names(option("--peers"), tuple(PEERS)),
        rounds=option("--rounds") or (11 if quick else 7),
        longest=5.0 if quick else 60.0,
    )


@pytest.fixture
def case(case_name, pytestconfig):
    """The case of a test's parameter `case_name`; skipped if it was not asked for."""
    asked = names(pytestconfig.getoption("--cases"), tuple(cases.FULL))
    if case_name not in asked:
        pytest.skip("not asked for")
    return (cases.QUICK if pytestconfig.getoption("--quick") else cases.FULL)[case_name]


@pytest.fixture
def thorough(request, pytestconfig):
    """Skips what a quick run, or one of a few cases, leaves out.

    A run that is saved is of whole cases: a module's `CASE`, or a test's parameter `name`, says
    which one its rows belong to.
    """
    option = pytestconfig.getoption
    if option("--quick") or (option("--cases") and not option("--save")):
        pytest.skip("not asked for")
    case = getattr(request.module, "CASE", None) or request.getfixturevalue("name")
    if option("--cases") and case not in option("--cases").split(","):
        pytest.skip("not asked for")


class Rows:
    """The rows of this run; each is on disk as soon as it is added."""

    def __init__(self, config):
        self.path = config.getoption("--json")
        command = "nca bench" + (" --quick" if config.getoption("--quick") else "")
        self.about = provenance(command)
        self.rows: list[rows.Row] = []
        if config.getoption("--resume") and self.path.exists():
            before = json.loads(self.path.read_text())
            same = all(before[name] == self.about[name] for name in ("commit", "device", "command"))
            self.rows = before["rows"] if same else []

    def has(self, *key: str) -> bool:
        return any(rows.key(row) == key for row in self.rows)

    def add(self, row: rows.Row) -> None:
        self.rows = [old for old in self.rows if rows.key(old) != rows.key(row)] + [row]
        write_json(self.path, {**self.about, "rows": self.rows})

    def save(self) -> None:
        """Writes one file for each case, in place of an older one."""
        folder = ROOT / "results" / device_name()
        for name in {row["case"] for row in self.rows}:
            mine = [row for row in self.rows if row["case"] == name]
            about = {**self.about, "command": f"{self.about['command']} --save"}
            write_json(folder / f"{name}.json", {**about, "rows": mine})


_KEY = pytest.StashKey[Rows]()


def pytest_configure(config):
    config.stash[_KEY] = Rows(config)


@pytest.fixture
def record(pytestconfig):
    """``record.add(row)`` writes a row; ``record.has(*key)`` says whether there is one already."""
    return pytestconfig.stash[_KEY]


def pytest_sessionfinish(session, exitstatus):
    if session.config.getoption("--save") and exitstatus == 0:
        session.config.stash[_KEY].save()
