"""The Triton kernels as an engine of :mod:`nca_kernels.tiled`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from nca_kernels.backends.triton.launch import capability, launch
from nca_kernels.tiled.configuration import Engine, unsupported_by_tiles

ENGINE = Engine(
    name="triton",
    step_kernels=lambda: import_module("nca_kernels.backends.triton.step_kernels"),
    attention_kernels=lambda: import_module("nca_kernels.backends.triton.attention_kernels"),
    launch=launch,
    wide_products=lambda: capability() >= 90,
)


def unsupported(call: Any, avals: Sequence[Any]) -> str | None:
    """Why these kernels cannot run a call, or None."""
    return unsupported_by_tiles(call, avals)
