"""Textures: an image file, one of the Describable Textures Dataset, a photograph, or a drawing.

Nothing is downloaded: `brick`, `grass` and `gravel` are photographs that come with scikit-image,
and others are drawn by `nca_models.data.drawn`. Of the dataset (Cimpoi et al., "Describing Textures
in the Wild", CVPR 2014), unpacked in a folder `dtd`, `dtd/bubbly_0101` names a texture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from nca_models.data import DataError, drawn
from nca_models.data.images import open_rgba
from nca_models.training.config import TrainConfig, target_side

PHOTOGRAPHS = ("brick", "grass", "gravel")
AT_HAND = (*PHOTOGRAPHS, *drawn.TEXTURES)
_PIXELS = 4  # of a photograph at hand along the side of a cell: a brick is then 8 cells wide
_ROOM = 2  # a drawn texture is this many times larger than what is cut out of it


@dataclass(frozen=True, kw_only=True)
class TextureConfig(TrainConfig):
    """Settings of a system that learns a texture."""

    target_help: ClassVar[str] = (
        "an image file, DTD/NAME with DTD that dataset's folder, or one of "
        f"{', '.join(AT_HAND)} (default: {AT_HAND[0]})"
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
    """Return the middle of a texture, `size` by `size` pixels of RGB.

    Args:
        name: an image file or a texture of a dataset's folder (`dtd/bubbly_0101`), whose middle
            square is scaled; or one of `AT_HAND`, which has one scale and of which a larger `size`
            shows more. None for the first of these.
        size: side of the result.

    Raises:
        DataError: there is no such file, it is no image, or scikit-image is missing.
    """
    whole = _scaled(name or AT_HAND[0], size)
    left, top = ((n - size) // 2 for n in whole.size)
    return whole.crop((left, top, left + size, top + size))


def elsewhere(name: str | None, size: int) -> Image.Image | None:
    """Return the corner of a texture, as `texture` does its middle; None if that is the same."""
    whole = _scaled(name or AT_HAND[0], size)
    return None if whole.size == (size, size) else whole.crop((0, 0, size, size))


def _scaled(name: str, size: int) -> Image.Image:
    """A whole texture as RGB, both of whose sides have at least `size` pixels."""
    if name not in AT_HAND or Path(name).exists():
        image = _file(name)
        scale = size / min(image.size)
    elif name in drawn.TEXTURES:
        return Image.fromarray(drawn.draw(name, _ROOM * size))
    else:
        image = _photograph(name)
        scale = max(1 / _PIXELS, size / min(image.size))
    width, height = (max(size, round(n * scale)) for n in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


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


def _photograph(name: str) -> Image.Image:
    try:
        from skimage import data
    except ImportError as error:
        raise DataError(
            f"{name}: comes with scikit-image: run `pip install scikit-image`, or give an image "
            "file with --target FILE"
        ) from error
    return Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB")
