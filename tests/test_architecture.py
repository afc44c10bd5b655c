"""The rules of docs/architecture.md, read from the source: imports, and sizes of functions."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from tests import ROOT

CORE = {f"nca_kernels.{name}" for name in ("rule", "perception", "fire_mask", "call")}
TOOLS = {"nca_kernels.tuning", "nca_kernels.files"}  # which backends may use, too


def module_name(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, top_level_only=False):
    """Absolute names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module.endswith(("nca_kernels", ".backends")):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def ours(path):
    return {i for i in imports(path) if i.split(".")[0] in ("nca_kernels", "nca_models")}


@pytest.mark.parametrize("name", sorted(CORE | TOOLS))
def test_core_imports_only_jax_and_numpy(name):
    path = ROOT / f"{name.replace('.', '/')}.py"
    third_party = {i.split(".")[0] for i in imports(path)} - {"nca_kernels"}
    assert third_party - set(sys.stdlib_module_names) <= {"jax", "numpy"}
    assert ours(path) <= (CORE if name in CORE else CORE | TOOLS)


@pytest.mark.parametrize("path", files("nca_kernels/backends"), ids=module_name)
def test_backends_import_the_core_and_themselves(path):
    if path.parent.name == "backends":
        return  # the list of backends, which registers them
    package = f"nca_kernels.backends.{path.relative_to(ROOT / 'nca_kernels/backends').parts[0]}"
    allowed = CORE | TOOLS
    assert all(i in allowed or i.startswith(package) for i in ours(path)), ours(path)


@pytest.mark.parametrize("name", ["dispatch", "primitive"])
def test_dispatch_never_names_a_backend(name):
    path = ROOT / f"nca_kernels/{name}.py"
    backends = {p.name for p in (ROOT / "nca_kernels/backends").iterdir() if p.is_dir()}
    backends -= {"cpu"}  # which is a platform of JAX, too
    strings = {
        n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)
    }
    assert not backends & {s for s in strings if isinstance(s, str)}
    assert not any(i.startswith("nca_kernels.backends") for i in ours(path))


@pytest.mark.parametrize("name", ["rollout", "sharded_rollout", "tiled_rollout", "parts"])
def test_rollouts_see_step_by_its_public_interface(name):
    path = ROOT / f"nca_kernels/ops/{name}.py"
    others = {f"nca_kernels.ops.{other}" for other in ("step", "rollout", "parts")}
    assert ours(path) <= CORE | others | {"nca_kernels.checks", "nca_kernels.dispatch"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "nca_kernels.ops.step":
            assert [alias.name for alias in node.names] == ["step"]
        if isinstance(node, ast.ImportFrom) and node.module == "nca_kernels.dispatch":
            assert [alias.name for alias in node.names] == ["requested"]


def test_ops_do_not_import_backends():
    for path in files("nca_kernels/ops"):
        assert not any("backends" in i for i in ours(path)), path


def test_models_use_public_names_only():
    for path in files("nca_models"):
        kernels = {i for i in ours(path) if i.startswith("nca_kernels.")}
        public = {f"nca_kernels.{name}" for name in __import__("nca_kernels").__all__}
        assert kernels <= public | {"nca_kernels.testing"}, (path, kernels)


def test_no_training_sees_what_it_is_measured_by():
    for path in [*files("nca_models/training"), ROOT / "nca_models/texture_loss.py"]:
        assert not any(name.startswith("nca_models.measures") for name in ours(path)), path


def test_no_circle_of_imports():
    """Among all files, imports within functions included; a package itself holds its modules."""
    for package in ("nca_kernels", "nca_models"):
        names = {module_name(path): path for path in files(package)}
        graph = {
            name: {other for other in ours(path) & names.keys() if not name.startswith(other)}
            for name, path in names.items()
        }
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            raise AssertionError(" -> ".join(error.args[1])) from None


def test_nothing_imports_tests_or_benchmarks():
    for path in [*files("nca_kernels"), *files("nca_models")]:
        assert not {i.split(".")[0] for i in imports(path)} & {"tests", "benchmarks"}, path


def test_importing_needs_jax_and_numpy_alone():
    """Also: no tool-chain of a backend is imported before it is used."""
    code = (
        "import sys, nca_kernels\n"
        "heavy = {'flax', 'optax', 'orbax', 'PIL', 'matplotlib', 'triton', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print(any(m.startswith('nca_kernels.backends.') for m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[:2] == ["[]", "False"]


def test_every_backend_inherits_the_suite():
    """The oracle alone does not, which the suite compares the others with."""
    packages = {path.parent.name for path in (ROOT / "nca_kernels/backends").glob("*/__init__.py")}
    for name in packages - {"reference"}:
        tests = "".join(path.read_text() for path in files(f"tests/nca_kernels/backends/{name}"))
        for suite in ("StepSuite", "AttentionSuite"):
            assert f"({suite}):" in tests, f"no test of {name} inherits {suite}"


# ---- sizes of functions ----

MOST_LINES, MOST_POSITIONAL = 60, 6
# Their signatures are the public contract, that of another library, or that of a backend's kernels
# with the engine that runs them.
CONTRACTS = {
    "nca_kernels.backends.reference.plain_step.update",
    "nca_kernels.backends.triton.attention_calls.backward",
    "nca_kernels.backends.triton.step_calls.backward",
    "nca_kernels.ops.rollout.rollout",
    "nca_kernels.ops.sharded_rollout.sharded_rollout",
    "nca_kernels.ops.tiled_rollout.tiled_rollout",
    "nca_kernels.ops.update.update",
    "nca_models.compat.jax_nca_trainer.emit_metrics",
    "nca_models.compat.jax_nca_trainer.train",
}


def functions(path):
    """(full name, node) of every function; Triton kernels are not in Python's language."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            if not decorators & {"triton.jit", "jit"}:
                yield f"{module_name(path)}.{node.name}", node


def is_large(node):
    positional = len(node.args.posonlyargs + node.args.args)
    return node.end_lineno - node.lineno >= MOST_LINES or positional > MOST_POSITIONAL


def test_functions_are_short_and_take_few_positional_arguments():
    folders = ("nca_kernels", "nca_models", "benchmarks", "tests/tools")
    paths = [path for folder in folders for path in files(folder)]
    large = {name for path in paths for name, node in functions(path) if is_large(node)}
    assert large <= CONTRACTS, large - CONTRACTS
    assert large >= CONTRACTS, "they need no exception"
