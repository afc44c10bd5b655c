"""Runs Pallas kernels without a GPU: interpreted, as XLA's operations, under jit.

The backend ``pallas_interpreted`` is the backend ``pallas`` in that mode. ``checked_launch``
also looks at every access, as ``triton_host`` always does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from nca_kernels import dispatch
from nca_kernels.backends import COMMON
from nca_kernels.backends.pallas import launch as launching
from nca_kernels.testing.races import Accesses, Extent, function_in
from nca_kernels.testing.triton_host import small_tiles
from nca_kernels.tiled.configuration import too_wide_for_tiles
from nca_kernels.tuning import Launch

NAME = "pallas_interpreted"
KERNELS = "backends/pallas"  # files that hold them


def register(name: str = NAME, launch: Callable[..., list[Any]] | None = None) -> None:
    """Adds the backend ``pallas_interpreted``, for tests; see ``nca_kernels.dispatch``."""

    def load(op: str) -> Any:
        from nca_kernels.backends import pallas

        engine = replace(pallas.ENGINE, launch=launch or interpret, fixed=small_tiles)
        return tuple(partial(kernel.func, engine) for kernel in getattr(pallas, op))

    attention = ("@interpreted_attention_forward", "@interpreted_attention_backward_query")
    dispatch.register(
        dispatch.Backend(
            name=name,
            summary="the Pallas kernels in interpret mode",
            load=load,
            platforms=("cpu",),
            covers=replace(COMMON, width=too_wide_for_tiles),
            markers={
                "step": ("@interpreted_step_forward", "@interpreted_step_backward"),
                "neighborhood_attention": attention,
            },
        )
    )


_launch: Callable[..., list[Any]] = partial(launching.launch, interpret=True)


def interpret(kernel: Any, inputs: Sequence[Any], *args: Any, **keywords: Any) -> list[Any]:
    """A launch in interpret mode, as a function that a lowered module shows by name."""

    def run(*inputs: Any) -> list[Any]:
        return _launch(kernel, inputs, *args, **keywords)

    run.__name__ = f"interpreted_{kernel.__name__}"
    return list(jax.jit(run)(*inputs))


@dataclass(frozen=True)
class _Noted(launching.Memory):
    """Memory whose every access is told to ``note(kind, array, at, mask, values)``."""

    array: int = 0
    note: Any = None

    def load(self, at: Any, mask: Any = None) -> Any:
        self.note("read", self.array, self.start + at, mask, None)
        return super().load(at, mask)

    def store(self, at: Any, value: Any, mask: Any = None) -> None:
        self.note("write", self.array, self.start + at, mask, value.astype(self.ref.dtype))
        super().store(at, value, mask)


def checked_launch(
    kernel: Any,
    inputs: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    g: dict[str, Any],
    how: Launch,
    aliases: dict[int, int] | None = None,
) -> list[Any]:
    """As :func:`interpret`; an access outside of the arrays, or a race, raises."""
    from jax.experimental import pallas

    log = _Log([*inputs, *outputs], len(inputs), aliases or {}, 32 * how.warps)

    def body(*arguments: Any) -> None:
        *memories, clock, constants = arguments
        one = jnp.zeros((1,), jnp.int32)
        program = pallas.program_id(0)
        if len(grid) > 1:
            program += grid[0] * pallas.program_id(1)

        def note(kind: str, array: int, at: Any, mask: Any, values: Any) -> None:
            mask = jnp.broadcast_to(True if mask is None else mask, at.shape)
            values = None if values is None else jnp.broadcast_to(values, at.shape)
            # Each call takes the result of the one before, so that they come in their order.
            told = (clock.load(one), program, at, mask, values)
            shape, function = jax.ShapeDtypeStruct((1,), jnp.int32), function_in(KERNELS)
            clock.store(one, io_callback(partial(log.note, kind, array, function), shape, *told))

        def tell(kind: str) -> None:
            note(kind, 0, one, None, None)

        tell("start")
        constants.barrier = partial(tell, "barrier")
        kernel(*(_Noted(m.ref, True, 0, i, note) for i, m in enumerate(memories)), constants)

    body.__name__ = kernel.__name__
    clock = jax.ShapeDtypeStruct((1,), jnp.int32)
    return interpret(body, inputs, [*outputs, clock], grid, g, how, aliases)[:-1]


class _Log:
    """The accesses of a launch, of arrays that lie far from each other."""

    APART = 2**40

    def __init__(self, arrays: Sequence[Any], inputs: int, aliases: dict[int, int], threads: int):
        self._threads = threads
        self._extents = [
            Extent(i * self.APART, int(np.prod(a.shape)), a.dtype.itemsize)
            for i, a in enumerate(arrays)
        ]
        for i, output in aliases.items():
            self._extents[inputs + output] = self._extents[i]

    def note(
        self,
        kind: str,
        array: int,
        function: str,
        clock: Any,
        program: Any,
        at: Any,
        mask: Any,
        values: Any,
    ) -> np.ndarray:
        if kind == "start":
            if program == 0:
                self._accesses = Accesses(list(dict.fromkeys(self._extents)), self._threads)
        elif kind == "barrier":
            self._accesses.barrier()
        else:
            first, _, itemsize = self._extents[array]
            addresses = first + itemsize * np.asarray(at, np.int64)
            told = (int(program), function, addresses, np.asarray(mask))
            if kind == "read":
                self._accesses.read(*told)
            else:
                self._accesses.write(*told, np.asarray(values))
        return np.zeros(1, np.int32)
