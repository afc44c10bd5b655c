"""The Triton kernels as an engine of :mod:`nca_kernels.tiled`."""

from __future__ import annotations

from importlib import import_module

from nca_kernels.backends.triton.launch import capability, launch
from nca_kernels.tiled.configuration import Engine, unsupported_by_tiles

ENGINE = Engine(
    name="triton",
    step_kernels=lambda: import_module("nca_kernels.backends.triton.step_kernels"),
    attention_kernels=lambda: import_module("nca_kernels.backends.triton.attention_kernels"),
    launch=launch,
    wide_products=lambda: capability() >= 90,
)
unsupported = unsupported_by_tiles
