"""The fused NCA of jax-nca and its trainer, against jax-nca itself, as far as it is installed."""

import os
import signal
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nca_kernels as nk
from nca_kernels.testing import assert_close, error_ratio
from nca_models.compat.jax_nca import NCA, EmojiTrainer, ImageDataset, accelerate
from nca_models.training.trainer import Diverged

needs_original = pytest.mark.skipif(
    find_spec("jax_nca") is None, reason="jax-nca is not installed (pip install --no-deps jax-nca)"
)
KEY = jax.random.key(0)
SHAPE = (20, 17)


def original(**fields):
    from jax_nca.nca import NCA as Original

    return Original(num_hidden_channels=16, **fields)


def random_params(nca, seed=0):
    """Parameters of `init` with small noise added, so that a pattern grows and stays bounded."""
    state = nca.create_seed(nca.num_hidden_channels, shape=SHAPE)
    params = nca.init(jax.random.key(seed), state, KEY)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [a + 0.01 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, noisy)
    last = params["update_net"]["Conv_2"]
    last["kernel"] = 0.5 * last["kernel"].at[..., 3].set(jnp.abs(last["kernel"][..., 3]))
    return params


@needs_original
@pytest.mark.parametrize("trainable", [False, True])
def test_the_trajectory_and_gradients_of_the_original(trainable):
    theirs = original(trainable_perception=trainable, alpha=0.8)
    ours = accelerate(theirs)
    assert isinstance(ours, NCA)
    params = random_params(theirs)
    seed = jnp.asarray(theirs.create_seed(16, shape=SHAPE, batch_size=2), jnp.float32)
    _, expected = theirs.multi_step(params, seed, KEY, num_steps=96)
    final, states = ours.multi_step(params, seed, KEY, num_steps=96)
    assert jnp.abs(final).max() < 100
    living = np.count_nonzero(np.asarray(final)[..., 3])
    assert living > 0.2 * final[..., 3].size, "nothing grew"
    for t in range(96):
        assert error_ratio(states[t], expected[t]) < 1e-4, f"step {t}"
    np.testing.assert_array_equal(final, states[-1])

    def loss(nca, params):
        return jnp.sum(jnp.sin(nca.multi_step(params, states[50], KEY, num_steps=8)[0]))

    assert_close(
        jax.grad(lambda p: loss(ours, p))(params), jax.grad(lambda p: loss(theirs, p))(params), 1e-4
    )
    applied = ours.apply({"params": params}, seed, KEY)
    assert_close(applied, theirs.apply({"params": params}, seed, KEY), 1e-5)


@needs_original
@pytest.mark.parametrize("trainable", [False, True])
def test_the_same_parameters_and_files(trainable, tmp_path):
    theirs = original(trainable_perception=trainable)
    ours = NCA(num_hidden_channels=16, trainable_perception=trainable)
    seed = theirs.create_seed(16, shape=SHAPE, batch_size=3)
    np.testing.assert_array_equal(ours.create_seed(16, shape=SHAPE, batch_size=3), seed)
    initial = [nca.init(KEY, jnp.asarray(seed), KEY)["params"] for nca in (theirs, ours)]
    assert jax.tree.structure(initial[0]) == jax.tree.structure(initial[1])
    assert_close(initial[1], initial[0], 0)
    params = random_params(theirs)
    for writer, reader in ((theirs, ours), (ours, theirs)):
        writer.save(params, str(tmp_path / "params"))
        assert_close(reader.load(str(tmp_path / "params")), params, 0)
    np.testing.assert_array_equal(ours.to_rgb(seed), theirs.to_rgb(seed))


@needs_original
def test_rates_below_one():
    """The original then updates all cells, as accelerate says; the fused NCA fires at the rate."""
    theirs = original(cell_fire_rate=0.3)
    with pytest.warns(UserWarning, match="jax-nca updates every cell at any rate below 1"):
        ours = accelerate(theirs, "xla")
    assert ours.backend == "xla"
    params = random_params(theirs)
    state = jnp.ones((1, *SHAPE, 20))
    changed = np.any(np.asarray(ours.apply({"params": params}, state, KEY) != state), axis=-1)
    np.testing.assert_array_equal(changed, jax.random.bernoulli(KEY, 0.3, (1, *SHAPE)))
    _, states = ours.multi_step(params, state, KEY, num_steps=3)
    moved = [np.any(np.asarray(a != b), -1) for a, b in zip(states[1:], states[:-1], strict=True)]
    assert (moved[0] != moved[1]).any(), "the same cells fire in every step"


