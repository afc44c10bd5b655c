"""Wrong calls raise the right exception before anything is traced, with the words that help."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nca_kernels as nk

C = 4
RULE = nk.Rule()
KEY = jax.random.key(0)
TAPS = jnp.asarray(nk.taps(["identity", "sobel"], C))
W1, B1, W2 = jnp.zeros((12, 8)), jnp.zeros(8), jnp.zeros((8, C))
PARAMS = nk.RuleParams(TAPS, None, ((W1, B1), (W2, None)))
STATE = jnp.zeros((2, 6, 5, C))
Q = jnp.zeros((2, 6, 5, 3, 4))


def step(params=PARAMS, state=STATE, key=KEY, inputs=None, rule=RULE, backend="auto"):
    return nk.step(rule, params, state, key, inputs, backend=backend)


def params(**changes):
    return nk.RuleParams(**{**vars(PARAMS), **changes})


def update(state=STATE, perception=None, layers=PARAMS.layers, **keywords):
    perception = jnp.zeros((2, 6, 5, 12)) if perception is None else perception
    return nk.update(RULE, layers, state, perception, KEY, **keywords)


def rollout(num_steps=4, state=STATE, **keywords):
    return nk.rollout(RULE, PARAMS, state, KEY, num_steps, **keywords)


def attend(q=Q, k=Q, v=Q, radius=1, num_spatial_dims=2, backend="auto", padding="zeros"):
    return nk.neighborhood_attention(q, k, v, radius, num_spatial_dims, backend, padding=padding)


WRONG = {
    "activation": (
        lambda: nk.Rule(activation="softplus"),
        ValueError,
        "activation relu gelu 'softplus'",
    ),
    "perception activation": (
        lambda: nk.Rule(perception_activation="ReLU"),
        ValueError,
        "perception_activation relu 'ReLU'",
    ),
    "padding": (lambda: nk.Rule(padding="same"), ValueError, "padding zeros circular 'same'"),
    "precision": (lambda: nk.Rule(precision="fp16"), ValueError, "precision bfloat16 'fp16'"),
    "fire rate 0": (lambda: nk.Rule(fire_rate=0.0), ValueError, "fire_rate greater than 0 0.0"),
    "fire rate 2": (lambda: nk.Rule(fire_rate=2), ValueError, "fire_rate at most 1 2"),
    "fire rate nan": (lambda: nk.Rule(fire_rate=float("nan")), ValueError, "fire_rate finite nan"),
    "fire rate array": (
        lambda: nk.Rule(fire_rate=jnp.full(2, 1.5)),
        ValueError,
        "fire_rate at most 1",
    ),
    "fire rate ints": (lambda: nk.Rule(fire_rate=np.ones(2, int)), TypeError, "fire_rate int64"),
    "step size of others": (
        lambda: step(rule=nk.Rule(step_size=jnp.ones(7))),
        ValueError,
        "Rule.step_size scalar batch (7,)",
    ),
    "step size": (lambda: nk.Rule(step_size="1"), TypeError, "step_size float str"),
    "alive": (lambda: nk.Rule(alive=0.1), TypeError, "alive Alive None float"),
    "alive channel": (lambda: nk.Alive(channel=1.5), TypeError, "channel int 1.5"),
    "alive threshold": (lambda: nk.Alive(threshold=None), TypeError, "threshold NoneType"),
    "alive channel range": (
        lambda: step(rule=nk.Rule(alive=nk.Alive(channel=4))),
        ValueError,
        "alive.channel -4 3 4 channels",
    ),
    "rule": (lambda: step(rule="relu"), TypeError, "rule Rule str"),
    "params": (lambda: step(params=(TAPS, ())), TypeError, "params RuleParams tuple"),
    "state list": (lambda: step(state=[1.0]), TypeError, "state array list"),
    "state dtype": (
        lambda: step(state=STATE.astype("float16")),
        TypeError,
        "state bfloat16 float16",
    ),
    "state int": (lambda: step(state=STATE.astype(int)), TypeError, "state float32 int32"),
    "state rank": (
        lambda: step(state=STATE[0, 0]),
        ValueError,
        "state [*batch, *spatial, C] (5, 4)",
    ),
    "state empty": (lambda: step(state=STATE[:, :0]), ValueError, "state one cell (2, 0, 5, 4)"),
    "taps rank": (
        lambda: step(params=params(perception=W1)),
        ValueError,
        "perception kernel (12, 8)",
    ),
    "taps fan-in": (
        lambda: step(params=params(perception=TAPS.reshape(3, 3, 2, 6))),
        ValueError,
        "perception C=4 (3, 3, 2, 6)",
    ),
    "taps multiple": (
        lambda: step(params=params(perception=TAPS[..., :-1])),
        ValueError,
        "depthwise multiple C=4 (3, 3, 1, 11)",
    ),
    "taps int": (
        lambda: step(params=params(perception=TAPS.astype(int))),
        TypeError,
        "perception floating int32",
    ),
    "taps missing": (
        lambda: step(params=params(perception=None)),
        TypeError,
        "perception NoneType",
    ),
    "perception bias": (
        lambda: step(params=params(perception_bias=B1)),
        ValueError,
        "perception_bias [12] (8,)",
    ),
    "no layers": (lambda: step(params=params(layers=())), ValueError, "layers one or more (W, b)"),
    "layer not a pair": (
        lambda: step(params=params(layers=(W1, W2))),
        ValueError,
        "layers[0] pair (W, b)",
    ),
    "first width": (
        lambda: step(params=params(layers=((W1.T, None), (W2, None)))),
        ValueError,
        "layers[0][0] [12, out] perception 12 (8, 12)",
    ),
    "inputs not in width": (
        lambda: step(inputs=jnp.zeros((2, 3))),
        ValueError,
        "layers[0][0] [15, out] inputs 3",
    ),
    "next width": (
        lambda: step(params=params(layers=((W1, None), (W1, None)))),
        ValueError,
        "layers[1][0] [8, out] width",
    ),
    "last width": (
        lambda: step(params=params(layers=((W1, None),))),
        ValueError,
        "last as many outputs channels, 4 8",
    ),
    "bias shape": (
        lambda: step(params=params(layers=((W1, B1[:3]), (W2, None)))),
        ValueError,
        "layers[0][1] [8] None (3,)",
    ),
    "inputs shape": (
        lambda: step(inputs=jnp.zeros((6, 5, 3))),
        ValueError,
        "inputs per cell (2, 6, 5, 'I') per sample (6, 5, 3)",
    ),
    "inputs dtype": (
        lambda: step(inputs=jnp.zeros((2, 3), int)),
        TypeError,
        "inputs floating int32",
    ),
    "key int": (lambda: step(key=0), TypeError, "key jax.random.key(0) 0"),
    "key float": (lambda: step(key=jnp.zeros(2)), TypeError, "key float32[2]"),
    "key mask": (
        lambda: step(key=np.ones((3, 3), bool)),
        ValueError,
        "mask [*batch, *spatial] (3, 3)",
    ),
    "key array": (
        lambda: step(key=jax.random.split(KEY, 2)),
        ValueError,
        "key single (2,) jax.vmap",
    ),
    "backend": (lambda: step(backend="cuda"), ValueError, "backend auto xla reference 'cuda'"),
    "perception shape": (
        lambda: update(perception=jnp.zeros((2, 6, 12))),
        ValueError,
        "perception (2, 6, 5) (2, 6, 12)",
    ),
    "update dims": (lambda: update(num_spatial_dims=4), ValueError, "num_spatial_dims 1, 2, 3 4"),
    "update rank": (
        lambda: update(state=STATE[0, 0], perception=jnp.zeros((5, 12))),
        ValueError,
        "state 2 spatial num_spatial_dims (5, 4)",
    ),
    "num_steps": (lambda: rollout(-1), ValueError, "num_steps at least 0 -1"),
    "num_steps float": (lambda: rollout(2.0), TypeError, "num_steps int 2.0"),
    "checkpoint": (lambda: rollout(checkpoint="log"), ValueError, "checkpoint 'all' 'sqrt' 'log'"),
    "checkpoint 0": (lambda: rollout(checkpoint=0), ValueError, "checkpoint at least 1 0"),
    "checkpoint bool": (lambda: rollout(checkpoint=True), ValueError, "checkpoint int True"),
    "sample shape": (
        lambda: rollout(sample_steps=np.zeros(3, int)),
        ValueError,
        "sample_steps batch (2,) (3,)",
    ),
    "sample range": (
        lambda: rollout(sample_steps=np.array([0, 5])),
        ValueError,
        "sample_steps num_steps=4 0 to 5",
    ),
    "sample dtype": (lambda: rollout(sample_steps=np.zeros(2)), TypeError, "sample_steps float64"),
    "sample and states": (
        lambda: rollout(sample_steps=np.zeros(2, int), return_states=True),
        ValueError,
        "sample_steps return_states exclude",
    ),
    "filter name": (lambda: nk.taps(["sobol"], 4), ValueError, "'sobol' identity sobel"),
    "filter string": (lambda: nk.taps("sobel", 4), ValueError, "filters sequence 'sobel'"),
    "filter dims": (lambda: nk.taps(["sobel"], 4, 4), ValueError, "num_spatial_dims 1, 2 or 3 4"),
    "filter channels": (lambda: nk.taps(["sobel"], 0), ValueError, "channels positive 0"),
    "filter array": (
        lambda: nk.taps([np.zeros((3, 3))], 4),
        ValueError,
        "[*kernel, F] 2 kernel axes (3, 3)",
    ),
    "filter centre": (
        lambda: nk.taps(["sobel", np.zeros((2, 2, 1))], 4),
        ValueError,
        "no common centre odd (2, 2)",
    ),
}

WRONG_ATTENTION = {
    "q list": (lambda: attend(q=[1.0]), TypeError, "q array list"),
    "k None": (lambda: attend(k=None), TypeError, "k array NoneType"),
    "v int": (lambda: attend(v=Q.astype(int)), TypeError, "v float32 bfloat16 int32"),
    "q float16": (lambda: attend(q=Q.astype("float16")), TypeError, "q float32 bfloat16 float16"),
    "k dtype": (lambda: attend(k=Q.astype("bfloat16")), TypeError, "k dtype q float32 bfloat16"),
    "k shape": (
        lambda: attend(k=Q[..., :3]),
        ValueError,
        "k shape q (2, 6, 5, 3, 4) (2, 6, 5, 3, 3)",
    ),
    "v shape": (lambda: attend(v=Q[:1]), ValueError, "v shape q (2, 6, 5, 3, 4) (1, 6, 5, 3, 4)"),
    "rank": (
        lambda: attend(*[Q[0, 0]] * 3),
        ValueError,
        "q [*batch, *spatial, heads, d] 2 spatial num_spatial_dims (5, 3, 4)",
    ),
    "no cell": (lambda: attend(*[Q[:, :0]] * 3), ValueError, "q one cell (2, 0, 5, 3, 4) batch"),
    "no head": (lambda: attend(*[Q[..., :0, :]] * 3), ValueError, "q one head (2, 6, 5, 0, 4)"),
    "radius -1": (lambda: attend(radius=-1), ValueError, "radius at least 0 -1"),
    "radius float": (lambda: attend(radius=1.0), TypeError, "radius int 1.0"),
    "radius bool": (lambda: attend(radius=True), TypeError, "radius int True"),
    "padding": (lambda: attend(padding="reflect"), ValueError, "padding zeros circular 'reflect'"),
    "dims": (lambda: attend(num_spatial_dims=4), ValueError, "num_spatial_dims 1, 2, 3 4"),
    "backend": (lambda: attend(backend="cuda"), ValueError, "backend auto xla reference 'cuda'"),
}
WRONG |= {f"attention {name}": wrong for name, wrong in WRONG_ATTENTION.items()}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    call, exception, words = WRONG[name]
    with pytest.raises(exception) as caught:
        call()
    assert caught.type is exception
    missing = [word for word in words.split() if word.strip("(),[]") not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_there_are_at_least_thirty():
    assert len(WRONG) >= 30


OPS = {
    "step": (lambda x, backend: step(state=x, backend=backend), STATE),
    "neighborhood_attention": (lambda x, backend: attend(q=x, backend=backend), Q),
}


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_says_to_use_reverse_mode(op):
    call, x = OPS[op]
    run = partial(call, backend="xla")
    for transform in (
        jax.jacfwd(run),
        jax.jit(jax.jacfwd(run)),
        jax.hessian(lambda x: run(x).sum()),
    ):
        with pytest.raises(TypeError, match=rf"{op} has .* use "):
            transform(x)
    jax.jvp(partial(call, backend="reference"), (x,), (x,))
