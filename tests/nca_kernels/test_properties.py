"""Random shapes and rules: xla against the reference, values and gradients."""

import jax
import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import nca_kernels as nk
from nca_kernels.rule import ACTIVATIONS, PADDINGS
from nca_kernels.testing import Case
from nca_kernels.testing.compare import assert_close
from nca_kernels.testing.conformance import value_and_gradients

activations = st.sampled_from(sorted(ACTIVATIONS))
rules = st.builds(
    nk.Rule,
    activation=activations,
    perception_activation=activations,
    padding=st.sampled_from(PADDINGS),
    fire_rate=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    step_size=st.sampled_from([-0.5, 0.0, 1.0, 3.0]),
    alive=st.none() | st.builds(nk.Alive, st.integers(-1, 0), st.sampled_from([-0.2, 0.3, 0.9])),
    precision=st.just("float32"),
)


@st.composite
def cases(draw):
    dims = draw(st.integers(1, 3))
    sizes = st.integers(1, {1: 20, 2: 9, 3: 5}[dims])
    return Case(
        name="random",
        grid=tuple(draw(sizes) for _ in range(dims)),
        rule=draw(rules),
        batch=tuple(draw(st.lists(st.integers(1, 3), max_size=2))),
        channels=draw(st.integers(1, 7)),
        kernel=tuple(draw(st.integers(1, 4)) for _ in range(dims)),
        filters=draw(st.integers(1, 3)),
        dense=draw(st.none() | st.integers(1, 6)),
        hidden=tuple(draw(st.lists(st.integers(1, 20), max_size=3))),
        inputs=draw(st.integers(0, 3)),
        inputs_per_sample=draw(st.booleans()),
        bias=draw(st.booleans()),
        perception_bias=draw(st.booleans()),
        living=draw(st.sampled_from([0.1, 1.0])),
    )


def far_from_threshold(case, args):
    """Rounding must not decide who lives: no cell within 1e-4 of the threshold."""
    if case.rule.alive is None:
        return True
    free = nk.Rule(**{**vars(case.rule), "alive": None})
    new = nk.step(free, *args, backend="reference")
    values = np.stack([args.state, new])[..., case.rule.alive.channel]
    return np.abs(values - case.rule.alive.threshold).min() > 1e-4


@given(cases(), st.integers(0, 2**31 - 1))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_xla_equals_reference(case, seed):
    args = case.arguments(seed)
    assume(far_from_threshold(case, args))
    out, grads = value_and_gradients("xla", case, args)
    expected, expected_grads = value_and_gradients("reference", case, args)
    assert_close(out, expected, 1e-5, "state")
    size = max(float(np.linalg.norm(np.ravel(g))) for g in jax.tree.leaves(expected_grads))
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        # A gradient may cancel to nearly nothing: then its error is measured by the largest one.
        error = np.linalg.norm(np.ravel(got - want))
        assert error <= 1e-5 * max(np.linalg.norm(np.ravel(want)), 1e-2 * size)
