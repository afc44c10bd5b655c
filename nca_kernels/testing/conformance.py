"""Checks ``check(backend, case)`` that every backend must pass; they raise AssertionError.

The oracle is the backend ``reference`` with products of float32. ``CHECKS`` run on every case,
``TRANSFORMATION_CHECKS`` on a few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.ops import step as step_module
from nca_kernels.testing.cases import Arguments, Case
from nca_kernels.testing.compare import assert_close, assert_same_bits, tolerance

ORACLE = "reference"


def value_and_gradients(
    backend: str, case: Case, args: Arguments, calls: int = 2
) -> tuple[Any, Any]:
    """The new state and the gradients of (params, state, inputs): the same bits in every call."""

    def run(params: Any, state: Any, inputs: Any) -> Any:
        params = case.with_constant_taps(params)
        return nk.step(case.rule, params, state, args.key, inputs, backend=backend)

    def both(params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
        out, pull = jax.vjp(run, params, state, inputs)
        return out, dict(zip(("params", "state", "inputs"), pull(cotangent_of(out)), strict=True))

    compiled = jax.jit(both)
    first = compiled(args.params, args.state, args.inputs)
    for _ in range(calls - 1):
        assert_same_bits(compiled(args.params, args.state, args.inputs), first, "another call")
    return first


def cotangent_of(out: Any) -> Any:
    """A fixed cotangent with no symmetry that could hide an error, like ``out``."""
    ramp = jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)
    return jnp.cos(ramp).astype(out.dtype)


@cache
def _expected(case: Case) -> tuple[Any, Any]:
    case = replace(case, rule=replace(case.rule, precision="float32"))
    return value_and_gradients(ORACLE, case, case.arguments(), calls=1)  # GPUs' convolutions vary


def _limit(case: Case) -> float:
    return tolerance(case.dtype, case.rule.precision)


# ---- every case ----


def check_values_and_gradients(backend: str, case: Case, calls: int = 2) -> None:
    """Values and gradients against the oracle, the same bits in each of ``calls`` calls."""
    out, grads = value_and_gradients(backend, case, case.arguments(), calls)
    expected, expected_grads = _expected(case)
    assert_close(out, expected, _limit(case), "state")
    assert_close(grads, expected_grads, _limit(case), "gradient of ")


def check_mask(backend: str, case: Case) -> None:
    """With a rule that adds exactly 1, the state shows which cells fired: those that JAX draws."""
    params, state, key, inputs = case.arguments()
    fan_in = case.perception_size + case.inputs
    adds_one = ((jnp.zeros((fan_in, case.channels)), jnp.ones(case.channels)),)
    params = nk.RuleParams(params.perception, None, adds_one)
    rule = nk.Rule(fire_rate=case.rule.fire_rate, padding=case.rule.padding, alive=None)
    state = jnp.zeros_like(state)
    out = nk.step(rule, params, state, key, inputs, backend=backend)
    fired = jax.random.bernoulli(key, rule.fire_rate, state.shape[:-1])
    expected = np.broadcast_to(np.asarray(fired)[..., None], out.shape)
    np.testing.assert_array_equal(np.asarray(out, np.float32), expected)


def check_update(backend: str, case: Case) -> None:
    """``update`` with the perception given equals ``step``, with gradients to the perception."""
    from nca_kernels.backends.reference.plain_step import perceive

    args = case.arguments()
    perception = perceive(case.rule, args.params, args.state)
    cotangent = cotangent_of(args.state)

    def run(backend: str, rule: nk.Rule) -> Any:
        @jax.jit
        def update(layers: Any, state: Any, perception: Any, inputs: Any) -> Any:
            n = len(case.grid)
            return nk.update(
                rule, layers, state, perception, args.key, inputs, backend, num_spatial_dims=n
            )

        out, pull = jax.vjp(update, args.params.layers, args.state, perception, args.inputs)
        return out, pull(cotangent)

    expected = run(ORACLE, replace(case.rule, precision="float32"))
    assert_close(run(backend, case.rule), expected, _limit(case), "update ")


def check_fate_hangs_on_dead_neighbours(backend: str) -> None:
    """A cell survives if a *dead* neighbour's update exceeds the threshold as its own falls below.

    Each of many samples has one living cell. Where cells fire, living ones die and empty ones rise.
    A backend that skipped the updates of all dead cells would change who survives.
    """
    rule = nk.Rule(alive=nk.Alive(0, 0.5), precision="float32")
    state = jnp.zeros((300, 12, 2)).at[:, 6, 0].set(0.6).at[..., 1].set(7.0)  # 7 shows survival
    taps = jnp.asarray(nk.taps(["identity"], channels=2, num_spatial_dims=1))
    falls, rises = jnp.array([[-3.0, 0.0], [0.0, 0.0]]), jnp.array([1.0, 0.0])
    params = nk.RuleParams(taps, None, ((falls, rises),))
    run = partial(nk.step, rule, params, state, jax.random.key(0))
    assert_close(run(backend=backend), run(backend=ORACLE), 1e-6, "state")


def check_a_draw_equal_to_the_fire_rate(backend: str, case: Case) -> None:
    """A cell fires if its draw is below the rate, and not if it is equal."""
    draws = jax.random.uniform(case.arguments().key, (*case.batch, *case.grid))
    for rate in (float(draws.ravel()[0]), float(draws.ravel()[-1])):
        check_mask(backend, replace(case, rule=replace(case.rule, fire_rate=rate)))


def check_mask_drawn_by_jax(backend: str, case: Case) -> None:
    """A kernel cannot draw the bits of another generator: it takes the mask that JAX draws."""
    args = case.arguments()._replace(key=jax.random.key(3, impl="rbg"))
    expected = value_and_gradients(ORACLE, case, args, calls=1)
    out = value_and_gradients(backend, case, args, calls=2)
    assert_close(out, expected, _limit(case), "state, gradients ")


def check_nan_is_not_hidden(backend: str, case: Case, activation: str) -> None:
    """NaN in the weights of the first layer shows in the state of every cell that fires."""
    params, state, key, inputs = case.arguments()
    (weight, bias), *rest = params.layers
    layers = ((weight.at[0, 0].set(jnp.nan), bias), *rest)
    params = nk.RuleParams(params.perception, params.perception_bias, layers)
    rule = replace(case.rule, activation=activation, fire_rate=1.0, alive=None)
    out = nk.step(rule, params, state, key, inputs, backend=backend)
    assert jnp.isnan(out).all(), f"{activation} hides NaN"


CHECKS: dict[str, Callable[[str, Case], None]] = {
    "values_and_gradients": check_values_and_gradients,
    "mask": check_mask,
}


# ---- transformations: a few cases ----


def _samples(case: Case, count: int = 3) -> tuple[Any, Any, Any]:
    """(params, state, key) of several samples, each with a leading axis of ``count``."""
    many = [case.arguments(seed) for seed in range(count)]
    stack: Callable = partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
    keys = jnp.stack([a.key for a in many])
    return stack(*(a.params for a in many)), stack(*(a.state for a in many)), keys


def each(fun: Callable, *args: Any) -> Any:
    """``jax.vmap(fun)(*args)`` as a Python loop."""
    count = jax.tree.leaves(args)[0].shape[0]
    outs = [fun(*jax.tree.map(lambda a: a[i], args)) for i in range(count)]  # noqa: B023
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def _loss(backend: str, case: Case, inputs: Any = None) -> Callable:
    def loss(params: Any, state: Any, key: Any) -> Any:
        out = nk.step(case.rule, params, state, key, inputs, backend=backend)
        return jnp.sum(cotangent_of(out) * out.astype(jnp.float32))

    return loss


def check_wanted_gradients_only(backend: str, case: Case) -> None:
    """The gradient of each argument alone is the same as together with the others."""
    args = case.arguments()
    operands = (args.params, args.state, args.inputs)
    leaves, tree = jax.tree.flatten(operands)

    def loss(backend: str, operands: Any) -> Any:
        params, state, inputs = operands
        return _loss(backend, case, inputs)(params, state, args.key)

    def alone(i: int) -> Any:
        def loss_of_leaf(leaf: Any) -> Any:
            return loss(backend, jax.tree.unflatten(tree, [*leaves[:i], leaf, *leaves[i + 1 :]]))

        return jax.grad(loss_of_leaf)(leaves[i])

    expected = jax.jit(jax.grad(partial(loss, ORACLE)))(operands)
    out = jax.jit(lambda: [alone(i) for i in range(len(leaves))])()
    assert_close(jax.tree.unflatten(tree, out), expected, _limit(case), "gradient alone of ")


def check_vmap(backend: str, case: Case) -> None:
    """``vmap`` over states and keys, states alone, weights, and all of them; and nested."""
    params, states, keys = _samples(case)
    single, _, key, inputs = case.arguments()

    def run(backend: str) -> Callable:
        return lambda p, s, k: nk.step(case.rule, p, s, k, inputs, backend=backend)

    got, want = run(backend), jax.jit(run(ORACLE))
    limit = _limit(case)
    out = jax.jit(jax.vmap(got, (None, 0, 0)))(single, states, keys)
    expected = each(lambda s, k: want(single, s, k), states, keys)
    assert_close(out, expected, limit, "states, keys ")
    out = jax.jit(jax.vmap(got, (None, 0, None)))(single, states, key)
    assert_close(out, each(lambda s: want(single, s, key), states), limit, "states ")
    out = jax.jit(jax.vmap(got, (0, None, None)))(params, states[0], key)
    assert_close(out, each(lambda p: want(p, states[0], key), params), limit, "weights ")
    out = jax.jit(jax.vmap(got))(params, states, keys)
    assert_close(out, each(want, params, states, keys), limit, "everything ")
    nested = jax.jit(jax.vmap(jax.vmap(got, (None, 0, None)), (0, None, 0), out_axes=1))
    expected = each(lambda p, k: each(lambda s: want(p, s, k), states), params, keys)
    out = jnp.swapaxes(nested(params, states, keys), 0, 1)
    assert_close(out, expected, limit, "nested ")


def check_gradients_under_vmap(backend: str, case: Case) -> None:
    """vmap(grad) and grad(vmap), with shared and with separate weights."""
    params, states, keys = _samples(case)
    single, _, _, inputs = case.arguments()
    got = jax.grad(_loss(backend, case, inputs), (0, 1))
    want = jax.jit(jax.grad(_loss(ORACLE, case, inputs), (0, 1)))
    limit = _limit(case)
    out = jax.jit(jax.vmap(got, (None, 0, 0)))(single, states, keys)
    expected = each(lambda s, k: want(single, s, k), states, keys)
    assert_close(out, expected, limit, "vmap(grad) ")
    out = jax.jit(jax.vmap(got))(params, states, keys)
    assert_close(out, each(want, params, states, keys), limit, "vmap(grad), own weights ")

    def total(params: Any, axis: int | None) -> Any:
        loss = jax.vmap(_loss(backend, case, inputs), (axis, 0, 0))
        return jnp.sum(loss(params, states, keys))

    summed = jax.tree.map(lambda leaf: leaf.sum(0), expected[0])
    assert_close(
        jax.jit(jax.grad(total), static_argnums=1)(single, None), summed, limit, "grad(vmap) "
    )
    out = jax.jit(jax.grad(total), static_argnums=1)(params, 0)
    assert_close(out, each(want, params, states, keys)[0], limit, "grad(vmap), own weights ")


def check_mask_in_place_of_key(backend: str, case: Case) -> None:
    """A mask instead of a key says which cells fire, whatever the fire rate.

    The same mask drawn from a key gives the same bits. Masks may be mapped over.
    """
    args = case.arguments()
    mask = jax.random.bernoulli(args.key, 0.4, args.state.shape[:-1])
    rule = replace(case.rule, fire_rate=0.4)
    run = jax.jit(lambda f: nk.step(rule, args.params, args.state, f, args.inputs, backend))
    assert_same_bits(run(mask), run(args.key), "the mask that the key draws")
    masks = jnp.stack([mask, ~mask])
    for rate in (0.4, 1.0):
        rule = replace(case.rule, fire_rate=rate)

        def loss(backend: str, params: Any, state: Any, mask: Any, rule: nk.Rule = rule) -> Any:
            out = nk.step(rule, params, state, mask, args.inputs, backend=backend)
            return jnp.sum(cotangent_of(out) * out.astype(jnp.float32)), out

        grad = partial(jax.grad, argnums=(0, 1), has_aux=True)
        got, want = grad(partial(loss, backend)), grad(partial(loss, ORACLE))
        out = jax.jit(jax.vmap(got, (None, None, 0)))(args.params, args.state, masks)
        expected = each(lambda m: want(args.params, args.state, m), masks)  # noqa: B023
        assert_close(out, expected, _limit(case), f"fire rate {rate} ")


@cache
def _expected_rollout(case: Case, steps: int) -> tuple[Any, Any, Any]:
    """A loop of single steps of the oracle: all states, a cotangent for them, the gradients."""
    params, state, key, inputs = case.arguments()

    def loop(params: Any, state: Any) -> Any:
        def step(state: Any, t: Any) -> tuple[Any, Any]:
            step_key = jax.random.fold_in(key, t)
            state = nk.step(case.rule, params, state, step_key, inputs, backend=ORACLE)
            return state, state

        return jax.lax.scan(step, state, jnp.arange(steps))[1]

    def loss(params: Any, state: Any) -> Any:
        states = loop(params, state)
        return jnp.sum(cotangent_of(states) * states.astype(jnp.float32)), states

    grads, states = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, state)
    return states, cotangent_of(states), grads


def check_rollout(backend: str, case: Case) -> None:
    """Every form of checkpointing against a loop of single steps, with gradients."""
    params, state, key, inputs = case.arguments()
    steps = 7

    expected, weights, expected_grads = _expected_rollout(case, steps)
    run = partial(nk.rollout, case.rule, key=key, num_steps=steps, inputs=inputs, backend=backend)
    limit = 3 * _limit(case)  # errors add up over the steps
    for checkpoint in ("all", "sqrt", 3):

        def loss(params: Any, state: Any, checkpoint: Any = checkpoint) -> Any:
            final, states = run(params, state, checkpoint=checkpoint, return_states=True)
            return jnp.sum(weights * states.astype(jnp.float32)), (final, states)

        grads, (final, states) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, state)
        assert_close(states, expected, limit, f"rollout {checkpoint} ")
        assert_same_bits(final, states[-1], "final")
        assert_close(grads, expected_grads, limit, f"gradient of rollout {checkpoint} ")
    chosen = jnp.arange(int(np.prod(case.batch)), dtype=jnp.int32).reshape(case.batch) * 3 % 8
    final, sampled = jax.jit(partial(run, sample_steps=chosen))(params, state)
    trajectory = jnp.concatenate([state[None], states])
    flat = trajectory.reshape(steps + 1, -1, *trajectory.shape[1 + len(case.batch) :])
    picked = flat[chosen.ravel(), jnp.arange(flat.shape[1])].reshape(state.shape)
    assert_same_bits(sampled, picked, "sampled")


def check_strict_promotion(backend: str, case: Case) -> None:
    """A step and its gradient need no implicit promotion of ranks or dtypes."""
    args = case.arguments()
    jax.clear_caches()
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        run = partial(nk.step, case.rule, inputs=args.inputs, backend=backend)
        out, pull = jax.vjp(lambda p, s: run(p, s, args.key), args.params, args.state)
        pull(out)
        nk.rollout(
            case.rule, args.params, args.state, args.key, 5, args.inputs, backend=backend
        ).block_until_ready()


def check_no_retrace(backend: str, case: Case) -> None:
    """A second call with other values compiles nothing."""
    args = case.arguments()
    run = partial(nk.step, case.rule, inputs=args.inputs, backend=backend)
    traced: Any = step_module.nca_step
    run(args.params, args.state, args.key)
    size = traced._cache_size()
    run(args.params, args.state + 1, jax.random.key(99))
    assert traced._cache_size() == size, "the second call traced again"


def check_kernel_ran(backend: str, case: Case) -> None:
    """The lowered module shows the backend's own kernels, forward and backward."""
    args = case.arguments()
    text = jax.jit(jax.grad(_loss(backend, case, args.inputs))).lower(*args[:3]).as_text()
    for marker in dispatch.markers(backend, "step"):
        assert marker in text, f"{backend} did not run: no {marker!r} in the lowered module"


