"""The mask is JAX's own, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nca_kernels as nk
from nca_kernels.fire_mask import cell_index, fire_operand, fires, multiply_add, threshold


@pytest.mark.parametrize("rate", [1e-9, 0.1, 1 / 3, 0.5, 0.75, 1 - 2**-24, 0.999999, 1.0])
@pytest.mark.parametrize("shape", [(1,), (17,), (3, 5, 7), (2, 1, 4, 3)])
def test_equals_bernoulli(rate, shape):
    for seed in (0, 1, 12345):
        key = jax.random.fold_in(jax.random.key(seed), 3)
        ours = fires(jax.random.key_data(key), rate, shape)
        np.testing.assert_array_equal(ours, jax.random.bernoulli(key, rate, shape))


def test_threshold_is_that_of_the_uniform_draw():
    for rate in (1e-9, 0.1, 0.3, 0.5, 0.7, 0.9999999):
        uniform = np.arange(2**23) / 2**23  # every value that jax.random.uniform can take
        assert threshold(rate) == np.count_nonzero(uniform < np.float32(rate))


def test_index_beyond_32_bits():
    position = jnp.array([0, 1, 65535, 65536, 2**31 - 1, 2**32 - 1], jnp.uint32)
    start = (jnp.full(6, 3, jnp.uint32), jnp.full(6, 2**32 - 5, jnp.uint32))
    for stride in (1, 7, 2**16 - 1, 2**32 - 1, 2**32 + 9, 2**40 + 12345):
        high, low = multiply_add(*start, position, stride)
        got = [(int(h) << 32) | int(w) for h, w in zip(high, low, strict=True)]
        origin = (3 << 32) + 2**32 - 5
        assert got == [(origin + int(p) * stride) % 2**64 for p in position]


def test_index_of_a_lattice_beyond_32_bits():
    # 2**33 cells are only traced, not allocated; the words agree on a corner computed by hand.
    shape = jax.eval_shape(lambda: cell_index((2, 2**32)))
    assert shape[0].shape == (2, 2**32)


def test_folded_keys_in_a_rollout():
    rule = nk.Rule(alive=None, fire_rate=0.3)
    params = nk.RuleParams(nk.taps(["identity"], 1), None, ((jnp.zeros((1, 1)), jnp.ones(1)),))
    key, state = jax.random.key(5), jnp.zeros((2, 6, 7, 1))
    _, states = nk.rollout(rule, params, state, key, 5, return_states=True)
    changes = np.diff(np.concatenate([state[None], states]), axis=0)[..., 0]
    for t in range(5):
        expected = jax.random.bernoulli(jax.random.fold_in(key, t), 0.3, state.shape[:-1])
        np.testing.assert_array_equal(changes[t], expected)


@pytest.mark.parametrize("kind", ["raw key", "rbg", "unsafe_rbg", "not partitionable", "x64"])
def test_other_draws_are_handed_to_the_kernel(kind):
    """jax.random draws the mask where its bits are not those that kernels compute."""
    impl = kind if "rbg" in kind else None
    key = jax.random.PRNGKey(3) if kind == "raw key" else jax.random.key(3, impl=impl)
    rule = nk.Rule(alive=None, fire_rate=0.4)
    params = nk.RuleParams(nk.taps(["identity"], 1), None, ((jnp.zeros((1, 1)), jnp.ones(1)),))
    partitionable = jax.config.jax_threefry_partitionable
    try:
        jax.config.update("jax_threefry_partitionable", kind != "not partitionable")
        with jax.enable_x64(kind == "x64"):
            state = jnp.zeros((3, 5, 7, 1), jnp.float32)
            out = nk.step(rule, params, state, key, backend="xla")
            expected = jax.random.bernoulli(key, 0.4, state.shape[:-1])
            operand = fire_operand(key, 0.4, state.shape[:-1])
    finally:
        jax.config.update("jax_threefry_partitionable", partitionable)
    np.testing.assert_array_equal(out[..., 0], expected)
    assert (operand.dtype == jnp.uint32) == (kind == "raw key")
