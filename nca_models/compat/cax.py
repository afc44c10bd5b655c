"""Fused steps for systems written with CAX, with one line.

    from nca_models.compat.cax import accelerate

    cs = accelerate(cs)

The modules stay what they are: `accelerate` swaps the class of each perceive and each update for a
subclass with another `__call__`. Parameters, their paths and random streams do not change, nor does
what depends on them (`nnx.state`, filters, optimizers, checkpoints, `nnx.vmap`).

A perceive still returns its perception, and remembers which state and taps it was computed from. An
update that receives this perception, unchanged, with that state, runs both as one `nk.step`; the
result of the convolution is then unused, and XLA removes it. In every other case the perception is
computed as before, and the update alone is fused, as `nk.update`.

CAX (Faldor and Cully, "CAX: Cellular Automata Accelerated in JAX", ICLR 2025) is needed when a
function is called, not to import this module. Both of its interfaces work, 0.3.x and 0.4.x.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx

import nca_kernels as nk
from nca_models.compat import cax_calls as calls
from nca_models.compat import cax_facts as facts


def accelerate(cs: Any, backend: str = "auto", *, strict: bool = False) -> Any:
    """Make the steps of a CAX system run fused, with the same trajectory for the same keys.

    The system is changed in place, so that optimizers and references to it stay valid. Calling
    again with another backend is fine. What cannot be fused exactly is left as it is.

    Two things are fused, wherever they are in the system: a `ConvPerceive` (stride 1, depthwise or
    dense, padding SAME, CIRCULAR or REFLECT, with or without bias and activation) with the
    `MLPUpdate`, `ResidualUpdate` or `NCAUpdate` that follows it, and such an update behind any
    other perceive. The activations are those of `nk.Rule`. States, parameters and inputs are
    float32.

    Two things differ, neither of which shows in a trajectory that stays finite: sums are rounded
    in another order, and dead cells are exactly 0 where CAX multiplies by 0 (which keeps NaN).
    Outside of `jit`, the unused convolution is still computed; `cs(...)` itself is jitted.

    Args:
        cs: a `cax.core.ComplexSystem`, with or without a `_step` of its own.
        backend: name of the `nca_kernels` backend, or "auto".
        strict: raise an error instead of a warning if a part cannot be fused.

    Returns:
        `cs` itself.

    Raises:
        ImportError: CAX is not installed; names the extra.
        TypeError: `cs` is no `ComplexSystem`.
        ValueError: `backend` is unknown, or `strict` and a part cannot be fused.
        BackendUnavailable: `backend` cannot run here.
    """
    _require_system(cs)
    _require_backend(backend)
    parts = list(_parts(cs))
    problems = "; ".join(map(str, (part for part in parts if part.why_not)))
    if problems and strict:
        raise ValueError(f"a part cannot be fused exactly: {problems}")
    if problems:
        warnings.warn(problems, stacklevel=2)
    for part in parts:
        if part.call is not None:
            cls = calls.accelerated(calls.original(part.module), part.call, backend)
            object.__setattr__(part.module, "__class__", cls)
    return cs


def explain(cs: Any, state: Any = None, input: Any = None) -> None:
    """Print which parts of a system, accelerated or not, are or can be fused, and why others not.

    Args:
        cs: a `cax.core.ComplexSystem`.
        state: `[*batch, *spatial, C]`, or its `jax.ShapeDtypeStruct`: then one step is traced
            (nothing is computed, no random number is drawn) to show what its updates really run.
        input: the step's input, if it takes one.
    """
    _require_system(cs)
    parts = list(_parts(cs))
    if not any(calls.is_accelerated(part.module) for part in parts):
        print("not accelerated; accelerate(cs) would make it:")
    for part in parts:
        print(part)
    if state is not None:
        for line in _trace(cs, state, input) or ["no accelerated update"]:
            print(f"one step runs: {line}")
    print(f'backend "auto" is {next(b.name for b in nk.backends() if b.auto)} here')


# ---- the parts of a system ----


@dataclass(frozen=True)
class _Part:
    """A perceive or an update in a system."""

    path: str
    module: Any
    verdict: str
    why_not: str = ""  # empty if all of it is fused
    call: Callable[..., Any] | None = None  # what replaces its `__call__`; None if nothing does

    def __str__(self) -> str:
        name = f"{self.path} ({calls.original(self.module).__name__})"
        return f"{name}: {self.verdict}" + (f": {self.why_not}" if self.why_not else "")


def _parts(cs: Any) -> Iterator[_Part]:
    """The perceives and updates anywhere in a system, in the order of their paths."""
    from cax.core.perceive import ConvPerceive, Perceive
    from cax.core.update import MLPUpdate, NCAUpdate, ResidualUpdate, Update

    for path, module in sorted(nnx.iter_modules(cs), key=lambda item: tuple(map(str, item[0]))):
        part = partial(_Part, ".".join(map(str, path)), module)
        cls = calls.original(module)
        try:
            if getattr(cls, "fused_by_itself", False):
                yield part("fused by itself")
            elif isinstance(module, Perceive):
                _require_call_of(cls, ConvPerceive)
                facts.stencil(module)
                yield part("fused into the update that follows", call=calls.perceive)
            elif isinstance(module, Update):
                _require_call_of(cls, MLPUpdate, ResidualUpdate, NCAUpdate)
                facts.network(module)
                facts.firing(module)
                why = facts.why_no_alive_mask(module, NCAUpdate)
                yield part("fused, but for the alive mask" if why else "fused", why, calls.update)
        except facts.CannotFuse as reason:
            yield part("left as it is", str(reason))


def _require_call_of(cls: type, *bases: type) -> None:
    """Refuse classes whose `__call__` is not known; subclasses that inherit it are fine."""
    if cls.__call__ not in {base.__call__ for base in bases}:
        names = " or ".join(base.__name__ for base in bases)
        raise facts.CannotFuse(f"its __call__ is not that of {names}")


def _trace(cs: Any, state: Any, input: Any) -> list[str]:
    """What the updates of a step run, as tracing the step on a copy shows."""
    graph, content = nnx.split(cs)
    with calls.noting() as notes:
        jax.eval_shape(lambda c, s, i: nnx.merge(graph, c)._step(s, i), content, state, input)
    return notes


# ---- checks ----


def _require_system(cs: Any) -> None:
    with facts.cax_is_needed():
        from cax.core import ComplexSystem
    if not isinstance(cs, ComplexSystem):
        raise TypeError(f"cs must be a cax.core.ComplexSystem, got {type(cs).__name__}")


def _require_backend(name: str) -> None:
    known = {b.name: b for b in nk.backends()}
    if name != "auto" and name not in known:
        raise ValueError(f"backend must be one of {', '.join(['auto', *known])}, got {name!r}")
    if name != "auto" and not known[name].available:
        raise nk.BackendUnavailable(f"backend {name!r} cannot run here: {known[name].reason}")


def __getattr__(name: str) -> Any:
    """`MooreAttentionPerceive` is made when first asked for: its base class is CAX's."""
    if name != "MooreAttentionPerceive":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nca_models.compat.cax_attention import MooreAttentionPerceive

    return MooreAttentionPerceive
