"""The Triton kernels in Triton's interpreter, through the same cases as every backend."""

from dataclasses import replace
from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux only)")

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.backends import COMMON
from nca_kernels.backends.triton.engine import ENGINE
from nca_kernels.backends.triton.launch import missing
from nca_kernels.backends.triton.step_calls import backward, forward
from nca_kernels.rule import Alive
from nca_kernels.testing import (
    ATTENTION,
    ATTENTION_CHECKS,
    CONFORMANCE,
    TRANSFORMATION_CHECKS,
    Case,
    covered_cases,
    triton_host,
)
from nca_kernels.testing.compare import assert_close
from nca_kernels.testing.conformance import (
    check_a_draw_equal_to_the_fire_rate,
    check_fate_hangs_on_dead_neighbours,
    check_mask,
    check_nan_is_not_hidden,
    check_values_and_gradients,
)
from nca_kernels.testing.races import Accesses
from nca_kernels.tuning import Launch

triton_host.register()
BACKEND = triton_host.NAME
BY_NAME = {case.name: case for case in CONFORMANCE}
ATTENTION_BY_NAME = {case.name: case for case in ATTENTION}


# All with the version of the machine with the H200; elsewhere a third, as the interpreter is slow.
CASES = list(CONFORMANCE if version("triton").startswith("3.6.") else CONFORMANCE[::3])
# Of many blocks, some: there are as many hidden units, and several tiles a program.
CASES = [replace(c, grid=(24, 20)) if c.name == "many_blocks" else c for c in CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
    check_values_and_gradients(BACKEND, case, calls=1)


@pytest.mark.parametrize("case", covered_cases(dispatch.covers(BACKEND)), ids=str)
def test_each_value_that_is_covered(case):
    check_values_and_gradients(BACKEND, case, calls=1)


PADDINGS = dispatch.covers(BACKEND).rule["padding"]
POOLED = [(padding, (11, 21), radius) for padding in PADDINGS for radius in (2, 3)]
POOLED += [("zeros", (37,), 2), ("circular", (37,), 4), ("circular", (3,), 3)]
POOLED += [("zeros", (5, 3, 19), 2), ("circular", (5, 3, 19), 2), ("circular", (1, 7, 5), 3)]


@pytest.mark.parametrize(("padding", "grid", "radius"), POOLED, ids=str)
def test_pools_of_other_radii(padding, grid, radius):
    """Few cells are above the threshold, so that the radius matters everywhere."""
    alive = Alive(channel=1, threshold=1.0, radius=radius)
    rule = replace(BY_NAME["plane"].rule, padding=padding, alive=alive)
    check_values_and_gradients(BACKEND, Case("pooled", grid, rule), calls=1)


def test_a_pool_beyond_a_word_is_refused():
    case = replace(BY_NAME["plane"], rule=replace(BY_NAME["plane"].rule, alive=Alive(radius=5)))
    with pytest.raises(nk.BackendUnavailable, match="radius"):
        check_values_and_gradients(BACKEND, case, calls=1)


def test_the_same_bits_twice():
    check_values_and_gradients(BACKEND, BY_NAME["plane_replicate"], calls=2)


@pytest.mark.parametrize("name", ["line", "plane_batch_2x3", "rarely_fires", "volume"])
def test_mask(name):
    check_mask(BACKEND, BY_NAME[name])


def test_a_mask_drawn_by_jax():
    """Another generator's bits are not the kernel's: it takes the mask as it is."""
    run = partial(nk.step, *_arguments()[:3], jax.random.key(3, impl="rbg"))
    assert_close(run(backend=BACKEND), run(backend="reference"), 1e-5, "state")


@pytest.mark.parametrize("activation", dispatch.covers(BACKEND).rule["activation"])
def test_what_is_not_a_number_is_not_hidden(activation):
    check_nan_is_not_hidden(BACKEND, BY_NAME["line"], activation)


def test_a_draw_equal_to_the_fire_rate():
    check_a_draw_equal_to_the_fire_rate(BACKEND, BY_NAME["line"])


def _engine():
    return dispatch._registry[BACKEND].load("step")[0].args[0]


def _register(name, summary, engine):
    both = (partial(forward, engine), partial(backward, engine))
    dispatch.register(dispatch.Backend(name, summary, lambda op: both, covers=COMMON))


@pytest.mark.parametrize("name", ["dense", "three_hidden", "inputs_per_cell", "plane_batch_1"])
def test_products_of_tensorfloat32(name):
    """They cut off bits of their operands: where those are not rounded before, errors add up."""
    case = BY_NAME[name]
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
    rule = replace(BY_NAME["plane"].rule, precision=precision)
    changes = {**changes, "rule": rule}
    with pytest.raises(dispatch.BackendUnavailable, match=told):
        check_values_and_gradients(BACKEND, replace(BY_NAME["plane"], **changes), calls=1)


def test_hidden_layers_of_several_blocks_of_rows():
    """Each block's go where those of the one before were, forward and backward."""
    case = BY_NAME["two_hidden"]
    case = replace(case, grid=(40,), rule=replace(case.rule, fire_rate=1.0, alive=None))
    check_values_and_gradients(BACKEND, case, calls=1)


def test_races_are_found(monkeypatch):
    """As if the kernels had no barriers."""
    monkeypatch.setattr(Accesses, "barrier", lambda self: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another thread"):
        check_values_and_gradients(BACKEND, BY_NAME["line"], calls=1)


@pytest.mark.parametrize(("arch", "precision"), [("75", "ieee"), ("80", "tf32"), ("90", "tf32")])
def test_tensorfloat32_where_there_is_one(arch, precision, monkeypatch):
    monkeypatch.setenv("NCA_CUDA_ARCH", arch)
    assert ENGINE.precision("tensorfloat32", "cuda") == precision
    assert ENGINE.precision("bfloat16", "cuda") == "bfloat16"


@pytest.mark.parametrize(("precision", "error"), [("tensorfloat32", 1e-6), ("bfloat16", 1e-5)])
def test_a_bias_is_not_rounded(precision, error):
    """Side by side with the filters, it goes through the products: in two numbers."""
    case = BY_NAME["no_hidden"]
    rule = replace(case.rule, precision=precision, alive=None, fire_rate=1.0)
    params, state, key, _ = case.arguments()
    ((weight, bias),) = params.layers
    params = replace(params, layers=((0 * weight, bias),))
    new = nk.step(rule, params, 0 * state, key, backend=BACKEND)
    assert_close(new, jnp.broadcast_to(bias, new.shape), error, "state")


def test_constant_taps_are_compiled_in(monkeypatch):
    """Wherever they come from a NumPy array, and not where they may be trained."""
    case = BY_NAME["constant_taps_line"]
    params, state, key, _ = case.arguments()
    seen = []

    def run_kernel(*arrays, config, **rest):
        seen.append(config.perception.constant)
        return triton_host.run_kernel(*arrays, config=config, **rest)

    _register("triton_seen", "records constants", replace(_engine(), run_kernel=run_kernel))

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
    _register("triton_many", "some share the tiles", replace(_engine(), fixed=lambda call: launch))
    check_values_and_gradients("triton_many", replace(BY_NAME["mostly_dead"], living=1.0), calls=1)


def test_indices_beyond_32_bits():
    """The kernels of states of more than 2**31 numbers, on a small one."""

    def run_kernel(*arrays, config, **rest):
        config = replace(config, int64_indices=True)
        return triton_host.run_kernel(*arrays, config=config, **rest)

    _register("triton_wide", "64-bit indices", replace(_engine(), run_kernel=run_kernel))
    check_values_and_gradients("triton_wide", BY_NAME["plane"], calls=1)


def test_says_what_is_missing(monkeypatch):
    """Without a GPU "auto" must not choose it, also when lowering for one."""
    assert "TRITON_INTERPRET is set" in missing()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "was set when Triton was imported" in missing()
    with pytest.raises(nk.BackendUnavailable, match="cannot run here: "):
        nk.step(*_arguments(), backend="triton")


def _arguments():
    case = BY_NAME["line"]
    args = case.arguments()
    return case.rule, args.params, args.state, args.key


def test_fate_hangs_on_dead_neighbours():
    check_fate_hangs_on_dead_neighbours(BACKEND)


# Callbacks to the host, which the interpreter is called through, cannot be exported.
@pytest.mark.parametrize("check", sorted(set(TRANSFORMATION_CHECKS) - {"export"}))
def test_transformations(check):
    TRANSFORMATION_CHECKS[check](BACKEND, BY_NAME["line"])


@pytest.mark.parametrize("check", ["update", "gradients_under_vmap"])
def test_transformations_with_inputs(check):
    TRANSFORMATION_CHECKS[check](BACKEND, BY_NAME["inputs_per_sample"])


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(case):
    ATTENTION_CHECKS["values_and_gradients"](BACKEND, case)


@pytest.mark.parametrize("check", sorted(set(ATTENTION_CHECKS) - {"export"}))
def test_attention_transformations(check):
    ATTENTION_CHECKS[check](BACKEND, ATTENTION_BY_NAME["plane"])
