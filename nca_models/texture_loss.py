"""Distances of textures that ignore where things are: sliced optimal transport.

By default, of small patches at several scales, along random directions of the space of patches
(Elnekave and Weiss, "Generating natural images with direct Patch Distributions Matching", ECCV
2022): a random direction is a random filter, and new ones are drawn for every training step. With
the weights of a VGG16 at hand, of its features (Gatys et al., "Texture Synthesis Using
Convolutional Neural Networks", NeurIPS 2015; Heitz et al., "A Sliced Wasserstein Loss for Neural
Texture Synthesis", CVPR 2021). Along one direction, optimal transport is sorting. Nothing is
downloaded.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from nca_models.data.vgg16 import BLOCKS, VGG16

PATCHES, SCALES = (3, 7), 3  # sides of patches; each scale is half as large as the one before
FILTERS, DIRECTIONS = 16, 32  # of each side and scale, and of each block of VGG16
_FAINTEST = 0.01  # of colours from 0 to 1


def pyramid(images: jax.Array) -> list[jax.Array]:
    """Images `[n, height, width, 3]` at all scales, each half as large as the one before."""
    scales = [images]
    while len(scales) < SCALES:
        scales.append(nnx.avg_pool(scales[-1], (2, 2), (2, 2)))
    return scales


def patch_transport(
    generated: Sequence[jax.Array], wanted: Sequence[jax.Array], key: jax.Array
) -> jax.Array:
    """Return the mean squared distance `[n]` of sorted responses to random filters.

    Each filter counts in units of the standard deviation of its responses in the wanted image, so
    that faint structure counts as much as strong structure. The generated images repeat beyond
    their borders; of the wanted image only whole patches count.

    Args:
        generated: `pyramid` of `n` images.
        wanted: `pyramid` of one image, of any size from 2 ** SCALES on.
        key: PRNG key of the filters.
    """
    total = jnp.zeros(generated[0].shape[0])
    for scale, (images, exemplar) in enumerate(zip(generated, wanted, strict=True)):
        largest = (min(*images.shape[1:3], *exemplar.shape[1:3]) + 1) // 2
        for patch in PATCHES:
            side = min(patch, largest)
            key_filters = jax.random.fold_in(jax.random.fold_in(key, scale), patch)
            filters = jax.random.normal(key_filters, (side, side, 3, FILTERS))
            a = _responses(images, filters).reshape(len(images), -1, FILTERS)
            inside = [n - side + 1 for n in exemplar.shape[1:3]]
            b = _responses(exemplar, filters)[:, : inside[0], : inside[1]]
            b = b.reshape(1, -1, FILTERS)
            faintest = _FAINTEST * jnp.linalg.norm(filters.reshape(-1, FILTERS), axis=0)
            unit = jnp.maximum(jnp.std(b, axis=(0, 1)), faintest)
            total += _sorted_distance(a / unit, b / unit)
    return total / (len(generated) * len(PATCHES))


def _responses(images: jax.Array, filters: jax.Array) -> jax.Array:
    """Correlate `[n, height, width, 3]`, on a torus, with `[k, k, 3, f]`, at all patches."""
    shape = images.shape[1:3]
    seen = jnp.fft.rfft2(images, axes=(1, 2))
    looked_for = jnp.conj(jnp.fft.rfft2(filters, shape, axes=(0, 1)))
    return jnp.fft.irfft2(jnp.einsum("nhwc,hwcf->nhwf", seen, looked_for), shape, axes=(1, 2))


def _sorted_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared distance `[n]` of the sorted columns of `a` `[n, p, f]` to `b` `[1, q, f]`."""
    a, b = (_in_order(jnp.swapaxes(values, 1, 2)) for values in (a, b))
    count, wanted = a.shape[-1], b.shape[-1]
    if count != wanted:  # quantiles of b
        at = np.clip((np.arange(count) + 0.5) / count * wanted - 0.5, 0, wanted - 1)
        low = np.floor(at).astype(int)
        share = (at - low).astype(np.float32)
        b = (1 - share) * b[..., low] + share * b[..., np.minimum(low + 1, wanted - 1)]
    return jnp.mean(jnp.square(a - b), axis=(1, 2))


def _in_order(values: jax.Array) -> jax.Array:
    """Sort float32 values along the last axis, all but those that hardly differ.

    XLA sorts integers five times as fast on a CPU as floats. Here they are a float's upper bits, in
    the order of floats, with its place in the lower bits, whose number is that of the places.
    """
    places = values.shape[-1]
    low_bits = (1 << (places - 1).bit_length()) - 1
    bits = lax.bitcast_convert_type(lax.stop_gradient(values), jnp.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = lax.sort((ascending & ~low_bits) | jnp.arange(places), dimension=values.ndim - 1)
    return jnp.take_along_axis(values, keys & low_bits, axis=-1)


def vgg16_features(network: VGG16, images: jax.Array) -> list[jax.Array]:
    """Features of images `[n, height, width, 3]`, for each block `[n, positions, features]`.

    They are the colours themselves and the rectified responses of each block's first convolution.
    The images repeat beyond their borders; a block whose image is below 2 x 2 is left out.
    """
    out = [images.reshape(images.shape[0], -1, 3)]
    colours = images[..., np.array(network.order)]
    x = (colours - network.mean.astype(np.float32)) / network.deviation.astype(np.float32)
    layers = iter(network.layers)
    for block, size in enumerate(BLOCKS):
        if min(x.shape[1:3]) < 2:
            break
        for i in range(size if block < len(BLOCKS) - 1 else 1):
            kernel, bias = next(layers)
            x = jax.nn.relu(_convolved(x, jnp.asarray(kernel, jnp.float32)) + bias)
            if i == 0:
                out.append(x.reshape(x.shape[0], -1, x.shape[-1]))
        x = nnx.max_pool(x, (2, 2), (2, 2))
    return out


def _convolved(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`images` `[n, height, width, in]` on a torus, by `kernel` `[k, k, in, out]`, k odd."""
    margin = kernel.shape[0] // 2
    around = [(0, 0), (margin, margin), (margin, margin), (0, 0)]
    wrapped = jnp.pad(images, around, mode="wrap")
    return lax.conv_general_dilated(
        wrapped, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def feature_transport(
    generated: Sequence[jax.Array], wanted: Sequence[jax.Array], key: jax.Array
) -> jax.Array:
    """Return the mean squared distance `[n]` of sorted projections, over all blocks of features.

    Each feature counts in units of its standard deviation in the wanted image.

    Args:
        generated: features of `n` images, as `vgg16_features` returns them.
        wanted: the features of one image, `[1, positions, features]` for each block.
        key: PRNG key of the directions.
    """
    total = jnp.zeros(generated[0].shape[0])
    for block, (a, b) in enumerate(zip(generated, wanted, strict=True)):
        directions = jax.random.normal(jax.random.fold_in(key, block), (a.shape[-1], DIRECTIONS))
        directions /= jnp.linalg.norm(directions, axis=0)
        directions /= jnp.maximum(jnp.std(b, axis=(0, 1)), _FAINTEST)[:, None]
        total += _sorted_distance(a @ directions, b @ directions)
    return total / len(generated)
