"""The sample pool and damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nca_models.training import DAMAGE_NAMES, pool
from nca_models.training.damage import DAMAGES

KEY = jax.random.key(0)


def some_pool(n: int = 10):
    return {"state": jnp.arange(n * 3.0).reshape(n, 3), "index": jnp.arange(n)}


def test_pool_draws_different_samples_and_puts_them_back():
    before = some_pool()
    indices, batch = jax.jit(pool.sample, static_argnums=2)(before, KEY, 6)
    assert len(set(indices.tolist())) == 6
    np.testing.assert_array_equal(batch["state"], before["state"][indices])
    after = jax.jit(pool.update)(before, indices, jax.tree.map(lambda x: -x - 1, batch))
    rest = np.setdiff1d(np.arange(10), indices)
    np.testing.assert_array_equal(after["index"][indices], -indices - 1)
    np.testing.assert_array_equal(after["state"][rest], before["state"][rest])


def test_pool_reaches_every_sample():
    drawn = [pool.sample(some_pool(), jax.random.key(i), 3)[0] for i in range(40)]
    assert set(np.concatenate(drawn).tolist()) == set(range(10))


def test_pool_smaller_than_the_batch():
    with pytest.raises(ValueError, match="batch_size is 11"):
        pool.sample(some_pool(), KEY, 11)


@pytest.mark.parametrize(("lead", "spatial"), [((), (3, 1, 4)), ((2, 3), (5, 4))])
@pytest.mark.parametrize("name", sorted({*DAMAGE_NAMES} - {"noise"}))
def test_damage_clears_whole_cells_and_touches_nothing_else(name, lead, spatial):
    state = jax.random.uniform(KEY, (*lead, *spatial, 4), minval=0.5)
    hurt = np.asarray(jax.jit(DAMAGES[name], static_argnums=2)(KEY, state, len(spatial)))
    assert hurt.shape == state.shape
    assert hurt.dtype == state.dtype
    cleared = (hurt == 0).all(-1)
    np.testing.assert_array_equal(hurt[~cleared], np.asarray(state)[~cleared])
    if name == "none":
        assert not cleared.any()


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("left", np.s_[:, :4]),
        ("right", np.s_[:, 4:]),
        ("top", np.s_[:3]),
        ("bottom", np.s_[3:]),
    ],
)
def test_sides(name, gone):
    cleared = np.asarray(DAMAGES[name](KEY, jnp.ones((6, 8, 1))))[..., 0] == 0
    expected = np.zeros((6, 8), bool)
    expected[gone] = True
    np.testing.assert_array_equal(cleared, expected)


def test_noise_is_in_every_value():
    state = jnp.full((3, 20, 30, 4), 0.5)
    added = np.asarray(DAMAGES["noise"](KEY, state)) - 0.5
    assert abs(added.mean()) < 0.05
    assert abs(added.std() - 1) < 0.05
    assert (added != 0).all()
    assert not np.array_equal(added[0], added[1])


def test_half_takes_each_of_the_four_sides():
    hurt = np.asarray(jax.jit(DAMAGES["half"])(KEY, jnp.ones((64, 6, 8, 1))))
    kinds = {sample.tobytes() for sample in hurt}
    assert len(kinds) == 4
    assert (hurt.sum((1, 2, 3)) == 24).all()


def test_circles_differ_between_samples_and_have_the_radii_of_the_docstring():
    hurt = np.asarray(jax.jit(DAMAGES["circle"])(KEY, jnp.ones((200, 101, 101, 1))))
    radii = np.sqrt((hurt == 0).sum((1, 2, 3)) / np.pi) / (101 / 2)
    assert 0.09 < radii.min() < 0.15
    assert 0.35 < radii.max() < 0.41
    assert (hurt[:, :4] == 1).all()  # 0.5 + 0.4 of the way to the border at most


def test_damage_of_too_few_dimensions():
    with pytest.raises(ValueError, match="shape"):
        DAMAGES["circle"](KEY, jnp.ones((4, 1)), 2)
    with pytest.raises(ValueError, match="no top"):
        DAMAGES["top"](KEY, jnp.ones((4, 1)), 1)
