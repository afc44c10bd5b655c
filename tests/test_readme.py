"""The README: its Python runs, and its commands are ones that exist."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_runs():
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["final"].shape == (8, 72, 72, 16)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    else:
        from nca_models.cli import _parser

        assert words[0] == "nca"
        _parser().parse_args(words[1:])


def test_pictures_are_there():
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).stat().st_size > 0


def test_the_table_of_speed_is_that_of_the_results():
    from benchmarks.table import table

    assert table() in README, "put the output of `python -m benchmarks.table` into the README"
