"""The native CPU kernels: conformance on every instruction set, threads, and doing without."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import nca_kernels as nk
from nca_kernels.backends.cpu import library
from nca_kernels.rule import ACTIVATIONS
from nca_kernels.testing import CONFORMANCE, TRANSFORMATION_CHECKS, conformance
from nca_kernels.testing.compare import assert_close, assert_same_bits

ROOT = Path(__file__).parents[2]
BY_NAME = {case.name: case for case in CONFORMANCE}
SETS = () if library.missing() else library.instruction_sets()
pytestmark = pytest.mark.skipif(not SETS, reason=f"no native kernels: {library.missing()}")


@pytest.fixture(params=SETS)
def instruction_set(request):
    library.use(request.param)
    yield request.param
    library.use(SETS[0])


@pytest.mark.parametrize("case", CONFORMANCE, ids=str)
def test_values_and_gradients(case):
    conformance.check_values_and_gradients("cpu", case)


OTHER_SETS = [
    pytest.param(name, case, id=f"{name}-{case}") for name in SETS[1:] for case in CONFORMANCE[::5]
]


@pytest.mark.parametrize(("name", "case"), OTHER_SETS)
def test_values_and_gradients_of_other_sets(name, case):
    library.use(name)
    try:
        conformance.check_values_and_gradients("cpu", case)
    finally:
        library.use(SETS[0])


@pytest.mark.parametrize("case", ["line", "one_cell", "plane_batch_2x3", "rarely_fires", "volume"])
def test_mask(instruction_set, case):
    conformance.check_mask("cpu", BY_NAME[case])


def test_fate_hangs_on_dead_neighbours(instruction_set):
    conformance.check_fate_hangs_on_dead_neighbours("cpu")


@pytest.mark.parametrize("case", ["plane", "inputs_per_sample"])
@pytest.mark.parametrize("check", TRANSFORMATION_CHECKS)
def test_transformations(check, case):
    TRANSFORMATION_CHECKS[check]("cpu", BY_NAME[case])


@pytest.mark.parametrize("case", ["inputs_per_cell", "dense_replicate", "perception_bias"])
def test_only_the_wanted_gradients(case):
    """Each gradient alone is the same as all together."""
    case = BY_NAME[case]
    params, state, key, inputs = case.arguments()

    def loss(backend, operands):
        params, state, inputs = operands
        out = nk.step(case.rule, params, state, key, inputs, backend=backend)
        return jnp.sum(conformance.cotangent_of(out) * out)

    leaves, tree = jax.tree.flatten((params, state, inputs))
    expected = jax.tree.leaves(jax.grad(partial(loss, "reference"))((params, state, inputs)))
    for i, leaf in enumerate(leaves):

        def alone(leaf, i=i):
            return loss("cpu", jax.tree.unflatten(tree, [*leaves[:i], leaf, *leaves[i + 1 :]]))

        assert_close(jax.jit(jax.grad(alone))(leaf), expected[i], 1e-5, f"gradient {i} alone ")


def test_a_mask_that_is_given():
    """Bits of another generator than threefry are drawn by JAX and handed over."""
    case = BY_NAME["plane"]
    params, state, _, _ = case.arguments()
    key = jax.random.key(3, impl="rbg")
    run = partial(nk.step, case.rule, params, state, key)
    assert_close(run(backend="cpu"), run(backend="reference"), 1e-5, "state")


def test_several_python_threads_at_once():
    cases = [BY_NAME[name] for name in ("plane", "volume", "growing", "many_blocks")] * 3
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
from nca_kernels.testing import CONFORMANCE
from nca_kernels.testing.conformance import value_and_gradients
for case in CONFORMANCE:
    if case.name in ("many_blocks", "growing", "volume_circular", "mostly_dead"):
        out = jax.tree.leaves(value_and_gradients("cpu", case, case.arguments(), calls=1))
        print(case, hashlib.sha256(b"".join(bytes(memoryview(a)) for a in out)).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity of threads here")
def test_the_same_bits_for_any_number_of_threads():
    runs = [
        subprocess.run([sys.executable, "-c", BITS, n], capture_output=True, text=True, cwd=ROOT)
        for n in ("one", "all")
    ]
    assert runs[0].stdout.count("\n") == 4, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout


def test_float64_says_what_to_do():
    case = BY_NAME["plane"]
    with jax.enable_x64(True):
        params, state, key, _ = case.arguments()
        with pytest.raises(nk.BackendUnavailable, match="float32 or bfloat16"):
            nk.step(case.rule, params, state.astype("float64"), key, backend="cpu")


def test_an_unknown_instruction_set():
    with pytest.raises(ValueError, match=r"must be one of .*portable here, got 'sse9'"):
        library.use("sse9")


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


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_what_is_not_a_number_is_not_hidden(activation, instruction_set):
    conformance.check_nan_is_not_hidden("cpu", BY_NAME["always_fires_no_alive"], activation)


def test_a_draw_equal_to_the_fire_rate(instruction_set):
    conformance.check_a_draw_equal_to_the_fire_rate("cpu", BY_NAME["line"])
