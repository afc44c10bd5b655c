"""``neighborhood_attention`` of ``xla``: also what it keeps, and how large its programs are."""

from dataclasses import replace

import jax
import pytest

from nca_kernels.testing import AttentionCase
from nca_kernels.testing.attention_conformance import attention
from tests.nca_kernels.backends.suite import ATTENTION_CASES, AttentionSuite

PLANE = ATTENTION_CASES["plane"]


class TestAttention(AttentionSuite):
    backend = "xla"


def test_backward_keeps_queries_keys_values_and_log_sum_exp():
    arrays = replace(PLANE, dtype="bfloat16").arguments()
    residuals = jax.eval_shape(lambda *a: jax.vjp(attention("xla", PLANE), *a)[1], *arrays)
    residuals = sorted((a.size, a.dtype.name) for a in jax.tree.leaves(residuals))
    size = arrays[0].size
    assert residuals == [(size // PLANE.head_size, "float32")] + 3 * [(size, "bfloat16")]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform):
    """The loop over the window has a fixed length, and its body no branch."""
    run = jax.jit(jax.grad(lambda *a: attention("xla", PLANE)(*a).sum(), (0, 1, 2)))
    text = run.trace(*PLANE.arguments()).lower(lowering_platforms=(platform,)).as_text()
    assert "@nca_xla_attention_backward" in text
    assert "stablehlo.case" not in text


def test_program_does_not_grow_with_the_window():
    def lines(radius):
        run = jax.jit(attention("xla", replace(PLANE, radius=radius)))
        return len(run.lower(*PLANE.arguments()).as_text().splitlines())

    assert lines(3) == lines(1)


def test_no_array_holds_all_neighbours():
    """The largest array of a gradient is a padded input, however large the window is."""
    case = AttentionCase("wide", (40, 40), batch=(1,), radius=5)
    run = jax.jit(jax.grad(lambda *a: attention("xla", case)(*a).sum(), (0, 1, 2)))
    arrays = case.arguments()
    compiled = run.lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * arrays[0].nbytes
