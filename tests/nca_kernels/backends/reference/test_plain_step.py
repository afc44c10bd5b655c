"""The oracle itself: against loops over cells, and against finite differences in float64."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.perception import border_index
from nca_kernels.testing import (
    CONFORMANCE,
    TRANSFORMATION_CHECKS,
    conformance,
    covered_cases,
    error_ratio,
)
from tests.nca_kernels.backends.suite import CASES, StepSuite

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "identity": lambda x: x,
}


def activate(rule, name, x):
    if name == "leaky_relu":
        return np.where(x > 0, x, rule.negative_slope * x)
    return ACTIVATIONS[name](x)


def cell(padding, grid, position):
    """The cell that lies at a position which may be outside the grid, or None."""
    inside = []
    for size, i in zip(grid, position, strict=True):
        if padding == "zeros" and not 0 <= i < size:
            return None
        if padding == "circular":
            i %= size
        elif padding == "replicate":
            i = min(max(i, 0), size - 1)
        elif padding == "reflect":
            while not 0 <= i < size:
                i = 0 if size == 1 else (-i if i < 0 else 2 * (size - 1) - i)
        inside.append(i)
    return tuple(inside)


def pooled(rule, state):
    """The max-pool of the alive channel of one sample, cell by cell."""
    by = range(-rule.alive.radius, rule.alive.radius + 1)
    grid, out = state.shape[:-1], np.zeros(state.shape[:-1])
    for position in np.ndindex(*grid):
        around = [np.add(position, o) for o in product(by, repeat=len(grid))]
        cells = [c for c in (cell(rule.padding, grid, p) for p in around) if c is not None]
        out[position] = max(state[c][rule.alive.channel] for c in cells)
    return out > rule.alive.threshold


def step_by_cells(rule, params, state, fires, inputs):
    """The contract as loops over the cells of one sample ``[*S, C]``, in float64."""
    grid, channels = state.shape[:-1], state.shape[-1]
    *kernel, fan_in, size = params.perception.shape
    taps = np.asarray(params.perception, np.float64)
    new = state.copy()
    for position in np.ndindex(*grid):
        perceived = np.zeros(size)
        for tap in np.ndindex(*kernel):
            offset = [t - (k - 1) // 2 for t, k in zip(tap, kernel, strict=True)]
            there = cell(rule.padding, grid, np.add(position, offset))
            if there is None:
                continue
            for p in range(size):
                for c in range(channels) if fan_in > 1 else [p * channels // size]:
                    perceived[p] += taps[tap][c if fan_in > 1 else 0, p] * state[there][c]
        if params.perception_bias is not None:
            perceived += np.asarray(params.perception_bias, np.float64)
        hidden = activate(rule, rule.perception_activation, perceived)
        if inputs is not None:
            hidden = np.concatenate([hidden, inputs[position] if inputs.ndim > 1 else inputs])
        for i, (weight, bias) in enumerate(params.layers):
            hidden = hidden @ np.asarray(weight, np.float64)
            hidden = hidden if bias is None else hidden + np.asarray(bias, np.float64)
            if i < len(params.layers) - 1:
                hidden = activate(rule, rule.activation, hidden)
        if fires[position]:
            new[position] = state[position] + rule.step_size * hidden
    if rule.alive is None:
        return new
    return np.where((pooled(rule, state) & pooled(rule, new))[..., None], new, 0.0)


SKIPPED = {
    "many_blocks",
    "growing",
    "mostly_dead_circular",
    "bfloat16",
    "bfloat16_circular",
    "products_bfloat16",
}
SMALL = [c for c in CONFORMANCE if c.name not in SKIPPED and c.batch != (0,)]


# The loops know nothing of products and states in bfloat16.
VALUES = [
    case
    for case in covered_cases(dispatch.covers("xla"))
    if (case.dtype, case.rule.precision) == ("float32", "float32")
]


@pytest.mark.parametrize("case", [*SMALL, *VALUES], ids=str)
def test_equals_loops_over_cells(case):
    params, state, key, inputs = case.arguments()
    out = nk.step(case.rule, params, state, key, inputs, backend="reference")
    fires = np.asarray(jax.random.bernoulli(key, case.rule.fire_rate, state.shape[:-1]))
    n = len(case.batch)
    for sample in np.ndindex(*case.batch):
        expected = step_by_cells(
            case.rule,
            params,
            np.asarray(state[sample], np.float64),
            fires[sample],
            None if inputs is None else np.asarray(inputs[sample], np.float64),
        )
        assert error_ratio(out[sample], jnp.asarray(expected, jnp.float32)) < 1e-6
    assert out.shape[:n] == case.batch


@pytest.mark.parametrize("padding", ["circular", "replicate", "reflect"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_border_index_is_that_of_numpy(padding, size):
    mode = {"circular": "wrap", "replicate": "edge", "reflect": "reflect"}[padding]
    expected = np.pad(np.arange(size), (3, 6), mode=mode)
    np.testing.assert_array_equal(border_index(size, 3, 6, padding), expected)


DIFFERENTIATED = ["plane", "dense_replicate", "perception_bias", "inputs_per_cell", "volume"]


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_against_finite_differences(backend, name):
    """In float64, with smooth activations and no cell near the threshold: there are no kinks."""
    case = CASES[name]
    with jax.enable_x64(True):
        params, state, key, inputs = jax.tree.map(
            lambda a: a.astype("float64") if jnp.issubdtype(a.dtype, jnp.floating) else a,
            case.arguments(),
        )
        rule = nk.Rule(
            activation="gelu",
            perception_activation="tanh",
            padding=case.rule.padding,
            alive=case.rule.alive,
            precision="float32",
        )

        def run(params, state, inputs):
            return nk.step(rule, params, state, key, inputs, backend=backend)

        assert run(params, state, inputs).dtype == jnp.float64
        check_grads(run, (params, state, inputs), order=1, modes=["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", StepSuite.masks)
def test_mask(name):
    conformance.check_mask("reference", CASES[name])


@pytest.mark.parametrize("check", ["rollout", "no_retrace", "kernel_ran", "export", "shard_map"])
def test_transformations(check):
    TRANSFORMATION_CHECKS[check]("reference", CASES["plane"])
