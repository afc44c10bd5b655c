"""Textures: any image file (one of the Describable Textures Dataset, say), or those at hand.

Nothing is downloaded: `brick`, `grass` and `gravel` come with scikit-image.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from nca_models.data import DataError
from nca_models.data.images import open_rgba

AT_HAND = ("brick", "grass", "gravel")


def texture(name: str | None, size: int) -> Image.Image:
    """Return a texture as RGB, its middle square scaled to `size` pixels.

    Args:
        name: an image file, or one of `AT_HAND`; None for the first of these.
        size: side of the result.

    Raises:
        DataError: there is no such file, it is no image, or scikit-image is missing.
    """
    name = name or AT_HAND[0]
    image = _at_hand(name) if name in AT_HAND and not Path(name).exists() else _file(name)
    side = min(image.size)
    left, top = ((n - side) // 2 for n in image.size)
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def _file(name: str) -> Image.Image:
    if not Path(name).exists():
        raise DataError(f"{name}: no such file, nor one of {', '.join(AT_HAND)}")
    return open_rgba(Path(name)).convert("RGB")


def _at_hand(name: str) -> Image.Image:
    try:
        from skimage import data
    except ImportError as error:
        raise DataError(
            f"{name}: comes with scikit-image: run `pip install scikit-image`, or give an image "
            "file with --target FILE"
        ) from error
    return Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB")
