"""The Triton kernels in Triton's interpreter, through the same cases as every backend."""

from dataclasses import replace
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux only)")

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.backends.triton.engine import ENGINE
from nca_kernels.backends.triton.launch import missing
from nca_kernels.rule import Alive
from nca_kernels.testing import (
    CONFORMANCE,
    TRANSFORMATION_CHECKS,
    Case,
)
from nca_kernels.testing.compare import assert_close
from nca_kernels.testing.conformance import check_values_and_gradients
from nca_kernels.tuning import Launch
from tests.nca_kernels.backends.suite import CASES, AttentionSuite, StepSuite, pairs
from tests.tools import triton_host
from tests.tools.races import Accesses

triton_host.register()
BACKEND = triton_host.NAME


# The interpreter is slow: all cases with one of the versions that CI has, a third with others.
CASES_RUN = CONFORMANCE if version("triton").startswith("3.6.") else CONFORMANCE[::3]


def smaller(case):
    """The case of many blocks on a smaller grid: as many hidden units, several tiles a program."""
    return replace(case, grid=(24, 20)) if case.name == "many_blocks" else case


class TestStep(StepSuite):
    backend = BACKEND
    cases = tuple(smaller(case) for case in CASES_RUN)
    calls = 1
    masks = ("line", "plane_batch_2x3", "rarely_fires", "volume")
    # The interpreter is called through the host, and such calls cannot be exported.
    transformations = (
        *pairs(TRANSFORMATION_CHECKS, ("line",), without=("export",)),
        *pairs(("update", "gradients_under_vmap"), ("inputs_per_sample",)),
    )


class TestAttention(AttentionSuite):
    backend = BACKEND
    transformations = tuple(
        (check, case) for check, case in AttentionSuite.transformations if check != "export"
    )


PADDINGS = dispatch.covers(BACKEND).rule["padding"]
POOLED = [(padding, (11, 21), radius) for padding in PADDINGS for radius in (2, 3)]
POOLED += [("zeros", (37,), 2), ("circular", (37,), 4), ("circular", (3,), 3)]
POOLED += [("zeros", (5, 3, 19), 2), ("circular", (5, 3, 19), 2), ("circular", (1, 7, 5), 3)]


@pytest.mark.parametrize(("padding", "grid", "radius"), POOLED, ids=str)
def test_pools_of_other_radii(padding, grid, radius):
    """Few cells are above the threshold, so that the radius matters everywhere."""
    alive = Alive(channel=1, threshold=1.0, radius=radius)
    rule = replace(CASES["plane"].rule, padding=padding, alive=alive)
    check_values_and_gradients(BACKEND, Case("pooled", grid, rule), calls=1)


def test_a_pool_beyond_a_word_is_refused():
    case = replace(CASES["plane"], rule=replace(CASES["plane"].rule, alive=Alive(radius=5)))
    with pytest.raises(nk.BackendUnavailable, match="radius"):
        check_values_and_gradients(BACKEND, case, calls=1)


@pytest.mark.parametrize("name", ["dense", "three_hidden", "inputs_per_cell", "plane_batch_1"])
def test_products_of_tensorfloat32(name):
    """Products cut off bits of their operands: errors add up if the kernels do not round first."""
    case = CASES[name]
    case = replace(case, rule=replace(case.rule, precision="tensorfloat32"))
    check_values_and_gradients(BACKEND, case, calls=1)


@pytest.mark.parametrize(
    ("arch", "precision", "changes", "told"),
    [
        (80, "float32", {"channels": 200}, "up to 512 numbers a cell with .*got 1024"),
        (80, "float32", {"channels": 128, "dense": 200}, "of up to 16384 numbers.*got 32768"),
        (80, "bfloat16", {"channels": 300}, "up to 1024 numbers a cell with .*got 2048"),
        (89, "default", {"channels": 200}, "up to 512 numbers a cell with .*got 1024"),
        (75, "default", {"channels": 64}, "up to 170 numbers a cell with .*got 256"),  # no TF32
        (75, "bfloat16", {"channels": 128}, "up to 341 numbers a cell with .*got 512"),
    ],
)
def test_what_shared_memory_does_not_hold_is_told(arch, precision, changes, told, monkeypatch):
    monkeypatch.setenv("NCA_CUDA_ARCH", str(arch))
    rule = replace(CASES["plane"].rule, precision=precision)
    changes = {**changes, "rule": rule}
    with pytest.raises(dispatch.BackendUnavailable, match=told):
        check_values_and_gradients(BACKEND, replace(CASES["plane"], **changes), calls=1)


