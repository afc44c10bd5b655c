"""Damage that a pattern has to heal: all channels of some cells set to zero, or noise everywhere.

All functions take `(key, state)` with a state `[*batch, *spatial, C]`, draw the damage of each
sample independently, and return the damaged state; they can be jitted, with `num_spatial_dims`
static.
"""

from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp

from nca_models.training import DAMAGE_NAMES


def _coordinates(spatial: tuple[int, ...]) -> list[jax.Array]:
    """One array per axis, broadcastable to `spatial`, from -1 to 1 across the grid."""
    return list(jnp.meshgrid(*(_centres(n) for n in spatial), indexing="ij", sparse=True))


def _centres(n: int) -> jax.Array:
    """The centres of n cells of equal width that tile -1 to 1."""
    return (2 * jnp.arange(n) + 1) / n - 1


def _split(state: jax.Array, num_spatial_dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The batch and the spatial shape of `state`."""
    lead = state.ndim - 1 - num_spatial_dims
    if lead < 0:
        raise ValueError(
            f"state has shape {state.shape}, but {num_spatial_dims} spatial dimensions and a "
            f"channel dimension need at least {num_spatial_dims + 1}"
        )
    return state.shape[:lead], state.shape[lead:-1]


def circle(key: jax.Array, state: jax.Array, num_spatial_dims: int = 2) -> jax.Array:
    """Clear a ball whose radius is 0.1 to 0.4 of half an axis.

    Its centre is within the middle half of each axis. In 1-D it is a line segment, in 2-D a disc;
    on axes of different sizes it is an ellipsoid.
    """
    batch, spatial = _split(state, num_spatial_dims)
    key_centre, key_radius = jax.random.split(key)
    ones = (1,) * num_spatial_dims
    centre = jax.random.uniform(
        key_centre, (num_spatial_dims, *batch, *ones), minval=-0.5, maxval=0.5
    )
    radius = jax.random.uniform(key_radius, (*batch, *ones), minval=0.1, maxval=0.4)
    axes = _coordinates(spatial)
    distance = sum((x - c) ** 2 for x, c in zip(axes, centre, strict=True))
    return jnp.where((distance < radius**2)[..., None], 0, state)


def half(key: jax.Array, state: jax.Array, num_spatial_dims: int = 2) -> jax.Array:
    """Clear one half of the grid, cut across a random axis, on a random side."""
    batch, _ = _split(state, num_spatial_dims)
    ones = (1,) * num_spatial_dims
    side = jax.random.randint(key, (*batch, *ones), 0, 2 * num_spatial_dims)
    return _without_side(state, num_spatial_dims, side)


def _without_side(state: jax.Array, num_spatial_dims: int, side: jax.Array | int) -> jax.Array:
    """Clear the half of the grid on a side: of axis i, 2 i is the low one, 2 i + 1 the high one."""
    axes = _coordinates(_split(state, num_spatial_dims)[1])
    sides = [half for x in axes for half in (x < 0, x > 0)]
    cleared = reduce(jnp.logical_or, ((side == i) & half for i, half in enumerate(sides)))
    return jnp.where(cleared[..., None], 0, state)


def mixed(key: jax.Array, state: jax.Array, num_spatial_dims: int = 2) -> jax.Array:
    """Clear a circle or a half, at even odds, in each sample."""
    batch, _ = _split(state, num_spatial_dims)
    key_choice, key_damage = jax.random.split(key)
    pick = jax.random.bernoulli(key_choice, 0.5, (*batch, *(1,) * (num_spatial_dims + 1)))
    circles = circle(key_damage, state, num_spatial_dims)
    return jnp.where(pick, circles, half(key_damage, state, num_spatial_dims))


def noise(key: jax.Array, state: jax.Array, num_spatial_dims: int = 2) -> jax.Array:
    """Add normal noise of standard deviation 1 to every channel of every cell."""
    return state + jax.random.normal(key, state.shape, state.dtype)


def _side(side: int) -> Callable[..., jax.Array]:
    """A damage that always clears the same side, counted from the last one of the last axis, -1."""

    def clear(key: jax.Array, state: jax.Array, num_spatial_dims: int = 2) -> jax.Array:
        if 2 * num_spatial_dims + side < 0:
            raise ValueError("a grid of one dimension has no top and no bottom")
        return _without_side(state, num_spatial_dims, 2 * num_spatial_dims + side)

    return clear


def none(key: jax.Array, state: jax.Array, num_spatial_dims: int = 2) -> jax.Array:
    """Return the state as it is."""
    return state


DAMAGES: dict[str, Callable[..., jax.Array]] = dict(
    zip(
        DAMAGE_NAMES,
        (none, circle, half, mixed, _side(-2), _side(-1), _side(-4), _side(-3), noise),
        strict=True,
    )
)
