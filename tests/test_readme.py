"""The README and the guides: their Python runs, and their commands exist."""

import re
import shlex

import pytest

from tests import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_python_runs():
    pytest.importorskip("cax", reason="CAX is not installed")
    from tests.nca_models.compat import cax_systems

    names = {"cs": cax_systems.Growing(rngs=cax_systems.nnx.Rngs(0))}
    for block in blocks("python"):
        exec(block, names)
    assert names["final"].shape == (8, 72, 72, 16)


def test_python_of_the_guide_runs(capsys, quick_to_compile):
    pytest.importorskip("cax", reason="CAX is not installed (the extra `cax`)")
    pytest.importorskip("equinox", reason="equinox is not installed (the extra `test`)")
    guide = (ROOT / "docs/drop-in.md").read_text()
    names = {"__name__": "guide"}
    for block in blocks("python", guide):
        exec(block, names)
    printed = capsys.readouterr().out
    for block in blocks("text", guide):  # what the guide says is printed
        backend = next(b.name for b in names["nk"].backends() if b.auto)
        assert block.replace(" cpu ", f" {backend} ") in printed
    assert "It is, if the features are in the order f*C + c" in printed
    assert names["perception"].shape == (256, 256, 64)
    assert names["states"].shape == (16, 1, 64, 64, 20)


def test_python_of_large_grids_runs():
    import jax
    import jax.numpy as jnp
    import numpy as np

    import nca_kernels as nk

    perception = jnp.asarray(nk.taps(("identity", "sobel"), 4, 2))
    params = nk.RuleParams(perception=perception, layers=((jnp.ones((12, 4)), None),))
    start = {"nk": nk, "rule": nk.Rule(), "params": params, "num_steps": 3}
    key = jax.random.key(0)
    start |= {"state": jax.random.uniform(key, (2, 8, 12, 4)), "key": key}
    expected = nk.rollout(*(start[name] for name in ("rule", "params", "state", "key")), 3)
    in_tiles, sharded = blocks("python", (ROOT / "docs/large.md").read_text())
    for block, result in ((in_tiles, "state"), (sharded, "final")):
        names = dict(start)
        exec(block, names)
        np.testing.assert_array_equal(names[result], expected)


COMMANDS = [
    command.strip()
    for document in (README, (ROOT / "docs/large.md").read_text())
    for block in blocks("sh", document)
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
    if command.strip()
]


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


def test_documents_are_those_of_the_results():
    from benchmarks import report

    again = "run `nca bench --report` and commit what it writes"
    assert (ROOT / "docs/benchmarks.md").read_text() == report.markdown(), again
    for path, blocks in report.generated().items():
        assert path.read_text() == report.filled(path.read_text(), blocks), (path, again)
