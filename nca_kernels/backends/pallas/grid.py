"""Where cells and their neighbours are; positions are int32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nca_kernels.backends.pallas.memory import divide

Position = tuple[Array, Array, Array]  # z, y, x
Sizes = tuple[int, int, int]


def three_axes(sizes: Sequence[int]) -> Sizes:
    """Sizes of 1 to 3 axes as those of z, y, x: 1 on an axis that is not there."""
    z, y, x = (1,) * (3 - len(sizes)) + tuple(sizes)
    return z, y, x


def unravel(number: Array, sizes: Sizes) -> tuple[Array, Position]:
    """A number in C order to (which grid of these sizes, the position in it)."""
    rest, x = divide(number, sizes[2])
    rest, y = divide(rest, sizes[1])
    rest, z = divide(rest, sizes[0])
    return rest, (z, y, x)


class Neighbourhoods(NamedTuple):
    """Windows around the cells of grids, numbered in C order; even ones are aligned as SAME."""

    sizes: Sizes  # of the grid
    window: Sizes
    padding: str  # as in Rule

    def neighbour(self, cell: Array, place: Array) -> tuple[Array, Array]:
        """The cells [T] at a place of the window around cells [T], and whether any is there."""
        sample, position = unravel(cell, self.sizes)
        _, offset = unravel(place, self.window)
        number, inside = sample, jnp.full(cell.shape, True)
        for i, size, by, window in zip(position, self.sizes, offset, self.window, strict=True):
            on_axis, inside_axis = border(i + (by - (window - 1) // 2), size, self.padding)
            number, inside = number * size + on_axis, inside & inside_axis
        return number, inside


def border(i: Array, size: int, padding: str) -> tuple[Array, Array]:
    """Positions on an axis, maybe outside, to (the cells seen there, whether any is)."""
    everywhere = jnp.full(i.shape, True)
    if padding == "zeros":
        inside = (i >= 0) & (i < size)
        return jnp.where(inside, i, 0), inside
    if padding == "circular":
        return _modulo(i, size), everywhere
    if padding == "replicate":
        return lax.clamp(np.int32(0), i, np.int32(size - 1)), everywhere
    if padding == "reflect":
        period = max(2 * (size - 1), 1)
        i = _modulo(i, period)
        return jnp.minimum(i, period - i) if size > 1 else i, everywhere
    raise ValueError(f"unknown padding {padding!r}")


def _modulo(i: Array, size: int) -> Array:
    """From 0 to size - 1, for negative ``i`` too."""
    sizes = jnp.full_like(i, size)
    return lax.rem(lax.rem(i, sizes) + sizes, sizes)
