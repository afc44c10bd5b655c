"""Pictures to learn: an image file, an emoji, or the one in the package."""

from pathlib import Path

from PIL import Image

from nca_models._files import whole_file
from nca_models.data.emoji import emoji, is_emoji
from nca_models.data.images import PACKAGED_TARGET, fit, open_rgba


def open_target(target: str | None) -> Image.Image:
    """Return the picture that `target` names: a file, an emoji, or None for the packaged one.

    Raises:
        ImageError: it cannot be had.
    """
    if target is None:
        return open_rgba(PACKAGED_TARGET)
    return emoji(target) if _names_emoji(target) else open_rgba(Path(target))


def save_target(target: str | None, size: int, path: Path) -> None:
    """Write the picture that `target` names, scaled to fit `size` pixels, whole or not at all."""
    with whole_file(path) as temporary:
        fit(open_target(target), size).save(temporary)


def _names_emoji(target: str) -> bool:
    return not Path(target).exists() and is_emoji(target)
