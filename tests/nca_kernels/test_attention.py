"""``neighborhood_attention``: the oracle against loops, xla and cpu against the oracle."""

from dataclasses import replace
from itertools import product

import jax
import numpy as np
import pytest

import nca_kernels as nk
from nca_kernels.backends.cpu import library
from nca_kernels.testing import ATTENTION, ATTENTION_CHECKS, AttentionCase, error_ratio
from nca_kernels.testing.attention_conformance import attention
from nca_kernels.testing.compare import assert_close, assert_same_bits

BY_NAME = {case.name: case for case in ATTENTION}
PLANE = BY_NAME["plane"]
SETS = () if library.missing() else library.instruction_sets()
needs_cpu = pytest.mark.skipif(not SETS, reason=f"no native kernels: {library.missing()}")
BACKENDS = ("xla", pytest.param("cpu", marks=needs_cpu))
# The native kernels cut these into several tiles; heads and channels do not fill vectors.
TILES = (
    AttentionCase("tiles_of_a_line", (700,), radius=3, head_size=20, padding="circular"),
    AttentionCase("tiles_of_a_plane", (29, 40), batch=(1,), heads=5, radius=2),
    AttentionCase("tiles_of_a_volume", (9, 8, 11), heads=3, head_size=3, padding="circular"),
    AttentionCase("tiles_in_bfloat16", (17, 33), head_size=33, dtype="bfloat16"),
)


def attend_by_cells(q, k, v, radius, padding):
    """The contract as loops over the cells of one sample ``[*S, heads, d]``, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    *grid, heads, d = q.shape
    out = np.zeros(q.shape)
    for position in np.ndindex(*grid):
        around = [
            np.add(position, o) for o in product(range(-radius, radius + 1), repeat=len(grid))
        ]
        if padding == "circular":
            around = [np.mod(p, grid) for p in around]
        cells = [tuple(p) for p in around if (p >= 0).all() and (p < grid).all()]
        for h in range(heads):
            weights = np.exp([q[position][h] @ k[c][h] / np.sqrt(d) for c in cells])
            mixed = sum(w * v[c][h] for w, c in zip(weights, cells, strict=True))
            out[position][h] = mixed / weights.sum()
    return out


@pytest.mark.parametrize("name", ["radius_2", "circular_beyond_grid", "volume_circular"])
def test_reference_equals_loops_over_cells(name):
    case = BY_NAME[name]
    arrays = case.arguments()
    out = attention("reference", case)(*arrays)
    for sample in range(2):
        expected = attend_by_cells(*(a[sample] for a in arrays), case.radius, case.padding)
        assert error_ratio(out[sample], expected.astype(np.float32)) < 1e-6


@pytest.mark.parametrize("case", ATTENTION, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, case):
    ATTENTION_CHECKS["values_and_gradients"](backend, case)


OF_EVERY_SET = (*TILES, *(BY_NAME[name] for name in ("circular_beyond_grid", "bfloat16")))


@needs_cpu
@pytest.mark.parametrize("case", OF_EVERY_SET, ids=str)
@pytest.mark.parametrize("instruction_set", SETS)
def test_values_and_gradients_of_instruction_sets(instruction_set, case):
    with library.using(instruction_set):
        ATTENTION_CHECKS["values_and_gradients"]("cpu", case)


@needs_cpu
@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_same_bits_however_tiles_are_cut(padding):
    """Alone, a sample is cut into more tiles than among others: no sum depends on the cut."""
    case = AttentionCase("samples", (40, 23), heads=3, head_size=7, padding=padding)
    arrays = replace(case, batch=(24,)).arguments()

    def run(*arrays):
        out, pull = jax.vjp(attention("cpu", case), *arrays)
        return out, pull(out)

    alone, all_of_them = run(*(a[:1] for a in arrays)), run(*arrays)
    assert_same_bits(alone, jax.tree.map(lambda a: a[:1], all_of_them), "another cut")


def test_values_and_gradients_in_float64():
    with jax.enable_x64(True):
        case = replace(BY_NAME["circular"], name="float64", dtype="float64")
        ATTENTION_CHECKS["values_and_gradients"]("xla", case)


@needs_cpu
def test_float64_says_what_to_do():
    with jax.enable_x64(True):
        arrays = replace(PLANE, dtype="float64").arguments()
        with pytest.raises(nk.BackendUnavailable, match="float32 or bfloat16"):
            attention("cpu", PLANE)(*arrays)


@pytest.mark.parametrize("shift", [-20, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_far_from_zero(backend, shift):
    """Neither exp(logit) nor, at the edge, exp(0 - lse) may overflow, not even times 0."""
    q, k, v = BY_NAME["batch_2x3"].arguments()

    def both(backend):
        out, pull = jax.vjp(attention(backend, PLANE), q + 20, k + shift, v)
        return out, pull(v)

    # A logit near 900 is rounded by 3e-5, and gradients add up what almost cancels.
    assert_close(both(backend), both("reference"), 1e-2, "output and gradients ")


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_spreads_as_in_plain_jax(backend, position):
    """To what attends to it, and from there to the gradients of all that is attended to."""
    case = AttentionCase("wide", (9, 12), padding="circular")
    arrays = list(case.arguments())
    arrays[position] = arrays[position].at[0, 4, 11, 1, 2].set(np.nan)

    def nans(backend):
        out, pull = jax.vjp(attention(backend, case), *arrays)
        return [np.isnan(a) for a in (out, *pull(np.ones_like(out)))]

    np.testing.assert_array_equal(nans(backend), nans("reference"))


@pytest.mark.parametrize("name", [name for name in ATTENTION_CHECKS if "values" not in name])
@pytest.mark.parametrize("backend", BACKENDS)
def test_transformations(backend, name):
    ATTENTION_CHECKS[name](backend, PLANE)


@pytest.mark.parametrize("name", ["kernel_ran", "shard_map", "export"])
def test_transformations_of_the_reference(name):
    ATTENTION_CHECKS[name]("reference", BY_NAME["circular"])


def test_backward_keeps_queries_keys_values_and_log_sum_exp():
    arrays = replace(PLANE, dtype="bfloat16").arguments()
    kept = jax.eval_shape(lambda *a: jax.vjp(attention("xla", PLANE), *a)[1], *arrays)
    kept = sorted((a.size, a.dtype.name) for a in jax.tree.leaves(kept))
    size = arrays[0].size
    assert kept == [(size // PLANE.head_size, "float32")] + 3 * [(size, "bfloat16")]


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
    """The largest array in a gradient is a padded one, whatever the window."""
    case = AttentionCase("wide", (40, 40), batch=(1,), radius=5)
    run = jax.jit(jax.grad(lambda *a: attention("xla", case)(*a).sum(), (0, 1, 2)))
    arrays = case.arguments()
    compiled = run.lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * arrays[0].nbytes
