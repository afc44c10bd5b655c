"""Emoji to pictures: from an installed colour font, else Noto's PNG, downloaded once."""

import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nca_models._files import whole_file
from nca_models.data.images import ImageError, open_rgba

_FONT_NAMES = re.compile(r"(.*color.*emoji.*|seguiemj)\.tt[fc]", re.IGNORECASE)
_FONT_SIZES = (109, 128, 136, 160, 96)  # bitmap fonts (Noto 109, Apple 160) have one size only
_URL = "https://raw.githubusercontent.com/googlefonts/noto-emoji/main/png/128/{name}"
_TIMEOUT = 10.0  # seconds


def is_emoji(text: str) -> bool:
    """Tell whether `text` looks like one emoji rather than a path: short, with nothing ASCII.

    Digits and `#`, `*` count when a keycap follows.
    """
    return 0 < len(text) <= 16 and ("\u20e3" in text or not any(c.isascii() for c in text))


def emoji(text: str) -> Image.Image:
    """Return the picture of one emoji as RGBA, cropped to what is visible.

    Raises:
        ImageError: no installed font has it and it could not be downloaded.
    """
    image = _from_fonts(text) or _from_noto(text)
    return image.crop(image.getchannel("A").getbbox())


def _from_fonts(text: str) -> Image.Image | None:
    """Draw with the first installed colour font that has the emoji."""
    for path in _fonts():
        for size in _FONT_SIZES:
            image = _draw(path, size, text)
            if image is not None:
                return image
    return None


def _fonts() -> list[Path]:
    from matplotlib.font_manager import findSystemFonts

    files = sorted(map(Path, findSystemFonts()))
    return [path for path in files if _FONT_NAMES.fullmatch(path.name)]


def _draw(font_path: Path, size: int, text: str) -> Image.Image | None:
    """Draw with one font, or return None if it lacks the size or the emoji's colours."""
    try:
        font = ImageFont.truetype(str(font_path), size)
    except OSError:
        return None
    image = Image.new("RGBA", (4 * size, 2 * size))
    corner = (size, size // 4)
    ImageDraw.Draw(image).text(corner, text, fill="black", font=font, embedded_color=True)
    red, green, blue, alpha = image.split()
    # A font without this emoji draws nothing, or its "missing" box in black.
    has_colour = any(band.getextrema()[1] for band in (red, green, blue))
    return image if has_colour and alpha.getbbox() else None


def _from_noto(text: str) -> Image.Image:
    """Read Noto's PNG of the emoji from the user's cache, downloading it first if need be."""
    codes = "_".join(f"{ord(c):04x}" for c in text if c != "\ufe0f")
    path = _cache_folder() / f"emoji_u{codes}.png"
    if not path.exists():
        _download(_URL.format(name=path.name), path, text)
    return open_rgba(path)


def _download(url: str, path: Path, text: str) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            data = response.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_bytes(data)
            open_rgba(temporary)  # a proxy's login page must not reach the cache
    except urllib.error.HTTPError as error:
        raise ImageError(
            f"{text}: no installed font has this emoji, and Noto answers {error.code} for it; "
            "use --target FILE with a picture of it"
        ) from error
    except (OSError, ImageError) as error:
        raise ImageError(
            f"{text}: no installed font has this emoji, and it could not be downloaded "
            f"({' '.join(str(error).split())}); use --target FILE with a picture of it"
        ) from error


def _cache_folder() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nca-kernels" / "emoji"
