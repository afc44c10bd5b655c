"""A distance of two textures that ignores where things are: sliced optimal transport of features.

The features are those of a fixed network of random filters at several scales (Ustyuzhaninov et
al., "What does it take to generate natural textures?", ICLR 2017), or of a VGG16 whose weights are
at hand (Gatys et al., "Texture Synthesis Using Convolutional Neural Networks", NeurIPS 2015):
nothing is downloaded. Their distributions are compared along random directions, where optimal
transport is sorting (Heitz et al., "A Sliced Wasserstein Loss for Neural Texture Synthesis", CVPR
2021, arXiv 2006.07229).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from nca_models.data.vgg16 import BLOCKS, VGG16

FILTERS, KERNEL, SCALES, DIRECTIONS = 32, 5, 3, 32
_FAINTEST = 0.01  # of colours from 0 to 1


def random_filters(seed: int = 0) -> jax.Array:
    """Filters `[KERNEL, KERNEL, 3, FILTERS]` of mean 0 and norm 1, always the same for a seed."""
    filters = np.random.default_rng(seed).normal(size=(KERNEL, KERNEL, 3, FILTERS))
    filters -= filters.mean((0, 1), keepdims=True)
    filters /= np.sqrt(np.square(filters).sum((0, 1, 2)))
    return jnp.asarray(filters, jnp.float32)


def features(images: jax.Array) -> list[jax.Array]:
    """Features of images `[n, height, width, 3]`, for each scale `[n, positions, 3 + FILTERS]`.

    Each scale is half as large as the one before, and has the colours themselves and the rectified
    responses of random filters. The images repeat beyond their borders.
    """
    filters, out = random_filters(), []
    for _ in range(SCALES):
        both = jnp.concatenate([images, jax.nn.relu(_convolved(images, filters))], axis=-1)
        out.append(both.reshape(images.shape[0], -1, both.shape[-1]))
        images = nnx.avg_pool(images, (2, 2), (2, 2))
    return out


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


def sliced_transport(
    generated: Sequence[jax.Array], wanted: Sequence[jax.Array], key: jax.Array
) -> jax.Array:
    """Return the mean squared distance `[n]` of sorted projections, over all scales.

    Each feature counts in units of its standard deviation in the wanted image, so that faint
    structure counts as much as strong structure.

    Args:
        generated: features of `n` images, as `features` returns them.
        wanted: the features of one image, `[1, positions, features]` for each scale.
        key: PRNG key of the directions.
    """
    total = jnp.zeros(generated[0].shape[0])
    for scale, (a, b) in enumerate(zip(generated, wanted, strict=True)):
        directions = jax.random.normal(jax.random.fold_in(key, scale), (a.shape[-1], DIRECTIONS))
        directions /= jnp.linalg.norm(directions, axis=0)
        directions /= jnp.maximum(jnp.std(b, axis=(0, 1)), _FAINTEST)[:, None]
        difference = jnp.sort(a @ directions, axis=1) - jnp.sort(b @ directions, axis=1)
        total += jnp.mean(jnp.square(difference), axis=(1, 2))
    return total / len(generated)
