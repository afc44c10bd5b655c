"""What may change without recompilation: masks, fire rates, step sizes, numbers of steps."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import nca_kernels as nk
from nca_kernels.testing import Case, assert_close

BACKENDS = ("cpu", "xla", "reference")
CASE = Case("controls", (11, 13), nk.Rule(alive=nk.Alive(0, 0.1)), batch=(3,), hidden=(7,))
PARAMS, STATE, KEY, _ = CASE.arguments()
CELLS = STATE.shape[:-1]
RATES, SIZES = jnp.array([0.2, 0.5, 1.0]), jnp.array([0.5, 1.0, -2.0])
STEPS = 6
SPLIT = P(None, "x", "y")


def compilations(fun):
    """How many programs ``fun`` compiles when it is called."""
    compiled = []

    def listen(event, seconds, **more):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    fun()
    jax.monitoring.unregister_event_duration_listener(listen)
    return len(compiled)


def controlled(backend):
    def run(rate, size, params=PARAMS, state=STATE):
        rule = replace(CASE.rule, fire_rate=rate, step_size=size)
        return nk.step(rule, params, state, KEY, backend=backend)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_do_what_floats_do(backend):
    run = jax.jit(controlled(backend))
    for rate, size in ((0.3, 0.7), (1.0, -1.5), (1e-3, 2.0)):
        arrays = jnp.float32(rate), jnp.float32(size)
        assert_close(run(*arrays), controlled(backend)(rate, size), 1e-6, "state")
    by_sample = run(RATES, SIZES)
    for i, (rate, size) in enumerate(zip(RATES, SIZES, strict=True)):
        alone = controlled(backend)(float(rate), float(size))
        assert_close(by_sample[i], alone[i], 1e-6, "sample")


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_values_compile_once(backend):
    run = jax.jit(jax.value_and_grad(lambda *controls: controlled(backend)(*controls).sum(), 1))
    values = [(jnp.float32(r), jnp.float32(2 * r)) for r in np.linspace(0.1, 1, 10)]
    jax.block_until_ready(run(*values[0]))
    assert compilations(lambda: [run(*pair) for pair in values]) == 0
    assert run._cache_size() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [jnp.float32(0.7), SIZES], ids=["scalar", "by_sample"])
def test_gradient_of_the_step_size(backend, size):
    rule = replace(CASE.rule, alive=None, fire_rate=jnp.float32(0.5))

    @jax.jit
    def loss(size):
        out = nk.step(replace(rule, step_size=size), PARAMS, STATE, KEY, backend=backend)
        return jnp.sum(jnp.sin(out))

    gradient, eps = jax.grad(loss)(size), 1e-2
    for i in np.ndindex(size.shape):
        bump = jnp.zeros_like(size).at[i].set(eps)
        difference = (loss(size + bump) - loss(size - bump)) / (2 * eps)
        np.testing.assert_allclose(gradient[i], difference, rtol=2e-2)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_rollout_with_controls(rate):
    rule = replace(CASE.rule, fire_rate=jnp.full(3, rate), step_size=SIZES)
    got = nk.rollout(rule, PARAMS, STATE, KEY, STEPS)
    static = replace(CASE.rule, fire_rate=rate, step_size=float(SIZES[2]))
    want = nk.rollout(static, PARAMS, STATE, KEY, STEPS)[2]
    assert_close(got[2], want, 1e-5, "state")
    tiled = nk.tiled_rollout(rule, PARAMS, np.array(STATE), KEY, STEPS, tile=8, steps_per_pass=2)
    np.testing.assert_array_equal(tiled, got)
    np.testing.assert_array_equal(sharded(rule, KEY), got)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_rates_of_samples_by_any_generator(impl):
    rule, key = replace(CASE.rule, fire_rate=RATES), jax.random.key(3, impl=impl)
    got = nk.rollout(rule, PARAMS, STATE, key, STEPS)
    np.testing.assert_array_equal(sharded(rule, key), got)


def sharded(rule, key, num_steps=STEPS, shape=(2, 2), spec=SPLIT, **more):
    mesh = jax.make_mesh(shape, ("x", "y"))
    run = partial(nk.sharded_rollout, mesh=mesh, partition_spec=spec, **more)
    return run(rule, PARAMS, STATE, key, num_steps)


def masks_of(rate):
    keys = jax.vmap(partial(jax.random.fold_in, KEY))(jnp.arange(STEPS))
    return jax.vmap(lambda key: jax.random.bernoulli(key, rate, CELLS))(keys)


@pytest.mark.parametrize("given", ["masks", "function"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_equal_the_same_masks_drawn(backend, given):
    rule, masks = replace(CASE.rule, fire_rate=0.4), masks_of(0.4)
    source = masks if given == "masks" else lambda t: masks[t]
    want = nk.rollout(rule, PARAMS, STATE, KEY, STEPS, backend=backend)
    rule = replace(rule, fire_rate=1.0)  # not used
    got = nk.rollout(rule, PARAMS, STATE, source, STEPS, backend=backend)
    np.testing.assert_array_equal(got, want)
    if backend == "cpu":
        for part in (sharded(rule, source), sharded(rule, source, spec=P(None, "x"), overlap=True)):
            np.testing.assert_array_equal(part, want)
        state = np.array(STATE)
        tiled = nk.tiled_rollout(rule, PARAMS, state, source, STEPS, tile=8, steps_per_pass=4)
        np.testing.assert_array_equal(tiled, want)


def test_masks_of_a_grid_that_the_mesh_does_not_divide():
    rule, masks = replace(CASE.rule, fire_rate=0.4), masks_of(0.4)
    want = nk.rollout(rule, PARAMS, STATE, KEY, STEPS)
    got = sharded(rule, masks, shape=(3, 2), steps_per_exchange=1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("checkpoint", ["all", "sqrt", 2])
def test_a_traced_number_of_steps(checkpoint):
    """Value and gradients of so many steps, from one program."""

    def loss(params, state, num_steps, **more):
        run = partial(nk.rollout, checkpoint=checkpoint, **more)
        out = run(CASE.rule, params, state, KEY, num_steps)
        return jnp.mean(out**2)

    run = jax.jit(jax.value_and_grad(partial(loss, max_steps=8), (0, 1)))
    for num_steps in (0, 1, 5, 8):
        got = run(PARAMS, STATE, jnp.int32(num_steps))
        assert_close(got, jax.value_and_grad(loss, (0, 1))(PARAMS, STATE, num_steps), 1e-5, "")
    assert run._cache_size() == 1


def test_a_traced_number_of_steps_takes_no_more():
    """The steps beyond it do not run: no callback of theirs is called."""
    seen = []

    def note(before, after, positions, step, key):
        jax.debug.callback(lambda t: seen.append(int(t)), step)
        return after

    run = jax.jit(
        lambda n: nk.rollout(
            CASE.rule, PARAMS, STATE, KEY, n, max_steps=9, after_step=note, return_states=True
        )
    )
    final, states = run(4)
    jax.effects_barrier()
    assert sorted(seen) == [0, 1, 2, 3]
    np.testing.assert_array_equal(final, nk.rollout(CASE.rule, PARAMS, STATE, KEY, 4))
    np.testing.assert_array_equal(states[4:], jnp.broadcast_to(final, states[4:].shape))


def test_after_step_gets_the_number_of_the_step_and_a_key():
    def drift(before, after, positions, *, step, key):
        return after + step + jax.random.normal(key, (5,))

    def by_place(before, after, positions, step, key):
        return drift(before, after, positions, step=step, key=key)

    want = STATE
    for t in range(STEPS):
        key = jax.random.fold_in(KEY, t)
        after = nk.step(CASE.rule, PARAMS, want, key)
        want = after + t + jax.random.normal(jax.random.fold_in(key, 1), (5,))
    for after_step in (drift, by_place):
        got = nk.rollout(CASE.rule, PARAMS, STATE, KEY, STEPS, after_step=after_step)
        assert_close(got, want, 1e-6, "state")
        np.testing.assert_array_equal(sharded(CASE.rule, KEY, after_step=after_step), got)
    tiled = nk.tiled_rollout(CASE.rule, PARAMS, np.array(STATE), KEY, STEPS, after_step=drift)
    assert_close(tiled, want, 1e-6, "state")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_alive_mask_is_handed_out(backend):
    out, alive = nk.step(CASE.rule, PARAMS, STATE, KEY, backend=backend, return_alive=True)
    np.testing.assert_array_equal(out, nk.step(CASE.rule, PARAMS, STATE, KEY, backend=backend))
    np.testing.assert_array_equal(alive, jnp.any(out != 0, axis=-1))
    assert 0 < alive.sum() < alive.size
    rule = replace(CASE.rule, alive=None)
    assert nk.step(rule, PARAMS, STATE, KEY, backend=backend, return_alive=True)[1].all()
    mapped = jax.vmap(lambda s: nk.step(CASE.rule, PARAMS, s, KEY, return_alive=True))
    assert mapped(STATE)[1].shape == CELLS


def test_the_alive_mask_of_an_update():
    perception = jnp.ones((*CELLS, CASE.perception_size))
    run = partial(nk.update, CASE.rule, PARAMS.layers, STATE, perception, KEY)
    out, alive = run(return_alive=True)
    np.testing.assert_array_equal(out, run())
    np.testing.assert_array_equal(alive, run(return_alive=True, backend="reference")[1])


WRONG = {
    "traced": (
        lambda: jax.jit(lambda n: nk.rollout(CASE.rule, PARAMS, STATE, KEY, n))(3),
        "num_steps is traced here: pass max_steps",
    ),
    "too many": (
        lambda: nk.rollout(CASE.rule, PARAMS, STATE, KEY, 9, max_steps=8),
        "num_steps must be between 0 and max_steps=8, got 9",
    ),
    "masks of fewer steps": (
        lambda: nk.rollout(CASE.rule, PARAMS, STATE, masks_of(0.5)[1:], STEPS),
        r"\[num_steps, \*batch, \*spatial\], \(6, 3, 11, 13\) here, got shape \(5,",
    ),
    "a function of floats": (
        lambda: nk.rollout(CASE.rule, PARAMS, STATE, lambda t: jnp.ones(CELLS), STEPS),
        "a function in place of the key must return bool",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    call, words = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=words):
        call()