@needs_original
def test_two_features_instead_of_forty():
    """The fused perception has C + 2 outputs, and equals the original's 3C."""
    theirs, ours = original(), NCA(num_hidden_channels=16)
    params = random_params(ours)
    rule_params = ours.rule_params(params)
    assert rule_params.perception.shape == (3, 3, 20, 22)
    state = jax.random.normal(KEY, (1, *SHAPE, 20)).at[..., 3].set(1.0)
    fused = nk.step(ours.rule, rule_params, state, KEY)
    assert_close(fused, theirs.apply({"params": params}, state, KEY), 1e-5)


def test_errors(tmp_path):
    with pytest.raises(TypeError, match=r"nca must be a jax_nca\.nca\.NCA, got builtins"):
        accelerate(3)
    small, large = NCA(num_hidden_channels=2), NCA(num_hidden_channels=3)
    small.save(random_params(small), tmp_path / "params")
    with pytest.raises(ValueError, match=r"has parameters .* but this NCA has"):
        large.load(tmp_path / "params")
    again = accelerate(small, "xla")
    assert (again.backend, again.num_hidden_channels) == ("xla", 2)


# ---- the trainer ----


@pytest.fixture
def dataset():
    y, x = np.mgrid[-1:1:10j, -1:1:12j]
    disc = (x**2 + y**2 < 0.5)[..., None]
    return ImageDataset(img=np.concatenate([disc * [1.0, 0.2, 0.1], disc], axis=-1))


NUMBERS = {"batch_size": 3, "min_steps": 5, "max_steps": 9, "progress": False}


def trainer(dataset, **changes):
    return EmojiTrainer(dataset, NCA(num_hidden_channels=4, **changes), pool_size=6, n_damage=1)


def test_training_learns_and_logs(dataset, tmp_path, capsys):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    made = trainer(dataset, cell_fire_rate=0.7)
    state = made.train(60, log_dir=tmp_path, lr=5e-3, **NUMBERS)
    assert state is made.state
    assert int(state.step) == 60
    losses = events(tmp_path)["loss"]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert {"batch", "outputs", "targets"} <= {tag.split("/")[0] for tag in events(tmp_path)}
    assert any(tag.startswith("update_net_Conv_0_kernel") for tag in events(tmp_path))
    assert "tensorboard --logdir" in capsys.readouterr().out


def events(folder):
    """The tags in TensorBoard's files, with their scalars."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  (its files' format)

    out = {}
    for path in folder.rglob("events*"):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            for value in Event.FromString(data[12 : 12 + size]).summary.value:
                out.setdefault(value.tag, []).append(value.simple_value)
            data = data[16 + size :]
    return out


def test_a_training_that_is_stopped_goes_on_to_the_same_bits(dataset, tmp_path):
    whole = trainer(dataset).train(6, log_dir=None, **NUMBERS)
    stopped = trainer(dataset)
    stopped._report = lambda *args: os.kill(os.getpid(), signal.SIGINT)
    first = stopped.train(6, log_dir=None, checkpoint_dir=tmp_path, **NUMBERS)
    assert int(first.step) == 1
    rest = trainer(dataset).train(6, log_dir=None, checkpoint_dir=tmp_path, **NUMBERS)
    assert int(rest.step) == 6
    assert_close(rest.params, whole.params, 0)


def test_the_loss_is_over_the_last_eight_states(dataset):
    from nca_models.compat.jax_nca_trainer import _Training

    nca = NCA(num_hidden_channels=4)
    params = random_params(nca)
    batch = jnp.asarray(nca.create_seed(4, shape=dataset.img_shape[:-1], batch_size=2))
    targets = jnp.asarray(dataset.get_batch(2)[0])
    numbers = {"pool_size": 2, "n_damage": 0, "num_steps": range(5, 15)}
    training = _Training(nca, None, KEY, batch[:1], targets, **numbers)
    for steps in (11, 5):
        _, states = nca.multi_step(params, batch, KEY, steps)
        expected = jnp.mean(jnp.square(states[-8:, ..., :4] - targets))
        loss, final = training.loss(params, batch, KEY, jnp.int32(steps))
        assert_close(loss, expected, 1e-6)
        assert_close(final, states[-1], 0)


def test_bad_training_settings(dataset):
    made = trainer(dataset)
    for changes, message in (
        ({"batch_size": 7}, "batch_size must be from 1 to pool_size, 6, got 7"),
        ({"batch_size": 1}, "n_damage must be from 0 to batch_size - 1, 0"),
        ({"min_steps": 9}, "min_steps must be above 0 and below max_steps, got 9 and 9"),
    ):
        with pytest.raises(ValueError, match=message):
            made.train(1, log_dir=None, **{**NUMBERS, **changes})
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step"):
        made.train(9, log_dir=None, lr=1e30, **NUMBERS)
    with pytest.raises(ValueError, match="give either an emoji or an img"):
        ImageDataset()
    with pytest.raises(ValueError, match=r"img must be \[height, width, 4\] \(RGBA\)"):
        ImageDataset(img=np.zeros((4, 4, 3)))
