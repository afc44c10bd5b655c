"""The native CPU kernels: conformance on every instruction set, threads, and doing without."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.backends.cpu import library
from nca_kernels.testing import CONFORMANCE, conformance
from nca_kernels.testing.cases import Case
from nca_kernels.testing.compare import assert_same_bits, error_ratio
from tests import ROOT
from tests.nca_kernels.backends.suite import CASES, StepSuite, pairs

SETS = () if library.missing() else library.instruction_sets()
pytestmark = pytest.mark.skipif(not SETS, reason=f"no native kernels: {library.missing()}")


class TestStep(StepSuite):
    backend = "cpu"
    transformations = StepSuite.transformations + pairs(
        ["wanted_gradients_only"], ("inputs_per_cell", "dense_replicate", "perception_bias")
    )

    @pytest.fixture(params=SETS)
    def kernels(self, request):
        with library.using(request.param):
            yield


@pytest.mark.parametrize("grid", [(1, 9), (7, 70), (3, 1, 4)], ids=str)
@pytest.mark.parametrize("padding", dispatch.covers("cpu").rule["padding"])
def test_alive_radius_at_borders(padding, grid):
    """Pools that reach beyond the grid, with every padding."""
    for radius in (2, 11):
        rule = nk.Rule(
            padding=padding, alive=nk.Alive(1, 1.2, radius), step_size=3.0, precision="float32"
        )
        conformance.check_values_and_gradients("cpu", Case(f"radius {radius}", grid, rule))


def test_unknown_names_are_refused(monkeypatch):
    """The library itself refuses them: it reads names, not positions in a list of Python's."""
    calls = import_module("nca_kernels.backends.cpu.step")
    attributes = calls._attributes
    monkeypatch.setattr(
        calls, "_attributes", lambda *args: {**attributes(*args), "activation": "softplus"}
    )
    jax.clear_caches()
    with pytest.raises(jax.errors.JaxRuntimeError, match="know no Activation named softplus"):
        conformance.check_values_and_gradients("cpu", CASES["line"])


# The backend hardly chooses tile registers for cases as small as these: here all run in them.
OF_SETS = [
    pytest.param(name, case, id=f"{name}-{case}")
    for name in SETS
    for case in (CONFORMANCE if name == "amx" else CONFORMANCE[::5])
]


@pytest.mark.parametrize(("name", "case"), OF_SETS)
def test_values_and_gradients_of_instruction_sets(name, case):
    with library.using(name):
        conformance.check_values_and_gradients("cpu", case)


def test_several_python_threads_at_once():
    cases = [CASES[name] for name in ("plane", "volume", "growing", "many_blocks")] * 3
    run = partial(conformance.value_and_gradients, "cpu")
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: run(case, case.arguments(), calls=4), cases))
    for case, got in zip(cases, together, strict=True):
        assert_same_bits(got, run(case, case.arguments(), calls=1), case.name)


BITS = """
import os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import hashlib, jax
from nca_kernels.backends.cpu import library
from nca_kernels.testing import CONFORMANCE
from nca_kernels.testing.conformance import value_and_gradients
for case in CONFORMANCE:
    if case.name in ("many_blocks", "growing", "volume_circular", "mostly_dead"):
        for name in library.instruction_sets()[:2]:
            with library.using(name):
                out = value_and_gradients("cpu", case, case.arguments(), calls=1)
                out = jax.tree.leaves(jax.block_until_ready(out))
            print(case, hashlib.sha256(b"".join(bytes(memoryview(a)) for a in out)).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity of threads here")
def test_the_same_bits_for_any_number_of_threads():
    runs = [
        subprocess.run([sys.executable, "-c", BITS, n], capture_output=True, text=True, cwd=ROOT)
        for n in ("one", "all")
    ]
    assert runs[0].stdout.count("\n") == 4 * len(SETS[:2]), runs[0].stderr
    assert runs[0].stdout == runs[1].stdout


WIDE = replace(CASES["plane"], name="wide", channels=24, hidden=(100, 40))


@pytest.mark.parametrize("instruction_set", SETS)
def test_float32_means_float32(instruction_set):
    """Errors against float64 are as small as those of XLA's float32, without a few bits lost."""
    args = WIDE.arguments()
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: a.astype("float64") if a.dtype == jnp.float32 else a, args)
        expected = conformance.value_and_gradients("reference", WIDE, exact, calls=1)

    def errors(backend):
        got = conformance.value_and_gradients(backend, WIDE, args, calls=1)
        return [
            error_ratio(np.asarray(a, np.float64), np.asarray(b, np.float64))
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        ]

    with library.using(instruction_set):
        native = errors("cpu")
    for ours, plain in zip(native, errors("reference"), strict=True):
        assert ours <= 2 * plain + 1e-8, (ours, plain)


