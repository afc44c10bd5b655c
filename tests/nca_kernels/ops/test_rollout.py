"""What a rollout keeps for its backward: the memory that it takes, and the gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import nca_kernels as nk
from nca_kernels.testing import BENCHMARKS

CASE = replace(BENCHMARKS[0], grid=(16, 24), batch=(2,))
STEPS = 5


def gradient(keep, checkpoint, mesh=None, steps=STEPS, case=CASE):
    """``[value, *gradients]`` of a rollout's loss, compiled; and what XLA plans for them."""
    params, state, key, _ = case.arguments()

    def loss(params, state, key):
        if mesh is None:
            out = nk.rollout(case.rule, params, state, key, steps, checkpoint=checkpoint, keep=keep)
        else:
            out = nk.sharded_rollout(
                case.rule,
                params,
                state,
                key,
                steps,
                checkpoint=checkpoint,
                keep=keep,
                mesh=mesh,
                partition_spec=P("data", "x"),
            )
        return jnp.mean(out**2)

    run = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, state, key).compile()
    return jax.tree.leaves(run(params, state, key)), run.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("split", "checkpoint"), [(False, "all"), (False, "sqrt"), (True, "all")])
def test_what_is_kept_changes_no_value(split, checkpoint, quick_to_compile):
    mesh = jax.make_mesh((2, 2), ("data", "x")) if split else None
    (value, *exact), _ = gradient("exact", checkpoint, mesh)
    (of_host, *host), _ = gradient("host", checkpoint, mesh)
    (of_rounded, *rounded), _ = gradient("bfloat16", checkpoint, mesh)
    assert value == of_host == of_rounded
    for a, b, c in zip(exact, host, rounded, strict=True):
        np.testing.assert_array_equal(a, b)
        assert jnp.linalg.norm(c - a) <= 0.1 * jnp.linalg.norm(a)
    assert any(bool(jnp.any(a != c)) for a, c in zip(exact, rounded, strict=True))


def test_bfloat16_takes_half_the_memory(quick_to_compile):
    """XLA's plan for a gradient that keeps 32 states."""
    case = replace(CASE, grid=(64, 64), batch=(1,))
    state = 64 * 64 * CASE.channels * 4
    exact, rounded = (
        gradient(keep, "all", steps=32, case=case)[1] / state for keep in ("exact", "bfloat16")
    )
    assert 32 < exact < 32 + 6
    assert 16 < rounded < 16 + 6


def test_wrong_keep():
    params, state, key, _ = CASE.arguments()
    with pytest.raises(ValueError, match=r"keep must be one of .*bfloat16.*, got 'float16'"):
        nk.rollout(CASE.rule, params, state, key, 2, keep="float16")


@pytest.mark.parametrize("backend", ["auto", "xla", "reference"])
def test_without_jit_for_people_who_debug(backend):
    params, state, key, _ = CASE.arguments()

    def loss(state):
        return nk.rollout(CASE.rule, params, state, key, 2, backend=backend).sum()

    expected = jax.grad(loss)(state)
    with jax.disable_jit():
        found = jax.grad(loss)(state)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
