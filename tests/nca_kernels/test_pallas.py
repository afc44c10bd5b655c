"""The Pallas kernels without a GPU: interpreted on the CPU, and lowered for CUDA."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.testing import (
    ATTENTION,
    ATTENTION_CHECKS,
    CONFORMANCE,
    TRANSFORMATION_CHECKS,
    pallas_host,
)
from nca_kernels.testing.conformance import (
    check_a_draw_equal_to_the_fire_rate,
    check_fate_hangs_on_dead_neighbours,
    check_mask,
    check_nan_is_not_hidden,
    check_values_and_gradients,
)
from nca_kernels.testing.races import Accesses

INTERPRETED = pallas_host.NAME
CHECKED = "pallas_checked"  # every access is looked at
pytestmark = pytest.mark.usefixtures("quick_to_compile")
BY_NAME = {case.name: case for case in CONFORMANCE}
# All with the version of the machine with the H200; elsewhere a third, as XLA compiles the kernels
# anew for each.
CASES = CONFORMANCE[::3] if jax.__version__.startswith("0.10.") else CONFORMANCE
TWO_HIDDEN = BY_NAME["two_hidden"]
CHECKED_CASES = [
    *(BY_NAME[name] for name in ("kernel_beyond_grid", "three_hidden", "volume")),
    # Of several blocks of rows.
    replace(TWO_HIDDEN, grid=(40,), rule=replace(TWO_HIDDEN.rule, fire_rate=1.0)),
]
MASKS = ("line", "plane_batch_2x3", "volume")
TRANSFORMATIONS = (
    ("update", "plane"),
    ("gradients_under_vmap", "line"),
    ("rollout", "line_no_batch"),
    ("kernel_ran", "inputs_per_sample"),
    ("shard_map", "line_no_batch"),
)
LOWERED = (
    "line",
    "plane",
    "dense",
    "two_hidden",
    "inputs_per_cell",
    "bfloat16",
    "products_bfloat16",
    "products_default",
    "volume",
)
KERNELS = ("step_forward", "clear_dead", "step_backward", "add_overlaps", "add_programs")


pallas_host.register()
pallas_host.register(CHECKED, pallas_host.checked_launch)


# ---- interpreted ----


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case):
    check_values_and_gradients(INTERPRETED, case, calls=1)


@pytest.mark.parametrize("case", CHECKED_CASES, ids=str)
def test_every_access_stays_inside_and_none_races(case):
    check_values_and_gradients(CHECKED, case, calls=1)


def test_races_are_found(monkeypatch):
    """As if the kernels had no barriers."""
    monkeypatch.setattr(Accesses, "barrier", lambda self: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another thread"):
        check_values_and_gradients(CHECKED, BY_NAME["line"], calls=1)


@pytest.mark.parametrize("name", MASKS)
def test_mask(name):
    check_mask(INTERPRETED, BY_NAME[name])


def test_fate_hangs_on_dead_neighbours():
    check_fate_hangs_on_dead_neighbours(INTERPRETED)


def test_a_draw_equal_to_the_fire_rate():
    check_a_draw_equal_to_the_fire_rate(INTERPRETED, BY_NAME["line"])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_what_is_not_a_number_is_not_hidden(activation):
    check_nan_is_not_hidden(INTERPRETED, BY_NAME["line"], activation)


@pytest.mark.parametrize(("check", "name"), TRANSFORMATIONS)
def test_transformations(check, name):
    TRANSFORMATION_CHECKS[check](INTERPRETED, BY_NAME[name])


ATTENDED = ("line_radius_3", "one_wide", "circular_beyond_grid", "volume", "bfloat16")


@pytest.mark.parametrize("name", ATTENDED)
def test_attention(name):
    case = next(case for case in ATTENTION if case.name == name)
    ATTENTION_CHECKS["values_and_gradients"](INTERPRETED, case)


def test_attention_ran():
    ATTENTION_CHECKS["kernel_ran"](INTERPRETED, ATTENTION[0])


# ---- lowered for CUDA ----


def a_gpu():
    """Lowers for a GPU that is not here."""
    device = AbstractDevice("NVIDIA H200", None, "gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def lowered_gradient(case, *shapes):
    args = case.arguments()

    def loss(params, state, inputs):
        out = nk.step(case.rule, params, state, args.key, inputs, backend="pallas")
        return jnp.sum(out.astype(jnp.float32))

    operands = shapes or (args.params, args.state, args.inputs)
    with a_gpu():
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(*operands)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("name", LOWERED)
def test_lowers_through_triton(name):
    text = lowered_gradient(BY_NAME[name])
    assert text.count("@__gpu$xla.gpu.triton(") == len(KERNELS)
    for kernel in KERNELS:
        assert f'name = "nca_pallas_{kernel}"' in text
    for marker in dispatch.markers("pallas", "step"):
        assert marker in text


def test_declines_positions_beyond_int32():
    case = BY_NAME["plane"]
    params, _, _, inputs = case.arguments()
    state = jax.ShapeDtypeStruct((1, 2**15, 2**15, case.channels), jnp.float32)
    with pytest.raises(nk.BackendUnavailable, match=r"2\*\*31"):
        lowered_gradient(case, params, state, inputs)


def test_declines_more_members_of_a_vmap_than_a_grid_has():
    case = BY_NAME["line"]
    params, state, key, _ = case.arguments()
    states = jax.ShapeDtypeStruct((2**16, *state.shape), state.dtype)
    step = jax.jit(jax.vmap(lambda state: nk.step(case.rule, params, state, key, backend="pallas")))
    with a_gpu(), pytest.raises(nk.BackendUnavailable, match="65535 members of a vmap, got 65536"):
        step.trace(states).lower(lowering_platforms=("cuda",))


def test_asks_for_a_gpu():
    params, state, key, _ = BY_NAME["plane"].arguments()
    with pytest.raises(nk.BackendUnavailable, match="there is no GPU"):
        nk.step(nk.Rule(), params, state, key, backend="pallas")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("name", ["plane", "volume_circular", "bfloat16"])
def test_attention_lowers_through_triton(name):
    case = next(case for case in ATTENTION if case.name == name)

    def loss(q, k, v):
        dims, padding = len(case.grid), case.padding
        out = nk.neighborhood_attention(q, k, v, case.radius, dims, "pallas", padding=padding)
        return jnp.sum(out.astype(jnp.float32))

    with a_gpu():
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*case.arguments())
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for marker in dispatch.markers("pallas", "neighborhood_attention"):
        assert marker in text
