"""Watching one step of an accelerated system: what its modules really run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import partial_eval

_MARK = "nca perception of "


@dataclass
class Watch:
    """Calls of a step's accelerated modules, told apart by the paths of their classes.

    Attributes:
        calls: (part, path of the module, why it did not run fused: empty if it did). The parts are
            "perception" (of a perceive, where an update that can be fused received it),
            "update" and "alive mask".
        computed: paths of the perceives whose perception is still needed once all that nothing uses
            is removed from the step, as XLA removes it.
    """

    calls: list[tuple[str, str, str]] = field(default_factory=list)
    computed: set[str] = field(default_factory=set)

    def reasons(self, part: str, path: str) -> list[str]:
        """One entry for each call."""
        return [why for *call, why in self.calls if call == [part, path]]


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


def is_watched() -> bool:
    return _watch.get() is not None


def note(part: str, path: str | None, why_not: str = "") -> None:
    watch = _watch.get()
    if watch is not None and path is not None:
        watch.calls.append((part, path, why_not))


def mark(perception: Any, path: str | None) -> Any:
    """Name a perception in the traced step, so that it can be found there."""
    watched = is_watched() and path is not None
    return checkpoint_name(perception, f"{_MARK}{path}") if watched else perception


@contextmanager
def watching() -> Iterator[Watch]:
    watch = Watch()
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


def trace(step: Any, *arguments: Any) -> Watch:
    """Trace a step, whose modules have classes with paths; nothing is computed."""
    with watching() as watch:
        jaxpr = needed(jax.make_jaxpr(step)(*arguments))
    for equation in equations(jaxpr):
        name = equation.params.get("name") if equation.primitive.name == "name" else None
        if isinstance(name, str) and name.startswith(_MARK):
            watch.computed.add(name.removeprefix(_MARK))
    return watch


def needed(closed: Any) -> Any:
    """A jaxpr without the equations whose results nothing uses."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return jaxpr


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those in loops, branches and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")
