"""The oracle's ``neighborhood_attention`` against loops over cells."""

from itertools import product

import numpy as np
import pytest

from nca_kernels.testing import ATTENTION_CHECKS, error_ratio
from nca_kernels.testing.attention_conformance import attention
from tests.nca_kernels.backends.suite import ATTENTION_CASES


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
    case = ATTENTION_CASES[name]
    arrays = case.arguments()
    out = attention("reference", case)(*arrays)
    for sample in range(2):
        expected = attend_by_cells(*(a[sample] for a in arrays), case.radius, case.padding)
        assert error_ratio(out[sample], expected.astype(np.float32)) < 1e-6


@pytest.mark.parametrize("name", ["kernel_ran", "shard_map", "export"])
def test_transformations(name):
    ATTENTION_CHECKS[name]("reference", ATTENTION_CASES["circular"])
