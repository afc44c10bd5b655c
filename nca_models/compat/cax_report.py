"""The parts of a CAX system, and what is fused of them: as a traced step shows, or as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nca_models.compat import cax_calls as calls
from nca_models.compat import cax_facts as facts
from nca_models.compat.cax_activations import CannotFuse
from nca_models.compat.cax_classes import accelerated, is_accelerated, original, swap_class
from nca_models.compat.cax_watch import Watch, trace


@dataclass(frozen=True)
class Part:
    """A perceive or an update in a system."""

    path: str
    module: Any
    is_update: bool
    why_not: str = ""  # empty if it can be fused
    why_no_mask: str | None = None  # of an update's alive mask; None if it has none
    call: Callable[..., Any] | None = None  # what replaces its `__call__`; None if nothing does


@dataclass(frozen=True)
class Verdict:
    """A line of `explain`.

    `fused` is None where a step does not use the part. `text` says how the part runs, and why.
    """

    part: str
    fused: bool | None
    text: str

    def __str__(self) -> str:
        return f"{self.part}: {self.text}"


# ---- the parts ----


def modules(cs: Any) -> list[tuple[str, Any]]:
    """(path, module) of every module in a system, in the order of their paths."""
    found = sorted(nnx.iter_modules(cs), key=lambda item: tuple(map(str, item[0])))
    return [(".".join(map(str, path)), module) for path, module in found]


def parts(cs: Any) -> list[Part]:
    """The perceives and updates anywhere in a system."""
    from cax.core.perceive import Perceive
    from cax.core.update import Update

    return [
        _part(path, module) for path, module in modules(cs) if isinstance(module, Perceive | Update)
    ]


def _part(path: str, module: Any) -> Part:
    from cax.core.perceive import ConvPerceive
    from cax.core.update import MLPUpdate, NCAUpdate, ResidualUpdate, Update

    part = Part(path, module, isinstance(module, Update))
    cls = original(module)
    try:
        if getattr(cls, "fused_by_itself", False):
            return part
        if not part.is_update:
            _require_call_of(cls, ConvPerceive)
            facts.stencil(module)
            return replace(part, call=calls.perceive)
        _require_call_of(cls, MLPUpdate, ResidualUpdate, NCAUpdate)
        facts.network(module)
        facts.firing(module)
        facts.step_size(module)
    except CannotFuse as reason:
        return replace(part, why_not=str(reason) + _advice(part))
    mask = facts.why_no_alive_mask(module, NCAUpdate) if isinstance(module, NCAUpdate) else None
    return replace(part, call=calls.update, why_no_mask=mask)


def changes(known: list[Part], backend: str) -> list[tuple[Any, type]]:
    """The modules that `accelerate` changes, each with the class that it gets."""
    classes = [
        (part.module, accelerated(original(part.module), part.call, backend, None))
        for part in known
        if part.call is not None
    ]
    return [(module, cls) for module, cls in classes if type(module) is not cls]


def _require_call_of(cls: type, *bases: type) -> None:
    """Refuse classes whose `__call__` is not known; subclasses that inherit it are fine."""
    if cls.__call__ not in {base.__call__ for base in bases}:
        names = " or ".join(base.__name__ for base in bases)
        raise CannotFuse(f"its __call__ is not that of {names}")


def _advice(part: Part) -> str:
    attends = any(isinstance(m, nnx.MultiHeadAttention) for _, m in nnx.iter_modules(part.module))
    if part.is_update or not attends:
        return ""
    return (
        "; if its cells attend to their neighbours, nca_models.compat.cax.MooreAttentionPerceive "
        "is the fused form"
    )


# ---- what is fused ----


def of_step(
    cs: Any, known: list[Part], backend: str | None, state: Any, input: Any
) -> list[Verdict]:
    """What runs fused in a step, by tracing it on a copy; no random number is drawn.

    Args:
        cs: the system.
        known: its parts; those that can be fused are accelerated in the copy.
        backend: the backend they are accelerated for; None for the one that each already has.
        state: an array or its `jax.ShapeDtypeStruct`.
        input: the step's input, or None.
    """
    graph, content = nnx.split(cs)
    call_at = {part.path: part.call for part in known}

    def step(content: Any, state: Any, input: Any) -> Any:
        copy = nnx.merge(graph, content)
        for path, module in modules(copy):
            call = call_at.get(path)
            if call is not None:
                name = backend or type(module)._nca_backend
                swap_class(module, accelerated(original(module), call, name, path))
        return copy._step(state, input), nnx.split(copy)[1]

    return list(_of_watch(known, trace(step, content, state, input)))


def as_accelerated(known: list[Part]) -> list[Part]:
    """The parts of an accelerated system, those refused that are not accelerated."""
    why = "it was added after accelerate: call accelerate(cs) again"
    return [
        replace(part, why_not=why, call=None)
        if part.call is not None and not is_accelerated(part.module)
        else part
        for part in known
    ]


def _of_watch(known: Iterable[Part], watch: Watch) -> Iterator[Verdict]:
    for part in known:
        if part.call is None:
            yield from _of_part(part)
        elif part.is_update:
            yield _of_calls(_name(part), watch.reasons("update", part.path))
            if part.why_no_mask is not None:
                yield _of_calls(_mask_name(part), watch.reasons("alive mask", part.path))
        else:
            yield _of_perceive(part, watch)


def _of_calls(name: str, reasons: list[str]) -> Verdict:
    if not reasons:
        return Verdict(name, None, "not used in this step")
    why = next(filter(None, reasons), "")
    return Verdict(name, not why, f"left as it is: {why}" if why else "fused")


def _of_perceive(part: Part, watch: Watch) -> Verdict:
    reasons, name = watch.reasons("perception", part.path), _name(part)
    if part.path in watch.computed:
        why = next(
            filter(None, reasons),
            "something else than a fused update uses its perception"
            if reasons
            else "no fused update receives its perception, unchanged and with the same state",
        )
        also = "fused into an update, but computed as well" if "" in reasons else "left as it is"
        return Verdict(name, False, f"{also}: {why}")
    if "" in reasons:
        return Verdict(name, True, "fused into the update that receives its perception")
    return Verdict(name, None, "not used in this step")


def of_parts(known: list[Part]) -> list[Verdict]:
    """What can be fused and what certainly cannot, where no step can be traced."""
    known = _without_partners(known)
    return [verdict for part in known for verdict in _of_part(part)]


def _without_partners(known: list[Part]) -> list[Part]:
    """The parts, those refused that nothing in the system can be fused with."""
    perceives = [part for part in known if part.call is not None and not part.is_update]
    paddings = {facts.stencil(part.module).padding for part in perceives}
    if not any(part.is_update and part.call is not None for part in known):
        why = "no update of the system can be fused with it"
        return [replace(p, why_not=why, call=None) if p in perceives else p for p in known]
    if not paddings or "zeros" in paddings:
        return known
    why = "its pool sees nothing beyond the border, and every perception of the system does"
    return [replace(p, why_no_mask=why) if p.why_no_mask == "" else p for p in known]


def _of_part(part: Part) -> Iterator[Verdict]:
    if part.why_not:
        yield Verdict(_name(part), False, f"left as it is: {part.why_not}")
    elif part.call is None:
        yield Verdict(_name(part), True, "fused by itself")
    elif part.is_update:
        yield Verdict(_name(part), True, "can be fused")
        if (why := part.why_no_mask) is not None:
            text = f"left as it is: {why}" if why else "can be fused"
            yield Verdict(_mask_name(part), not why, text)
    else:
        yield Verdict(_name(part), True, "can be fused into an update that receives its perception")


def _name(part: Part) -> str:
    return f"{part.path} ({original(part.module).__name__})"


def _mask_name(part: Part) -> str:
    return f"{part.path} (alive mask)"


# ---- a step to trace where none is given ----


def without_state(cs: Any, known: list[Part], backend: str) -> list[Verdict]:
    """What is fused in a step on a small grid, or what can be if such a step cannot be traced."""
    for state, input in _small_arguments(known):
        try:
            return of_step(cs, known, backend, state, input)
        except Exception:  # the step is the user's: it may need another grid, or another input
            continue
    return of_parts(known)


def _small_arguments(known: list[Part]) -> Iterator[tuple[Any, Any]]:
    """(state, input) that a step may take: no input, a vector, or a vector for each cell."""
    perceives = [p.module for p in known if p.call is not None and not p.is_update]
    updates = [p.module for p in known if p.call is not None and p.is_update]
    convs = [perceive.conv for perceive in perceives]
    shapes = {(conv.in_features, conv.kernel.ndim - 2) for conv in convs} or {
        (update.layers[-1].out_features, len(update.layers[0].kernel_size)) for update in updates
    }
    widths = {
        update.layers[0].in_features - conv.out_features for update in updates for conv in convs
    }
    for channels, dims in sorted(shapes):
        grid = (8,) * dims
        inputs = [None]
        for width in sorted(width for width in widths if width > 0):
            inputs += [_array(width), _array(*grid, width)]
        yield from ((_array(*grid, channels), input) for input in inputs)


def _array(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
