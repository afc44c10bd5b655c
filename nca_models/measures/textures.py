"""A distance between textures that shares nothing with the training loss.

It is made of grey-level co-occurrences, by scikit-image (Haralick et al., "Textural Features for
Image Classification", 1973), and of the colours. Both are compared by Hellinger's distance, from 0
(the same) to 1.
"""

from collections.abc import Sequence

import numpy as np

from nca_models.data.textures import AT_HAND, texture

_LEVELS, _BLUR = 16, 1.5  # of grey, from the 2nd to the 98th percentile of a picture
_DISTANCES = (1, 2, 4, 8)  # in cells
_ANGLES = (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
_SHADES = 16  # of each colour


def describe(picture: np.ndarray) -> list[np.ndarray]:
    """Return the descriptor of a picture `[height, width, 3]` uint8: histograms.

    They are `[levels * levels, distances * angles]` of co-occurrences, and `[shades, 3]` of
    colours. A colour counts for the shades around its own, too: noise would weigh much otherwise.
    """
    from scipy.ndimage import gaussian_filter
    from skimage.feature import graycomatrix

    grey = picture.astype(np.float64) @ (0.299, 0.587, 0.114)
    low, high = np.percentile(grey, (2, 98))
    levels = np.clip((grey - low) / max(high - low, 1.0) * _LEVELS, 0, _LEVELS - 1).astype(np.uint8)
    pairs = graycomatrix(levels, _DISTANCES, _ANGLES, _LEVELS, symmetric=True, normed=True)
    shades = np.arange(_SHADES)[:, None, None]
    in_shades = picture.reshape(-1, 3) / 255 * (_SHADES - 1)  # [cells, 3]
    colours = np.exp(-np.square(in_shades - shades) / 2).sum(axis=1)  # [shades, 3]
    pairs = gaussian_filter(pairs, _BLUR, mode="nearest", axes=(0, 1))
    pairs /= pairs.sum(axis=(0, 1))
    return [pairs.reshape(_LEVELS**2, -1), colours / colours.sum(axis=0)]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the distance of two pictures `[height, width, 3]` uint8, from 0 to 1.

    It is the root of the mean of the squared distances: of all co-occurrences, and of all colours.
    """
    return _between(describe(one), describe(other))


def _between(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    squares = [np.mean(1 - np.sum(np.sqrt(a * b), axis=0)) for a, b in zip(one, other, strict=True)]
    return float(np.sqrt(max(0.0, float(np.mean(squares)))))


def distances(pictures: Sequence[np.ndarray], exemplar: np.ndarray) -> dict[str, float]:
    """Return the mean distances of pictures to their exemplar, and to every texture at hand.

    The exemplar, among the textures at hand or not, is called "exemplar".

    Args:
        pictures: each `[size, size, 3]` uint8.
        exemplar: `[size, size, 3]` uint8.
    """
    known = {name: np.asarray(texture(name, len(exemplar))) for name in AT_HAND}
    others = {name: other for name, other in known.items() if not np.array_equal(other, exemplar)}
    described = [describe(picture) for picture in pictures]
    return {
        name: float(np.mean([_between(one, about) for one in described]))
        for name, about in (
            (name, describe(other)) for name, other in {"exemplar": exemplar, **others}.items()
        )
    }
