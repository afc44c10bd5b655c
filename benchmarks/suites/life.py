"""Work follows life: what a step costs as fewer cells live and fire."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import nca_kernels as nk
from benchmarks.cases import FULL
from benchmarks.contestants import available, nonconforming
from benchmarks.measure import STEPS, cells, interleaved

CASE = "growing"  # the file that the rows belong to

GROWING = FULL["growing"]


def _run(case, backend, mode):
    """A call of STEPS steps of one state with different keys.

    Nothing is allocated between them, and one number of each result is read, so that the time is
    that of the steps alone.
    """
    params, state, key, _ = case.arguments()

    def step(layers, state, key):
        params_now = nk.RuleParams(params.perception, None, layers)
        return nk.step(case.rule, params_now, state, key, backend=backend)

    @jax.jit
    def run(layers, state, ones):  # unknown factors, so that the compiler hoists nothing
        def step_with_new_key(key_and_factor):
            key, factor = key_and_factor
            layers_now = jax.tree.map(lambda w: w * factor, layers)
            if mode == "training":
                _, gradients = jax.vjp(
                    lambda layers, state: step(layers, state, key), layers_now, state
                )
                out = gradients(state)
            else:
                out = step(layers_now, state, key)
            out = jax.lax.optimization_barrier(out)  # so that all of it is computed
            return sum(leaf.ravel()[0] for leaf in jax.tree.leaves(out))

        return jax.lax.map(step_with_new_key, (jax.random.split(key, STEPS), ones))

    return lambda: jax.block_until_ready(run(params.layers, state, jnp.ones(STEPS)))


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("backend", [b for b in available() if b != "reference"])
def test_cost_of_what_lives_and_fires(backend, mode, chosen, record, thorough):
    if record.has("life", "growing", backend, mode):
        pytest.skip("measured before")
    assert nonconforming(backend, GROWING) is None
    rule = GROWING.rule
    runs = {
        "all": _run(GROWING, backend, mode),
        "tenth_alive": _run(replace(GROWING, living=0.1), backend, mode),
        "all_fire": _run(replace(GROWING, rule=replace(rule, fire_rate=1.0)), backend, mode),
    }
    times = interleaved(runs, chosen.rounds)
    row = {"suite": "life", "case": "growing", "kind": backend, "mode": mode, "best": "all"}
    record.add({**row, "work": cells(GROWING) * STEPS, "seconds": times})
