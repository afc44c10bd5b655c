"""``nk.cost`` against XLA's count of the reference's operations."""

import jax
import pytest

import nca_kernels as nk
from nca_kernels.testing import Case

EVERY = nk.Rule(alive=None, fire_rate=1.0, padding="circular")
CASES = [
    Case("growing", (32, 32), EVERY, batch=(1,), channels=16, filters=3, hidden=(128,)),
    Case("dense, two layers", (24, 24), EVERY, channels=12, dense=20, hidden=(64, 32)),
    Case("3-D", (12, 12, 12), EVERY, batch=(), channels=8, filters=4, hidden=(64,)),
    Case("inputs", (64,), EVERY, channels=8, filters=2, hidden=(64,), inputs=16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cost_is_what_xla_counts(case):
    params, state, key, inputs = case.arguments()
    cells = state.size // case.channels
    run = lambda p, s: nk.step(case.rule, p, s, key, inputs, backend="reference")
    both = lambda p, s: (lambda out, vjp: vjp(out))(*jax.vjp(run, p, s))
    counted = [
        jax.jit(f).lower(params, state).cost_analysis()["flops"] / cells for f in (run, both)
    ]
    cost = nk.cost(params)
    assert counted[0] == pytest.approx(cost.forward_flops, rel=0.05)
    # Plain JAX recomputes neither perception nor hidden layers; here the taps' gradient, which
    # costs as much as the perception, comes on top.
    again = 2 * sum(weight.size for weight, _ in params.layers[:-1])
    assert counted[1] == pytest.approx(cost.training_flops - again, rel=0.05)


def test_cost_of_growing():
    cost = nk.cost(CASES[0].arguments().params)
    assert cost.forward_flops == 2 * 9 * 48 + 2 * (48 * 128 + 128 * 16)
    assert (cost.forward_bytes, cost.backward_bytes) == (128, 192)
    assert (cost.training_flops, cost.training_bytes) == (17_248 + 46_784, 320)
    half = nk.cost(CASES[0].arguments().params, "bfloat16", active=0.5)
    assert half.forward_flops == 864 + 16_384 / 2
    assert half.forward_bytes == 64
