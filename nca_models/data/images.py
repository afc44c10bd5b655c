"""Image files to targets: any size, any mode."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from nca_models.data import DataError

PACKAGED_TARGET = Path(__file__).parent / "assets" / "butterfly.png"


class ImageError(DataError):
    """The file is not an image that can be learned; the message is one line."""


def open_rgba(path: Path) -> Image.Image:
    """Read an image file of any mode as 8-bit RGBA, upright as its EXIF data says.

    Of an animation, the first frame. 16-bit greyscale is scaled to 8 bits.

    Raises:
        ImageError: no such file, not an image, broken, or nothing in it is visible.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image = _eight_bit(image).convert("RGBA")
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path}: is a folder, not an image file") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: too large to open safely ({error})") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
        raise ImageError(f"{path}: cannot be read as an image ({_line(error)})") from error
    if image.getchannel("A").getextrema()[1] == 0:
        raise ImageError(f"{path}: every pixel is transparent, so there is nothing to grow")
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


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit and float greyscale to 8 bits, which Pillow's own conversion would clip."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, np.float64)
    top = 1.0 if values.max() <= 1 else 255.0 if values.max() <= 255 else 65535.0
    return Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
