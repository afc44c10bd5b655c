"""How unlike two textures are, whatever is where in them: sliced optimal transport of features.

The features are those of a fixed network of random filters at several scales (Ustyuzhaninov et
al., "What does it take to generate natural textures?", ICLR 2017): nothing is downloaded. Their
distributions are compared along random directions, where optimal transport is sorting (Heitz et
al., "A Sliced Wasserstein Loss for Neural Texture Synthesis", CVPR 2021, arXiv 2006.07229).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FILTERS, KERNEL, SCALES, DIRECTIONS = 32, 5, 3, 32
_FAINTEST = 0.01  # of colours from 0 to 1


def random_filters(seed: int = 0) -> jax.Array:
    """Filters `[KERNEL, KERNEL, 3, FILTERS]` without mean, of norm 1; always the same ones."""
    filters = np.random.default_rng(seed).normal(size=(KERNEL, KERNEL, 3, FILTERS))
    filters -= filters.mean((0, 1), keepdims=True)
    filters /= np.sqrt(np.square(filters).sum((0, 1, 2)))
    return jnp.asarray(filters, jnp.float32)


def features(images: jax.Array) -> list[jax.Array]:
    """Features of images `[n, height, width, 3]`, for each scale `[n, places, 3 + FILTERS]`.

    A scale is half as large as the one before; what a scale shows are the colours themselves and
    the rectified answers of random filters. The images repeat beyond their borders.
    """
    filters, out = random_filters(), []
    for _ in range(SCALES):
        around = [(0, 0), (KERNEL // 2, KERNEL // 2), (KERNEL // 2, KERNEL // 2), (0, 0)]
        wrapped = jnp.pad(images, around, mode="wrap")
        answers = lax.conv_general_dilated(
            wrapped, filters, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        both = jnp.concatenate([images, jax.nn.relu(answers)], axis=-1)
        out.append(both.reshape(images.shape[0], -1, both.shape[-1]))
        images = lax.reduce_window(images, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    return out


def sliced_transport(
    found: Sequence[jax.Array], wanted: Sequence[jax.Array], key: jax.Array
) -> jax.Array:
    """Return the mean squared distance `[n]` of sorted projections, over all scales.

    Each feature counts in units of its standard deviation in the image that is wanted, so that
    faint structure counts as much as strong one.

    Args:
        found: features of `n` images, as `features` gives them.
        wanted: those of one image, `[1, places, features]` for each scale.
        key: of the directions, which are drawn anew for each key.
    """
    total = jnp.zeros(found[0].shape[0])
    for scale, (a, b) in enumerate(zip(found, wanted, strict=True)):
        directions = jax.random.normal(jax.random.fold_in(key, scale), (a.shape[-1], DIRECTIONS))
        directions /= jnp.linalg.norm(directions, axis=0)
        directions /= jnp.maximum(jnp.std(b, axis=(0, 1)), _FAINTEST)[:, None]
        difference = jnp.sort(a @ directions, axis=1) - jnp.sort(b @ directions, axis=1)
        total += jnp.mean(jnp.square(difference), axis=(1, 2))
    return total / len(found)
