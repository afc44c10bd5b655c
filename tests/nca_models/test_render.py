"""Rendered files, read back."""

from fractions import Fraction

import imageio.v3 as iio
import numpy as np
import pytest

from nca_models import render


@pytest.fixture
def film() -> np.ndarray:
    """Eight frames of 12 by 9 pixels, each with its own bright column."""
    frames = np.zeros((8, 12, 9, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:, i] = (250, 30 * i, 0)
    return frames


def test_over_white():
    rgba = np.array([[[0, 0, 0, 0], [0.5, 0, 0, 0.5], [1, 1, 1, 1], [2, -1, 0, 1]]], np.float32)
    expected = [[[255, 255, 255], [255, 128, 128], [255, 255, 255], [255, 0, 0]]]
    np.testing.assert_array_equal(render.over_white(rgba), expected)


@pytest.mark.parametrize(
    ("side", "scale"),
    [(40, Fraction(8)), (300, Fraction(3)), (2048, Fraction(1)), (2049, Fraction(1, 2))],
)
def test_pictures_of_cells_stay_within_sight(side, scale):
    picture = np.zeros((side, side // 2, 3), np.uint8)
    picture[: side // 2] = 200
    assert render.scale_of(picture) == scale
    seen = render.scaled(picture, scale)
    assert abs(seen.shape[0] - side * scale) < 1
    assert 95 <= seen.mean() <= 105


def test_upscale_repeats_pixels(film):
    big = render.upscale(film, 3)
    assert big.shape == (8, 36, 27, 3)
    np.testing.assert_array_equal(big[:, 1::3, 2::3], film)
    with pytest.raises(ValueError, match="factor"):
        render.upscale(film, 0)


def test_strip_spans_the_film(film):
    strip = render.strip(film, 3, gap=2)
    assert strip.shape == (12, 3 * 9 + 2 * 2, 3)
    np.testing.assert_array_equal(strip[:, :9], film[0])
    np.testing.assert_array_equal(strip[:, -9:], film[-1])
    assert (strip[:, 9:11] == 255).all()
    assert render.strip(film[:1], 5).shape == (12, 9, 3)


def test_png(tmp_path, film):
    render.save_png(tmp_path / "a.png", film[3])
    np.testing.assert_array_equal(iio.imread(tmp_path / "a.png"), film[3])


def test_gif(tmp_path, film):
    render.save_film(tmp_path / "a.gif", film, fps=10)
    back = iio.imread(tmp_path / "a.gif", index=None)
    assert back.shape[:3] == film.shape[:3]
    assert np.abs(back[..., :3].astype(int) - film).max() < 16
    meta = iio.immeta(tmp_path / "a.gif")
    assert meta["duration"] == 100
    assert meta["loop"] == 0


@pytest.mark.filterwarnings("ignore:os.fork")  # imageio starts ffmpeg for reading as well
def test_mp4_of_odd_sides(tmp_path, film):
    big = render.upscale(film, 5)  # 60 by 45
    render.save_film(tmp_path / "a.mp4", big)
    back = iio.imread(tmp_path / "a.mp4")
    assert back.shape == (8, 60, 46, 3)
    for i, frame in enumerate(back):
        assert frame[:, 5 * i + 2, 0].mean() > 150
        assert np.delete(frame[:, 2::5, 0], i, 1).mean() < 80


def test_loss_plot(tmp_path):
    render.save_loss_plot(tmp_path / "loss.png", range(1, 101), np.geomspace(1, 1e-3, 100))
    assert iio.imread(tmp_path / "loss.png").std() > 5


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, film):
    render.save_png(tmp_path / "a.png", film[0])
    with pytest.raises(Exception, match="data type"):
        render.save_png(tmp_path / "a.png", np.array([object()]))
    np.testing.assert_array_equal(iio.imread(tmp_path / "a.png"), film[0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_film_that_ffmpeg_could_not_finish_is_no_film(tmp_path, film):
    path = tmp_path / "film.mp4"
    render.save_mp4(path, film)
    render._require_whole(path)
    whole = path.read_bytes()
    for size in (0, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(OSError, match="Input/output error"):
            render._require_whole(path)
