"""The Triton kernels in Triton's interpreter, through the same cases as every backend."""

from dataclasses import replace
from functools import partial
from importlib.metadata import version

import jax
import pytest

pytest.importorskip("triton", reason="Triton is not installed (it is for Linux only)")

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.backends.triton.launch import missing
from nca_kernels.testing import (
    ATTENTION,
    ATTENTION_CHECKS,
    CONFORMANCE,
    TRANSFORMATION_CHECKS,
    triton_host,
)
from nca_kernels.testing.compare import assert_close
from nca_kernels.testing.conformance import (
    check_fate_hangs_on_dead_neighbours,
    check_mask,
    check_values_and_gradients,
)
from nca_kernels.tiled.step import backward, forward

triton_host.register()
BACKEND = triton_host.NAME
BY_NAME = {case.name: case for case in CONFORMANCE}
ATTENTION_BY_NAME = {case.name: case for case in ATTENTION}


# All with the version of the machine with the H200; elsewhere a third, as the interpreter is slow.
CASES = CONFORMANCE if version("triton").startswith("3.6.") else CONFORMANCE[::3]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
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


def test_indices_beyond_32_bits():
    """The kernels of states of more than 2**31 numbers, on a small one."""
    engine = dispatch._registry[BACKEND].load("step")[0].args[0]

    def launch(kernel, inputs, outputs, grid, g, how, aliases=None):
        return triton_host.launch(kernel, inputs, outputs, grid, {**g, "wide": True}, how, aliases)

    wide = replace(engine, launch=launch)
    both = (partial(forward, wide), partial(backward, wide))
    dispatch.register(dispatch.Backend("triton_wide", "64-bit indices", lambda op: both))
    check_values_and_gradients("triton_wide", BY_NAME["plane"], calls=1)


def test_says_what_is_missing(monkeypatch):
    """Without a GPU "auto" must not choose it, also when lowering for one."""
    assert "TRITON_INTERPRET is set" in missing()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert missing() is not None
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
