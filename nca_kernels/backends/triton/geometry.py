"""Sizes of calls, and the tiles that kernels cut them into."""

from __future__ import annotations

from dataclasses import dataclass

from nca_kernels.perception import same_margins

RUN = 16  # cells in a word of flags, see cells.py


def block(size: int) -> int:
    """The power of two, at least 16, that holds ``size``: what products and ranges want."""
    return max(16, 1 << (size - 1).bit_length())


@dataclass(frozen=True)
class Sizes:
    """What kernels are told when they run: no kernel is compiled for a grid or a batch.

    Args:
        depth, height, width: of the grid, in cells; axes that it does not have are 1.
        samples: of each group.
        groups: independent calls in one, see :mod:`nca_kernels.call`.
        tiles: of all samples of a group.
        programs: how many share a group's tiles.
    """

    depth: int
    height: int
    width: int
    samples: int
    groups: int = 1
    tiles: int = 0
    programs: int = 0

    @property
    def cells(self) -> int:
        """Of all samples of a group."""
        return self.samples * self.depth * self.height * self.width


@dataclass(frozen=True)
class Axis:
    """One axis of a tile, and how far its cells see along it, in cells.

    Args:
        tile: the tile's size.
        kernel: the stencil's size.
        pool: how many cells the alive pool's window has along it, 1 where the grid has no more.
        near: whether no position that matters is as far outside the grid as the grid is wide.
    """

    tile: int
    kernel: int
    pool: int
    near: bool

    @property
    def before(self) -> int:
        """How far the stencil reaches to lower positions."""
        return same_margins([self.kernel])[0][0]

    @property
    def after(self) -> int:
        """How far the stencil reaches to higher positions."""
        return same_margins([self.kernel])[0][1]

    @property
    def halo(self) -> int:
        """How far a cell's need for work depends on others: twice as far as the pool reaches."""
        return self.pool - 1

    @property
    def with_halo(self) -> int:
        return self.tile + 2 * self.halo

    @property
    def reach(self) -> int:
        """How many positions a tile's cells contribute to: the tile and some around it."""
        return self.tile + self.kernel - 1

    @property
    def around(self) -> int:
        """How many positions may contribute to those."""
        return self.tile + 2 * (self.kernel - 1)

    @property
    def shares(self) -> int:
        """How many tiles at most reach a cell."""
        return 1 + (self.kernel - 1 + self.tile - 1) // self.tile

    @property
    def edge(self) -> int:
        """How many of a tile's cells other tiles contribute to."""
        return min(self.kernel - 1, self.tile)

    @property
    def low_edge(self) -> int:
        """How many of the edge's cells are at the tile's beginning."""
        return self.after if self.kernel <= self.tile else self.tile
