"""The Pallas kernels as an engine of :mod:`nca_kernels.tiled`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from nca_kernels.backends.pallas.launch import launch
from nca_kernels.tiled import device
from nca_kernels.tiled.attention import attention_constants
from nca_kernels.tiled.configuration import Engine, heuristic, too_wide_for_tiles
from nca_kernels.tiled.geometry import step_constants
from nca_kernels.tuning import Launch

ENGINE = Engine(
    name="pallas",
    step_kernels=lambda: import_module("nca_kernels.backends.pallas.step_kernels"),
    attention_kernels=lambda: import_module("nca_kernels.backends.pallas.attention_kernels"),
    launch=launch,
    capability=lambda: min(device.capability(), 89),  # they make use of nothing newer
    lacks=("by_tap", "hoisted", "joined", "registers", "carried"),
)
MOST_GROUPS = 65535  # on the second axis of a launch


def too_wide(call: Any, avals: Sequence[Any]) -> str | None:
    """Why these kernels cannot run a call, or None."""
    return too_wide_for_tiles(call, avals) or _too_large(call, avals)


def _too_large(call: Any, avals: Sequence[Any]) -> str | None:
    """Too many groups, or positions beyond int32: without x64, JAX has no wider integers."""
    operands = call.operands(avals)
    groups = avals[0].shape[0]
    if call.op != "neighborhood_attention" and groups > MOST_GROUPS:
        return f"it takes up to {MOST_GROUPS} members of a vmap, got {groups}"
    if call.op == "neighborhood_attention":
        g = attention_constants(call, operands, Launch())
    else:
        how = heuristic("step_backward", call, operands, precise=True, capability=0)
        g = step_constants(call, operands, how, "ieee")
    if g["wide"]:
        return "it takes arrays of less than 2**31 elements, those of its own included"
    return None
