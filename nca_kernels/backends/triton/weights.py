"""The weights as kernels want them: one flat float32 array of blocks, padded with zeros.

In this order: taps ``[K, F, BC]`` (depthwise) or ``[K, BC, BP]`` (dense), perception bias
``[F, BP]``, then for each layer its matrix ``[inputs, outputs]`` and its bias. The inputs of the
first layer are the stencil's filters, one block each, then the given perception and the inputs. Of
a perception that goes through products as one block with ones, the first bias comes right after
the rows of the filters, then what rounding took off it, then zeros.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nca_kernels.call import Operands, Weights

Sizes = dict[str, Any]  # of nca_kernels.backends.triton.geometry.step_constants
MANTISSA = {"tf32": 10, "bfloat16": 7}  # bits that operands of products keep


def pack(operands: Operands, g: Sizes) -> Array:
    """``[G or 1, weights]``."""
    groups = operands.weight_groups
    taps, perception_bias, layers = jax.tree.map(
        lambda w: jnp.broadcast_to(w, (groups, *w.shape[1:])).astype(jnp.float32),
        operands.weights,
    )
    if g["precision"] == "tf32":  # to the nearest: products would cut off what they have more
        taps = _rounded(taps, g) if g["dense"] else taps
        layers = tuple((_rounded(weight, g), bias) for weight, bias in layers)
    packed = _pack(Weights(taps, perception_bias, layers), g)
    if not g["ones"] or layers[0][1] is None or g["precision"] not in MANTISSA:
        return packed
    bias, at = _pad(layers[0][1], -1, g["padded_widths"][0]), g["bias_at"][0]
    whole = _rounded(bias, g)
    rest = jnp.where(jnp.isfinite(whole), bias - whole, 0.0)
    both = jnp.concatenate([whole, rest], axis=1)
    return jax.lax.dynamic_update_slice(packed, both, (0, at))


def _rounded(array: Array, g: Sizes) -> Array:
    return jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=MANTISSA[g["precision"]])


def unpack(packed: Array, operands: Operands, g: Sizes) -> Weights:
    """Gradients ``[G, weights]`` as those of the operands: the transpose of :func:`pack`."""
    groups = packed.shape[0]
    shapes = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct((groups, *w.shape[1:]), jnp.float32), operands.weights
    )
    (grads,) = jax.linear_transpose(lambda weights: _pack(weights, g), shapes)(packed)
    return jax.tree.map(lambda d, w: d.astype(w.dtype), grads, operands.weights)


def _pack(weights: Weights, g: Sizes) -> Array:
    taps, perception_bias, layers = weights
    groups = layers[0][0].shape[0]
    sections = []
    if taps is not None:
        taps = taps.reshape(groups, g["kernel"], *taps.shape[-2:])
        if g["dense"]:
            taps = _pad(taps, -2, g["block_c"])
        sections.append(_by_filter(taps, -1, g))
        size = g["filters"] * g["block_p"]
        bias = jnp.zeros((groups, size), jnp.float32)
        sections.append(bias if perception_bias is None else _by_filter(perception_bias, -1, g))
    for i, (weight, bias) in enumerate(layers):
        width = g["padded_widths"][i]
        weight = _pad(weight, -1, width)
        zeros = jnp.zeros((groups, width), jnp.float32)
        bias = zeros if bias is None else _pad(bias, -1, width)
        if i == 0 and g["ones"]:
            sections.append(_first_layer_rows(weight, bias, g))
        elif i == 0:
            sections += [_first_layer_rows(weight, None, g), bias]
        else:
            sections += [_pad(weight, -2, g["padded_widths"][i - 1]), bias]
    return jnp.concatenate([s.reshape(groups, -1) for s in sections], axis=1)


def _first_layer_rows(weight: Array, bias: Array | None, g: Sizes) -> Array:
    """Rows by filter, the bias's if it is among them, then the sources', in whole blocks each."""
    given, inputs = g["source_sizes"]
    size = weight.shape[1] - given - inputs
    rows = [_by_filter(weight[:, :size], 1, g)] if size else []
    if bias is not None:
        rows.append(bias[:, None])
    if size:
        rows = [_pad(jnp.concatenate(rows, axis=1), 1, g["parts"] * g["part"])]
    at = size
    for source, padded in zip((given, inputs), g["padded_sources"], strict=True):
        if source:
            rows.append(_pad(weight[:, at : at + source], 1, padded))
            at += source
    return jnp.concatenate(rows, axis=1)


def _by_filter(array: Array, axis: int, g: Sizes) -> Array:
    """A perception axis, ``c*F + f`` if depthwise, to blocks by filter: ``f*BP + c``."""
    axis %= array.ndim
    if not g["dense"]:
        filters = g["filters"]
        split = (array.shape[axis] // filters, filters)
        array = array.reshape(*array.shape[:axis], *split, *array.shape[axis + 1 :])
        array = _pad(jnp.swapaxes(array, axis, axis + 1), axis + 1, g["block_p"])
        return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
    return _pad(array, axis, g["block_p"])


def _pad(array: Array, axis: int, size: int) -> Array:
    config = [(0, 0, 0)] * array.ndim
    config[axis] = (0, size - array.shape[axis], 0)
    return jax.lax.pad(array, jnp.zeros((), array.dtype), config)
