"""Pictures to learn: an image file, an emoji, or the one in the package."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nca_models._files import whole_file
from nca_models.data.emoji import emoji, is_emoji
from nca_models.data.images import PACKAGED_TARGET, ImageError, fit, open_rgba
from nca_models.training.config import TrainConfig, setting, target_side


@dataclass(frozen=True, kw_only=True)
class PictureConfig(TrainConfig):
    """Settings of a system that learns a picture."""

    target_help: ClassVar[str] = "an image file or an emoji (default: the packaged butterfly)"

    target_size: int = target_side()
    padding: int = setting(
        lowest=0, flag="--padding", help="empty cells on each side of the picture"
    )

    @property
    def size(self) -> int:
        """Side of the grid, in cells."""
        return self.target_size + 2 * self.padding

    @classmethod
    def check_target(cls, system: str, target: str) -> None:
        """Refuse a file that is no picture; an emoji may need the network, so it comes later."""
        if not _names_emoji(target):
            open_rgba(Path(target))


def save_target(target: str | None, size: int, path: Path) -> None:
    """Write a picture, scaled to fit `size` pixels, whole or not at all.

    Args:
        target: a file, an emoji, or None for the packaged picture.
        size: side of the square that the picture fits into.
        path: where it is written to.

    Raises:
        ImageError: the picture cannot be had, or is invisible at that size.
    """
    named = target is not None and _names_emoji(target)
    picture = emoji(str(target)) if named else open_rgba(Path(target or PACKAGED_TARGET))
    small = fit(picture, size)
    if small.getchannel("A").getextrema()[1] == 0:
        raise ImageError(
            f"{target}: at {size} x {size} pixels every one is transparent: there is nothing to "
            "learn; cut its margins off, or choose a larger --size"
        )
    with whole_file(path) as temporary:
        small.save(temporary)


def _names_emoji(target: str) -> bool:
    return not os.path.exists(target) and is_emoji(target)
