"""Work follows life: what a step costs as fewer cells live and fire, in interleaved rounds.

Run with ``make bench``.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import nca_kernels as nk
from benchmarks.measure import STEPS, cells, interleaved, median_ratio
from nca_kernels.testing import BENCHMARKS

GROWING = next(case for case in BENCHMARKS if case.name == "growing")
BACKENDS = [b.name for b in nk.backends() if b.available and b.name != "reference"]


def _run(case, backend, mode):
    """STEPS times the same step with other keys, in one call: nothing is allocated between."""
    params, state, key, _ = case.arguments()

    def loss(layers, state, key):
        params_now = nk.RuleParams(params.perception, None, layers)
        return (nk.step(case.rule, params_now, state, key, backend=backend) ** 2).mean()

    fun = jax.grad(loss, (0, 1)) if mode == "training" else loss

    @jax.jit
    def run(layers, state, ones):  # factors that the compiler does not know: nothing is hoisted
        def one(key_and_factor):
            key, factor = key_and_factor
            out = fun(jax.tree.map(lambda w: w * factor, layers), state, key)
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out))

        return jax.lax.map(one, (jax.random.split(key, STEPS), ones))

    return lambda: jax.block_until_ready(run(params.layers, state, jnp.ones(STEPS)))


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cost_of_what_lives_and_fires(backend, mode, benchmark, record, request):
    rule = GROWING.rule
    runs = {
        "all": _run(GROWING, backend, mode),
        "tenth_alive": _run(replace(GROWING, living=0.1), backend, mode),
        "all_fire": _run(replace(GROWING, rule=replace(rule, fire_rate=1.0)), backend, mode),
    }
    times = interleaved(runs, request.config.getoption("--rounds"))
    benchmark.pedantic(runs["all"], rounds=3, iterations=1)
    row = {"backend": backend, "mode": mode}
    for name, taken in times.items():
        row[f"{name}_ns"] = 1e9 * statistics.median(taken) / cells(GROWING) / STEPS
    row["tenth_alive_to_all"] = median_ratio(times["tenth_alive"], times["all"])
    row["half_fire_to_all_fire"] = median_ratio(times["all"], times["all_fire"])
    row["seconds"] = times
    record(**row)
