"""`nca run`: run a trained system and film it."""

import argparse
import math
from collections.abc import Iterable
from contextlib import nullcontext
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nca_models import run_folder
from nca_models.cli.common import Commands, InputError, check_backend_of_run, scale, whole
from nca_models.training import DAMAGE_NAMES

_EXAMPLES = """\
examples:
  nca run cat --steps 400 --damage half --gif cat.gif
  nca run cat --steps 1000 --every 10 --mp4 cat.mp4 --png strip.png
  nca run bricks --size 2048 --every 20 --mp4 wall.mp4
  nca run bricks --size 16384 --steps 64 --every 64 --png wall.png   out of the host's memory
"""
_OUTPUTS = {"gif": "film", "mp4": "film", "png": "strip of frames over time"}
_TILE = 1024  # cells a side of a tile
_WHOLE = 4096  # cells a side of the largest grid that runs without tiles by default


def add(commands: Commands) -> None:
    """Add the command."""
    run = commands.add_parser(
        "run",
        help="run a trained system and film it",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("folder", metavar="DIR", type=Path, help="folder of a run, from `nca train`")
    run.add_argument("--steps", type=whole(1), default=400, metavar="N", help="default: 400")
    run.add_argument(
        "--damage",
        choices=DAMAGE_NAMES,
        default="none",
        help="what is done to the cells (default: none)",
    )
    run.add_argument(
        "--damage-at", type=whole(0), metavar="N", help="after which step (default: half way)"
    )
    run.add_argument(
        "--size", type=whole(1), metavar="N", help="side of the grid (default: as trained)"
    )
    run.add_argument(
        "--tile",
        type=whole(1),
        metavar="N",
        help="keep the grid in the host's memory and run it in tiles of so many cells a side, so "
        f"that it need not fit on a device (default: {_TILE}, of grids above {_WHOLE} a side)",
    )
    run.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="seed of the run (default: 0)"
    )
    run.add_argument("--backend", metavar="NAME", help="default: the run's own")
    _add_outputs(run)
    run.set_defaults(run=_run)


def _add_outputs(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--every", type=whole(1), default=2, metavar="N", help="steps a frame (default: 2)"
    )
    run.add_argument(
        "--fps", type=whole(1), default=20, metavar="N", help="frames a second (default: 20)"
    )
    run.add_argument(
        "--scale",
        type=scale,
        metavar="N|1/N",
        help="pixels a cell; 1/N: cells a pixel (default: 8, less for large grids)",
    )
    for suffix, text in _OUTPUTS.items():
        run.add_argument(f"--{suffix}", type=Path, metavar="FILE", help=f"write a {text}")


def _run(args: argparse.Namespace) -> int:
    damage_at = _check(args)
    system = run_folder.load(args.folder, args.backend, args.size)

    from nca_models.training import trainer

    model = trainer.trained_model(system, args.folder)
    bar, device = _in_tiles(args, model)
    with device, bar or nullcontext():
        frames = system.frames(
            model,
            args.steps,
            every=args.every,
            damage=args.damage,
            damage_at=damage_at,
            seed=args.seed,
        )
        paths = _write(args, frames, progress=bar is None)
    for path in paths:
        print(path)
    return 0


def _check(args: argparse.Namespace) -> int:
    """Refuse impossible options before JAX starts; return the step after which damage is done."""
    for suffix in _OUTPUTS:
        _check_output(suffix, getattr(args, suffix))
    damage_at: int = args.steps // 2 if args.damage_at is None else args.damage_at
    if args.damage_at is not None and args.damage_at > args.steps:
        raise InputError(f"--damage-at {damage_at}: is after the last step, --steps {args.steps}")
    if args.damage_at is not None and args.damage == "none":
        raise InputError(f"--damage-at {damage_at}: says when, so --damage must say what")
    check_backend_of_run(args.backend, run_folder.require(args.folder))
    return damage_at


def _check_output(suffix: str, path: Path | None) -> None:
    if path is None:
        return
    if path.suffix.lower() != f".{suffix}":
        raise InputError(f"--{suffix} {path}: the name must end in .{suffix}")
    if not path.parent.is_dir():
        raise InputError(f"--{suffix} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise InputError(f"--{suffix} {path}: is a folder; give the name of a file")
    if suffix == "mp4" and find_spec("imageio_ffmpeg") is None:
        raise InputError("--mp4 needs `pip install imageio-ffmpeg`; --gif needs nothing more")


def _in_tiles(args: argparse.Namespace, model: Any) -> tuple[Any, Any]:
    """Let a model run in tiles if it should.

    Return its progress bar, or None, and a context in which grids are on the right device.
    """
    import jax
    from tqdm import tqdm

    side = args.tile
    if side is None and (args.size or 0) > _WHOLE and hasattr(model, "in_tiles"):
        side = _TILE
    if side is None:
        return None, nullcontext()
    if not hasattr(model, "in_tiles"):
        raise InputError("--tile: the cells of this system attend to each other; leave it out")
    total = args.steps * args.size**2 if args.size else None
    bar = tqdm(total=total, desc="running", unit=" cell-steps", unit_scale=True)
    model.in_tiles(side, bar.update)
    return bar, jax.default_device(jax.local_devices(backend="cpu")[0])


def _write(args: argparse.Namespace, frames: Iterable[np.ndarray], *, progress: bool) -> list[Path]:
    """Write the frames to the files that were asked for, else to run.gif; return their paths."""
    from tqdm import tqdm

    from nca_models import render

    paths = {suffix: getattr(args, suffix) for suffix in _OUTPUTS if getattr(args, suffix)}
    paths = paths or {"gif": args.folder / "run.gif"}
    size = lambda frame: args.scale or render.scale_of(frame)
    smaller = lambda frame: render.scaled(frame, min(size(frame), Fraction(1)))
    larger = lambda frame: render.scaled(frame, max(size(frame), Fraction(1)))
    count = 1 + math.ceil(args.steps / args.every)
    bar = tqdm(frames, total=count, desc="running", unit="frame", disable=not progress)
    with bar as shown:
        if list(paths) == ["png"]:  # a few of the frames
            indices = set(render.spread(count))
            film: Any = [smaller(frame) for i, frame in enumerate(shown) if i in indices]
        else:  # frames go to disk as they come, unless several files want them
            film = map(smaller, shown)
            film = film if len(paths) == 1 else list(film)
        for suffix in paths.keys() - {"png"}:
            render.save_film(paths[suffix], map(larger, film), args.fps)
        if "png" in paths:
            render.save_png(paths["png"], render.strip([larger(frame) for frame in film], gap=8))
    return list(paths.values())
