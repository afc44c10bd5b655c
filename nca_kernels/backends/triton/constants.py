"""Compile-time constants as Triton takes them."""

from __future__ import annotations

from typing import Any


class Constants:
    """Named compile-time constants, passed to kernels as the one argument ``g``.

    Triton takes any hashable object as a ``constexpr``, but hands on its plain attributes as
    Python numbers, which not all of its functions accept: these come out as ``constexpr``.
    """

    def __init__(self, values: dict[str, Any]):
        self._values = values
        self._key = tuple(sorted(values.items()))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(name)
        import triton.language as tl

        value = self._values[name]
        if isinstance(value, tuple):
            return tl.tuple([tl.constexpr(v) for v in value])
        return tl.constexpr(value)

    def values(self) -> dict[str, Any]:
        return dict(self._values)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self._key == other._key

    def __repr__(self) -> str:
        return f"Constants{self._key}"
