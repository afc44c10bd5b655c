"""The layers of nca_models, read from its source: imports, and names of systems."""

import ast
import re
from graphlib import CycleError, TopologicalSorter

import pytest

from tests import ROOT

FILES = sorted((ROOT / "nca_models").rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(path):
    """The modules of nca_models that a file imports anywhere, also if for typing only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name in MODULES)


IMPORTS = {name: set(imported(path)) for name, path in MODULES.items()}


def test_no_circle_of_imports():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def reached(name):
    """All modules that an import of `name` loads in turn, itself included."""
    modules, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module not in modules:
            modules.add(module)
            waiting += IMPORTS[module]
    return modules


def test_the_settings_are_below_the_systems_and_those_below_the_trainer():
    assert reached("nca_models.training.config") == {"nca_models.training.config"}
    systems = [name for name in MODULES if name.startswith("nca_models.systems")]
    assert len(systems) > 5
    for name in systems:
        above = {"trainer", "estimate", "run_folder", "demo", "sweep", "cli"}
        assert not {module.split(".")[-1] for module in reached(name)} & above, name
    assert "nca_models.training.config" in IMPORTS["nca_models.training.trainer"]


def strings(path):
    """The strings of a file, without its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in documentation:
            yield node.value


def test_nothing_but_its_file_names_a_system():
    names = {path.stem for path in FILES if path.parent.name == "systems"} - {"__init__"}
    assert len(names) > 4
    for path in FILES:
        words = {word for text in strings(path) for word in re.findall("[a-z_]+", text)}
        assert not (names - {path.stem}) & words, path
