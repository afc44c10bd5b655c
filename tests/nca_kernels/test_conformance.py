"""Every backend through the same cases and checks; see ``nca_kernels.testing.conformance``."""

import re
from dataclasses import fields, replace
from functools import partial

import jax
import pytest

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.backends import xla
from nca_kernels.rule import ACTIVATIONS, PADDINGS, PRECISIONS
from nca_kernels.testing import CONFORMANCE, TRANSFORMATION_CHECKS, covered_cases
from nca_kernels.testing.conformance import (
    check_fate_hangs_on_dead_neighbours,
    check_mask,
    check_values_and_gradients,
)

# The path that xla takes on accelerators, run on the CPU: all cells at once, groups by vmap.
dispatch.register(
    dispatch.Backend(
        name="xla_all_at_once",
        summary="xla as lowered for a GPU",
        load=lambda op: tuple(
            lambda call, platform, *args, kernel=kernel: kernel(call, "cuda", *args)
            for kernel in getattr(xla, op)
        ),
        markers={"step": dispatch.markers("xla", "step")},
        covers=dispatch.covers("xla"),
    )
)
KERNELS = ("xla", "xla_all_at_once")  # the reference is checked in test_reference.py
BY_NAME = {case.name: case for case in CONFORMANCE}
MASKS = ("line", "one_cell", "plane_batch_2x3", "rarely_fires", "always_fires", "volume")
TRANSFORMED = ("plane", "inputs_per_sample")


@pytest.mark.parametrize("case", [c for c in CONFORMANCE if 0 not in c.batch], ids=str)
def test_a_case_has_cells_that_fire_and_live_on(case):
    """Else nothing but zeros would be compared."""
    params, state, key, inputs = case.arguments()
    out = nk.step(case.rule, params, state, key, inputs, backend="reference")
    fired = jax.random.bernoulli(key, case.rule.fire_rate, state.shape[:-1])
    assert (fired & (out != 0).any(axis=-1)).any()


@pytest.mark.parametrize("case", CONFORMANCE, ids=str)
def test_values_and_gradients(case):
    check_values_and_gradients("xla", case)


# On accelerators only the rows differ: all cells at once, and groups by vmap.
@pytest.mark.parametrize("case", CONFORMANCE[::3], ids=str)
def test_values_and_gradients_all_at_once(case):
    check_values_and_gradients("xla_all_at_once", case)


@pytest.mark.parametrize("case", covered_cases(dispatch.covers("xla")), ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_each_value_that_is_covered(backend, case):
    check_values_and_gradients(backend, case)


def test_xla_covers_all_options():
    """The others may refuse some; what this one refuses, "auto" could not run anywhere."""
    listed = dispatch.covers("xla")
    assert set(listed.rule) == {field.name for field in fields(nk.Rule)}
    assert set(listed.alive) == {field.name for field in fields(nk.Alive)}
    assert set(listed.rule["activation"]) == set(ACTIVATIONS)
    assert set(listed.rule["perception_activation"]) == set(ACTIVATIONS)
    assert set(listed.rule["padding"]) == set(PADDINGS)
    assert set(listed.rule["precision"]) == set(PRECISIONS)


def test_what_is_not_listed_is_refused_by_name(monkeypatch):
    """A field that a backend does not list may be at its default, and a value has to be listed."""
    case = BY_NAME["plane"]
    args = case.arguments()
    run = partial(nk.step, params=args.params, state=args.state, key=args.key, backend="xla")
    covered = dispatch.covers("xla")
    backend = dispatch._registry["xla"]

    def cover(**changes):
        monkeypatch.setitem(
            dispatch._registry, "xla", replace(backend, covers=replace(covered, **changes))
        )
        jax.clear_caches()

    def refused(words):
        return pytest.raises(nk.BackendUnavailable, match=re.escape(words))

    cover(rule={name: values for name, values in covered.rule.items() if name != "padding"})
    run(replace(case.rule, padding="zeros"))
    with refused("does Rule.padding 'zeros' only, got 'reflect'"):
        run(replace(case.rule, padding="reflect"))
    cover(rule={**covered.rule, "activation": ("relu", "tanh")})
    with refused("activation 'relu' or 'tanh' only, got 'silu'"):
        run(replace(case.rule, activation="silu"))
    cover(alive={"channel": dispatch.EVERY})
    with refused("does Alive.threshold 0.1 only, got 0.5"):
        run(case.rule)
    cover(dtypes=("bfloat16",))
    with refused("takes bfloat16, and this is float32"):
        run(case.rule)
    cover(spatial_dims=(1, 3))
    with refused("grids of 1 or 3 axes, got 2"):
        run(case.rule)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_mask(backend, name):
    check_mask(backend, BY_NAME[name])


@pytest.mark.parametrize("backend", KERNELS)
def test_fate_hangs_on_dead_neighbours(backend):
    check_fate_hangs_on_dead_neighbours(backend)


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("check", TRANSFORMATION_CHECKS)
def test_transformations(check, backend, name):
    TRANSFORMATION_CHECKS[check](backend, BY_NAME[name])


@pytest.mark.parametrize("check", ["rollout", "no_retrace", "kernel_ran", "export", "shard_map"])
def test_transformations_of_the_reference(check):
    TRANSFORMATION_CHECKS[check]("reference", BY_NAME["plane"])
