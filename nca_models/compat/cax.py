"""Fused steps for systems written with CAX, with one line.

    from nca_models.compat.cax import accelerate

    cs = accelerate(cs)

The modules stay what they are: `accelerate` swaps the class of each perceive and each update for a
subclass with another `__call__`. Parameters, their paths and random streams do not change, nor does
what depends on them (`nnx.state`, filters, optimizers, checkpoints, `nnx.vmap`).

A perceive still returns its perception, and remembers which state and taps it was computed from. An
update that receives this perception, unchanged, with that state, runs both as one `nk.step`; the
result of the convolution is then unused, and XLA removes it. In every other case the perception is
computed as before, and the update alone is fused, as `nk.update`. Only a trace of a step tells
which case it is, so `explain` and `strict` trace one.

CAX (Faldor and Cully, "CAX: Cellular Automata Accelerated in JAX", ICLR 2025) is needed when a
function is called, not to import this module. Both of its interfaces work, 0.3.x and 0.4.x.
"""

from __future__ import annotations

import warnings
from typing import Any

import nca_kernels as nk
from nca_models.compat import cax_checks as checks
from nca_models.compat import cax_report as report
from nca_models.compat.cax_classes import is_accelerated, swap_class


def accelerate(
    cs: Any, backend: str = "auto", *, strict: bool = False, state: Any = None, input: Any = None
) -> Any:
    """Make the steps of a CAX system run fused, with the same trajectory for the same keys.

    The system is changed in place, so that optimizers and references to it stay valid. Calling
    again with another backend is fine. What cannot be fused exactly is left as it is.

    Fused are a `ConvPerceive` (stride 1, depthwise or dense, padding SAME, CIRCULAR or REFLECT,
    with or without bias and activation) with the `MLPUpdate`, `ResidualUpdate` or `NCAUpdate` that
    follows it, and such an update behind any other perceive, wherever they are in the system. The
    activations are those of `nk.Rule`. States, parameters and inputs are float32.

    Two things differ, neither of which shows in a trajectory that stays finite: sums are rounded
    in another order, and dead cells are exactly 0 where CAX multiplies by 0 (which keeps NaN).

    A step is traced on a copy to see what is fused, with `state` and `input`, or else on a small
    grid. If no such step can be traced, only the parts are judged.

    Args:
        cs: a `cax.core.ComplexSystem`, with or without a `_step` of its own.
        backend: name of the `nca_kernels` backend, or "auto".
        strict: raise an error instead of a warning if a part, its alive mask included, is not
            fused: what `explain` shows as left as it is.
        state: `[*batch, *spatial, C]`, or its `jax.ShapeDtypeStruct`.
        input: the step's input, if it takes one.

    Returns:
        `cs` itself.

    Raises:
        ImportError: CAX is not installed; names the extra.
        TypeError: `cs` is no `ComplexSystem`.
        ValueError: `backend` is unknown, `strict` and a part is not fused, the step cannot be
            traced with `state`, or `cs` was passed into a transformation of nnx.
        BackendUnavailable: `backend` cannot run here.
    """
    checks.require_system(cs)
    checks.require_backend(backend)
    parts = report.parts(cs)
    changes = report.changes(parts, backend)
    if changes:
        checks.require_not_passed_in(cs)
    problems = _problems(cs, _verdicts(cs, parts, backend, state, input))
    if problems and strict:
        raise ValueError(problems)
    for message in filter(None, (problems, checks.about_copies(cs) if changes else "")):
        warnings.warn(message, stacklevel=2)
    for module, cls in changes:
        swap_class(module, cls)
    return cs


def _verdicts(
    cs: Any, parts: list[report.Part], backend: str, state: Any, input: Any
) -> list[report.Verdict]:
    if state is None:
        return report.without_state(cs, parts, backend)
    try:
        return report.of_step(cs, parts, backend, state, input)
    except Exception as error:
        raise ValueError(_untraceable(error, "accelerate(cs, state=state, input=input)")) from error


def _problems(cs: Any, verdicts: list[report.Verdict]) -> str:
    """What is not fused, as `explain` says it; empty if there is nothing."""
    if any(verdict.fused for verdict in verdicts):
        return "; ".join(str(verdict) for verdict in verdicts if verdict.fused is False)
    lines = "; ".join(map(str, verdicts)) or "it has no perceive and no update of CAX"
    return f"nothing in this {type(cs).__name__} is fused: {lines}"


def _untraceable(error: Exception, call: str) -> str:
    what = f"a step of the system cannot be traced: {type(error).__name__}: {error}"
    return f"{what}. If the step takes an input, give one: {call}"


def explain(cs: Any, state: Any = None, input: Any = None) -> None:
    """Print what of a system is fused and what is not, and why: one line for each part.

    Args:
        cs: a `cax.core.ComplexSystem`, accelerated or not.
        state: `[*batch, *spatial, C]`, or its `jax.ShapeDtypeStruct`: then one step is traced
            (nothing is computed, no random number is drawn) to see what it really runs. Without it,
            only the parts are known, not what the step does with them.
        input: the step's input, if it takes one.
    """
    checks.require_system(cs)
    parts = report.parts(cs)
    accelerated_before = any(is_accelerated(part.module) for part in parts)
    if accelerated_before:
        parts = report.as_accelerated(parts)
    else:
        print("not accelerated; accelerate(cs) would make it:")
    note = ""
    if state is None:
        verdicts = report.of_parts(parts)
        note = "only the parts are known here: explain(cs, state) shows what a step really runs"
    else:
        try:
            backend = None if accelerated_before else "auto"
            verdicts = report.of_step(cs, parts, backend, state, input)
        except Exception as error:
            if input is not None:
                raise
            verdicts = report.of_parts(parts)
            note = _untraceable(error, "explain(cs, state, input)")
    if not verdicts:
        note = "nothing to fuse: the system has no perceive and no update of CAX"
    for line in (*map(str, verdicts), *filter(None, [note])):
        print(line)
    print(f'backend "auto" is {next(b.name for b in nk.backends() if b.auto)} here')


def __getattr__(name: str) -> Any:
    """`MooreAttentionPerceive` is made when first asked for: its base class is CAX's."""
    if name != "MooreAttentionPerceive":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nca_models.compat.cax_attention import MooreAttentionPerceive

    return MooreAttentionPerceive