@pytest.mark.skipif("amx" not in SETS, reason="this processor has no tile registers (AMX)")
def test_tile_registers_are_chosen_for_large_products():
    """And for no others. The bits, which differ a little, tell which instruction set ran."""
    for case, expected in ((CASES["growing"], "amx"), (CASES["plane"], SETS[1])):
        run = partial(conformance.value_and_gradients, "cpu", case, case.arguments(), 1)
        chosen = jax.block_until_ready(run())
        with library.using(expected):
            assert_same_bits(run(), chosen, f"{case} on {expected}")


EMULATED = """
from nca_kernels.backends.cpu import library
from nca_kernels.testing import CONFORMANCE
from nca_kernels.testing.conformance import check_values_and_gradients
assert library.instruction_sets() == ("amx", "portable")
with library.using("amx"):
    for case in CONFORMANCE[::2]:
        check_values_and_gradients("cpu", case, 1)
        print(case)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile with")
def test_tile_products_without_tile_registers(tmp_path):
    """AMX's products, emulated in plain C++: on any machine with g++ and XLA's headers."""
    library_path = tmp_path / "libnca_cpu.so"
    sources = ROOT / "nca_kernels" / "backends" / "cpu" / "src"
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wno-psabi", "-DNCA_HAS_AMX", "-DNCA_EMULATE_AMX"]
    flags += [f"-isystem{Path(jaxlib.__file__).parent / 'include'}"]

    def compile(name, isa, *more):
        to = tmp_path / f"{name}_{isa}.o"
        command = [
            "g++",
            *flags,
            f"-DNCA_ISA={isa}",
            *more,
            "-c",
            sources / f"{name}.cpp",
            "-o",
            to,
        ]
        subprocess.run(command, check=True)
        return to

    objects = [compile("handlers", "none"), compile("parallel", "none")]
    objects += [compile("kernels", "portable"), compile("kernels", "amx", "-DNCA_AMX")]
    subprocess.run(["g++", "-shared", *objects, "-o", library_path], check=True)
    env = os.environ | {library.ENVIRONMENT: str(library_path)}
    run = subprocess.run(
        [sys.executable, "-c", EMULATED], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert run.stdout.count("\n") == len(CONFORMANCE[::2]), run.stdout + run.stderr


def test_an_unknown_instruction_set():
    expected = r"must be one of .*portable here, got 'sse9'"
    with pytest.raises(ValueError, match=expected), library.using("sse9"):
        pass


WITHOUT = """
import nca_kernels as nk
from nca_kernels.testing import CONFORMANCE
status = {b.name: b for b in nk.backends()}
assert status["xla"].auto and not status["cpu"].available
print(status["cpu"].reason)
case = next(c for c in CONFORMANCE if c.name == "plane")
params, state, key, _ = case.arguments()
nk.step(case.rule, params, state, key)
try:
    nk.step(case.rule, params, state, key, backend="cpu")
except nk.BackendUnavailable as error:
    print(error)
"""


def test_without_the_library():
    """As after an install without a compiler: auto takes xla, and the reason says what to do."""
    env = os.environ | {"NCA_CPU_LIBRARY": "/nowhere/libnca_cpu.so"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert run.stdout.count("install GCC or Clang") == 2, run.stdout + run.stderr
