"""Draws `nca_models/data/assets/butterfly.png`: `python draw_butterfly.py FILE`.

An original picture, drawn eight times too large and scaled down. The wings differ in colour, so
that it shows which half of a grown butterfly was cut away and has come back. Broad, soft shapes,
because it is grown on few cells.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SIZE, SCALE = 128, 8
BODY = (70, 44, 92, 255)
LEFT = {"upper": (255, 140, 40, 255), "lower": (236, 76, 92, 255), "spot": (255, 226, 110, 255)}
RIGHT = {"upper": (44, 146, 238, 255), "lower": (32, 188, 160, 255), "spot": (206, 244, 255, 255)}


def oval(draw: ImageDraw.ImageDraw, centre: tuple[float, float], radii: tuple[float, float], fill):
    """Draw an ellipse given in pixels of the final picture."""
    (x, y), (a, b) = centre, radii
    draw.ellipse([(v * SCALE) for v in (x - a, y - b, x + a, y + b)], fill=fill)


def wing(colours: dict[str, tuple[int, ...]]) -> Image.Image:
    """Draw the right wings."""
    image = Image.new("RGBA", (SIZE * SCALE,) * 2)
    for part, centre, radii, angle in (
        ("lower", (88, 90), (27, 23), 40),
        ("upper", (91, 48), (36, 28), -36),
    ):
        layer = Image.new("RGBA", image.size)
        oval(ImageDraw.Draw(layer), centre, radii, colours[part])
        spot = Image.new("L", image.size)
        oval(
            ImageDraw.Draw(spot),
            (centre[0] + radii[0] * 0.3, centre[1]),
            (radii[1] * 0.4,) * 2,
            255,
        )
        spot = spot.filter(ImageFilter.GaussianBlur(3 * SCALE))
        layer.paste(colours["spot"], mask=spot)
        pivot = tuple(v * SCALE for v in centre)
        layer = layer.rotate(-angle, Image.Resampling.BICUBIC, center=pivot)
        image = Image.alpha_composite(image, layer)
    return image


def butterfly() -> Image.Image:
    """Draw the whole picture, `[128, 128]` RGBA."""
    left = wing(LEFT).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = Image.alpha_composite(left, wing(RIGHT))
    draw = ImageDraw.Draw(image)
    for side in (-1, 1):
        tip = (64 + side * 15, 13)
        draw.line([(64 * SCALE, 36 * SCALE), tuple(v * SCALE for v in tip)], BODY, 5 * SCALE)
        oval(draw, tip, (5, 5), BODY)
    oval(draw, (64, 72), (8, 42), BODY)
    oval(draw, (64, 36), (10, 10), BODY)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    butterfly().save(Path(sys.argv[1]), optimize=True)
