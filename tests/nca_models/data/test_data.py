"""Targets: image files of every kind, emoji, the packaged picture."""

import importlib.util
import os
import threading
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nca_models import _files
from nca_models.data import emoji, images, pictures


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_reads_as_rgba(tmp_path, mode):
    path = tmp_path / ("image.tiff" if mode in ("CMYK", "I", "F") else "image.png")
    half = Image.new("L", (4, 2), 128)
    if mode in ("I;16", "I"):
        image = Image.fromarray(
            np.full((2, 4), 128 * 257, np.uint16 if mode == "I;16" else np.int32)
        )
    else:
        image = half.convert(mode)
    if mode == "F":
        image = Image.fromarray(np.full((2, 4), 128 / 255, np.float32))
    image.save(path)
    pixels = np.asarray(images.open_rgba(path))
    assert pixels.shape == (2, 4, 4)
    assert (pixels[..., 3] == 255).all()
    if mode != "1":
        assert np.abs(pixels[..., :3].astype(int) - 128).max() <= 1


def test_palette_transparency_is_kept(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png", transparency=0)
    pixels = np.asarray(images.open_rgba(tmp_path / "p.png"))
    np.testing.assert_array_equal(pixels[0, :, 3], [0, 255])


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (6, 2), "red").save(tmp_path / "e.jpg", exif=exif)
    assert images.open_rgba(tmp_path / "e.jpg").size == (2, 6)


def test_cmyk_of_a_jpeg_is_not_inverted(tmp_path):
    Image.new("RGB", (16, 16), (250, 20, 20)).convert("CMYK").save(tmp_path / "c.jpg")
    pixels = np.asarray(images.open_rgba(tmp_path / "c.jpg")).astype(int)
    assert np.abs(pixels - [250, 20, 20, 255]).max() <= 8


