"""A rollout split over eight devices is the rollout on one: states to the bit, gradients to 1e-6.

NCA_EXHAUSTIVE=1 runs every mesh shape of eight devices with every padding, with and without alive
mask, on even and uneven grids (240 cases). By default a part of them runs, which has each of these
values at least once.
"""

import os
import re
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import nca_kernels as nk
from nca_kernels.rule import PADDINGS
from nca_kernels.testing import Case

pytestmark = pytest.mark.usefixtures("quick_to_compile")
STEPS = 5
NAMES = ("x", "y", "z")
EVEN = {1: (48,), 2: (24, 32), 3: (16, 24, 16)}
UNEVEN = {1: (37,), 2: (17, 19), 3: (17, 18, 19)}  # at least nine cells over eight devices
SHAPES = [
    (8,),
    *((8 // n, n) for n in (1, 2, 4, 8)),
    *((a, b, 8 // a // b) for a in (1, 2, 4, 8) for b in (1, 2, 4, 8) if a * b <= 8),
]


def every_case(one_in=13):
    for i, (shape, padding, alive, grids) in enumerate(
        product(SHAPES, PADDINGS, (nk.Alive(), None), (EVEN, UNEVEN))
    ):
        # Odd in the number of shapes, paddings and choices, so that the part has all of each.
        if not os.environ.get("NCA_EXHAUSTIVE") and (i * 7 + i // 16) % one_in:
            continue
        grid = grids[len(shape)]
        rule = nk.Rule(padding=padding, alive=alive)
        name = f"{'x'.join(map(str, shape))}-{padding}-{'alive' if alive else 'all'}"
        yield (
            shape,
            Case(
                f"{name}-{'x'.join(map(str, grid))}",
                grid,
                rule,
                batch=(2,),
                channels=4,
                hidden=(6,),
            ),
        )


def mesh(shape, names=NAMES, explicit=False):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, names[: len(shape)], axis_types=(kind,) * len(shape))


def gradients(rollout, arguments):
    """`((loss, outputs), gradients)` of the weights, taps and state of a rollout."""
    params, state, key, inputs = arguments

    def loss(params, state):
        outs = rollout(params, state, key, STEPS, inputs)
        leaves = jax.tree.leaves(outs)
        return sum(jnp.sum(out * jnp.sin(out + i)) for i, out in enumerate(leaves)), outs

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, state)


def both(
    case, shape, spec, explicit=False, per_exchange=1, backend="cpu", overlap=False, **options
):
    """Check that splitting changes nothing; returns the states of the split rollout."""
    arguments = case.arguments()

    def on_one_device(params, state, key, steps, inputs):
        return nk.rollout(case.rule, params, state, key, steps, inputs, backend=backend, **options)

    def many(params, state, key, steps, inputs):
        return nk.sharded_rollout(
            case.rule, params, state, key, steps, inputs, backend=backend, **options,
            mesh=mesh(shape, explicit=explicit), partition_spec=spec,
            steps_per_exchange=per_exchange, overlap=overlap,
        )  # fmt: skip

    (_, expected), expected_gradients = gradients(on_one_device, arguments)
    (_, out), out_gradients = gradients(many, arguments)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    for a, b in zip(
        jax.tree.leaves(out_gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)
    return out


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_a_wider_pool_reaches_further(padding):
    rule = nk.Rule(padding=padding, alive=nk.Alive(radius=2))
    case = Case("", (17, 12), rule, batch=(1,), channels=4, hidden=(6,), living=0.4)
    both(case, (2, 2), P(None, *NAMES[:2]), backend="xla")


@pytest.mark.parametrize(("shape", "case"), [pytest.param(*c, id=str(c[1])) for c in every_case()])
def test_eight_devices_are_as_one(shape, case):
    fewest = min(n // m for n, m in zip(case.grid, shape, strict=True) if m > 1)
    wide = 2 if fewest >= 4 or (case.rule.alive is None and fewest >= 2) else 1
    both(case, shape, P(None, *NAMES[: len(shape)]), per_exchange=wide)


PLAIN = Case("plain", (24, 17), nk.Rule(), batch=(4,), channels=4, hidden=(6,))


@pytest.mark.parametrize(
    ("shape", "case"), [pytest.param(*c, id=str(c[1])) for c in every_case(one_in=29)]
)
def test_a_halo_on_its_way_changes_nothing(shape, case):
    """While the halo travels, the block steps without it; strips at its ends then step with it."""
    both(case, shape, P(None, *NAMES[: len(shape)]), overlap=True)


def wall(before, after, places):
    return jnp.where(places[0] == 11, before, after)


def test_overlap_with_sampled_states_inputs_and_a_wall():
    case, spec = replace(PLAIN, inputs=3), P(None, "x", "y")
    steps = jnp.array([0, 2, 5, 3])
    both(case, (4, 2), spec, per_exchange=2, overlap=True, sample_steps=steps, after_step=wall)
    both(case, (4, 2), spec, per_exchange=2, overlap=True, return_states=True)


@pytest.mark.parametrize("overlap", [False, True])
def test_with_overlap_the_block_waits_for_no_halo(overlap):
    case = replace(PLAIN, grid=(32, 17))
    params, state, key, _ = case.arguments()

    def final(state):
        return nk.sharded_rollout(
            case.rule, params, state, key, 4, mesh=mesh((4,)), partition_spec=P(None, "x"),
            overlap=overlap,
        )  # fmt: skip

    rows = {shape[1]: waits for shape, waits in steps_and_halos(jax.make_jaxpr(final)(state).jaxpr)}
    assert rows == ({8: False, 6: True} if overlap else {12: True})  # block, strips; window


def steps_and_halos(jaxpr, received=()):
    """For each step of a program: the state's shape, and whether it depends on a received halo."""
    received = set(received)  # ids of variables
    for equation in jaxpr.eqns:
        waits = equation.primitive.name == "ppermute"
        waits = waits or any(id(var) in received for var in equation.invars)
        if equation.params.get("name") == "nca_step":
            states = [v for v in equation.invars if v.aval.ndim == 4 and v.aval.shape[0] == 4]
            yield states[0].aval.shape, id(states[0]) in received
        else:
            for inner in jaxprs_in_params(equation.params):
                pairs = zip(inner.invars, equation.invars, strict=False)
                yield from steps_and_halos(inner, {id(i) for i, o in pairs if id(o) in received})
        if waits:
            received.update(map(id, equation.outvars))


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_other_backends(backend):
    both(PLAIN, (4, 2), P(None, "x", "y"), backend=backend)


@pytest.mark.parametrize("explicit", [False, True])
def test_batch_and_grid_are_split_and_states_are_sampled(explicit):
    steps = jnp.array([0, 2, 5, 3])
    case = replace(PLAIN, inputs=3)
    spec = P("x", "y", None)
    both(case, (2, 4), spec, explicit=explicit, per_exchange=2, sample_steps=steps)
    both(replace(case, inputs_per_sample=True), (2, 4), spec, explicit=explicit, return_states=True)


def test_one_dim_over_two_mesh_axes_and_no_split_at_all():
    both(PLAIN, (2, 4), P(None, ("x", "y")), checkpoint="all")
    both(PLAIN, (2, 4), P(), checkpoint=2)


def test_wide_taps_and_a_remainder():
    """Five steps with three between exchanges, and taps of odd and of even size."""
    rule = nk.Rule(padding="reflect", alive=None)
    case = Case("wide", (26, 40), rule, kernel=(5, 4), channels=3, filters=2, hidden=(5,))
    both(case, (2, 4), P(None, "x", "y"), per_exchange=3, return_states=True)


@pytest.mark.parametrize("rule", [nk.Rule(fire_rate=1.0), nk.Rule(alive=nk.Alive(0, -0.2))])
def test_all_fire_and_a_threshold_below_zero(rule):
    """Beyond the border nothing lives, though zero exceeds the threshold."""
    both(replace(PLAIN, rule=rule), (4, 2), P(None, "x", "y"))


def test_another_random_generator():
    case = Case("rbg", (16, 16), nk.Rule(), batch=(), channels=3, hidden=(4,))
    params, state, _, _ = case.arguments()
    key = jax.random.key(3, impl="rbg")
    expected = nk.rollout(case.rule, params, state, key, STEPS)
    out = nk.sharded_rollout(
        case.rule, params, state, key, STEPS, mesh=mesh((2, 4)), partition_spec=P("x", "y")
    )
    np.testing.assert_array_equal(out, expected)


def test_states_travel_between_neighbours_only():
    """The compiled gradient exchanges halos only, and sums the weights' gradients once."""
    case = Case("even", (32, 32), nk.Rule(), batch=(2,), channels=4, hidden=(6,))
    params, state, key, _ = case.arguments()
    grid = mesh((4, 2))
    sharding = jax.NamedSharding(grid, P(None, "x", "y"))

    def loss(params, state):
        final = nk.sharded_rollout(
            case.rule, params, state, key, 8, mesh=grid, partition_spec=P(None, "x", "y")
        )
        return jnp.mean(final**2)

    split = jax.device_put(state, sharding)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(params, split).compile().as_text()
    collectives = set(re.findall(r"(all-\w+|collective-\w+|reduce-scatter)\(", text))
    assert collectives == {"collective-permute", "all-reduce"}
    sums = list(sums_in_loops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, split).jaxpr))
    assert sums.count(False) >= len(jax.tree.leaves(params)) - 1  # the taps' may be the last
    assert not any(sums)


def sums_in_loops(jaxpr, in_loop=False):
    """For each sum over devices in a program: whether it is in a loop."""
    for equation in jaxpr.eqns:
        if "psum" in equation.primitive.name:
            yield in_loop
        for inner in jaxprs_in_params(equation.params):
            yield from sums_in_loops(inner, in_loop or equation.primitive.name == "scan")


WRONG = [
    ({"mesh": "mesh"}, TypeError, "mesh must be a jax.sharding.Mesh, got str"),
    ({"partition_spec": ("x",)}, TypeError, "must be a jax.sharding.PartitionSpec"),
    ({"partition_spec": P(None, "w")}, ValueError, "names 'w', but the mesh has 'x', 'y'"),
    ({"partition_spec": P(None, None, None, "x")}, ValueError, "but not for its channels"),
    ({"partition_spec": P(*[None] * 5)}, ValueError, "partition_spec must name mesh axes"),
    ({"partition_spec": P("y")}, ValueError, "a batch dim of 3, cannot be split over 4"),
    ({"steps_per_exchange": 0}, ValueError, "must be at least 1, got 0"),
    ({"steps_per_exchange": 1.5}, TypeError, "must be an int, got 1.5"),
    ({"steps_per_exchange": 5}, ValueError, "fewer than its halo of 10 .*exchange more often"),
    ({"num_steps": -1}, ValueError, "num_steps must be at least 0"),
]


@pytest.mark.parametrize(("change", "kind", "words"), WRONG)
def test_wrong_arguments(change, kind, words):
    params, state, key, _ = replace(PLAIN, batch=(3,)).arguments()
    arguments = {
        "num_steps": 2, "mesh": mesh((2, 4)), "partition_spec": P(None, "x", "y"), **change
    }  # fmt: skip
    with pytest.raises(kind, match=words):
        nk.sharded_rollout(PLAIN.rule, params, state, key, arguments.pop("num_steps"), **arguments)
