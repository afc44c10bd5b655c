"""Fused steps for systems written with CAX, with one line.

    from nca_models.compat.cax import accelerate

    cs = accelerate(cs)

The modules stay what they are: `accelerate` swaps the class of each perceive and each update for a
subclass with another `__call__`. Parameters, their paths, random streams and everything that looks
at them (`nnx.state`, filters, optimizers, checkpoints, `nnx.vmap`) see no difference.

A perceive still returns its perception, and remembers of which state and taps it is. An update that
is handed this perception, unchanged, with that state, runs both as one `nk.step`; nobody then uses
the convolution, and XLA removes it. In every other case the perception is there, computed as
always, and the update alone is fused, as `nk.update`.

CAX (Faldor and Cully, "CAX: Cellular Automata Accelerated in JAX", ICLR 2025) is needed when a
function is called, not to import this module. Both of its interfaces work, 0.3.x and 0.4.x.
"""

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
from flax import nnx
from jax import Array, lax

import nca_kernels as nk


def accelerate(cs: Any, backend: str = "auto", *, strict: bool = False) -> Any:
    """Make the steps of a CAX system run fused; the same trajectory for the same keys.

    The system is changed in place, so that optimizers and references to it stay valid. Calling
    again with another backend is fine. What cannot be fused exactly is left as it is.

    Fused are, wherever they are in the system: a `ConvPerceive` (stride 1, depthwise or dense,
    padding SAME, CIRCULAR or REFLECT, with or without bias and activation) with the `MLPUpdate`,
    `ResidualUpdate` or `NCAUpdate` that follows it, and such an update behind any other perceive.
    The activations are those of `nk.Rule`. States, parameters and inputs are float32.

    Two things differ, neither of which shows in a trajectory that stays finite: sums are rounded
    in another order, and dead cells are exactly 0 where CAX multiplies by 0 (which keeps NaN).
    Called outside of `jit`, the unused convolution is computed all the same; `cs(...)` itself is
    jitted.

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
            cls = _accelerated(_original(part.module), part.call, backend)
            object.__setattr__(part.module, "__class__", cls)
    return cs


def explain(cs: Any, state: Any = None, input: Any = None) -> None:
    """Print which parts of a system are fused and, if not, why; accelerated or not.

    Args:
        cs: a `cax.core.ComplexSystem`.
        state: `[*batch, *spatial, C]`, or its `jax.ShapeDtypeStruct`: then one step is traced
            (nothing is computed, no random number is drawn) to see what its updates really run.
        input: the step's input, if it takes one.
    """
    _require_system(cs)
    parts = list(_parts(cs))
    if not any(_is_accelerated(part.module) for part in parts):
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
    call: Callable[..., Any] | None = None  # what it is accelerated with; None: it stays

    def __str__(self) -> str:
        name = f"{self.path} ({_original(self.module).__name__})"
        return f"{name}: {self.verdict}" + (f": {self.why_not}" if self.why_not else "")


class _CannotFuse(Exception):
    """Why a part cannot be fused exactly."""


def _parts(cs: Any) -> Iterator[_Part]:
    """The perceives and updates anywhere in a system, in the order of their paths."""
    from cax.core.perceive import ConvPerceive, Perceive
    from cax.core.update import MLPUpdate, NCAUpdate, ResidualUpdate, Update

    for path, module in sorted(nnx.iter_modules(cs), key=lambda item: tuple(map(str, item[0]))):
        part = functools.partial(_Part, ".".join(map(str, path)), module)
        cls = _original(module)
        try:
            if getattr(cls, "fused_by_itself", False):
                yield part("fused by itself")
            elif isinstance(module, Perceive):
                _require_call_of(cls, ConvPerceive)
                _stencil(module)
                yield part("fused into the update that follows", call=_perceive)
            elif isinstance(module, Update):
                _require_call_of(cls, MLPUpdate, ResidualUpdate, NCAUpdate)
                _network(module)
                _firing(module)
                why = _why_no_alive_mask(module, NCAUpdate)
                yield part("fused, but for the alive mask" if why else "fused", why, _update)
        except _CannotFuse as reason:
            yield part("left as it is", str(reason))


def _require_call_of(cls: type, *bases: type) -> None:
    """Only the classes whose `__call__` is known; subclasses that keep it are fine."""
    if cls.__call__ not in {base.__call__ for base in bases}:
        names = " or ".join(base.__name__ for base in bases)
        raise _CannotFuse(f"its __call__ is not that of {names}")


@dataclass(frozen=True)
class _Stencil:
    """The facts of a `ConvPerceive` that a rule holds."""

    padding: str
    activation: str
    precision: str


_PADDINGS = {"SAME": "zeros", "CIRCULAR": "circular", "REFLECT": "reflect"}


def _stencil(perceive: Any) -> _Stencil:
    conv, activation = perceive.conv, perceive.activation_fn
    precision = _plain_conv(conv, "its convolution")
    if conv.padding not in _PADDINGS:
        raise _CannotFuse(f"its padding is {conv.padding!r}, not one of {', '.join(_PADDINGS)}")
    if conv.feature_group_count not in (1, conv.in_features):
        raise _CannotFuse(
            f"its feature_group_count is {conv.feature_group_count}, neither 1 (dense) nor the "
            f"number of channels, {conv.in_features} (depthwise)"
        )
    name = "identity" if activation is None else _activation(activation)
    return _Stencil(_PADDINGS[conv.padding], name, precision)


def _network(update: Any) -> tuple[str, str]:
    """(activation, precision) of an update's MLP."""
    precisions = set()
    for i, layer in enumerate(update.layers):
        precisions.add(_plain_conv(layer, f"layer {i}"))
        if set(layer.kernel_size) != {1} or layer.feature_group_count != 1:
            raise _CannotFuse(f"layer {i} is not a dense convolution of kernel size 1")
    if len(precisions) != 1:
        raise _CannotFuse(f"its layers have different precisions, {', '.join(sorted(precisions))}")
    activation = _activation(update.activation_fn) if len(update.layers) > 1 else "identity"
    return activation, precisions.pop()


