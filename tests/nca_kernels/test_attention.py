"""``neighborhood_attention``: the oracle against loops, xla against the oracle, wrong calls."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nca_kernels as nk
from nca_kernels.testing import ATTENTION, ATTENTION_CHECKS, AttentionCase, error_ratio
from nca_kernels.testing.attention_conformance import attention

BY_NAME = {case.name: case for case in ATTENTION}
PLANE = BY_NAME["plane"]


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
def test_values_and_gradients(case):
    ATTENTION_CHECKS["values_and_gradients"]("xla", case)


def test_values_and_gradients_in_float64():
    with jax.enable_x64(True):
        case = replace(BY_NAME["circular"], name="float64", dtype="float64")
        ATTENTION_CHECKS["values_and_gradients"]("xla", case)


def test_very_negative_logits_at_the_edge():
    """exp(0 - lse) overflows: what is padded must not get a weight, not even one times 0."""
    q, k, v = BY_NAME["batch_2x3"].arguments()
    grads = jax.vjp(attention("xla", PLANE), q + 20, k - 20, v)[1](v)
    assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("name", [name for name in ATTENTION_CHECKS if "values" not in name])
def test_transformations(name):
    ATTENTION_CHECKS[name]("xla", PLANE)


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


def test_forward_mode_says_to_use_reverse_mode():
    q, k, v = PLANE.arguments()
    run = lambda q: attention("xla", PLANE)(q, k, v)
    for transform in (jax.jacfwd(run), jax.hessian(lambda q: run(q).sum())):
        with pytest.raises(TypeError, match=r"neighborhood_attention has .* use"):
            transform(q)
    jax.jvp(lambda q: attention("reference", PLANE)(q, k, v), (q,), (q,))


Q = jnp.zeros((2, 6, 5, 3, 4))


def call(q=Q, k=Q, v=Q, radius=1, num_spatial_dims=2, backend="auto", padding="zeros"):
    return nk.neighborhood_attention(q, k, v, radius, num_spatial_dims, backend, padding=padding)


WRONG = {
    "q list": (lambda: call(q=[1.0]), TypeError, "q array list"),
    "k None": (lambda: call(k=None), TypeError, "k array NoneType"),
    "v int": (lambda: call(v=Q.astype(int)), TypeError, "v float32 bfloat16 int32"),
    "q float16": (lambda: call(q=Q.astype("float16")), TypeError, "q float32 bfloat16 float16"),
    "k dtype": (lambda: call(k=Q.astype("bfloat16")), TypeError, "k dtype q float32 bfloat16"),
    "k shape": (
        lambda: call(k=Q[..., :3]),
        ValueError,
        "k shape q (2, 6, 5, 3, 4) (2, 6, 5, 3, 3)",
    ),
    "v shape": (lambda: call(v=Q[:1]), ValueError, "v shape q (2, 6, 5, 3, 4) (1, 6, 5, 3, 4)"),
    "rank": (
        lambda: call(*[Q[0, 0]] * 3),
        ValueError,
        "q [*batch, *spatial, heads, d] 2 spatial num_spatial_dims (5, 3, 4)",
    ),
    "no cell": (lambda: call(*[Q[:, :0]] * 3), ValueError, "q one cell (2, 0, 5, 3, 4) batch"),
    "no head": (lambda: call(*[Q[..., :0, :]] * 3), ValueError, "q one head (2, 6, 5, 0, 4)"),
    "radius -1": (lambda: call(radius=-1), ValueError, "radius at least 0 -1"),
    "radius float": (lambda: call(radius=1.0), TypeError, "radius int 1.0"),
    "radius bool": (lambda: call(radius=True), TypeError, "radius int True"),
    "padding": (lambda: call(padding="reflect"), ValueError, "padding zeros circular 'reflect'"),
    "dims": (lambda: call(num_spatial_dims=4), ValueError, "num_spatial_dims 1, 2, 3 4"),
    "backend": (lambda: call(backend="cuda"), ValueError, "backend auto xla reference 'cuda'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    wrong, exception, words = WRONG[name]
    with pytest.raises(exception) as caught:
        wrong()
    assert caught.type is exception
    missing = [word for word in words.split() if word.strip("(),[]") not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
