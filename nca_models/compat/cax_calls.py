"""What the modules of an accelerated CAX system do when they are called."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import nca_kernels as nk
from nca_models.compat import cax_watch as watch
from nca_models.compat.cax_activations import Activation, CannotFuse
from nca_models.compat.cax_classes import original
from nca_models.compat.cax_facts import (
    Stencil,
    firing,
    network,
    require_float32,
    stencil,
    step_size,
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
    path: str | None  # of the perceive, if a step is being watched


_sources: dict[int, _Source] = {}


def _remember(perception: Any, state: Any, perceive: Any) -> None:
    """Store what a perception was computed from, unless it could still be changed in place."""
    taps, bias = perceive.conv.kernel[...], perceive.conv.bias
    bias = None if bias is None else bias[...]
    arrays = (perception, state, taps) if bias is None else (perception, state, taps, bias)
    if not all(isinstance(array, jax.Array) for array in arrays):
        return
    name = id(perception)
    _sources[name] = _Source(
        weakref.ref(perception, lambda _: _sources.pop(name, None)),
        weakref.ref(state),
        stencil(perceive),
        taps,
        bias,
        type(perceive)._nca_path,
    )


def _source(perception: Any, state: Any) -> _Source | None:
    """The source of a perception, if it was computed from this very state."""
    source = _sources.get(id(perception))
    same = source and source.perception() is perception and source.state() is state
    return source if same else None


# ---- the calls of accelerated modules ----

_Layers = tuple[tuple[Array, Array | None], ...]


def perceive(self: Any, state: Any) -> Any:
    """Call a `ConvPerceive`, and remember what its perception was computed from."""
    path = type(self)._nca_path
    perception = watch.mark(original(self).__call__(self, state), path)
    with suppress(CannotFuse):  # the module has changed: the update will not find a source
        _remember(perception, state, self)
    return perception


def update(self: Any, state: Any, perception: Any, input: Any = None) -> Any:
    """Call an update fused, with its perception too if that was computed from this state."""
    from cax.core.update import NCAUpdate, ResidualUpdate

    path = type(self)._nca_path
    try:
        require_float32(self, state, perception, input)
        activation, precision = network(self)
        fire_rate, draws = firing(self)
        size = step_size(self)
    except CannotFuse as reason:
        watch.note("update", path, str(reason))
        watch.note("alive mask", path, "its update is not fused")
        if not watch.is_watched():
            warnings.warn(f"{type(self).__name__} is not fused here: {reason}", stacklevel=2)
        return original(self).__call__(self, state, perception, input)
    watch.note("update", path)
    rule = _with_slope(
        nk.Rule(
            activation=activation.name,
            precision=precision,
            fire_rate=fire_rate,
            step_size=size / fire_rate,  # dropout scales what it keeps by the inverse
            alive=None,
        ),
        activation,
    )
    key = self.dropout.rngs() if draws else jax.random.key(0)
    source = _joined(_source(perception, state), activation, precision)
    run = functools.partial(_run, self, state=state, key=key, inputs=input)
    if not isinstance(self, ResidualUpdate):
        return _without_residual(run, rule, mlp_layers(self.layers), source, state, perception)
    if not isinstance(self, NCAUpdate):
        return run(rule, source, perception)
    why_not = why_no_alive_mask(self, NCAUpdate) or _why_no_pool(source)
    watch.note("alive mask", path, why_not)
    if not why_not:
        alive = nk.Alive(channel=-1, threshold=self.alive_threshold)
        return run(replace(rule, alive=alive), source, perception)
    before = self.get_alive_mask(state)
    state = run(rule, source, perception)
    return (before & self.get_alive_mask(state)) * state


def _joined(source: _Source | None, activation: Activation, precision: str) -> _Source | None:
    """The source, if one rule can hold both the perception and the network."""
    if source is None:
        return None
    why_not, first = "", source.stencil
    if first.precision != precision:
        why_not = f"its precision is {first.precision}, that of the update is {precision}"
    slopes = {first.activation.negative_slope, activation.negative_slope} - {None}
    if len(slopes) > 1:
        why_not = f"its activation is {first.activation}, that of the update is {activation}"
    watch.note("perception", source.path, why_not)
    return None if why_not else source


def _why_no_pool(source: _Source | None) -> str:
    """The pool of an `NCAUpdate` has no cells beyond the border, whatever the perception has."""
    if source is None or source.stencil.padding == "zeros":
        return ""
    return (
        f"it sees nothing beyond the border, and in a fused step it would see what the perception "
        f"sees there ({source.stencil.padding} padding)"
    )


def _with_slope(rule: nk.Rule, activation: Activation) -> nk.Rule:
    slope = activation.negative_slope
    return rule if slope is None else replace(rule, negative_slope=slope)


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
    backend = type(update)._nca_backend
    if source is None:
        dims = len(update.layers[0].kernel_size)
        return nk.update(
            rule, layers, state, perception, key, inputs, backend, num_spatial_dims=dims
        )
    padding, activation = source.stencil.padding, source.stencil.activation
    rule = replace(rule, padding=padding, perception_activation=activation.name)
    params = nk.RuleParams(source.taps, source.bias, layers)
    return nk.step(_with_slope(rule, activation), params, state, key, inputs, backend=backend)


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
