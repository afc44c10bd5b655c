"""What a rule needs to know about CAX's modules, and why a module cannot be fused exactly."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from nca_models.compat.cax_activations import Activation, CannotFuse, recognise


@contextmanager
def cax_is_needed() -> Iterator[None]:
    """Say how to install CAX if an import of it in the block fails."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            'CAX is not installed: run `pip install "nca-kernels[cax]"`, or pip install cax'
        ) from error


@dataclass(frozen=True)
class Stencil:
    """What a rule holds of a `ConvPerceive`."""

    padding: str
    activation: Activation
    precision: str


_PADDINGS = {"SAME": "zeros", "CIRCULAR": "circular", "REFLECT": "reflect"}


def stencil(perceive: Any) -> Stencil:
    conv, activation = perceive.conv, perceive.activation_fn
    precision = _plain_conv(conv, "its convolution")
    if conv.padding not in _PADDINGS:
        raise CannotFuse(f"its padding is {conv.padding!r}, not one of {', '.join(_PADDINGS)}")
    if conv.feature_group_count not in (1, conv.in_features):
        raise CannotFuse(
            f"its feature_group_count is {conv.feature_group_count}, neither 1 (dense) nor the "
            f"number of channels, {conv.in_features} (depthwise)"
        )
    dims = len(conv.kernel.shape) - 2
    known = recognise(activation, dims, conv.out_features) if activation else Activation()
    return Stencil(_PADDINGS[conv.padding], known, precision)


def network(update: Any) -> tuple[Activation, str]:
    """(activation, precision) of an update's MLP."""
    precisions = set()
    for i, layer in enumerate(update.layers):
        precisions.add(_plain_conv(layer, f"layer {i}"))
        if set(layer.kernel_size) != {1} or layer.feature_group_count != 1:
            raise CannotFuse(f"layer {i} is not a dense convolution of kernel size 1")
    if len(precisions) != 1:
        raise CannotFuse(f"its layers have different precisions, {', '.join(sorted(precisions))}")
    dims = len(update.layers[0].kernel_size)
    widths = {layer.out_features for layer in update.layers[:-1]}
    activations = {recognise(update.activation_fn, dims, width) for width in widths}
    if len(activations) > 1:
        raise CannotFuse("its activation depends on the width of the layer")
    return (activations or {Activation()}).pop(), precisions.pop()


def _plain_conv(conv: Any, name: str) -> str:
    """The precision of an `nnx.Conv`, which must be plain enough for a stencil or a layer."""
    if not isinstance(conv, nnx.Conv):
        raise CannotFuse(f"{name} is a {type(conv).__name__}, not an nnx.Conv")
    ones = (1, None, (1,) * len(conv.kernel_size))
    for field in ("strides", "input_dilation", "kernel_dilation"):
        value = getattr(conv, field)
        if (tuple(value) if isinstance(value, list) else value) not in ones:
            raise CannotFuse(f"{name} has {field} {value}")
    for field in ("mask", "dtype", "preferred_element_type"):
        if getattr(conv, field) is not None:
            raise CannotFuse(f"{name} has a {field} of its own")
    if conv.conv_general_dilated is not lax.conv_general_dilated:
        raise CannotFuse(f"{name} has a conv_general_dilated of its own")
    if conv.precision is None or conv.precision == lax.Precision.DEFAULT:
        return "default"
    if conv.precision == lax.Precision.HIGHEST:
        return "float32"
    raise CannotFuse(f"{name} has precision {conv.precision}")


def step_size(update: Any) -> float | Array:
    """What an update multiplies its network's output by: a number, or a scalar float32 array.

    CAX takes any scalar, a variable too, which is then trained.
    """
    size = getattr(update, "step_size", 1.0)  # an MLPUpdate has none
    if isinstance(size, nnx.Variable):
        size = size[...]
    if isinstance(size, (int, float)) and not isinstance(size, bool):
        return size
    dtype, shape = getattr(size, "dtype", None), getattr(size, "shape", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.number):
        kind = f"{dtype}{list(shape)}" if shape else type(size).__name__
        raise CannotFuse(f"its step_size is a {kind}, not a scalar number")
    if jnp.result_type(dtype, jnp.float32) != jnp.float32:
        raise CannotFuse(f"its step_size is {dtype}, which makes the state one as well")
    return jnp.asarray(size, jnp.float32)


def firing(update: Any) -> tuple[float, bool]:
    """(fire rate, whether a key is drawn) of an update, as `nnx.Dropout` decides them."""
    dropout = getattr(update, "dropout", None)
    if dropout is None:  # MLPUpdate
        return 1.0, False
    if not isinstance(dropout, nnx.Dropout) or type(dropout).__call__ is not nnx.Dropout.__call__:
        raise CannotFuse(f"its dropout is a {type(dropout).__name__}, not an nnx.Dropout")
    if tuple(dropout.broadcast_dims) != (-1,):
        raise CannotFuse(f"its dropout broadcasts over {dropout.broadcast_dims}, not over (-1,)")
    if dropout.rate == 0.0 or dropout.deterministic:
        return 1.0, False
    if not 0.0 < dropout.rate < 1.0:
        raise CannotFuse(f"its dropout rate is {dropout.rate}: no cell ever fires")
    if not isinstance(dropout.rngs, nnx.RngStream):
        raise CannotFuse("its dropout has no random stream of its own")
    return 1.0 - dropout.rate, True


def why_no_alive_mask(update: Any, NCAUpdate: Any) -> str:
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


def require_float32(update: Any, state: Any, perception: Any, input: Any) -> None:
    arrays = {"state": state, "perception": perception, "input": input}
    for i, layer in enumerate(update.layers):
        arrays |= {f"kernel of layer {i}": layer.kernel, f"bias of layer {i}": layer.bias}
    for name, array in arrays.items():
        if array is not None and getattr(array, "dtype", None) != jnp.float32:
            actual = getattr(array, "dtype", type(array).__name__)
            raise CannotFuse(f"the {name} is {actual}, not float32")
    for name in ("perception", "input"):
        array = arrays[name]
        if array is not None and array.shape[:-1] != state.shape[:-1]:
            raise CannotFuse(
                f"the {name} has shape {array.shape}, not that of the state, {state.shape}, up to "
                "the last axis"
            )
