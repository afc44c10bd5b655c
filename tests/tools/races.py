"""Finds races of GPU kernels while an interpreter runs them, one access after another.

On a GPU the elements of a tensor belong to different threads, and the threads of a program see what
others wrote to memory only after a barrier. Programs never wait for each other. Within one launch,
therefore:

* It is a race if two elements access the same address between two barriers, and one of them writes.
  The same element of two tensors of one shape in one function is no race: it belongs to the same
  thread, as in a sum that is read, added to, and written back. If a tensor has fewer elements than
  there are threads, several threads hold each element: all of them read it, and one writes it.
* Elements of one store that have the same address must write the same value.
* No program may read or write what another one writes.

Triton may also lay out two tensors of one shape differently within a function. Such a race is not
found.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

_MANY = -1  # in place of the one program or element that read


class Race(RuntimeError):
    """Two threads access the same address, and nothing says which of them comes first."""


class Extent(NamedTuple):
    """An array in memory: its first address, its number of elements, and the bytes of each."""

    first: int
    size: int
    itemsize: int


class _Array:
    """By element of an array, the last read and the last write."""

    def __init__(self, extent: Extent):
        self.first, size, self.itemsize = extent
        self.end = self.first + size * self.itemsize
        # By which program (counted from 1), after how many barriers, by which tensor's element.
        self.read_by, self.written_by = np.zeros((2, size), np.int32)
        self.read_at, self.written_at = np.zeros((2, size), np.int32)
        self.read_as, self.written_as = np.zeros((2, size), np.int64)


class Accesses:
    """All accesses of a launch so far; its programs have ``threads`` threads each.

    An access outside of the arrays raises IndexError, a race raises Race.
    """

    def __init__(self, extents: Sequence[Extent], threads: int):
        self._arrays = [_Array(extent) for extent in extents]
        self._threads = threads
        self._now, self._program = 1, 0
        self._tensors: dict[tuple[str, tuple[int, ...]], int] = {}  # by function and shape

    def barrier(self) -> None:
        self._now += 1

    def read(self, program: int, function: str, addresses: np.ndarray, mask: np.ndarray) -> None:
        array, at, element = self._find(program, function, addresses, mask)
        if array is None:
            return
        written = array.written_at[at] == self._now
        elsewhere = mask.size < self._threads or array.written_as[at] != element
        _refuse(written & elsewhere, "reads what another thread wrote")
        others = (array.written_by[at] != 0) & (array.written_by[at] != self._program)
        _refuse(others, "reads what another program wrote")
        again = array.read_at[at] == self._now
        array.read_as[at] = np.where(again & (array.read_as[at] != element), _MANY, element)
        array.read_as[at[array.read_as[at] != element]] = _MANY  # several of these elements
        array.read_at[at] = self._now
        known = (array.read_by[at] == 0) | (array.read_by[at] == self._program)
        array.read_by[at] = np.where(known, self._program, _MANY)

    def write(
        self,
        program: int,
        function: str,
        addresses: np.ndarray,
        mask: np.ndarray,
        values: np.ndarray,
    ) -> None:
        array, at, element = self._find(program, function, addresses, mask)
        if array is None:
            return
        read, written = array.read_at[at] == self._now, array.written_at[at] == self._now
        _refuse(read & (array.read_as[at] != element), "writes what another thread reads")
        _refuse(written & (array.written_as[at] != element), "writes what another thread wrote")
        for by, verb in ((array.read_by, "reads"), (array.written_by, "writes")):
            others = (by[at] != 0) & (by[at] != self._program)
            _refuse(others, f"writes what another program {verb}")
        array.written_as[at] = element
        array.written_at[at], array.written_by[at] = self._now, self._program
        shared = array.written_as[at] != element
        if shared.any():
            _refuse_contradiction(at, values[mask])

    def _find(
        self, program: int, function: str, addresses: np.ndarray, mask: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray]:
        """The array of an access, its positions there, and a number for each accessing element."""
        if program + 1 != self._program:
            self._program, self._now = program + 1, self._now + 1
        element = np.flatnonzero(mask)
        if not element.size:
            return None, element, element
        addresses = addresses.reshape(-1)[element].astype(np.int64)
        low, high = int(addresses.min()), int(addresses.max())
        for array in self._arrays:
            if array.first <= low and high + array.itemsize <= array.end:
                tensor = self._tensors.setdefault((function, mask.shape), len(self._tensors))
                return array, (addresses - array.first) // array.itemsize, tensor * 2**40 + element
        raise IndexError(f"an access of {element.size} elements lies outside of every array")


def function_in(folder: str) -> str:
    """The name of the innermost running function that a file of ``folder`` holds."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and folder not in frame.f_code.co_filename:
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_name


def _refuse_contradiction(at: np.ndarray, values: np.ndarray) -> None:
    order = np.argsort(at, kind="stable")
    at, raw = at[order], np.ascontiguousarray(values[order])
    raw = raw.view(np.uint8).reshape(at.size, -1)  # compared as bits, so that NaN equals NaN
    differ = (raw[1:] != raw[:-1]).any(axis=1)
    _refuse((at[1:] == at[:-1]) & differ, "writes two values to one place")


def _refuse(race: np.ndarray, what: str) -> None:
    if race.any():
        raise Race(f"{int(race.sum())} of {race.size} elements: a thread {what}")
