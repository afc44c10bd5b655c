"""States over time, damaged on the way: what a system's film is made of."""

from collections.abc import Callable, Iterator

import jax

from nca_models.modules import Automaton, run


def number_of_frames(num_steps: int, every: int) -> int:
    """Return how many states `states_over_time` yields."""
    return 1 + -(-num_steps // every)


def states_over_time(
    model: Automaton,
    state: jax.Array,
    num_steps: int,
    *,
    every: int,
    key: jax.Array,
    damage: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    damage_at: int = 0,
) -> Iterator[jax.Array]:
    """Run a model and yield its states, one at a time; what runs in tiles overwrites the last.

    Args:
        model: what to run.
        state: where it starts.
        num_steps: how many steps.
        every: steps from one state to the next; the first and the last come always.
        key: of everything random.
        damage: `(key, state) -> state`, done once.
        damage_at: after which step.
    """
    key, key_damage = jax.random.split(key)
    yield state
    done = 0
    while done < num_steps:
        stops = [num_steps, (done // every + 1) * every]
        stop = min(stops + [damage_at] * (damage is not None and done < damage_at))
        state = run(model, state, jax.random.fold_in(key, done), stop - done, donate=True)
        done = stop
        if damage is not None and done == damage_at:
            state = damage(key_damage, state)
        if done % every == 0 or done == num_steps:
            yield state