def _plain_conv(conv: Any, name: str) -> str:
    """The precision of an `nnx.Conv` that is one of a stencil or a layer."""
    if not isinstance(conv, nnx.Conv):
        raise _CannotFuse(f"{name} is a {type(conv).__name__}, not an nnx.Conv")
    ones = (1, None, (1,) * len(conv.kernel_size))
    for field in ("strides", "input_dilation", "kernel_dilation"):
        value = getattr(conv, field)
        if (tuple(value) if isinstance(value, list) else value) not in ones:
            raise _CannotFuse(f"{name} has {field} {value}")
    for field in ("mask", "dtype", "preferred_element_type"):
        if getattr(conv, field) is not None:
            raise _CannotFuse(f"{name} has a {field} of its own")
    if conv.conv_general_dilated is not lax.conv_general_dilated:
        raise _CannotFuse(f"{name} has a conv_general_dilated of its own")
    if conv.precision is None or conv.precision == lax.Precision.DEFAULT:
        return "default"
    if conv.precision == lax.Precision.HIGHEST:
        return "float32"
    raise _CannotFuse(f"{name} has precision {conv.precision}")


_ACTIVATIONS: dict[Callable[..., Any], str] = {
    jax.nn.relu: "relu",
    jax.nn.gelu: "gelu",
    jax.nn.silu: "silu",
    jnp.tanh: "tanh",
    lax.tanh: "tanh",
    jax.nn.leaky_relu: "leaky_relu",
    jax.nn.identity: "identity",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gelu": {"approximate": True},
    "leaky_relu": {"negative_slope": 0.01},
}


