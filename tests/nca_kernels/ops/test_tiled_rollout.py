"""A rollout tile by tile is the rollout at once, to the bit."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nca_kernels as nk
from nca_kernels.rule import PADDINGS
from nca_kernels.testing import Case

pytestmark = pytest.mark.usefixtures("quick_to_compile")
STEPS = 5
GRIDS = {(37,): 6, (17, 23): 7, (9, 11, 10): 5}
PLAIN = Case("plain", (24, 17), nk.Rule(), batch=(2,), channels=4, hidden=(6,))


def both(case, backend="cpu", after_step=None, **options):
    """Check that tiles change nothing; returns the final state."""
    params, state, key, inputs = case.arguments()
    expected = nk.rollout(
        case.rule, params, state, key, STEPS, inputs, backend=backend, after_step=after_step
    )
    state = np.array(state)
    before = state.copy()
    out = nk.tiled_rollout(
        case.rule, params, state, key, STEPS, inputs, backend, after_step, **options
    )
    np.testing.assert_array_equal(out, expected)
    if not options.get("donate"):
        np.testing.assert_array_equal(state, before)
    return out


@pytest.mark.parametrize(
    ("grid", "padding", "alive"),
    [pytest.param(*c, id=f"{len(c[0])}d-{c[1]}-{'alive' if c[2] else 'all'}")
     for c in product(GRIDS, PADDINGS, (nk.Alive(), None))],
)  # fmt: skip
def test_tiles_are_as_the_whole(grid, padding, alive):
    rule = nk.Rule(padding=padding, alive=alive)
    case = Case("tiled", grid, rule, batch=(2,), channels=4, hidden=(6,))
    both(case, tile=GRIDS[grid], steps_per_pass=2)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_other_backends(backend):
    both(PLAIN, backend, tile=8, steps_per_pass=1)


@pytest.mark.parametrize("inputs_per_sample", [False, True])
def test_inputs(inputs_per_sample):
    rule = nk.Rule(padding="circular")
    case = Case("inputs", (19, 12), rule, (2,), channels=3, hidden=(5,), inputs=2,
                inputs_per_sample=inputs_per_sample)  # fmt: skip
    both(case, tile=5, steps_per_pass=2)


def test_wide_even_taps_and_tiles_larger_than_the_grid():
    rule = nk.Rule(padding="reflect", alive=None)
    case = Case("wide", (26, 40), rule, kernel=(5, 4), channels=3, filters=2, hidden=(5,))
    both(case, tile=9, steps_per_pass=3)
    both(case, tile=99, steps_per_pass=8)
    both(case, tile=30, steps_per_pass=8)  # a halo makes the window as large as the grid


def left_wall(before, after, places):
    return jnp.where(places[1] < 3, before, after)


def test_after_step_sees_places_in_the_whole_grid():
    both(PLAIN, after_step=left_wall, tile=8, steps_per_pass=2)


def test_progress_and_a_state_that_may_be_overwritten():
    done = []
    both(PLAIN, tile=7, steps_per_pass=2, donate=True, progress=done.append)
    assert sum(done) == STEPS * PLAIN.batch[0] * 24 * 17
    assert len(done) == 3 * 4 * 3


def test_a_state_on_disk(tmp_path):
    params, state, key, _ = PLAIN.arguments()
    on_disk = np.memmap(tmp_path / "state", np.float32, "w+", shape=state.shape)
    on_disk[:] = state
    out = nk.tiled_rollout(PLAIN.rule, params, on_disk, key, STEPS, tile=8)
    np.testing.assert_array_equal(out, nk.rollout(PLAIN.rule, params, state, key, STEPS))


def test_no_steps_and_another_random_generator():
    params, state, key, _ = PLAIN.arguments()
    state = np.array(state)
    same = nk.tiled_rollout(PLAIN.rule, params, state, key, 0)
    assert same is not state
    np.testing.assert_array_equal(same, state)
    key = jax.random.key(3, impl="rbg")
    expected = nk.rollout(PLAIN.rule, params, state, key, 2)
    out = nk.tiled_rollout(PLAIN.rule, params, state, key, 2, tile=8)
    np.testing.assert_array_equal(out, expected)


def test_the_device_sees_one_window_shape():
    """All tiles of a pass, those at the border too, run one compiled program."""
    from nca_kernels.ops.tiled_rollout import _steps

    before = _steps._cache_size()
    params, state, key, _ = Case("many", (41, 43), nk.Rule(), channels=5, hidden=(3,)).arguments()
    nk.tiled_rollout(nk.Rule(), params, np.array(state), key, 4, tile=8, steps_per_pass=2)
    assert _steps._cache_size() == before + 1


WRONG = [
    ({"tile": 0}, ValueError, "tile must be a whole number of at least 1, got 0"),
    ({"steps_per_pass": 1.5}, ValueError, "steps_per_pass must be a whole number"),
    ({"num_steps": -1}, ValueError, "num_steps must be at least 0"),
    ({"state": jnp.zeros((4, 4, 4))}, TypeError, r"must be a NumPy array.*np.asarray\(state\)"),
    ({"state": np.zeros((4, 4))}, ValueError, "state must be"),
]


@pytest.mark.parametrize(("change", "kind", "words"), WRONG)
def test_wrong_arguments(change, kind, words):
    params, state, key, _ = PLAIN.arguments()
    arguments = {"state": np.array(state), "num_steps": 2, **change}
    with pytest.raises(kind, match=words):
        nk.tiled_rollout(
            PLAIN.rule, params, arguments.pop("state"), key, arguments.pop("num_steps"), **arguments
        )
