"""``neighborhood_attention``: our backends against each other, for each cell and head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import pytest

from benchmarks.measure import interleaved
from nca_kernels.testing import ATTENTION_CHECKS, AttentionCase
from nca_kernels.testing.attention_conformance import attention, loss

CASE = "neighborhood_attention"  # the file that the rows belong to

CASES = (
    AttentionCase("plane_d8", (64, 64), batch=(8,), heads=4, head_size=8),
    AttentionCase("plane_d16_radius_2", (64, 64), batch=(8,), heads=4, head_size=16, radius=2),
    AttentionCase("volume_d16", (16, 32, 32), batch=(1,), heads=4, head_size=16),
)
NAME = "neighborhood_attention"


def attention_run(case: AttentionCase, backend: str, mode: str) -> Callable[[], Any]:
    """A compiled call: "forward", or "training" with gradients of query, key and value."""
    arrays, fun = case.arguments(), attention(backend, case)
    compiled = jax.jit(fun if mode == "forward" else jax.grad(loss(backend, case), (0, 1, 2)))
    return lambda: jax.block_until_ready(compiled(*arrays))


def check_conforms(case: AttentionCase, backend: str) -> None:
    """Values and gradients of a small piece of the case: what is wrong is not timed."""
    small = replace(case, grid=tuple(min(n, 12) for n in case.grid), batch=(1,))
    ATTENTION_CHECKS["values_and_gradients"](backend, small)


def cells_and_heads(case: AttentionCase) -> int:
    return math.prod((*case.batch, *case.grid)) * case.heads


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("attention_case", CASES, ids=str)
def test_against_others(attention_case, mode, chosen, record, thorough):
    case = attention_case
    if record.has("attention", NAME, case.name, mode):
        pytest.skip("measured before")
    for backend in chosen.backends:
        check_conforms(case, backend)
    runs = {backend: attention_run(case, backend, mode) for backend in chosen.backends}
    times = interleaved(runs, chosen.rounds)
    row = {"suite": "attention", "case": NAME, "kind": case.name, "mode": mode}
    row |= {"best": chosen.backends[0], "ours": list(chosen.backends), "unit": "cell and head"}
    record.add({**row, "work": cells_and_heads(case), "seconds": times})