def _activation(function: Any) -> str:
    """The name that `nk.Rule` has for an activation function."""
    plain: Any = function
    keywords: dict[str, Any] = {}
    if isinstance(function, functools.partial) and not function.args:
        plain, keywords = function.func, function.keywords
    try:
        name = _ACTIVATIONS.get(plain)
    except TypeError:  # not hashable
        name = None
    if name is None or not keywords.items() <= _DEFAULTS.get(name, {}).items():
        known = ", ".join(sorted({f.__name__ for f in _ACTIVATIONS}))
        raise _CannotFuse(f"its activation {function!r} is not one of {known} with their defaults")
    return name


def _firing(update: Any) -> tuple[float, bool]:
    """(fire rate, whether a key is drawn) of an update, as `nnx.Dropout` decides it."""
    dropout = getattr(update, "dropout", None)
    if dropout is None:  # MLPUpdate
        return 1.0, False
    if not isinstance(dropout, nnx.Dropout) or type(dropout).__call__ is not nnx.Dropout.__call__:
        raise _CannotFuse(f"its dropout is a {type(dropout).__name__}, not an nnx.Dropout")
    if tuple(dropout.broadcast_dims) != (-1,):
        raise _CannotFuse(f"its dropout broadcasts over {dropout.broadcast_dims}, not over (-1,)")
    if dropout.rate == 0.0 or dropout.deterministic:
        return 1.0, False
    if not 0.0 < dropout.rate < 1.0:
        raise _CannotFuse(f"its dropout rate is {dropout.rate}: no cell ever fires")
    if not isinstance(dropout.rngs, nnx.RngStream):
        raise _CannotFuse("its dropout has no random stream of its own")
    return 1.0 - dropout.rate, True


def _why_no_alive_mask(update: Any, NCAUpdate: Any) -> str:
    """Why the alive mask of an update cannot be fused; empty if it can or there is none."""
    if not isinstance(update, NCAUpdate):
        return ""
    if type(update).get_alive_mask is not NCAUpdate.get_alive_mask:
        return "its get_alive_mask is its own"
    if not isinstance(update.alive_threshold, (int, float)):
        return f"its alive_threshold is a {type(update.alive_threshold).__name__}, not a number"
    pool, window = update.pool, [3] * len(update.layers[0].kernel_size)
    fused = (
        isinstance(pool, functools.partial)
        and pool.func is nnx.max_pool
        and not pool.args
        and set(pool.keywords) == {"window_shape", "padding"}
        and list(pool.keywords["window_shape"]) == window
        and pool.keywords["padding"] == "SAME"
    )
    if not fused:
        return f"its pool is not a max-pool over {tuple(window)}, padded as SAME"
    return ""


# ---- which perception is made of what ----


@dataclass(frozen=True)
class _Source:
    """What a perception was computed from, kept for as long as the perception lives."""

    perception: weakref.ref
    state: weakref.ref
    stencil: _Stencil
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
        _stencil(perceive),
        conv.kernel[...],
        bias,
    )


def _source(perception: Any, state: Any) -> _Source | None:
    """The source of this very perception, if it is one of this very state."""
    source = _sources.get(id(perception))
    same = source and source.perception() is perception and source.state() is state
    return source if same else None


# ---- the calls of accelerated modules ----

_Layers = tuple[tuple[Array, Array | None], ...]


@functools.cache
def _accelerated(original: type, call: Callable[..., Any], backend: str) -> type:
    """The subclass of a user's class that an accelerated module gets: always the same one."""
    content = {
        "__call__": call,
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "_nca_original": original,
        "_nca_backend": backend,
    }
    return type(original)(original.__name__, (original,), content)


def _is_accelerated(module: Any) -> bool:
    return "_nca_original" in vars(type(module))


def _original(module: Any) -> type:
    cls: type = vars(type(module)).get("_nca_original", type(module))
    return cls


def _perceive(self: Any, state: Any) -> Any:
    """A `ConvPerceive` that remembers what its perception is made of."""
    perception = _original(self).__call__(self, state)
    with suppress(_CannotFuse):  # changed since: the update gets a perception that is given
        _remember(perception, state, self)
    return perception


