"""The sample pool: states that outlive a training step, so that patterns learn to persist.

A pool is a pytree whose leaves have a leading axis of the pool's size; every function is pure
and can be jitted.
"""

from typing import TypeVar

import jax

T = TypeVar("T")


def size(pool: T) -> int:
    """Return the number of samples in `pool`."""
    return int(jax.tree.leaves(pool)[0].shape[0])


def sample(pool: T, key: jax.Array, batch_size: int) -> tuple[jax.Array, T]:
    """Draw `batch_size` different samples.

    Without replacement: an index drawn twice would be written twice by `update`, in an order
    that no device promises.

    Returns:
        `(indices [batch_size] int32, batch)`, the leaves of `batch` being `[batch_size, ...]`.

    Raises:
        ValueError: the pool has fewer than `batch_size` samples.
    """
    if batch_size > size(pool):
        raise ValueError(f"batch_size is {batch_size}, but the pool has {size(pool)} samples")
    indices = jax.random.choice(key, size(pool), (batch_size,), replace=False)
    return indices, take(pool, indices)


def take(pool: T, indices: jax.Array) -> T:
    """Return the samples at `indices` `[n]`, in that order."""
    taken: T = jax.tree.map(lambda leaf: leaf[indices], pool)
    return taken


def update(pool: T, indices: jax.Array, batch: T) -> T:
    """Return the pool with the samples at `indices` `[n]` replaced by `batch`."""
    updated: T = jax.tree.map(lambda leaf, new: leaf.at[indices].set(new), pool, batch)
    return updated
