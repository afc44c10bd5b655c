"""Which activation a function computes, told by values and gradients."""

import copy
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("cax", reason="CAX is not installed (the extra `cax`)")

from flax import nnx

from nca_models.compat.cax_activations import Activation, CannotFuse, recognise


class Squash:
    """An activation that is an object, with a number that may change."""

    def __init__(self, slope):
        self.slope = slope

    def __call__(self, x):
        return jnp.where(x < 0, self.slope * x, x)


class LooksLike:
    """The same function as another object."""

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)


def gelu_by_hand(x):
    return 0.5 * x * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3)))


KNOWN = {
    "relu": (nnx.relu, "relu"),
    "relu by where": (lambda x: jnp.where(x > 0, x, 0), "relu"),
    "silu by hand": (lambda x: x * nnx.sigmoid(x), "silu"),
    "swish": (nnx.swish, "silu"),
    "gelu": (nnx.gelu, "gelu"),
    "gelu by hand": (gelu_by_hand, "gelu"),
    "tanh": (jax.lax.tanh, "tanh"),
    "elu": (nnx.elu, "elu"),
    "celu": (partial(nnx.celu, alpha=1.0), "elu"),
    "nothing": (lambda x: x, "identity"),
    "jitted": (jax.jit(nnx.silu), "silu"),
    "copied": (copy.deepcopy(nnx.relu), "relu"),
    "leaky": (nnx.leaky_relu, ("leaky_relu", 0.01)),
    "steep": (partial(nnx.leaky_relu, negative_slope=0.2), ("leaky_relu", 0.2)),
    "falling": (partial(nnx.leaky_relu, negative_slope=-0.3), ("leaky_relu", -0.3)),
    "object": (Squash(0.4), ("leaky_relu", 0.4)),
    "wrapped": (LooksLike(nnx.elu), "elu"),
}
UNKNOWN = {
    "half a gradient at 0": (lambda x: jnp.maximum(x, 0), "the values of relu, but another grad"),
    "clip": (lambda x: jnp.clip(x, 0), "the values of relu, but another gradient"),
    "no gradient": (lambda x: jax.lax.stop_gradient(nnx.tanh(x)), "the values of tanh, but"),
    "straight through": (
        lambda x: x + jax.lax.stop_gradient(nnx.relu(x) - x),
        "the values of relu",
    ),
    "exact gelu": (partial(nnx.gelu, approximate=False), "not one of relu, gelu"),
    "relu6": (nnx.relu6, "not one of"),
    "elu of 1.5": (partial(nnx.elu, alpha=1.5), r"partial\(elu\) is not one of"),
    "hard tanh": (nnx.hard_tanh, "not one of"),
    "scaled": (lambda x: 2 * nnx.relu(x), "not one of"),
    "softmax": (nnx.softmax, "not one of"),
    "over cells": (lambda x: nnx.relu(x - x.mean(0)), "not one of"),
    "the largest": (lambda x: nnx.relu(x.max(-1, keepdims=True) + 0 * x), "not one of"),
    "a channel apart": (lambda x: nnx.relu(x).at[..., 3].set(x[..., 3]), "not one of"),
    "the last apart": (lambda x: nnx.relu(x).at[..., -1].set(0), "not one of"),
    "a gate": (lambda x: nnx.glu(x), "cannot be evaluated by itself: TypeError"),
    "another dtype": (lambda x: nnx.relu(x).astype(jnp.bfloat16), "TypeError"),
    "a module": (nnx.PReLU(), "PReLU is or holds an nnx module"),
    "a method of one": (nnx.PReLU().__call__, "is or holds an nnx module"),
    "none": (None, "TypeError"),
}


@pytest.mark.parametrize("features", [5, 16])
@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("name", KNOWN)
def test_known(name, dims, features):
    function, expected = KNOWN[name]
    label, slope = expected if isinstance(expected, tuple) else (expected, None)
    activation = recognise(function, dims, features)
    assert activation.name == label
    assert (activation.negative_slope is None) == (slope is None)
    if slope is not None:
        assert np.float32(activation.negative_slope) == np.float32(slope)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name):
    function, reason = UNKNOWN[name]
    with pytest.raises(CannotFuse, match=reason):
        recognise(function, 2, 8)


def test_what_a_function_refers_to():
    module, rngs, rng = nnx.PReLU(), nnx.Rngs(0), np.random.default_rng(0)
    for function in (
        lambda x: module(x),
        lambda x: x * rngs.uniform(),
        partial(lambda slope, x: x * slope[...], nnx.Param(jnp.ones(()))),
    ):
        with pytest.raises(CannotFuse, match="holds an nnx module or variable"):
            recognise(function, 2, 8)
    assert int(rngs.default.count[...]) == 0, "a random number was drawn"
    with pytest.raises(CannotFuse, match="is random"):
        recognise(lambda x: x * rng.random(), 2, 8)


def test_a_number_that_changes_counts_each_time():
    squash = Squash(0.4)
    assert recognise(squash, 2, 8).negative_slope == pytest.approx(0.4)
    squash.slope = 0.1
    assert recognise(squash, 2, 8).negative_slope == pytest.approx(0.1)


def test_while_jax_traces():
    """Also in a gradient; a slope that is traced itself is not known."""
    function = pickle.loads(pickle.dumps(Squash(0.25)))
    seen = []

    def traced(x, slope):
        seen.append(recognise(function, 2, 8))
        with pytest.raises(CannotFuse, match="cannot be evaluated by itself"):
            recognise(lambda y: nnx.leaky_relu(y, slope), 2, 8)
        return x * slope

    jax.jit(jax.grad(traced))(1.0, 0.1)
    with jax.disable_jit():
        seen.append(recognise(function, 2, 8))
    assert set(seen) == {Activation("leaky_relu", 0.25)}
