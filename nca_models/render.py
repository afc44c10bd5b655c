"""Arrays to pictures: PNG, GIF, MP4 and plots. Every file appears whole or not at all.

Pictures are `[height, width, 3]` uint8, films `[frames, height, width, 3]` uint8.
"""

import errno
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image

from nca_models._files import whole_file


def over_white(rgba: np.ndarray) -> np.ndarray:
    """Lay premultiplied RGBA `[*lead, height, width, 4]` float over white, as uint8 RGB.

    Values outside 0 to 1 are clipped, NaN is black.
    """
    rgba = np.nan_to_num(np.asarray(rgba, np.float32))
    alpha = np.clip(rgba[..., 3:], 0, 1)
    return (np.clip(1 - alpha + rgba[..., :3], 0, 1) * 255).round().astype(np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    """Turn ink `[*lead, height, width]`, 0 (white) to 1 (black), into uint8 RGB."""
    values = np.clip(np.nan_to_num(np.asarray(values, np.float32)), 0, 1)
    return np.repeat(((1 - values) * 255).round().astype(np.uint8)[..., None], 3, axis=-1)


def upscale(picture: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each pixel of a picture or film `factor` times along both axes."""
    if factor < 1:
        raise ValueError(f"factor is {factor}, but must be at least 1")
    return picture.repeat(factor, axis=-3).repeat(factor, axis=-2)


def scale_of(picture: np.ndarray) -> Fraction:
    """Return how many pixels a cell of a picture of cells may take: 8, fewer for large ones.

    In pictures of more than 2,048 cells a side, several cells share a pixel.
    """
    side = max(picture.shape[:2])
    return Fraction(max(1, min(8, 1024 // side))) / -(-side // 2048)


def scaled(picture: np.ndarray, scale: Fraction) -> np.ndarray:
    """Give each cell of a picture `scale` pixels a side; `scale` or its inverse is whole."""
    if scale >= 1:
        return upscale(picture, int(scale))
    cells = int(1 / scale)
    return np.asarray(Image.fromarray(picture).reduce(cells))


def spread(length: int, count: int = 8) -> list[int]:
    """Return up to `count` indices that are evenly spread from 0 to `length - 1`."""
    chosen = np.linspace(0, length - 1, min(count, length))
    return [int(i) for i in chosen.round()]


def strip(film: np.ndarray | Sequence[np.ndarray], count: int = 8, gap: int = 2) -> np.ndarray:
    """Put `count` frames, evenly spread from the first to the last, side by side on white."""
    return beside([film[i] for i in spread(len(film), count)], gap)


def beside(pictures: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """Put pictures of one height side by side, `gap` white pixels between them."""
    height = pictures[0].shape[0]
    space = np.full((height, gap, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (space, picture)]
    return np.concatenate(parts[1:], axis=1)


def above(pictures: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """Put pictures of one width one above the other, `gap` white pixels between them."""
    space = np.full((gap, pictures[0].shape[1], 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (space, picture)]
    return np.concatenate(parts[1:])


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture."""
    with whole_file(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def save_gif(path: Path, film: Iterable[np.ndarray], fps: float = 20.0) -> None:
    """Write a film, or frames as they come, as a GIF that repeats for ever.

    GIF counts time in hundredths of a second. Frames equal to the one before make it stay longer.
    """
    frames = (Image.fromarray(frame) for frame in film)
    with whole_file(path) as temporary:
        first = next(frames)
        first.save(temporary, save_all=True, append_images=frames, duration=1000 / fps, loop=0)


def save_mp4(path: Path, film: Iterable[np.ndarray], fps: float = 20.0) -> None:
    """Write a film, or frames as they come, as H.264; an odd side gains a pixel, to be even."""
    even = lambda frame: [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)]
    frames: Any = (np.pad(frame, even(frame), constant_values=255) for frame in film)
    with whole_file(path) as temporary, warnings.catch_warnings():
        # JAX warns of every fork; this one only starts ffmpeg.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        iio.imwrite(
            temporary,
            frames,
            plugin="FFMPEG",
            is_batch=True,
            fps=fps,
            macro_block_size=2,
            ffmpeg_log_level="quiet",
        )
        _require_whole(temporary)


def _require_whole(path: Path) -> None:
    """Raise OSError if ffmpeg failed, of which imageio says nothing, as on a disk that is full."""
    try:
        iio.immeta(path, plugin="FFMPEG")  # reads the index, which ffmpeg writes last
    except (OSError, ValueError, IndexError) as error:
        free = shutil.disk_usage(path.parent).free
        number = errno.ENOSPC if free < 1 << 20 else errno.EIO
        raise OSError(number, os.strerror(number)) from error


def save_film(path: Path, film: Iterable[np.ndarray], fps: float = 20.0) -> None:
    """Write a film in the format that the suffix names, .gif or .mp4."""
    {".gif": save_gif, ".mp4": save_mp4}[path.suffix.lower()](path, film, fps)


def save_lattice_gif(path: Path, ink: np.ndarray, wall: int, fps: float = 12.0) -> None:
    """Write a film of a lattice, seen from the near face (plane 0) while the view swings once.

    Args:
        path: of the GIF.
        ink: `[frames, height, width, depth]`, 0 to 1; below 0.15 it is not drawn.
        wall: the plane that is drawn as a wall.
        fps: frames per second.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    _, height, width, depth = ink.shape
    figure = Figure(figsize=(4.8, 3.2), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes: Any = figure.add_axes((-0.1, -0.15, 1.2, 1.3), projection="3d", computed_zorder=False)
    side = 200 / max(height, width)  # points
    corners = np.meshgrid(
        [0.5, 0.5 - width], [0.5, 0.5 - height]
    )  # as -x and -y, or it is mirrored
    film = []
    for frame, swing in zip(ink, np.sin(np.linspace(0, 2 * np.pi, len(ink))), strict=True):
        axes.clear()
        for z in reversed(range(depth)):  # from the far face to the near one, which is in front
            if z == wall:
                axes.plot_surface(
                    np.full((2, 2), z), *corners, color="#4c72b0", alpha=0.3, shade=False
                )
            y, x = np.nonzero(frame[..., z] > 0.15)
            colours = np.zeros((len(y), 4))
            colours[:, 3] = np.clip(frame[y, x, z], 0, 1)
            axes.scatter(
                np.full(len(y), z), -x, -y, c=colours, s=side**2 / 6, marker="s", linewidths=0
            )
        axes.set(xlim=(0, depth - 1), ylim=(1 - width, 0), zlim=(1 - height, 0))
        axes.set_box_aspect((2.2, 1, height / width))
        axes.set_axis_off()
        axes.view_init(elev=12, azim=-125 + 12 * swing)
        canvas.draw()
        film.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    save_gif(path, np.stack(film), fps)


@contextmanager
def _plot(path: Path, size: tuple[float, float], dpi: int = 110) -> Iterator[Any]:
    """Give the axes of a new figure of `size` inches; write it to `path` when the block ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure.add_subplot()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def save_flow_plot(path: Path, picture: np.ndarray, flow: np.ndarray) -> None:
    """Draw flow `[height, width, 2]`, x first, in pixels, as arrows over a picture."""
    every = max(1, picture.shape[0] // 20)
    y, x = np.mgrid[: picture.shape[0] : every, : picture.shape[1] : every]
    u, v = np.moveaxis(flow[::every, ::every], -1, 0)
    with _plot(path, (4, 4)) as axes:
        axes.imshow(picture)
        axes.quiver(x, y, u, v, angles="xy", scale_units="xy", scale=1, color="red")
        axes.set_axis_off()


def save_heat_map(
    path: Path,
    values: np.ndarray,
    columns: tuple[str, Sequence[object]],
    rows: tuple[str, Sequence[object]],
    title: str,
    spreads: np.ndarray | None = None,
) -> None:
    """Draw a table `[rows, columns]` as colours and numbers; axes are (name, labels).

    `spreads` `[rows, columns]` are written below the numbers, unless they are NaN.
    """
    size = (max(5, 2 + len(columns[1])), 1.8 + 0.8 * len(rows[1]))  # wide enough for the title
    if spreads is None:
        spreads = np.full(values.shape, np.nan)
    finite = values[np.isfinite(values)]
    dark = np.quantile([finite.min(), finite.max()], 0.7) if finite.size else 0.0
    with _plot(path, size) as axes:
        axes.figure.colorbar(axes.imshow(values, origin="lower"))
        axes.set_xticks(range(len(columns[1])), list(map(str, columns[1])))
        axes.set_yticks(range(len(rows[1])), list(map(str, rows[1])))
        axes.set(xlabel=columns[0], ylabel=rows[0])
        axes.figure.suptitle(title)
        for (y, x), value in np.ndenumerate(values):
            text = f"{value:.2f}" + ("" if np.isnan(spreads[y, x]) else f"\n±{spreads[y, x]:.2f}")
            colour = "white" if value <= dark else "black"  # black for NaN, whose cell is white
            axes.text(x, y, text, ha="center", va="center", color=colour)


def save_curves(
    path: Path, x: Sequence[float], curves: Mapping[str, Sequence[float]], labels: tuple[str, str]
) -> None:
    """Plot curves of one x by their names; `labels` are those of x and y."""
    with _plot(path, (5, 3.2)) as axes:
        for name, values in curves.items():
            axes.plot(x, values, marker=".", label=name)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.legend()
        axes.grid(alpha=0.3)


def save_loss_plot(path: Path, steps: Sequence[int], losses: Sequence[float]) -> None:
    """Plot log10 of the loss against the training step, with a running mean."""
    values = np.log10(np.maximum(np.asarray(losses, float), np.finfo(float).tiny))
    width = min(50, len(values))
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    with _plot(path, (7, 4), dpi=120) as axes:
        axes.plot(steps, values, ".", markersize=2, alpha=0.4, label="each step")
        axes.plot(steps[width - 1 :], mean, label=f"mean of {width} steps")
        axes.set(xlabel="training step", ylabel="log10 of the loss")
        axes.legend()
        axes.grid(alpha=0.3)
