"""The Pallas kernels without a GPU: interpreted on the CPU, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.testing import ATTENTION, CONFORMANCE, Case, covered_cases
from tests.nca_kernels.backends.suite import (
    ATTENTION_CASES,
    CASES,
    AttentionSuite,
    StepSuite,
    pairs,
)
from tests.tools import pallas_host

INTERPRETED = pallas_host.NAME
pytestmark = pytest.mark.usefixtures("quick_to_compile")
# XLA compiles the kernels anew for each case: with some versions of those that CI has, a third.
FEWER = 3 if jax.__version__.startswith("0.10.") else 1
LOWERED = (
    "line",
    "dense",
    "two_hidden",
    "inputs_per_cell",
    "bfloat16",
    "products_bfloat16",
    "products_default",
    "volume_circular",
    "one_wide",
    "perception_bias",
)


pallas_host.register()


# ---- interpreted ----


class TestStep(StepSuite):
    """The kernel is a forward and the gradients are xla's, so that few transformations matter."""

    backend = INTERPRETED
    cases = CONFORMANCE[::FEWER]
    covered = covered_cases(dispatch.covers("pallas"))[::FEWER]
    calls = 1
    masks = ("line", "plane_batch_2x3", "volume")
    activations = ("relu", "gelu")
    transformations = (
        ("update", "plane"),
        ("vmap", "inputs_per_cell"),
        ("gradients_under_vmap", "line"),
        ("strict_promotion", "bfloat16"),
        ("kernel_ran", "inputs_per_sample"),
        ("shard_map", "line_no_batch"),
    )


class TestAttention(AttentionSuite):
    backend = INTERPRETED
    attention_cases = ATTENTION[::FEWER]
    # xla's backward adds up logits in another order than the kernel, whose log-sum-exp it takes.
    far_from_zero_limit = 2e-2
    transformations = pairs(("kernel_ran", "vmap", "shard_map"), ("line",))


# ---- lowered for CUDA ----


def a_gpu():
    """Lowers for a GPU that is not here."""
    device = AbstractDevice("NVIDIA H200", None, "gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def lowered(function, *arguments):
    with a_gpu():
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def step_of(case, params, key):
    return lambda state: nk.step(case.rule, params, state, key, backend="pallas")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("name", LOWERED)
def test_lowers_through_triton(name):
    """The forward is one kernel, and its gradients are xla's."""
    case = CASES[name]
    params, state, key, inputs = case.arguments()

    def loss(params, state, inputs):
        out = nk.step(case.rule, params, state, key, inputs, backend="pallas")
        return jnp.sum(out.astype(jnp.float32))

    text = lowered(jax.grad(loss, (0, 1)), params, state, inputs)
    assert text.count("@__gpu$xla.gpu.triton(") == 1
    for marker in dispatch.markers("pallas", "step"):
        assert marker in text


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("name", ["plane", "volume_circular", "bfloat16"])
def test_attention_lowers_through_triton(name):
    case = ATTENTION_CASES[name]

    def loss(q, k, v):
        dims, padding = len(case.grid), case.padding
        out = nk.neighborhood_attention(q, k, v, case.radius, dims, "pallas", padding=padding)
        return jnp.sum(out.astype(jnp.float32))

    text = lowered(jax.grad(loss, (0, 1, 2)), *case.arguments())
    assert text.count("@__gpu$xla.gpu.triton(") == 1
    for marker in dispatch.markers("pallas", "neighborhood_attention"):
        assert marker in text


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_lowers_more_groups_than_an_axis_of_a_launch_has():
    params, state, key, _ = CASES["line"].arguments()
    states = jax.ShapeDtypeStruct((2**16, *state.shape), state.dtype)
    text = lowered(jax.vmap(step_of(CASES["line"], params, key)), states)
    assert dispatch.markers("pallas", "step")[0] in text


# ---- refusals ----


def refused(step, *arguments, because):
    with pytest.raises(nk.BackendUnavailable, match=because):
        lowered(step, *arguments)


def test_asks_for_a_gpu():
    params, state, key, _ = CASES["plane"].arguments()
    with pytest.raises(nk.BackendUnavailable, match="there is no GPU"):
        nk.step(nk.Rule(), params, state, key, backend="pallas")


def test_declines_positions_beyond_int32():
    case = CASES["plane"]
    params, _, key, _ = case.arguments()
    state = jax.ShapeDtypeStruct((1, 2**15, 2**15, case.channels), jnp.float32)
    refused(step_of(case, params, key), state, because=r"2\*\*31")


def test_declines_float64():
    case = CASES["plane"]
    with jax.enable_x64(True):
        params, _, key, _ = case.arguments()
        state = jax.ShapeDtypeStruct((1, 4, 4, case.channels), jnp.float64)
        refused(step_of(case, params, key), state, because="and this is float64: cast it")


@pytest.mark.parametrize(
    ("channels", "filters", "dense", "hidden", "because"),
    [
        (128, 4, None, (8,), "up to 512 numbers a cell, .* got 640"),
        (64, 1, 256, (8,), "up to 8192 weights in one product .* got 16384"),
        (128, 1, None, (), "up to 8192 weights in one product .* got 16384"),
    ],
)
def test_declines_what_does_not_fit(channels, filters, dense, hidden, because):
    case = Case("", (4,), channels=channels, filters=filters, dense=dense, hidden=hidden)
    params, state, key, _ = case.arguments()
    refused(step_of(case, params, key), state, because=because)


def test_declines_wide_heads():
    q = jnp.zeros((1, 4, 1, 1025))

    def attention(q):
        return nk.neighborhood_attention(q, q, q, 1, 1, "pallas")

    refused(attention, q, because="heads of up to 1024 numbers, got 1025")
