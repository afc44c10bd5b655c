"""Accelerated CAX systems against CAX itself, as it is installed here."""

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("cax", reason="CAX is not installed (the extra `cax`)")

from cax.core.perceive import ConvPerceive, MoorePerceive
from cax.core.update import MLPUpdate, NCAUpdate, ResidualUpdate
from flax import nnx

import nca_kernels as nk
from nca_kernels.testing import assert_close, error_ratio
from nca_models.compat import cax_calls
from nca_models.compat.cax import MooreAttentionPerceive, accelerate, explain
from tests.nca_models.compat.cax_systems import (
    EXAMPLES,
    OLD_API,
    Attention,
    Conditional,
    Growing,
    OneDimensional,
    SelfAutoencoding,
    SelfClassifying,
    System,
    arguments,
    trajectory,
)

STEPS = 32
pytestmark = pytest.mark.usefixtures("quick_to_compile")


def pair(system, seed=0, backend="auto", **keywords):
    """The same system twice, the second one accelerated."""
    plain, fast = (system(rngs=nnx.Rngs(seed)) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plain, accelerate(fast, backend, **keywords)


def assert_same_trajectory(plain, fast, state, input=None, steps=STEPS):
    """Identical cells fire; the states differ by at most 1e-5 of their norm for each step."""
    expected = np.asarray(trajectory(plain, state, input, steps)[1])
    got = np.asarray(trajectory(fast, state, input, steps)[1])
    before = np.concatenate([np.asarray(state)[None], expected[:-1]])
    assert np.any(expected != before), "nothing fired"
    for t in range(steps):
        assert error_ratio(got[t], expected[t]) <= 1e-5 * (t + 1), f"step {t}"
    fired = [
        np.any(states[1:] != states[:-1], axis=-1)
        for states in (np.concatenate([np.asarray(state)[None], s]) for s in (expected, got))
    ]
    np.testing.assert_array_equal(*fired)


# ---- the examples ----


@pytest.mark.parametrize("system", EXAMPLES)
def test_trajectory(system):
    plain, fast = pair(system)
    assert_same_trajectory(plain, fast, *arguments(system))


def loss_of(cs, state, input, num_steps):
    """The loss that every example trains on: a batch by `nnx.vmap` with streams split."""
    axes = nnx.StateAxes({nnx.RngState: 0, ...: None})
    run = nnx.vmap(
        lambda cs, state, input: cs(state, input, num_steps=num_steps), in_axes=(axes, 0, 0)
    )
    final = nnx.split_rngs(splits=state.shape[0])(run)(cs, state, input)
    return jnp.mean(jnp.square(final[..., :4] - 0.3)), final


@pytest.mark.parametrize("system", EXAMPLES)
def test_gradients_of_a_batch(system):
    """Gradients of all parameters, taps too, under `nnx.jit`, `nnx.vmap` and `nnx.split_rngs`."""
    plain, fast = pair(system)
    state, input = arguments(system, batch=3)
    gradient = nnx.jit(nnx.value_and_grad(loss_of, has_aux=True), static_argnums=3)
    (loss, final), grads = gradient(plain, state, input, STEPS)
    (fast_loss, fast_final), fast_grads = gradient(fast, state, input, STEPS)
    assert_close(fast_loss, loss, 1e-5)
    assert_close(fast_final, final, 1e-5 * STEPS)
    assert_close(pure(fast_grads), pure(grads), 1e-4)


def pure(grads):
    """A dictionary without the keys' bias, whose gradient is rounding alone: softmax ignores it."""
    grads = nnx.to_pure_dict(grads)
    grads["perceive"].get("attention", {}).get("key", {}).pop("bias", None)
    return grads


@pytest.mark.parametrize("system", [Growing, SelfClassifying, SelfAutoencoding, OneDimensional])
def test_nothing_is_left_of_the_convolutions(system):
    """The compiled gradient has the fused kernels, and no leftover perception."""
    _, fast = pair(system)
    if not OLD_API:
        fast.remat = True
    state, input = arguments(system, batch=2)
    graph, content = nnx.split(fast)

    def gradient(content, state, input):
        grads = nnx.grad(loss_of, has_aux=True)(nnx.merge(graph, content), state, input, 4)[0]
        return jax.tree.leaves(nnx.to_pure_dict(grads))

    compiled = jax.jit(gradient).lower(content, state, input).compile().as_text()
    assert " convolution(" not in compiled
    auto = next(b.name for b in nk.backends() if b.auto)
    if auto == "cpu":
        assert "nca_cpu_step_forward" in compiled
        assert "nca_cpu_step_backward" in compiled


@pytest.mark.parametrize("backend", ["cpu", "xla", "reference"])
def test_backends(backend):
    reason = {b.name: b.reason for b in nk.backends()}[backend]
    if reason:
        pytest.skip(reason)
    plain, fast = pair(Growing, backend=backend)
    assert_same_trajectory(plain, fast, *arguments(Growing), steps=8)
    assert_same_trajectory(plain, accelerate(fast, "xla"), *arguments(Growing), steps=8)


# ---- nothing else changes ----


def test_parameters_streams_and_classes_stay():
    plain, fast = pair(Growing)
    assert jax.tree.structure(nnx.state(plain)) == jax.tree.structure(nnx.state(fast))
    paths = [[path for path, _ in nnx.to_flat_state(nnx.state(cs))] for cs in (plain, fast)]
    assert paths[0] == paths[1]
    update = nnx.All(nnx.Param, nnx.PathContains("update"))
    assert len(jax.tree.leaves(nnx.state(fast, update))) == 4
    assert isinstance(fast.update, NCAUpdate)
    assert isinstance(fast.perceive, ConvPerceive)
    assert type(fast.update).__name__ == "NCAUpdate"
    state, _ = arguments(Growing)
    for cs in (plain, fast):
        cs(state, num_steps=3)
    streams = [
        jax.tree.leaves(nnx.to_pure_dict(nnx.state(cs, nnx.RngState))) for cs in (plain, fast)
    ]
    for a, b in zip(*streams, strict=True):
        np.testing.assert_array_equal(
            jax.random.key_data(a) if a.dtype != "uint32" else a,
            jax.random.key_data(b) if b.dtype != "uint32" else b,
        )
    nnx.update(plain, nnx.state(fast))  # a checkpoint of either is one of the other
    copy = nnx.clone(fast)
    assert_same_trajectory(plain, copy, state, steps=4)


def test_training_with_an_optimizer():
    """The losses of 50 training steps are the same, and the filter leaves the taps as they are."""
    wrt = nnx.All(nnx.Param, nnx.PathContains("update"))
    state, _ = arguments(Growing, batch=2)

    @nnx.jit
    def train_step(cs, optimizer, state):
        diff = nnx.DiffState(0, wrt)
        gradient = nnx.value_and_grad(loss_of, has_aux=True, argnums=diff)
        (loss, _), grads = gradient(cs, state, None, 8)
        optimizer.update(cs, grads)
        return loss

    losses = []
    for cs in pair(Growing):
        optimizer = nnx.Optimizer(
            cs, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), wrt=wrt
        )
        losses.append([float(train_step(cs, optimizer, state)) for _ in range(50)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_eval_turns_dropout_off_and_on_again():
    plain, fast = pair(Growing)
    state, _ = arguments(Growing)
    for mode in ("eval", "train"):
        for cs in (plain, fast):
            getattr(cs, mode)()
        assert_same_trajectory(plain, fast, state, steps=4)


def test_an_input_for_each_step():
    class PerStep(Conditional):
        pass

    plain, fast = pair(PerStep)
    state, _ = arguments(PerStep)
    input = jax.random.normal(jax.random.key(5), (6, 3))
    out = [cs(state, input, num_steps=6, input_in_axis=0) for cs in (plain, fast)]
    assert_close(out[1], out[0], 1e-4)


def test_what_is_done_with_the_perception_counts():
    """A perception that was looked at, changed, or taken of another state gives what CAX gives."""

    class Looks(Growing):
        def _step(self, state, input=None, *, sow=False):
            perception = self.perceive(state)
            bright = jnp.mean(perception)  # looked at, and handed on unchanged
            return self.done(self.update(state, perception, input) + 0.01 * bright, sow)

    class Changes(Growing):
        def _step(self, state, input=None, *, sow=False):
            return self.done(self.update(state, 0.5 * self.perceive(state), input), sow)

    class OtherState(Growing):
        def _step(self, state, input=None, *, sow=False):
            perception = self.perceive(state)
            return self.done(self.update(0.9 * state, perception, input), sow)

    class Twice(Growing):
        def _step(self, state, input=None, *, sow=False):
            perception = self.perceive(state)
            state = self.update(state, perception, input)
            return self.done(self.update(state, perception, input), sow)

    for system in (Looks, Changes, OtherState, Twice):
        plain, fast = pair(system)
        assert_same_trajectory(plain, fast, *arguments(system), steps=4)
        assert not cax_calls._sources, "a perception outlived its step"


# ---- parts of other kinds ----


@dataclass(frozen=True)
class Kind:
    """A system put together from a perceive and an update."""

    name: str
    perceive: dict
    update: dict
    of: type = ResidualUpdate
    warns: str = ""

    def __str__(self):
        return self.name

    def system(self, input_size):
        kind, channels = self, 6

        class Made(System):
            grid, inputs = (7, 9), input_size

            def __init__(self, *, rngs):
                perceive = {"perception_size": 18, "feature_group_count": channels} | kind.perceive
                self.perceive = ConvPerceive(channel_size=channels, rngs=rngs, **perceive)
                bias = self.perceive.conv.bias
                if bias is not None:
                    bias[...] = jnp.linspace(-0.2, 0.2, bias.shape[0])
                update = {
                    "num_spatial_dims": 2,
                    "perception_size": perceive["perception_size"] + input_size,
                    "hidden_layer_sizes": (12, 7),
                } | kind.update
                if issubclass(kind.of, NCAUpdate):
                    del update["num_spatial_dims"]
                self.update = kind.of(channel_size=channels, rngs=rngs, **update)

            def _step(self, state, input=None, *, sow=False):
                if input is not None:
                    input = jnp.broadcast_to(input, (*state.shape[:-1], input.shape[-1]))
                return self.done(self.update(state, self.perceive(state), input), sow)

        Made.channels = channels
        return Made


class OwnMask(NCAUpdate):
    def get_alive_mask(self, state):
        return state[..., :1] > -0.2


class Inherits(NCAUpdate):
    """A subclass that computes nothing of its own."""


STEEP = partial(nnx.leaky_relu, negative_slope=0.2)
DENSE = {"perception_size": 11, "feature_group_count": 1}
FIRES = {"cell_dropout_rate": 0.3, "step_size": 0.5}
KINDS = (
    Kind("residual", {}, FIRES),
    Kind("inherits", {}, FIRES, Inherits),
    Kind("no_hidden", {}, FIRES | {"hidden_layer_sizes": ()}),
    Kind("circular", {"padding": "CIRCULAR"}, FIRES),
    Kind("reflect_dense", DENSE | {"padding": "REFLECT"}, FIRES),
    Kind("circular_with_alive", {"padding": "CIRCULAR"}, FIRES, NCAUpdate,
         "alive mask.*beyond the border"),
    Kind("even_kernel", {"kernel_size": (2, 4)}, FIRES, NCAUpdate),
    Kind("bias_and_tanh", {"use_bias": True, "activation_fn": nnx.tanh}, FIRES, NCAUpdate),
    Kind("gelu", {"activation_fn": nnx.gelu}, FIRES | {"activation_fn": nnx.silu}),
    Kind("leaky_relu", {}, {"activation_fn": partial(nnx.leaky_relu, negative_slope=0.01)}),
    Kind("mlp", {}, {}, MLPUpdate),
    Kind("mlp_no_hidden", {"use_bias": True}, {"hidden_layer_sizes": ()}, MLPUpdate),
    Kind("mlp_dense", DENSE | {"use_bias": True}, {}, MLPUpdate),
    Kind("own_mask", {}, FIRES, OwnMask, "get_alive_mask is its own"),
    Kind("wide_pool", {}, FIRES | {"kernel_size": (5, 5)}, NCAUpdate, "not a max-pool over"),
    Kind("valid", {"kernel_size": (1, 1), "padding": "VALID"}, FIRES, warns="padding is 'VALID'"),
    Kind("groups", {"feature_group_count": 2}, FIRES, warns="feature_group_count is 2"),
    Kind("elu", {"activation_fn": nnx.elu}, FIRES | {"activation_fn": nnx.elu}, NCAUpdate),
    Kind("steep", {"activation_fn": STEEP}, FIRES | {"activation_fn": STEEP}),
    Kind("steep_alone", {}, {"activation_fn": STEEP}, MLPUpdate),
    Kind("two_slopes", {"activation_fn": nnx.leaky_relu}, FIRES | {"activation_fn": STEEP},
         warns="slope 0.01, that of the update is leaky_relu of slope 0.2"),
    Kind("softmax", {}, FIRES | {"activation_fn": nnx.softmax}, warns="its activation softmax"),
    Kind("step_array", {}, FIRES | {"step_size": np.array(0.7, np.float32)}, NCAUpdate),
    Kind("step_vector", {}, FIRES | {"step_size": np.ones(1, np.float32)},
         warns=r"its step_size is a float32\[1\], not a scalar number"),
    Kind("nothing_fires", {}, {"cell_dropout_rate": 1.0}, warns="dropout rate is 1.0"),
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_kinds(kind):
    system = kind.system(input_size=2 if KINDS.index(kind) % 2 else 0)
    plain, fast = (system(rngs=nnx.Rngs(1)) for _ in range(2))
    if kind.warns:
        with pytest.raises(ValueError, match=kind.warns):
            accelerate(fast, strict=True)
        with pytest.warns(UserWarning, match=kind.warns) as caught:
            accelerate(fast)
        assert len(caught) == 1
    else:
        accelerate(fast, strict=True)
    if kind.name == "nothing_fires":
        state, input = arguments(system)
        np.testing.assert_array_equal(fast(state, input), plain(state, input))
        return
    state, input = arguments(system)
    if issubclass(kind.of, MLPUpdate) and not issubclass(kind.of, ResidualUpdate):
        out = [cs(state, input, num_steps=4) for cs in (plain, fast)]
        assert_close(out[1], out[0], 4e-5)
    else:
        assert_same_trajectory(plain, fast, state, input, steps=4)
    grads = []
    for cs in (plain, fast):
        loss = lambda cs: jnp.sum(jnp.sin(cs(state, input, num_steps=2)))
        grads.append(pure(nnx.grad(loss)(cs)))
    assert_close(grads[1], grads[0], 1e-4)


def test_another_perceive_has_its_update_fused(capsys):
    class Moore(System):
        def __init__(self, *, rngs):
            self.perceive = MoorePerceive(num_spatial_dims=2, radius=1)
            self.update = self.new_update(9 * self.channels, rngs)

    plain, fast = (Moore(rngs=nnx.Rngs(0)) for _ in range(2))
    with pytest.warns(UserWarning, match=r"perceive \(MoorePerceive\): left as it is: "):
        accelerate(fast)
    state, _ = arguments(Moore)
    assert_same_trajectory(plain, fast, state, steps=4)
    explain(fast, state)
    assert "update (NCAUpdate): fused" in capsys.readouterr().out


def test_the_perceive_of_the_attention_example():
    """The same parameters, names and initial values; linear in the cells."""

    class Fast(Attention):
        make_perceive = MooreAttentionPerceive

    plain, fast = Attention(rngs=nnx.Rngs(0)), Fast(rngs=nnx.Rngs(0))
    accelerate(fast, strict=True)
    initial = [nnx.to_pure_dict(nnx.state(cs, nnx.Param)) for cs in (plain, fast)]
    assert_close(initial[1], initial[0], 0)
    state, _ = arguments(Attention)
    assert_same_trajectory(plain, fast, state)
    grads = [
        pure(nnx.grad(lambda cs: jnp.sum(cs(state, num_steps=4) ** 2))(cs)) for cs in (plain, fast)
    ]
    assert_close(grads[1], grads[0], 1e-4)
    batch = jnp.stack([state, state])
    assert fast.perceive(batch).shape == (2, 7, 6, 10)
    with pytest.raises(ValueError, match="longer than max_position_size, 7"):
        fast.perceive(jnp.zeros((8, 6, 8)))


def test_bfloat16_is_left_as_it_is():
    """CAX widens such a state in a step, which nk.step does not, so that accelerate declines."""
    plain, fast = pair(Growing)
    state = arguments(Growing)[0].astype(jnp.bfloat16)
    with pytest.warns(UserWarning, match="the state is bfloat16, not float32"):
        got = fast._step(state)
    assert_close(got, plain._step(state), 1e-6)


def test_a_step_size_that_is_trained():
    """CAX takes any scalar as a step size; an array or a variable is differentiable."""

    class Trained(System):
        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            self.update.step_size = nnx.data(nnx.Param(jnp.array(0.6)))

    plain, fast = pair(Trained, strict=True)
    state, _ = arguments(Trained)
    loss = lambda cs: jnp.sum(jnp.sin(cs(state, num_steps=3)))
    grads = [pure(nnx.grad(loss)(cs)) for cs in (plain, fast)]
    assert_close(grads[1], grads[0], 1e-4)
    assert_same_trajectory(plain, fast, state, steps=4)


# ---- what it refuses ----


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"cs must be a cax\.core\.ComplexSystem, got Linear"):
        accelerate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="backend must be one of auto, triton"):
        accelerate(Growing(rngs=nnx.Rngs(0)), "cuda")
    with pytest.raises(nk.BackendUnavailable, match="backend 'triton' cannot run here"):
        accelerate(Growing(rngs=nnx.Rngs(0)), "triton")


WITHOUT = """
import sys
sys.modules["cax"] = None  # as if it were not installed
from nca_models.compat import cax
for call in (lambda: cax.accelerate(None), lambda: cax.MooreAttentionPerceive):
    try:
        call()
    except ImportError as error:
        print(error)
"""


def test_without_cax():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=os.environ
    )
    assert run.stdout.count('pip install "nca-kernels[cax]"') == 2, run.stderr