def check_shard_map(backend: str, case: Case) -> None:
    """Samples split over devices: the same bits as on one, and the weights' gradients agree."""
    devices = jax.devices()[:2]
    assert len(devices) == 2, "needs two devices: XLA_FLAGS=--xla_force_host_platform_device_count"
    _, states, keys = _samples(case, 4)
    params, _, _, inputs = case.arguments()
    mesh = Mesh(np.array(devices), ("data",))
    rows, same = PartitionSpec("data"), PartitionSpec()
    many = jax.vmap(
        lambda p, s, k: nk.step(case.rule, p, s, k, inputs, backend=backend), (None, 0, 0)
    )
    sharded = jax.shard_map(many, mesh=mesh, in_specs=(same, rows, rows), out_specs=rows)
    assert_same_bits(jax.jit(sharded)(params, states, keys), many(params, states, keys), "sharded")

    def total(fun: Callable) -> Callable:
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(fun(p, states, keys).astype("float32")))))

    assert_close(total(sharded)(params), total(many)(params), _limit(case), "sharded gradient ")


def check_symbolic_batch(backend: str, case: Case) -> None:
    """``jax.export`` with an open number of samples, for backends that cover it, and "auto"."""
    assert case.batch, "for cases with a batch"
    params, state, key, inputs = case.arguments()
    (size,) = jax.export.symbolic_shape("samples")

    def loss(state: Any, inputs: Any) -> Any:
        return _loss(backend, case, inputs)(params, state, key)

    run = jax.jit(jax.value_and_grad(loss))
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), (state, inputs)
    )
    export = jax.export.export(run, disabled_checks=nk.DISABLE_JAX_EXPORT_CHECKS)
    refuses = backend not in ("auto", ORACLE) and not dispatch.covers(backend).symbolic_batch
    reason = ""
    try:
        exported = export(*shapes)
    except nk.BackendUnavailable as error:
        reason = str(error)
    assert ("it takes a known number of samples" in reason) == refuses
    for count in () if refuses else (1, 2, 5):
        arrays = jax.tree.map(lambda a: jnp.concatenate([a] * count), (state, inputs))  # noqa: B023
        assert_close(exported.call(*arrays), run(*arrays), _limit(case), f"{count} batches ")