def test_hidden_layers_of_several_blocks_of_rows():
    """Each block's hidden units overwrite those of the block before, forward and backward."""
    case = CASES["two_hidden"]
    case = replace(case, grid=(40,), rule=replace(case.rule, fire_rate=1.0, alive=None))
    check_values_and_gradients(BACKEND, case, calls=1)


def test_races_are_found(monkeypatch):
    """Without its barriers, a kernel has races, and the interpreter reports them."""
    monkeypatch.setattr(Accesses, "barrier", lambda self: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another thread"):
        check_values_and_gradients(BACKEND, CASES["line"], calls=1)


@pytest.mark.parametrize(("arch", "precision"), [("75", "ieee"), ("80", "tf32"), ("90", "tf32")])
def test_tensorfloat32_where_there_is_one(arch, precision, monkeypatch):
    monkeypatch.setenv("NCA_CUDA_ARCH", arch)
    assert ENGINE.precision("tensorfloat32", "cuda") == precision
    assert ENGINE.precision("bfloat16", "cuda") == "bfloat16"


@pytest.mark.parametrize(("precision", "error"), [("tensorfloat32", 1e-6), ("bfloat16", 1e-5)])
def test_a_bias_is_not_rounded(precision, error):
    """Where filters lie side by side, the bias is part of the product, split into two numbers."""
    case = CASES["no_hidden"]
    rule = replace(case.rule, precision=precision, alive=None, fire_rate=1.0)
    params, state, key, _ = case.arguments()
    ((weight, bias),) = params.layers
    params = replace(params, layers=((0 * weight, bias),))
    new = nk.step(rule, params, 0 * state, key, backend=BACKEND)
    assert_close(new, jnp.broadcast_to(bias, new.shape), error, "state")


def test_constant_taps_are_compiled_in(monkeypatch):
    """Taps from a NumPy array are; taps that may be trained are not."""
    case = CASES["constant_taps_line"]
    params, state, key, _ = case.arguments()
    seen = []

    def run_kernel(*arrays, config, **rest):
        seen.append(config.perception.constant)
        return triton_host.run_kernel(*arrays, config=config, **rest)

    triton_host.register("triton_seen", "records constants", run_kernel=run_kernel)

    def constant(run):
        seen.clear()
        jax.clear_caches()
        run()
        assert seen, "no kernel was launched"
        return all(seen)

    def step(layers):
        now = replace(params, layers=layers)
        return nk.step(case.rule, now, state, key, backend="triton_seen")

    def total(params):
        return nk.step(case.rule, params, state, key, backend="triton_seen").sum()

    rest = {"backend": "triton_seen"}
    split = {"mesh": Mesh(jax.devices()[:1], "x"), "partition_spec": PartitionSpec(None, "x")}
    assert constant(lambda: step(params.layers))
    assert constant(lambda: jax.jit(step)(params.layers))
    assert constant(lambda: jax.grad(lambda layers: step(layers).sum())(params.layers))
    assert constant(lambda: nk.rollout(case.rule, params, state, key, 2, **rest))
    assert constant(lambda: nk.sharded_rollout(case.rule, params, state, key, 2, **split, **rest))
    assert constant(
        lambda: nk.tiled_rollout(case.rule, params, np.asarray(state), key, 2, tile=4, **rest)
    )
    assert not constant(lambda: jax.grad(total)(params))
    assert not constant(lambda: jax.jit(total)(params))
    assert not constant(lambda: total(replace(params, perception=jnp.asarray(params.perception))))


def test_gradients_of_many_programs():
    """Gradients of the weights are added up over more programs than fit one turn of the loop."""
    launch = Launch(tile=(1, 1, 16), rows=16, block_h=16, programs=40)
    triton_host.register("triton_many", "some share the tiles", fixed=lambda call: launch)
    check_values_and_gradients("triton_many", replace(CASES["mostly_dead"], living=1.0), calls=1)


def test_indices_beyond_32_bits():
    """The kernels of states of more than 2**31 numbers, on a small one."""

    def run_kernel(*arrays, config, **rest):
        config = replace(config, int64_indices=True)
        return triton_host.run_kernel(*arrays, config=config, **rest)

    triton_host.register("triton_wide", "64-bit indices", run_kernel=run_kernel)
    check_values_and_gradients("triton_wide", CASES["plane"], calls=1)


def test_says_what_is_missing(monkeypatch):
    """Without a GPU "auto" must not choose it, also when lowering for one."""
    assert "TRITON_INTERPRET is set" in missing()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "was set when Triton was imported" in missing()
    with pytest.raises(nk.BackendUnavailable, match="cannot run here: "):
        nk.step(*_arguments(), backend="triton")


def _arguments():
    case = CASES["line"]
    args = case.arguments()
    return case.rule, args.params, args.state, args.key
