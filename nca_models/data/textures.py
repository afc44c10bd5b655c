"""Textures: an image file, one of the Describable Textures Dataset, or one of scikit-image.

Nothing is downloaded: `brick`, `grass` and `gravel` come with scikit-image. Of the dataset (Cimpoi
et al., "Describing Textures in the Wild", CVPR 2014), unpacked in a folder `dtd`,
`dtd/bubbly_0101` names a texture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from nca_models.data import DataError
from nca_models.data.images import open_rgba
from nca_models.training.config import TrainConfig, target_side

AT_HAND = ("brick", "grass", "gravel")


@dataclass(frozen=True, kw_only=True)
class TextureConfig(TrainConfig):
    """Settings of a system that learns a texture."""

    target_help: ClassVar[str] = (
        "an image file, DTD/NAME with DTD that dataset's folder, brick (default), grass or gravel"
    )
    target_name: ClassVar[str] = "texture"
    default_target: ClassVar[str | None] = AT_HAND[0]

    target_size: int = target_side()

    @classmethod
    def check_target(cls, system: str, target: str) -> None:
        """Refuse what is neither a picture nor a texture."""
        if target in AT_HAND:
            return
        path = find(target)
        if path is None:
            known = ", ".join(AT_HAND)
            raise DataError(f"--target {target}: no such file, and not one of {known}")
        open_rgba(path)


def texture(name: str | None, size: int) -> Image.Image:
    """Return the middle square of a texture as RGB, scaled to `size` pixels.

    Args:
        name: an image file, a texture of a dataset's folder (`dtd/bubbly_0101`), or one of
            `AT_HAND`; None for the first of these.
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


def find(name: str) -> Path | None:
    """Return the file of a texture: `name` itself, or the file in a dataset's folder, or None."""
    path = Path(name)
    if path.exists():
        return path
    category = path.name.split("_")[0]
    for folder in (path.parent / "images" / category, path.parent / category):
        for suffix in (".jpg", ".png"):
            if (file := folder / f"{path.name}{suffix}").is_file():
                return file
    return None


def _file(name: str) -> Image.Image:
    path = find(name)
    if path is None:
        raise DataError(f"{name}: no such file, nor one of {', '.join(AT_HAND)}")
    return open_rgba(path).convert("RGB")


def _at_hand(name: str) -> Image.Image:
    try:
        from skimage import data
    except ImportError as error:
        raise DataError(
            f"{name}: comes with scikit-image: run `pip install scikit-image`, or give an image "
            "file with --target FILE"
        ) from error
    return Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB")