def _update(self: Any, state: Any, perception: Any, input: Any = None) -> Any:
    """An update that is fused, with the perception if it is the state's own."""
    from cax.core.update import NCAUpdate, ResidualUpdate

    try:
        _require_float32(self, state, perception, input)
        activation, precision = _network(self)
        fire_rate, draws = _firing(self)
        step_size = self.step_size if isinstance(self, ResidualUpdate) else 1.0
        if not isinstance(step_size, (int, float)):
            raise _CannotFuse(f"its step_size is a {type(step_size).__name__}, not a number")
    except _CannotFuse as reason:
        _note(f"{type(self).__name__} as it was ({reason})")
        warnings.warn(f"{type(self).__name__} is not fused here: {reason}", stacklevel=2)
        return _original(self).__call__(self, state, perception, input)
    rule = nk.Rule(
        activation=activation,
        precision=precision,
        fire_rate=fire_rate,
        step_size=step_size / fire_rate,  # dropout scales up what it keeps
        alive=None,
    )
    key = self.dropout.rngs() if draws else jax.random.key(0)
    source = _source(perception, state)
    if source is not None and source.stencil.precision != precision:
        source = None
    run = functools.partial(_run, self, state=state, key=key, inputs=input)
    if not isinstance(self, ResidualUpdate):
        return _without_residual(run, rule, _layers(self), source, state, perception)
    if not isinstance(self, NCAUpdate):
        return run(rule, source, perception)
    # The pool of an NCAUpdate has no cells beyond the border, whatever the perception has.
    pads = source is None or source.stencil.padding == "zeros"
    if pads and not _why_no_alive_mask(self, NCAUpdate):
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
    layers = _layers(update) if layers is None else layers
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


def _layers(update: Any) -> _Layers:
    """`(W [in, out], b [out])` of an update's convolutions of kernel size 1."""
    return tuple(
        (
            conv.kernel[...].reshape(conv.kernel.shape[-2:]),
            None if conv.bias is None else conv.bias[...],
        )
        for conv in update.layers
    )


def _without_residual(
    run: Callable[..., Any],
    rule: nk.Rule,
    layers: _Layers,
    source: _Source | None,
    state: Any,
    perception: Any,
) -> Any:
    """An `MLPUpdate`: the network's output itself, as what is added to channels of zeros.

    With the perception, these channels follow the state's own: the taps see nothing in them, and
    the network adds nothing to the state's.
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


def _require_float32(update: Any, state: Any, perception: Any, input: Any) -> None:
    arrays = {"state": state, "perception": perception, "input": input}
    for i, layer in enumerate(update.layers):
        arrays |= {f"kernel of layer {i}": layer.kernel, f"bias of layer {i}": layer.bias}
    for name, array in arrays.items():
        if array is not None and getattr(array, "dtype", None) != jnp.float32:
            given = getattr(array, "dtype", type(array).__name__)
            raise _CannotFuse(f"the {name} is {given}, not float32")
    for name in ("perception", "input"):
        array = arrays[name]
        if array is not None and array.shape[:-1] != state.shape[:-1]:
            raise _CannotFuse(
                f"the {name} has shape {array.shape}, not that of the state, {state.shape}, up to "
                "the last axis"
            )


# ---- what explain reports ----

_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


def _note(line: str) -> None:
    notes = _notes.get()
    if notes is not None:
        notes.append(line)


@contextmanager
def _noting() -> Iterator[list[str]]:
    token = _notes.set([])
    try:
        notes = _notes.get()
        assert notes is not None
        yield notes
    finally:
        _notes.reset(token)


def _trace(cs: Any, state: Any, input: Any) -> list[str]:
    """What the updates of one step run, by tracing it on a copy."""
    graph, content = nnx.split(cs)
    with _noting() as notes:
        jax.eval_shape(lambda c, s, i: nnx.merge(graph, c)._step(s, i), content, state, input)
    return notes


# ---- checks ----


def _require_system(cs: Any) -> None:
    try:
        from cax.core import ComplexSystem
    except ImportError as error:
        raise ImportError(
            'CAX is not installed: run `pip install "nca-kernels[cax]"`, or pip install cax'
        ) from error
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
