"""What `accelerate` refuses or warns about before it changes a system."""

from __future__ import annotations

import gc
from typing import Any

from flax import nnx

import nca_kernels as nk
from nca_models.compat.cax_facts import cax_is_needed


def require_system(cs: Any) -> None:
    with cax_is_needed():
        from cax.core import ComplexSystem
    if not isinstance(cs, ComplexSystem):
        raise TypeError(f"cs must be a cax.core.ComplexSystem, got {type(cs).__name__}")


def require_backend(name: str) -> None:
    known = {b.name: b for b in nk.backends()}
    if name != "auto" and name not in known:
        raise ValueError(f"backend must be one of {', '.join(['auto', *known])}, got {name!r}")
    if name != "auto" and not known[name].available:
        raise nk.BackendUnavailable(f"backend {name!r} cannot run here: {known[name].reason}")


def require_not_passed_in(cs: Any) -> None:
    """Refuse a system that a transformation of nnx passed in and will hand back.

    nnx compares the classes that come back with those that it was given, and fails if they differ.
    """
    try:
        from flax.nnx import graphlib

        stacks = graphlib.GRAPH_CONTEXT.update_context_stacks
        inner = [ctx.inner_ref_outer_index for stack in stacks.values() for ctx in stack]
        passed_in = any(index is not None and cs in index for index in inner)
    except (ImportError, AttributeError):  # not a public interface: nnx then fails by itself
        return
    if passed_in:
        raise ValueError(
            f"accelerate was called inside nnx.jit, or another transformation of nnx, on a "
            f"{type(cs).__name__} that was passed in: its modules would get other classes, and nnx "
            "allows no change of classes there. Call accelerate(cs) before, outside of it"
        )


def about_copies(cs: Any) -> str:
    """A warning if `nnx.cached_partial` has copied a system: it steps the copy, whose classes stay.

    Empty if it has not.
    """
    if not _is_cached(cs):
        return ""
    gc.collect()  # a copy that nothing uses any more may still be there
    if not _is_cached(cs):
        return ""
    return (
        f"nnx.cached_partial was called with this {type(cs).__name__} and steps a copy of it, "
        "which is not accelerated: call accelerate(cs) first, and nnx.cached_partial after it"
    )


def _is_cached(cs: Any) -> bool:
    """Whether a cache of nnx holds a system's variables, which a copy shares."""
    try:
        from flax.nnx.graphlib import StaticCache
    except ImportError:  # not a public interface
        return False
    mine = {id(value) for _, value in nnx.iter_graph(cs) if isinstance(value, nnx.Variable)}
    caches = [value for value in gc.get_objects() if type(value) is StaticCache]
    return any(id(variable) in mine for cache in caches for variable in cache.variables)
