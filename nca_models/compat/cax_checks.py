"""What `accelerate` refuses or warns about before it changes a system."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

from flax import nnx

import nca_kernels as nk
from nca_models.compat.cax_classes import original
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


def has_copy_with_same_variables(cs: Any) -> bool:
    """Whether other modules hold a system's variables, as those of `nnx.cached_partial` do."""
    if not _holders(cs):
        return False
    gc.collect()  # a copy that nothing uses any more may still be there
    return bool(_holders(cs))


def _holders(cs: Any) -> list[Any]:
    """Modules outside of a system, of the classes in it, that hold variables of the system."""
    mine = [module for _, module in nnx.iter_modules(cs)]
    classes, ids = {original(module) for module in mine}, {id(module) for module in mine}
    variables = [v for module in mine for v in vars(module).values() if isinstance(v, nnx.Variable)]
    # Until Python 3.12, attributes may lie in a dictionary of their own.
    referrers = gc.get_referrers(*variables)
    dicts = [r for r in referrers if isinstance(r, dict)]
    return [
        module
        for module in _modules_among([*referrers, *(gc.get_referrers(*dicts) if dicts else ())])
        if original(module) in classes
        and id(module) not in ids
        and any(value is v for value in vars(module).values() for v in variables)
    ]


def _modules_among(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, nnx.Module)]
