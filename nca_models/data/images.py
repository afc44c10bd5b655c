"""Image files to targets: any size, any mode."""

import logging
import warnings
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from nca_models._files import is_pipe, piped, reason
from nca_models.data import DataError

PACKAGED_TARGET = Path(__file__).parent / "assets" / "butterfly.png"


class ImageError(DataError):
    """The file is not an image that can be learned; the message is one line."""


def open_rgba(path: Path) -> Image.Image:
    """Read an image file, or a pipe, of any mode as 8-bit RGBA, upright as its EXIF data says.

    Of an animation, the first frame, which a warning in the log says. 16-bit greyscale is scaled to
    8 bits.

    Raises:
        ImageError: no such file, not an image, broken, or nothing in it is visible.
    """
    try:
        if path.is_char_device():
            raise ImageError(f"{path}: is a device, not an image file; a pipe or a file is read")
        with warnings.catch_warnings():
            # Below the size that Pillow refuses, it warns.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image, frames = _first_frame(BytesIO(piped(path)) if is_pipe(path) else path)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path}: is a folder, not an image file") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too large to open safely, scale it down ({error})") from error
    except Exception as error:  # Pillow's readers raise errors of many classes for broken files
        raise ImageError(f"{path}: cannot be read as an image ({reason(error)})") from error
    if image.getchannel("A").getextrema()[1] == 0:
        where = f" of the first of {frames} frames, which is the one read," if frames > 1 else ""
        raise ImageError(f"{path}: every pixel{where} is transparent: there is nothing to learn")
    if frames > 1:
        _warn(f"{path}: of its {frames} frames, the first one is used")
    return image


def fit(image: Image.Image, size: int) -> Image.Image:
    """Scale an RGBA image to fit a square of `size` pixels, centred, with its aspect ratio kept.

    What the image does not cover is transparent. Pillow weighs colours by alpha when it resizes,
    so no colour of transparent pixels bleeds in.
    """
    scale = size / max(image.size)
    width, height = (max(1, round(n * scale)) for n in image.size)
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size))
    square.paste(small, ((size - width) // 2, (size - height) // 2))
    return square


def premultiplied(image: Image.Image, padding: int = 0) -> np.ndarray:
    """Return an RGBA image as `[height, width, 4]` float32 in 0 to 1, colours times alpha.

    Premultiplied, as in Growing NCA: a transparent cell is then all zeros, which is what a dead
    cell is. `padding` transparent cells are added on each side.
    """
    rgba = np.asarray(image.convert("RGBA"), np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return np.pad(rgba, ((padding, padding), (padding, padding), (0, 0)))


def _first_frame(source: Path | BytesIO) -> tuple[Image.Image, int]:
    """The first frame of an image as RGBA, and how many there are."""
    with Image.open(source) as file:
        image = ImageOps.exif_transpose(file)
        return _eight_bit(image).convert("RGBA"), getattr(file, "n_frames", 1)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit and float greyscale to 8 bits, which Pillow's own conversion would clip.

    Of 32-bit and float values, the largest one says what white is: 1, 255 or 65,535. A 16-bit value
    that stands for transparency is kept as such.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.nan_to_num(np.asarray(image, np.float64))
    top = 1.0 if values.max() <= 1 else 255.0 if values.max() <= 255 else 65535.0
    if image.mode.startswith("I;16"):
        top = 65535.0
    grey = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


@cache
def _warn(text: str) -> None:
    """Warn once in a process: a target is read more than once."""
    logging.getLogger(__name__).warning(text)
