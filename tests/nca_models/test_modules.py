"""The nnx module: the same numbers as nca_kernels, and at home in Flax's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nca_kernels as nk
from nca_models import NCA

KEY = jax.random.key(3)


def automaton(**options) -> NCA:
    defaults = {"hidden": (12,), "zero_init": False, "rngs": nnx.Rngs(0)}
    return NCA(6, **(defaults | options))


def some_state(*lead: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (*lead, 9, 7, 6))


def test_a_call_is_nk_step():
    nca, state = automaton(), some_state(2)
    expected = nk.step(nca.rule, nca.rule_params(), state, KEY)
    np.testing.assert_array_equal(nca(state, KEY), expected)
    assert np.abs(nca(state, KEY) - state).max() > 1e-3


def test_taps_are_identity_and_normalised_sobel():
    taps = automaton().rule_params().perception
    np.testing.assert_array_equal(taps, nk.taps(("identity", "sobel"), channels=6))
    np.testing.assert_allclose(np.abs(taps).sum((0, 1)), 1, rtol=1e-6)


def test_constant_taps_are_known_when_it_is_compiled():
    nca = automaton()
    assert not any("perception" in path for path, _ in nnx.to_flat_state(nnx.state(nca)))
    assert nnx.graphdef(nca) == nnx.graphdef(automaton())
    assert nnx.graphdef(nca) != nnx.graphdef(automaton(filters=("identity", "gradient")))

    @nnx.jit
    def constant(nca):
        return isinstance(nca.rule_params().perception, np.ndarray)

    assert constant(nca)
    assert not constant(automaton(trainable_perception=True))


def test_an_untrained_automaton_leaves_living_cells_alone():
    nca, state = automaton(zero_init=True), some_state(1)
    np.testing.assert_array_equal(nca(state, KEY), state)


def test_first_weights_are_lecun_normal():
    kernel = automaton(hidden=(4096,)).layers[0].kernel[...]
    assert kernel.std() == pytest.approx((1 / 18) ** 0.5, rel=0.02)


def test_rollout_is_steps_with_folded_keys():
    nca, state = automaton(), some_state(2)
    expected = state
    for t in range(4):
        expected = nca(expected, jax.random.fold_in(KEY, t))
    np.testing.assert_allclose(nca.rollout(state, KEY, 4), expected, rtol=1e-5, atol=1e-6)
    _, sampled = nca.rollout(state, KEY, 4, sample_steps=jnp.array([4, 1]))
    np.testing.assert_allclose(sampled[0], expected[0], rtol=1e-5, atol=1e-6)
    first = nca(state, jax.random.fold_in(KEY, 0))
    np.testing.assert_allclose(sampled[1], first[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_are_of_params_alone(trainable):
    nca, state = automaton(trainable_perception=trainable), some_state(2)
    grads = nnx.grad(lambda m: jnp.mean(m(state, KEY) ** 2))(nca)
    assert ("perception" in grads) == trainable
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_jit_agrees_with_the_plain_call():
    nca, state = automaton(), some_state(2)
    jitted = nnx.jit(lambda m, s: m(s, KEY))(nca, state)
    np.testing.assert_allclose(jitted, nca(state, KEY), rtol=1e-5, atol=1e-6)


def test_vmap_over_models():
    make = nnx.vmap(lambda rngs: automaton(rngs=rngs), in_axes=0, out_axes=0)
    models = make(nnx.Rngs(0).split(3))
    state = some_state(2)
    many = nnx.vmap(lambda m, s: m(s, KEY), in_axes=(0, None))(models, state)
    assert many.shape == (3, *state.shape)
    graph, values = nnx.split(models)
    second = nnx.merge(graph, jax.tree.map(lambda v: v[1], values))
    np.testing.assert_allclose(many[1], second(state, KEY), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (2, 9, 7, 3)], ids=["per sample", "per cell"])
def test_inputs(shape):
    nca, state = automaton(inputs=3), some_state(2)
    with_inputs = nca(state, KEY, jnp.ones(shape))
    assert np.abs(with_inputs - nca(state, KEY, jnp.zeros(shape))).max() > 1e-4


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_and_no_last_bias(dims):
    nca = automaton(num_spatial_dims=dims, last_bias=False)
    state = jax.random.uniform(KEY, (2, *(5,) * dims, 6))
    assert nca(state, KEY).shape == state.shape
    assert nca.rule_params().layers[-1][1] is None
