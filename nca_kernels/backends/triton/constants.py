"""Configurations as Triton's compiler reads them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any


class CompileTime:
    """A frozen dataclass as kernels are compiled for it, passed as their one constant ``config``.

    Triton takes any hashable object as a ``constexpr``, but hands on its plain attributes as
    Python numbers, which not all of its functions accept: these come out as ``constexpr``, and
    dataclasses in it as this class. Its interpreter reads the dataclass itself.
    """

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        import triton.language as tl

        value = getattr(self._config, name)
        if isinstance(value, tuple):
            return tl.tuple([tl.constexpr(v) for v in value])
        return tl.constexpr(CompileTime(value) if is_dataclass(value) else value)

    def __hash__(self) -> int:
        return hash(self._config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompileTime) and self._config == other._config

    @cached_property
    def _text(self) -> str:
        return repr(_values(self._config))

    def __repr__(self) -> str:
        """Triton's cache tells kernels apart by it: all that they may read, properties, too."""
        return self._text


def _values(config: Any) -> Any:
    """Fields and properties by name, of dataclasses within, too."""
    if not is_dataclass(config):
        return config
    derived = (name for name in dir(type(config)) if _is_property(type(config), name))
    names = (*(field.name for field in fields(config)), *derived)
    return {name: _values(getattr(config, name)) for name in sorted(names)}


def _is_property(kind: type, name: str) -> bool:
    public = not name.startswith("_")
    return public and isinstance(getattr(kind, name), (property, cached_property))
