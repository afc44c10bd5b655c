"""The classes that accelerated modules get, which can be pickled, and what is known of them."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from flax import nnx


class AcceleratedMeta(type(nnx.Module)):  # type: ignore[misc]
    """The type of accelerated classes: pickle stores how such a class is made, not its name.

    So instances can be pickled, and every `nnx.GraphDef` that names the class.
    """


@functools.cache
def accelerated(original: type, call: Callable[..., Any], backend: str, path: str | None) -> type:
    """The subclass that accelerated modules of a class get; the same class each time.

    `path` is that of the module in a system whose step is being watched, and None otherwise.
    """
    content = {
        "__call__": call,
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "_nca_original": original,
        "_nca_call": staticmethod(call),
        "_nca_backend": backend,
        "_nca_path": path,
    }
    return _metaclass(type(original))(original.__name__, (original,), content)


@functools.cache
def _metaclass(base: type) -> type:
    if issubclass(AcceleratedMeta, base):
        return AcceleratedMeta
    bases = (base,) if issubclass(base, AcceleratedMeta) else (AcceleratedMeta, base)
    made = type(AcceleratedMeta.__name__, bases, {})
    copyreg.pickle(made, _reduce)
    return made


def _reduce(cls: Any) -> Any:
    if "_nca_original" not in vars(cls):  # a subclass of an accelerated class, known by its name
        return cls.__qualname__
    return accelerated, (cls._nca_original, cls._nca_call, cls._nca_backend, cls._nca_path)


copyreg.pickle(AcceleratedMeta, _reduce)


def is_accelerated(module: Any) -> bool:
    return "_nca_original" in vars(type(module))


def original(module: Any) -> type:
    cls: type = vars(type(module)).get("_nca_original", type(module))
    return cls


def swap_class(module: Any, cls: type) -> None:
    """Make an nnx module, which guards its attributes, an instance of another class."""
    object.__setattr__(module, "__class__", cls)