def test_16_bits_are_scaled_by_their_range_and_keep_their_transparency(tmp_path):
    values = np.array([[0, 200, 65535, 128 * 257]], np.uint16)
    Image.fromarray(values).save(tmp_path / "g.png", transparency=65535)
    pixels = np.asarray(images.open_rgba(tmp_path / "g.png"))
    np.testing.assert_array_equal(pixels[0, :, 3], [255, 255, 0, 255])
    np.testing.assert_array_equal(pixels[0, [0, 1, 3], 0], [0, 1, 128])
    Image.fromarray(values // 400).save(tmp_path / "dark.png")
    assert np.asarray(images.open_rgba(tmp_path / "dark.png"))[..., :3].max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_of_an_animation_the_first_frame_is_used_and_that_is_said_once(tmp_path, caplog, suffix):
    path = tmp_path / f"a.{suffix}"
    red, blue = (Image.new("RGBA", (4, 4), colour) for colour in ("red", "blue"))
    red.save(path, save_all=True, append_images=[blue, red])
    for _ in range(2):
        pixels = np.asarray(images.open_rgba(path)).astype(int)
        assert np.abs(pixels - [255, 0, 0, 255]).max() <= 2
    assert caplog.messages == [f"{path}: of its 3 frames, the first one is used"]


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_an_animation_whose_first_frame_is_empty_says_so(tmp_path, caplog, suffix):
    path = tmp_path / f"a.{suffix}"
    empty, full = Image.new("RGBA", (16, 16)), Image.new("RGBA", (16, 16), "red")
    empty.save(path, save_all=True, append_images=[full], duration=100, disposal=2)
    with pytest.raises(images.ImageError, match="of the first of 2 frames, which is the one read"):
        images.open_rgba(path)
    assert not caplog.messages


def test_large_pictures_are_read_and_larger_ones_refused_in_a_line(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (12, 15):
        Image.new("RGB", (side, side), "red").save(tmp_path / f"{side}.png")
    assert images.open_rgba(tmp_path / "12.png").size == (12, 12)
    assert not recwarn.list
    with pytest.raises(images.ImageError, match=r"too large to open safely, scale it down \(.*\)"):
        images.open_rgba(tmp_path / "15.png")


@pytest.mark.parametrize(
    "suffix", ["png", "gif", "jpg", "tiff", "webp", "bmp", "ico", "ppm", "tga", "pcx", "jp2"]
)
def test_damaged_files_are_read_or_refused_in_a_line(tmp_path, suffix, recwarn):
    path = tmp_path / f"noise.{suffix}"
    Image.effect_noise((32, 32), 80).convert("RGB").save(path)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    contents = [whole[: len(whole) * part // 16] for part in range(16)]
    for _ in range(60):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[random.integers(0, min(len(whole), 200), 3)] = random.integers(0, 256, 3)
        contents.append(damaged.tobytes())
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            images.open_rgba(path)
        except images.ImageError as error:
            refused += 1
            line = str(error)
            assert line.startswith(str(path))
            assert "\n" not in line
    assert refused >= 3


@pytest.fixture
def pipe(tmp_path):
    """A pipe, and a function that starts to write into it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def feed(content: bytes) -> Path:
        _files.piped.cache_clear()
        threading.Thread(target=path.write_bytes, args=(content,), daemon=True).start()
        return path

    return feed


def test_a_pipe_is_read_as_often_as_a_file(pipe, picture):
    path = pipe(picture.read_bytes())
    for _ in range(3):
        assert np.array_equal(images.open_rgba(path), images.open_rgba(picture))


def test_pipes_of_nothing_or_too_much_and_devices_are_refused(pipe, monkeypatch):
    with pytest.raises(images.ImageError, match="cannot be read as an image"):
        images.open_rgba(pipe(b""))
    monkeypatch.setattr(_files, "LARGEST_PIPED", 1 << 20)
    with pytest.raises(images.ImageError, match="more than 1 MiB come out of it"):
        images.open_rgba(pipe(bytes((1 << 20) + 1)))
    with pytest.raises(images.ImageError, match="is a device"):
        images.open_rgba(Path("/dev/zero"))


def test_a_picture_that_vanishes_when_it_is_scaled_is_refused(tmp_path):
    image = Image.new("RGBA", (2000, 2000))
    image.putpixel((1000, 1000), (255, 0, 0, 255))
    image.save(tmp_path / "dot.png")
    with pytest.raises(images.ImageError, match="at 7 x 7 pixels every one is transparent"):
        pictures.save_target(str(tmp_path / "dot.png"), 7, tmp_path / "target.png")
    assert not (tmp_path / "target.png").exists()
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    pictures.save_target(str(tmp_path / "one.png"), 7, tmp_path / "target.png")
    assert (np.asarray(Image.open(tmp_path / "target.png")) == [255, 0, 0, 255]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (53, 31), (2400, 1800)])
def test_fit_keeps_the_aspect_ratio_and_centres(size):
    fitted = np.asarray(images.fit(Image.new("RGBA", size, "blue"), 20))
    assert fitted.shape == (20, 20, 4)
    rows, columns = np.nonzero(fitted[..., 3])
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert width == max(1, round(20 * size[0] / max(size)))
    assert height == max(1, round(20 * size[1] / max(size)))
    assert abs((rows.min() + rows.max()) / 2 - 9.5) <= 0.5
    np.testing.assert_array_equal(fitted[rows, columns], [[0, 0, 255, 255]] * len(rows))


def test_colours_of_transparent_pixels_do_not_bleed():
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 64, 29))
    array = images.premultiplied(images.fit(image, 9), padding=1)
    assert array.shape == (11, 11, 4)
    assert array.dtype == np.float32
    assert array[..., 0].max() < 0.02  # no red
    assert (array[..., :3] <= array[..., 3:] + 1e-6).all()
    assert not array[0].any()
    assert not array[:, -1].any()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "cannot be read"),
        (b"not an image", "cannot be read"),
        ("folder", "is a folder"),
        ("clear", "transparent"),
        ("cut off", "cannot be read"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, content, words):
    path = tmp_path / "bad.png"
    if content == "folder":
        path.mkdir()
    elif content == "clear":
        Image.new("RGBA", (3, 3)).save(path)
    elif content == "cut off":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:500])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(images.ImageError, match=words) as caught:
        images.open_rgba(path)
    assert "bad.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_packaged_target_is_the_one_that_the_script_draws():
    path = Path(__file__).parent / "draw_butterfly.py"
    spec = importlib.util.spec_from_file_location("draw_butterfly", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = images.premultiplied(module.butterfly())
    packaged = images.premultiplied(images.open_rgba(images.PACKAGED_TARGET))
    assert (
        np.abs(drawn - packaged).mean() < 2e-3
    )  # Pillow's resampling may differ by one between versions
    left, right = packaged[:, :60].mean((0, 1)), packaged[:, 68:].mean((0, 1))
    assert left[0] > right[0]
    assert left[2] < right[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("🦎", True), ("👩‍🚀", True), ("1️⃣", True), ("cat.png", False), ("", False), ("a", False)],
)
def test_is_emoji(text, expected):
    assert emoji.is_emoji(text) == expected


@pytest.fixture
def no_fonts(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji, "_fonts", list)
    monkeypatch.setattr(emoji, "_cache_folder", lambda: tmp_path / "cache")


def test_emoji_is_downloaded_once(no_fonts, monkeypatch, tmp_path):
    source = tmp_path / "noto"
    source.mkdir()
    image = Image.new("RGBA", (16, 16))
    image.paste("green", (4, 4, 12, 10))
    image.save(source / "emoji_u1f98e.png")
    monkeypatch.setattr(emoji, "_URL", source.as_uri() + "/{name}")
    assert emoji.emoji("🦎\ufe0f").size == (8, 6)
    (source / "emoji_u1f98e.png").unlink()
    assert emoji.emoji("🦎").getpixel((0, 0)) == (0, 128, 0, 255)


@pytest.mark.parametrize(
    "answer", [urllib.error.URLError("no route"), TimeoutError("timed out"), b"<html>log in</html>"]
)
def test_emoji_without_font_or_network_says_what_to_do(no_fonts, monkeypatch, tmp_path, answer):
    if isinstance(answer, bytes):
        page = tmp_path / "emoji_u1f98e.png"
        page.write_bytes(answer)
        monkeypatch.setattr(emoji, "_URL", tmp_path.as_uri() + "/{name}")
    else:

        def fail(url, timeout):
            raise answer

        monkeypatch.setattr(emoji.urllib.request, "urlopen", fail)
    with pytest.raises(images.ImageError, match="--target FILE"):
        emoji.emoji("🦎")
    assert not list(tmp_path.glob("cache/*.png"))


def test_emoji_from_a_font_without_it_is_not_a_black_box():
    import matplotlib

    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    assert emoji._draw(font, 20, "🦎") is None
