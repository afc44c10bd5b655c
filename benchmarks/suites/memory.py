"""Memory of a rollout's gradient against its steps, by XLA's own plan; nothing is run.

What processes take when they run is in large.json; see benchmarks/large.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import pytest

import nca_kernels as nk
from benchmarks.cases import FULL
from benchmarks.contestants import best

CASE = "growing"  # the file that the rows belong to

STEPS = (8, 16, 32, 64, 128)
POLICIES = ("all", "sqrt", "reference")  # of ours, and plain autodiff of the reference


def _planned_states(policy: str, steps: int) -> float:
    """The peak of memory that XLA plans, as a multiple of the bytes of a state."""
    case = replace(FULL["growing"], grid=(128, 128), batch=(1,))
    params, state, key, _ = case.arguments()

    def loss(layers: Any, state: Any) -> Any:
        now = nk.RuleParams(params.perception, None, layers)
        if policy != "reference":
            return (
                nk.rollout(
                    case.rule, now, state, key, steps, checkpoint=policy, backend=best()
                ) ** 2
            ).mean()  # fmt: skip
        body = lambda s, t: (
            nk.step(case.rule, now, s, jax.random.fold_in(key, t), backend="reference"), None,
        )  # fmt: skip
        return (jax.lax.scan(body, state, jax.numpy.arange(steps))[0] ** 2).mean()

    plan: Any = jax.jit(jax.grad(loss)).lower(params.layers, state).compile().memory_analysis()
    return plan.temp_size_in_bytes / state.nbytes


@pytest.mark.parametrize("policy", POLICIES)
def test_planned_memory(policy, record, thorough):
    if record.has("memory", "growing", policy, "training"):
        pytest.skip("measured before")
    planned = {str(steps): _planned_states(policy, steps) for steps in STEPS}
    row = {"suite": "memory", "case": "growing", "kind": policy, "mode": "training"}
    record.add({**row, "planned_states": planned})
