"""Textures that are drawn, so that there are some in colour without a file or a download.

Most have the names of categories of the Describable Textures Dataset, for which they stand in where
that dataset is not at hand. One pixel is one cell, and what repeats is 6 to 20 cells large.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

_FINE = 4  # samples of a pixel along each axis, of which the pixel is the mean
_Plane = np.ndarray  # [height, width] float


@cache
def draw(name: str, size: int) -> np.ndarray:
    """Return a drawn texture of `size` by `size` pixels, `[size, size, 3]` uint8.

    Args:
        name: one of `TEXTURES`.
        size: side of the picture; a larger picture shows more elements of the same size.
    """
    along = (np.arange(size * _FINE) + 0.5) / _FINE
    y, x = np.meshgrid(along, along, indexing="ij")
    rgb = TEXTURES[name](y, x)
    means = rgb.reshape(size, _FINE, size, _FINE, 3).mean(axis=(1, 3))
    picture = (np.clip(means, 0, 1) * 255).round().astype(np.uint8)
    picture.flags.writeable = False  # it is kept, and shared
    return picture


def _flat(code: str) -> np.ndarray:
    """`[3]`: a colour as `rrggbb`, from 0 to 1."""
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)]) / 255


def _blend(share: _Plane, first: str, second: str) -> np.ndarray:
    """`[height, width, 3]`: the colour `first` where `share` is 0, and `second` where it is 1."""
    a, b = _flat(first), _flat(second)
    return a + np.clip(share, 0, 1)[..., None] * (b - a)


def _scattered(y: _Plane, x: _Plane, spacing: float) -> tuple[_Plane, _Plane, _Plane]:
    """Distances to the nearest two of scattered points, and a number of the nearest, from 0 to 1.

    There is a point at a random place in each square of side `spacing`.
    """
    squares = 64  # along each axis, after which the points repeat
    points = np.random.default_rng(0).uniform(0.1, 0.9, (squares, squares, 3))
    row, column = (np.floor(along / spacing).astype(int) for along in (y, x))
    nearest = second = np.full(y.shape, np.inf)
    shade = np.zeros(y.shape)
    for i in range(-2, 3):
        for j in range(-2, 3):
            point = points[(row + i) % squares, (column + j) % squares]
            distance = np.hypot(
                (row + i + point[..., 0]) * spacing - y, (column + j + point[..., 1]) * spacing - x
            )
            second = np.minimum(second, np.maximum(distance, nearest))
            shade = np.where(distance < nearest, point[..., 2], shade)
            nearest = np.minimum(distance, nearest)
    return nearest, second, shade


def _brickwork(y: _Plane, x: _Plane) -> np.ndarray:
    row = np.floor(y / 6)
    shifted = x + 6 * (row % 2)
    shade = np.sin(12.9898 * row + 78.233 * np.floor(shifted / 12)) * 43758.5453 % 1
    to_edge = [np.minimum(along % side, -along % side) for along, side in ((y, 6), (shifted, 12))]
    mortar = np.minimum(*to_edge) < 0.7
    return np.where(mortar[..., None], _flat("d8cfc0"), _blend(shade, "8c3a2b", "b9573a"))


def _chequered(y: _Plane, x: _Plane) -> np.ndarray:
    return _blend((np.floor(y / 6) + np.floor(x / 6)) % 2, "f2ead8", "23304a")


def _cracked(y: _Plane, x: _Plane) -> np.ndarray:
    nearest, second, shade = _scattered(y, x, 10)
    crack = second - nearest < 1.5
    return np.where(crack[..., None], _flat("2a1c12"), _blend(shade, "b08a5c", "d9b98a"))


def _crystalline(y: _Plane, x: _Plane) -> np.ndarray:
    nearest, second, _ = _scattered(y, x, 9)
    facet = _blend((second - nearest) / 5, "e8f6ff", "1f6fa8")
    return facet + _blend(np.exp(-((nearest / 2.2) ** 2)), "000000", "4a4a3a")


def _dotted(y: _Plane, x: _Plane) -> np.ndarray:
    row = np.floor(y / 7)
    distance = np.hypot(y % 7 - 3.5, (x + 4 * (row % 2)) % 8 - 4)
    return _blend(np.where(distance < 2.4, 1, 0), "f4d35e", "c8313c")


def _honeycombed(y: _Plane, x: _Plane) -> np.ndarray:
    tall = 12.0
    wide = tall / np.sqrt(3)
    centres = [(i * tall / 2, (j + i % 2 / 2) * wide) for i in range(-1, 4) for j in range(-1, 3)]
    distances = np.sort([np.hypot(y % tall - cy, x % wide - cx) for cy, cx in centres], axis=0)
    return _blend((distances[1] - distances[0]) / 2.5, "5a3413", "f0b23c")


def _interlaced(y: _Plane, x: _Plane) -> np.ndarray:
    over = (np.floor(y / 5) + np.floor(x / 5)) % 2
    across = np.sin(np.pi * (y % 5) / 5)
    down = np.sin(np.pi * (x % 5) / 5)
    return np.where(
        over[..., None] == 1, _blend(across, "3d2a1a", "d9a866"), _blend(down, "26321f", "8fae6a")
    )


def _scaly(y: _Plane, x: _Plane) -> np.ndarray:
    colour = np.zeros((*y.shape, 3))
    for above in (3, 2, 1, 0, -1):  # each row of scales hangs over the one below
        row = np.floor(y / 5) - above
        distance = np.hypot(y - 5 * row, (x + 5 * (row % 2)) % 10 - 5)
        scale = _blend((distance / 6) ** 2, "2f8f83", "0d3b3a")
        scale = np.where((np.abs(distance - 6) < 0.6)[..., None], _flat("d7efe0"), scale)
        colour = np.where(((distance < 6.6) & (y >= 5 * row))[..., None], scale, colour)
    return colour


def _striped(y: _Plane, x: _Plane) -> np.ndarray:
    return _blend(0.5 + 4 * np.sin(2 * np.pi * (x + y) / 10), "f6f1e4", "2f5d8c")


def _wavy(y: _Plane, x: _Plane) -> np.ndarray:
    height = y + 2.5 * np.sin(2 * np.pi * x / 20)
    return _blend(0.5 + 0.5 * np.sin(2 * np.pi * height / 8), "0b3954", "bfd7ea")


def _zigzagged(y: _Plane, x: _Plane) -> np.ndarray:
    shifted = y + np.abs(x % 12 - 6)
    return _blend(np.where(shifted % 9 < 4.5, 0, 1), "f7f0f5", "8e3b5e")


TEXTURES: dict[str, Callable[[_Plane, _Plane], np.ndarray]] = {
    "brickwork": _brickwork,
    "chequered": _chequered,
    "cracked": _cracked,
    "crystalline": _crystalline,
    "dotted": _dotted,
    "honeycombed": _honeycombed,
    "interlaced": _interlaced,
    "scaly": _scaly,
    "striped": _striped,
    "wavy": _wavy,
    "zigzagged": _zigzagged,
}
