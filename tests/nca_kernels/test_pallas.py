"""The Pallas kernels without a GPU: interpreted on the CPU, and lowered for CUDA."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.backends.pallas.launch import launch, missing
from nca_kernels.testing import CONFORMANCE, TRANSFORMATION_CHECKS
from nca_kernels.testing.conformance import (
    check_fate_hangs_on_dead_neighbours,
    check_mask,
    check_values_and_gradients,
)
from nca_kernels.testing.triton_host import small_tiles

INTERPRETED = "pallas_interpreted"
BY_NAME = {case.name: case for case in CONFORMANCE}
# About half of the cases, since XLA compiles every kernel anew for each: every padding, 1 to 3
# dimensions, kernels and layers of every kind, and what the kernels take another way for.
CASES = (
    "line",
    "line_no_batch",
    "plane",
    "one_wide",
    "one_high",
    "plane_circular",
    "plane_replicate",
    "plane_reflect",
    "kernel_beyond_grid",
    "kernel_beyond_grid_circular",
    "even_kernel",
    "even_kernel_circular",
    "dense",
    "dense_replicate",
    "perception_bias",
    "no_hidden",
    "two_hidden",
    "three_hidden",
    "always_fires",
    "inputs_per_cell",
    "inputs_per_sample",
    "mostly_dead",
    "mostly_dead_circular",
    "bfloat16",
    "products_bfloat16",
    "volume",
    "volume_circular",
    "volume_dense",
    "growing",
)
MASKS = ("line", "plane_batch_2x3", "volume")
TRANSFORMATIONS = (
    ("update", "plane"),
    ("update", "inputs_per_sample"),
    ("vmap", "inputs_per_sample"),
    ("gradients_under_vmap", "plane"),
    ("rollout", "plane"),
    ("kernel_ran", "plane"),
    ("shard_map", "inputs_per_sample"),
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


def interpret(kernel, inputs, *args, **keywords):
    """A launch in interpret mode, as a function that a lowered module shows by name."""

    def run(*inputs):
        return launch(kernel, inputs, *args, **keywords, interpret=True)

    run.__name__ = f"interpreted_{kernel.__name__}"
    return jax.jit(run)(*inputs)


def load(op):
    from nca_kernels.backends import pallas

    engine = replace(pallas.ENGINE, launch=interpret, fixed=small_tiles)
    return tuple(partial(kernel.func, engine) for kernel in getattr(pallas, op))


dispatch.register(
    dispatch.Backend(
        name=INTERPRETED,
        summary="the Pallas kernels in interpret mode",
        load=load,
        platforms=("cpu",),
        missing=missing,
        markers={"step": ("@interpreted_step_forward", "@interpreted_step_backward")},
    )
)


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    """Most of the time goes into compiling kernels that then run for milliseconds."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# ---- interpreted ----


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    check_values_and_gradients(INTERPRETED, BY_NAME[name])


@pytest.mark.parametrize("name", MASKS)
def test_mask(name):
    check_mask(INTERPRETED, BY_NAME[name])


def test_fate_hangs_on_dead_neighbours():
    check_fate_hangs_on_dead_neighbours(INTERPRETED)


@pytest.mark.parametrize(("check", "name"), TRANSFORMATIONS)
def test_transformations(check, name):
    TRANSFORMATION_CHECKS[check](INTERPRETED, BY_NAME[name])


# ---- lowered for CUDA ----


def a_gpu():
    """Newer JAX asks which GPU it is to lower for."""
    if jax.__version_info__ < (0, 11):
        return nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

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
