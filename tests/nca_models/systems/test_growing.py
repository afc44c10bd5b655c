"""Growing NCA: the settings of the paper, and what the system offers."""

from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nca_kernels as nk
from nca_models import systems
from nca_models.systems import growing

PAPER = {
    "target_size": 40,
    "padding": 16,
    "channels": 16,
    "hidden": 128,
    "num_steps": 128,
    "min_steps": 65,
    "fire_rate": 0.5,
    "alive_threshold": 0.1,
    "batch_size": 8,
    "pool_size": 1024,
    "num_train_steps": 8192,
    "learning_rate": 1e-3,
    "final_learning_rate": 1e-4,
    "decay_steps": 2000,
    "clip_norm": 1.0,
    "damaged_per_batch": 0,
}


@pytest.fixture
def system(make_run, tiny):
    return growing.SystemClass(tiny, make_run())


def test_paper_preset_has_the_papers_numbers():
    config = growing.PRESETS["paper"]
    assert {name: asdict(config)[name] for name in PAPER} == PAPER
    assert config.size == 72


def test_every_system_has_the_presets_and_the_class():
    assert "growing" in systems.names()
    for name in systems.names():
        module = systems.load(name)
        assert set(systems.PRESET_NAMES) <= set(module.PRESETS)
        offered = {n for n in vars(systems.System) if not n.startswith("_")}
        assert offered - {"config"} <= set(dir(module.SystemClass))


def test_model_has_the_papers_rule(system):
    model = system.model(nnx.Rngs(0))
    assert model.rule == nk.Rule(step_size=2.0, alive=nk.Alive(-1, 0.1), fire_rate=0.5)
    assert [w.shape for w, _ in model.rule_params().layers] == [(48, 8), (8, 16)]
    assert not np.any(model.rule_params().layers[-1][0])


def test_seed_is_one_living_cell_in_the_middle(system):
    state = np.asarray(system.fresh(jax.random.key(0), 2)["state"])
    assert state.shape == (2, 11, 11, 16)
    assert state.dtype == np.float32
    assert state.sum() == 2
    assert (state[:, 5, 5, -1] == 1).all()


def test_loss_is_the_error_of_states_at_a_random_step(system):
    model = system.model(nnx.Rngs(0))
    samples = system.fresh(jax.random.key(0), 4)
    # A model of constant growth makes each state say how many steps it has taken.
    model.layers[-1].bias[...] = jnp.zeros(16).at[0].set(1.0)
    model.rule = replace(model.rule, fire_rate=1.0, step_size=1.0)
    loss_fn = nnx.jit(system.loss)
    seen = set()
    for i in range(12):
        loss, new = loss_fn(model, samples, jax.random.key(i))
        seen |= set(np.asarray(new["state"][:, 5, 5, 0]).tolist())
        assert float(loss) == pytest.approx(float(system.errors(new).mean()))
    assert seen == {4.0, 5.0, 6.0}


def test_errors_are_zero_on_the_target_alone(system):
    state = jnp.zeros((2, 11, 11, 16)).at[0, ..., -4:].set(system.target)
    errors = np.asarray(system.errors({"state": state}))
    assert errors[0] == 0
    assert errors[1] == pytest.approx(float((system.target**2).mean()))


def test_film_has_the_frames_and_the_damage_that_were_asked_for(system):
    model = system.model(nnx.Rngs(0))
    film = system.film(model, 10, every=4, damage="bottom", damage_at=5, seed=0)
    assert film.shape == (4, 11, 11, 3)
    assert film.dtype == np.uint8
    np.testing.assert_array_equal(film[0], film[1])
    whole = system.film(model, 10, every=4, damage="none", damage_at=5, seed=0)
    np.testing.assert_array_equal(whole[-1], whole[0])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"damage": "fire"}, "damage"),
        ({"batch_size": 0}, "batch_size"),
        ({"pool_size": 2}, "pool_size"),
        ({"damaged_per_batch": 4}, "damaged_per_batch"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"channels": 3}, "channels"),
        ({"min_steps": 7}, "min_steps"),
    ],
)
def test_impossible_settings_are_refused(tiny, change, word):
    with pytest.raises(ValueError, match=word):
        replace(tiny, **change)
