"""The conformance cases compare something."""

import jax
import pytest

import nca_kernels as nk
from nca_kernels.testing import CONFORMANCE


@pytest.mark.parametrize("case", [c for c in CONFORMANCE if 0 not in c.batch], ids=str)
def test_a_case_has_cells_that_fire_and_live_on(case):
    """Otherwise only zeros would be compared."""
    params, state, key, inputs = case.arguments()
    out = nk.step(case.rule, params, state, key, inputs, backend="reference")
    fired = jax.random.bernoulli(key, case.rule.fire_rate, state.shape[:-1])
    assert (fired & (out != 0).any(axis=-1)).any()
