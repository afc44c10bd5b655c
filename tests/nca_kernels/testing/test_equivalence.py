"""``check_equivalent`` on steps as people write them: the same, or with one part that differs."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nca_kernels as nk
from nca_kernels.testing import Case, check_equivalent

CHANNELS, HIDDEN, RATE, THRESHOLD = 6, 11, 0.4, 0.1
pytestmark = pytest.mark.usefixtures("quick_to_compile")
SOBEL = np.outer([1, 2, 1], [-1, 0, 1]) / 8
IDENTITY = np.outer([0, 1, 0], [0, 1, 0])
RULE = nk.Rule(fire_rate=RATE, alive=nk.Alive(3, THRESHOLD))
PARAMS = Case("", (9, 8), channels=CHANNELS, filters=("identity", "sobel"), hidden=(HIDDEN,))
PARAMS = PARAMS.arguments(3).params


def handwritten(
    filters=(IDENTITY, SOBEL.T, SOBEL),
    pad_mode="constant",
    by_filter=False,
    activation=jax.nn.relu,
    biases=True,
    draw=lambda key, shape: jax.random.uniform(key, (*shape[:-1], 1)) < RATE,
    scale=1.0,
    alive=3,
    before=True,
    after=True,
    residual=True,
    perceived=lambda perception: perception,
    done=lambda state: state,
):
    """A step with shifted slices and `einsum`; every argument replaces one of its parts."""

    def perceive(state):
        padded = jnp.pad(state, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=pad_mode)
        h, w = state.shape[1:3]
        features = [
            sum(f[i, j] * padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3))
            for f in filters
        ]
        if by_filter:
            return jnp.concatenate(features, axis=-1)
        return jnp.stack(features, axis=-1).reshape(*state.shape[:-1], -1)

    def lives(state):
        alpha = state[..., alive]
        pooled = jax.lax.reduce_window(alpha, -jnp.inf, jax.lax.max, (1, 3, 3), (1, 1, 1), "SAME")
        return (pooled > THRESHOLD)[..., None]

    def step(state, key):
        hidden = perceived(perceive(state))
        for i, (weight, bias) in enumerate(PARAMS.layers):
            hidden = hidden @ weight + (bias if biases else 0)
            hidden = activation(hidden) if i == 0 else hidden
        fires = draw(key, state.shape)
        new = (state if residual else 0) + scale * jnp.where(fires, hidden, 0)
        if alive is not None:
            new = new * (lives(state) if before else 1) * (lives(new) if after else 1)
        return done(new)

    return step


def test_the_same():
    check_equivalent(handwritten(), RULE, PARAMS)
    state = jnp.ones((1, 5, 7, CHANNELS)).at[:, 2:, :, 3].set(0.0)
    check_equivalent(handwritten(), RULE, PARAMS, state=state, key=jax.random.key(7))


DIFFERENCES = {
    "the features are in the order f*C + c": {"by_filter": True},
    "the taps are flipped": {"filters": (IDENTITY, -SOBEL.T, -SOBEL)},
    "x for y": {"filters": (IDENTITY, SOBEL, SOBEL.T)},
    "gradients are multiplied by 8": {"filters": (IDENTITY, 8 * SOBEL.T, 8 * SOBEL)},
    "padding='circular' for the perception, not for the alive pool": {"pad_mode": "wrap"},
    "activation='silu'": {"activation": jax.nn.silu},
    "perception_activation='tanh'": {"perceived": jnp.tanh},
    "all biases of layers are None": {"biases": False},
    "divided by fire_rate (as by dropout): step_size=2.5": {"scale": 1 / RATE},
    "every cell fires": {"draw": lambda key, shape: True},
    "fire_rate=0.6: theirs is the rate of not firing": {
        "draw": lambda key, shape: jax.random.bernoulli(key, 1 - RATE, (*shape[:-1], 1))
    },
    "the cells fire that jax.random.bernoulli leaves out": {
        "draw": lambda key, shape: ~jax.random.bernoulli(key, RATE, (*shape[:-1], 1))
    },
    "for each channel": {"draw": lambda key, shape: jax.random.bernoulli(key, RATE, shape)},
    "one mask is drawn for all samples": {
        "draw": lambda key, shape: jax.random.bernoulli(key, RATE, (*shape[1:-1], 1))
    },
    "jax.random.split(key)[1]": {
        "draw": lambda key, shape: jax.random.bernoulli(
            jax.random.split(key)[1], RATE, (*shape[:-1], 1)
        )
    },
    "theirs has no alive mask": {"alive": None},
    "the alive channel is 5": {"alive": 5},
    "only the state before": {"after": False},
    "only the state after": {"before": False},
    "nothing is added to the old one": {"residual": False},
}


@pytest.mark.parametrize("message", DIFFERENCES)
def test_the_part_that_differs(message):
    with pytest.raises(AssertionError, match=re.escape(message)) as caught:
        check_equivalent(handwritten(**DIFFERENCES[message]), RULE, PARAMS)
    assert "is not nk.step with this rule" in str(caught.value)


def test_two_parts_that_differ():
    step = handwritten(by_filter=True, scale=1 / RATE)
    with pytest.raises(AssertionError, match=r"It is, if .* and ") as caught:
        check_equivalent(step, RULE, PARAMS)
    assert "divided by fire_rate" in str(caught.value)
    assert "f*C + c" in str(caught.value)


def test_what_no_change_explains():
    noisy = handwritten(done=lambda state: state.at[..., 2].add(0.1))
    with pytest.raises(AssertionError, match=r"No change of one or two .* only in channels 2"):
        check_equivalent(noisy, RULE, PARAMS)
    border = handwritten(done=lambda state: state.at[:, 0].set(0.0))
    with pytest.raises(AssertionError, match="all of them at the border"):
        check_equivalent(border, RULE, PARAMS)


def test_shape_and_gradient():
    with pytest.raises(AssertionError, match=r"makes float32\[2, 9, 8, 5\] of a state that is"):
        check_equivalent(handwritten(done=lambda s: s[..., 1:]), RULE, PARAMS)
    stopped = handwritten(perceived=jax.lax.stop_gradient)
    with pytest.raises(AssertionError, match="another gradient to the state"):
        check_equivalent(stopped, RULE, PARAMS)
    check_equivalent(stopped, RULE, PARAMS, gradients=False)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_grids_and_inputs(dims):
    case = Case("", (5, 4, 6)[:dims], channels=4, filters=2, inputs=3, bias=False)
    args = case.arguments()
    rule = replace(RULE, alive=None, padding="circular", perception_activation="gelu")

    def step(state, key, inputs):
        return nk.step(rule, args.params, state, key, inputs, backend="xla")

    check_equivalent(step, rule, args.params, state=args.state, inputs=args.inputs)

    def swapped(state, key, inputs):
        (weight, bias), *rest = args.params.layers
        rows = jnp.concatenate([weight[3:], weight[:3]])
        params = replace(args.params, layers=((rows, bias), *rest))
        return nk.step(rule, params, state, key, inputs, backend="xla")

    with pytest.raises(AssertionError, match="the inputs come before the perception"):
        check_equivalent(swapped, rule, args.params, state=args.state, inputs=args.inputs)
