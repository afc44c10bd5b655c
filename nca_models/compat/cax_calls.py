"""What the modules of an accelerated CAX system do when they are called."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import nca_kernels as nk
from nca_models.compat.cax_facts import (
    CannotFuse,
    Stencil,
    firing,
    network,
    require_float32,
    stencil,
    why_no_alive_mask,
)
from nca_models.modules import mlp_layers

# ---- what a perception was computed from ----


@dataclass(frozen=True)
class _Source:
    """What a perception was computed from; it is stored for as long as the perception lives."""

    perception: weakref.ref
    state: weakref.ref
    stencil: Stencil
    taps: Array
    bias: Array | None


_sources: dict[int, _Source] = {}


def _remember(perception: Any, state: Any, perceive: Any) -> None:
    name = id(perception)
    conv = perceive.conv
    bias = None if conv.bias is None else conv.bias[...]
    _sources[name] = _Source(
        weakref.ref(perception, lambda _: _sources.pop(name, None)),
        weakref.ref(state),
        stencil(perceive),
        conv.kernel[...],
        bias,
    )


def _source(perception: Any, state: Any) -> _Source | None:
    """The source of a perception, if it was computed from this very state."""
    source = _sources.get(id(perception))
    same = source and source.perception() is perception and source.state() is state
    return source if same else None


# ---- the calls of accelerated modules ----

_Layers = tuple[tuple[Array, Array | None], ...]


@functools.cache
def accelerated(original: type, call: Callable[..., Any], backend: str) -> type:
    """The subclass that accelerated modules of a class get; the same class each time."""
    content = {
        "__call__": call,
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "_nca_original": original,
        "_nca_backend": backend,
    }
    return type(original)(original.__name__, (original,), content)


def is_accelerated(module: Any) -> bool:
    return "_nca_original" in vars(type(module))


def original(module: Any) -> type:
    cls: type = vars(type(module)).get("_nca_original", type(module))
    return cls


def perceive(self: Any, state: Any) -> Any:
    """Call a `ConvPerceive`, and remember what its perception was computed from."""
    perception = original(self).__call__(self, state)
    with suppress(CannotFuse):  # the module has changed: the update will not find a source
        _remember(perception, state, self)
    return perception


def update(self: Any, state: Any, perception: Any, input: Any = None) -> Any:
    """Call an update fused, with its perception too if that was computed from this state."""
    from cax.core.update import NCAUpdate, ResidualUpdate

    try:
        require_float32(self, state, perception, input)
        activation, precision = network(self)
        fire_rate, draws = firing(self)
        step_size = self.step_size if isinstance(self, ResidualUpdate) else 1.0
        if not isinstance(step_size, (int, float)):
            raise CannotFuse(f"its step_size is a {type(step_size).__name__}, not a number")
    except CannotFuse as reason:
        _note(f"{type(self).__name__} as it was ({reason})")
        warnings.warn(f"{type(self).__name__} is not fused here: {reason}", stacklevel=2)
        return original(self).__call__(self, state, perception, input)
    rule = nk.Rule(
        activation=activation,
        precision=precision,
        fire_rate=fire_rate,
        step_size=step_size / fire_rate,  # dropout scales what it keeps by the inverse
        alive=None,
    )
    key = self.dropout.rngs() if draws else jax.random.key(0)
    source = _source(perception, state)
    if source is not None and source.stencil.precision != precision:
        source = None
    run = functools.partial(_run, self, state=state, key=key, inputs=input)
    if not isinstance(self, ResidualUpdate):
        return _without_residual(run, rule, mlp_layers(self.layers), source, state, perception)
    if not isinstance(self, NCAUpdate):
        return run(rule, source, perception)
    # The pool of an NCAUpdate has no cells beyond the border, whatever the perception has.
    pads = source is None or source.stencil.padding == "zeros"
    if pads and not why_no_alive_mask(self, NCAUpdate):
        alive = nk.Alive(channel=-1, threshold=self.alive_threshold)
        return run(replace(rule, alive=alive), source, perception)
    before = self.get_alive_mask(state)
    state = run(rule, source, perception)
    return (before & self.get_alive_mask(state)) * state


def _run(
    update: Any,
    rule: nk.Rule,
    source: _Source | None,
    perception: Any,
    *,
    state: Any,
    key: Any,
    inputs: Any,
    layers: _Layers | None = None,
) -> Any:
    """One `nk.step`, or `nk.update` if the source of the perception is not known."""
    layers = mlp_layers(update.layers) if layers is None else layers
    backend, masked = type(update)._nca_backend, " and alive mask" if rule.alive else ""
    if source is None:
        _note(f"update{masked} fused, with the perception as it is given")
        dims = len(update.layers[0].kernel_size)
        return nk.update(
            rule, layers, state, perception, key, inputs, backend, num_spatial_dims=dims
        )
    _note(f"perception, update{masked} fused")
    stencil = source.stencil
    rule = replace(rule, padding=stencil.padding, perception_activation=stencil.activation)
    params = nk.RuleParams(source.taps, source.bias, layers)
    return nk.step(rule, params, state, key, inputs, backend=backend)


def _without_residual(
    run: Callable[..., Any],
    rule: nk.Rule,
    layers: _Layers,
    source: _Source | None,
    state: Any,
    perception: Any,
) -> Any:
    """Run an `MLPUpdate`, whose result is the network's output, by adding it to channels of zeros.

    Where the perception is fused, these channels follow those of the state: their taps see nothing,
    and the network adds nothing to the channels of the state.
    """
    outputs = layers[-1][0].shape[-1]
    zeros = jnp.zeros((*state.shape[:-1], outputs), state.dtype)
    if source is None:
        return run(rule, None, perception, state=zeros)
    channels = state.shape[-1]
    depthwise = source.taps.shape[-2] == 1
    extra = outputs * source.taps.shape[-1] // channels if depthwise else 0
    rows = source.taps.shape[-1]  # of the first layer, in front of those of the inputs
    taps, bias = source.taps, source.bias
    if depthwise:
        taps = _append_zeros(taps, extra, axis=-1)
        bias = None if bias is None else _append_zeros(bias, extra, axis=-1)
        weight, first_bias = layers[0]
        gap = jnp.zeros((extra, weight.shape[1]), weight.dtype)
        layers = ((jnp.concatenate([weight[:rows], gap, weight[rows:]]), first_bias), *layers[1:])
    else:
        taps = _append_zeros(taps, outputs, axis=-2)
    weight, last_bias = layers[-1]
    last_bias = None if last_bias is None else jnp.pad(last_bias, (channels, 0))
    layers = (*layers[:-1], (jnp.pad(weight, ((0, 0), (channels, 0))), last_bias))
    wide = jnp.concatenate([state, zeros], axis=-1)
    out = run(rule, replace(source, taps=taps, bias=bias), None, state=wide, layers=layers)
    return out[..., channels:]


def _append_zeros(array: Array, count: int, axis: int) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, count)
    return jnp.pad(array, widths)


# ---- what `explain` prints ----

_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


def _note(line: str) -> None:
    notes = _notes.get()
    if notes is not None:
        notes.append(line)


@contextmanager
def noting() -> Iterator[list[str]]:
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)
