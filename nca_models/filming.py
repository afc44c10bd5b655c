"""States over time, damaged on the way: what a system's film is made of."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nca_models.modules import Automaton, run


def states_over_time(
    model: Automaton,
    state: jax.Array,
    num_steps: int,
    *,
    every: int,
    key: jax.Array,
    damage: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    damage_at: int = 0,
) -> jax.Array:
    """Run a model and keep its states, `[frames, *state]`.

    Args:
        model: what to run.
        state: where it starts.
        num_steps: how many steps.
        every: steps from one kept state to the next; the first and the last are kept always.
        key: of everything random.
        damage: `(key, state) -> state`, done once.
        damage_at: after which step.
    """
    key, key_damage = jax.random.split(key)
    states, done = [state], 0
    while done < num_steps:
        stops = [num_steps, (done // every + 1) * every]
        stop = min(stops + [damage_at] * (damage is not None and done < damage_at))
        state = run(model, state, jax.random.fold_in(key, done), stop - done)
        done = stop
        if damage is not None and done == damage_at:
            state = damage(key_damage, state)
        if done % every == 0 or done == num_steps:
            states.append(state)
    return jnp.stack(states)