def check_export(backend: str, case: Case) -> None:
    """``jax.export`` round trip of a step and its gradient."""
    args = case.arguments()
    loss = jax.value_and_grad(_loss(backend, case, args.inputs))

    def run(params: Any, state: Any, key_data: Any) -> Any:
        return loss(params, state, jax.random.wrap_key_data(key_data))

    flat, tree = jax.tree.flatten(args.params)
    operands = (flat, args.state, jax.random.key_data(args.key))

    def run_flat(flat: Any, state: Any, key_data: Any) -> Any:
        value, grads = run(jax.tree.unflatten(tree, flat), state, key_data)
        return value, jax.tree.leaves(grads)

    exported = jax.export.export(jax.jit(run_flat), disabled_checks=nk.DISABLE_JAX_EXPORT_CHECKS)(
        *operands
    )
    again = jax.export.deserialize(exported.serialize())
    assert_same_bits(again.call(*operands), jax.jit(run_flat)(*operands), "exported")


TRANSFORMATION_CHECKS: dict[str, Callable[[str, Case], None]] = {
    "update": check_update,
    "wanted_gradients_only": check_wanted_gradients_only,
    "vmap": check_vmap,
    "gradients_under_vmap": check_gradients_under_vmap,
    "mask_in_place_of_key": check_mask_in_place_of_key,
    "rollout": check_rollout,
    "strict_promotion": check_strict_promotion,
    "no_retrace": check_no_retrace,
    "kernel_ran": check_kernel_ran,
    "shard_map": check_shard_map,
    "export": check_export,
    "symbolic_batch": check_symbolic_batch,
}
