"""The command `nca`: train, run, eval, sweep, bench, doctor, demo.

Arguments are checked before JAX starts. Wrong input is one line on stderr and exit code 2; a
training run that diverges is exit code 1; a signal is 128 plus its number.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

from nca_models import data, run_folder, systems
from nca_models.data import emoji, images, textures
from nca_models.training import DAMAGE_NAMES

if TYPE_CHECKING:
    from nca_models.systems import System
    from nca_models.training.split import Split

_EXAMPLES = """\
examples:
  nca demo                                     train on the packaged picture and show the result
  nca train growing --target cat.png --out cat   grow any picture
  nca train attention --out digits             complete masked digits; see `nca train --help`
  nca train growing --out cat --resume         continue where it stopped or was killed
  nca run cat --steps 400 --damage half --gif cat.gif
  nca eval attention digits                    measure what was trained
  nca sweep dynamics --channels 8 16 --hidden 16 48 --out sweep   the motion of textures
  nca bench --quick                            this machine against CAX, jax-nca and PyTorch
  nca doctor                                   what is installed, and which backend runs

`nca COMMAND --help` explains a command's options.
"""
_TRAIN_EXAMPLES = """\
examples:
  nca train growing --target cat.png --out cat
  nca train growing --target 🦎 --preset paper --out lizard
  nca train growing --out lizard --resume
  nca train diffusing --target cat.png --out cat-from-noise
  nca train self_autoencoding --out lattice
  nca train attention --data-dir mnist --preset paper --out digits
  nca train growing --preset paper --estimate   what it will take, before it starts

Ctrl-C saves a checkpoint and says how to resume; a run that was killed resumes as well, and ends
with the same bits as one left alone. DIR receives config.json, what is
learned (target.png or digits.npz), log.csv, checkpoints/ and, at the end, pictures.
"""
_RUN_EXAMPLES = """\
examples:
  nca run cat --steps 400 --damage half --gif cat.gif
  nca run cat --steps 1000 --every 10 --mp4 cat.mp4 --png strip.png
  nca run bricks --size 2048 --every 20 --mp4 wall.mp4
  nca run bricks --size 16384 --steps 64 --every 64 --png wall.png   out of the host's memory
"""


_TILE, _WHOLE = 1024, 4096  # side of a tile; of the largest grid that runs whole unless told to


class InputError(Exception):
    """Wrong input; the message is one line that says what to do."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code; `argv` is without the program's name."""
    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        return code
    except (InputError, data.DataError, run_folder.RunError) as error:
        return _fail(error, 2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, and wants no message
        return 141
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: object, code: int) -> int:
    print(f"nca: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="nca",
        description="Train, run and look at neural cellular automata.",
        epilog=_EXAMPLES,
        formatter_class=form,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    train = commands.add_parser(
        "train", help="train a system", epilog=_TRAIN_EXAMPLES, formatter_class=form
    )
    train.add_argument("system", choices=systems.names(), help="what to train")
    train.add_argument(
        "--target",
        "--data-dir",
        metavar="FILE|EMOJI|DIR",
        help="what to learn: an image file or an emoji (default: the packaged butterfly); for "
        "digits, a folder with MNIST's files (default: scikit-learn's digits); for dynamics, an "
        "image file, DTD/NAME with DTD that dataset's folder, brick (default), grass or gravel",
    )
    train.add_argument(
        "--preset", choices=systems.PRESET_NAMES, help="settings to start from (default: small)"
    )
    train.add_argument("--out", metavar="DIR", type=Path, help="folder of the run, made if absent")
    train.add_argument(
        "--estimate", action="store_true", help="only say what memory and time it will take"
    )
    for name, (kind, metavar, text) in _SETTINGS.items():
        flag = "--" + _FLAGS.get(name, name).replace("_", "-")
        choices = DAMAGE_NAMES if name == "damage" else None
        train.add_argument(flag, dest=name, type=kind, metavar=metavar, choices=choices, help=text)
    devices = train.add_argument_group("several devices")
    devices.add_argument(
        "--mesh",
        metavar="AXES",
        help="devices along the batch (data) and the dims of the grid (x, y, z), as in data=2,x=4",
    )
    devices.add_argument(
        "--coordinator",
        metavar="HOST:PORT|auto",
        help="of several processes: where the first one is, or as the cluster's environment says",
    )
    devices.add_argument("--processes", type=_whole(1), metavar="N", help="how many there are")
    devices.add_argument("--process-id", type=_whole(0), metavar="I", help="this one, from 0")
    train.set_defaults(run=_train)

    demo = commands.add_parser(
        "demo", help="train on the packaged picture and show what comes of it"
    )
    demo.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("nca-demo"), help="default: nca-demo"
    )
    demo.add_argument(
        "--steps",
        dest="num_train_steps",
        type=_whole(1),
        metavar="N",
        help="training steps (default: the preset's)",
    )
    demo.set_defaults(run=_demo, mesh=None, coordinator=None)
    for command in (train, demo):
        command.add_argument("--resume", action="store_true", help="continue the run in DIR")
        command.add_argument(
            "--tensorboard", action="store_true", help="log to DIR/tensorboard as well"
        )

    run = commands.add_parser(
        "run", help="run a trained system and film it", epilog=_RUN_EXAMPLES, formatter_class=form
    )
    run.add_argument("folder", metavar="DIR", type=Path, help="folder of a run, from `nca train`")
    run.add_argument("--steps", type=_whole(1), default=400, metavar="N", help="default: 400")
    run.add_argument(
        "--damage", choices=DAMAGE_NAMES, default="none", help="what to clear (default: none)"
    )
    run.add_argument(
        "--damage-at", type=_whole(0), metavar="N", help="after which step (default: half way)"
    )
    run.add_argument(
        "--every", type=_whole(1), default=2, metavar="N", help="steps a frame (default: 2)"
    )
    run.add_argument("--fps", type=_whole(1), default=20, metavar="N", help="frames a second")
    run.add_argument(
        "--scale",
        type=_scale,
        metavar="N|1/N",
        help="pixels a cell; 1/N: cells a pixel (default: 8, less for large grids)",
    )
    run.add_argument(
        "--size", type=_whole(1), metavar="N", help="side of the grid (default: as trained)"
    )
    run.add_argument(
        "--tile",
        type=_whole(1),
        metavar="N",
        help="keep the grid in the host's memory and run it in tiles of so many cells a side, so "
        f"that it need not fit on a device (default: {_TILE}, of grids above {_WHOLE} a side)",
    )
    run.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of the fire masks")
    run.add_argument("--backend", metavar="NAME", help="default: the run's own")
    for suffix, text in (("gif", "film"), ("mp4", "film"), ("png", "strip of frames over time")):
        run.add_argument(f"--{suffix}", type=Path, metavar="FILE", help=f"write a {text}")
    run.set_defaults(run=_run)

    evaluate = commands.add_parser("eval", help="measure a trained system")
    evaluate.add_argument("system", choices=systems.names(), help="what was trained")
    evaluate.add_argument("folder", metavar="DIR", type=Path, help="folder of its run")
    evaluate.add_argument("--backend", metavar="NAME", help="default: the run's own")
    evaluate.set_defaults(run=_eval)

    sweep = commands.add_parser("sweep", help="train many models of dynamics and map their motion")
    sweep.add_argument("system", choices=systems.LEARNS_TEXTURE, help="what to train")
    for name, text in (("channels", "C"), ("hidden", "D")):
        sweep.add_argument(
            f"--{name}", type=_whole(3), nargs="+", required=True, metavar=text, help="some widths"
        )
    sweep.add_argument(
        "--textures",
        nargs="+",
        default=[textures.AT_HAND[0]],
        metavar="FILE|NAME",
        help="image files, DTD/NAME as for `nca train`, brick (default), grass, gravel",
    )
    sweep.add_argument("--preset", choices=systems.PRESET_NAMES, default="small")
    sweep.add_argument("--steps", type=_whole(1), metavar="N", help="training steps of each model")
    sweep.add_argument(
        "--seeds", type=_whole(1), default=1, metavar="N", help="trainings of each (default: 1)"
    )
    sweep.add_argument("--vgg16", metavar="FILE", help="as for `nca train`")
    sweep.add_argument(
        "--together",
        type=_whole(1),
        metavar="N",
        help="models of the same widths that train at once (default: as many as fit into memory)",
    )
    sweep.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="a sweep in it is continued"
    )
    sweep.set_defaults(run=_sweep)

    # Nothing is an option here: all goes to the command in benchmarks/, `--help` too.
    bench = commands.add_parser(
        "bench", help="time backends and peers on this machine", prefix_chars="\0", add_help=False
    )
    bench.add_argument("arguments", nargs="*")
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser("doctor", help="show versions, devices and backends")
    doctor.set_defaults(run=_doctor)
    return parser


def _whole(lowest: int) -> Any:
    """An argument type: whole numbers from `lowest`."""

    def parse(text: str) -> int:
        if text.removeprefix("-").isdecimal() and int(text) >= lowest:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")

    return parse


def _scale(text: str) -> Fraction:
    """An argument type: N or 1/N."""
    try:
        scale = Fraction(text)
    except (ValueError, ZeroDivisionError):
        scale = Fraction(0)
    if scale > 0 and 1 in (scale.numerator, scale.denominator):
        return scale
    raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor one over one")


def _above_zero(text: str) -> float:
    """An argument type: numbers above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


# Settings that `nca train` can change: name in the configuration -> (type, metavar, help).
_SETTINGS: dict[str, tuple[Any, str | None, str]] = {
    "num_train_steps": (_whole(1), "N", "training steps"),
    "seed": (_whole(0), "N", "of everything random (default: 0)"),
    "backend": (str, "NAME", "of nca_kernels; see `nca doctor` (default: auto)"),
    "batch_size": (_whole(1), "N", "samples a training step"),
    "pool_size": (_whole(0), "N", "samples kept between training steps"),
    "learning_rate": (_above_zero, "X", "of Adam, at the start"),
    "checkpoint_every": (_whole(1), "N", "training steps between checkpoints"),
    "target_size": (_whole(1), "N", "side of the picture or digit, in cells"),
    "padding": (_whole(0), "N", "empty cells on each side of a picture"),
    "damage": (str, None, "how samples are damaged"),
    "vgg16": (str, "FILE", "weights of a VGG16 (.pth, .npz, .h5) to compare textures by"),
    "damaged_per_batch": (_whole(0), "N", "how many samples of a batch are damaged"),
}
_FLAGS = {"num_train_steps": "steps", "target_size": "size"}  # shorter names


def _train(args: argparse.Namespace) -> int:
    settings = {name: getattr(args, name) for name in _SETTINGS}
    request = run_folder.Request(args.system, args.preset, args.target, settings)
    if args.estimate:
        return _estimate(request, _split(args))
    if args.out is None:
        raise InputError("--out is needed: the folder of the run; see `nca train --help`")
    resume = f"nca train {args.system} --out {args.out} --resume"
    if args.mesh:
        resume += f" --mesh {args.mesh}"
    return _train_and_show(args, request, resume, compare=False)


def _demo(args: argparse.Namespace) -> int:
    settings = {"num_train_steps": args.num_train_steps}
    request = run_folder.Request("growing", None, None, settings)
    return _train_and_show(args, request, f"nca demo --out {args.out} --resume", compare=True)


def _train_and_show(
    args: argparse.Namespace, request: run_folder.Request, resume: str, *, compare: bool
) -> int:
    """Train, write pictures and print what came of it."""
    folder: Path = args.out
    _check_new(folder, args.resume)
    _check_target(request.system, request.target)
    if args.tensorboard and find_spec("tensorboardX") is None:
        raise InputError("--tensorboard needs `pip install tensorboardX`")
    split = _split(args)
    _check_backend(request.settings.get("backend"))
    first = split is None or split.first_process
    if first:
        _open(folder, request)
    if split is not None:
        split.wait("the run's folder")
    system = run_folder.load(folder)

    from nca_models import demo
    from nca_models.training import trainer

    steps = system.config.num_train_steps
    if first:
        print(f"training {request.system} for {steps} steps, in {folder}", flush=True)
    try:
        model = trainer.train(system, folder, tensorboard=args.tensorboard, split=split)
    except trainer.Interrupted as stop:
        return _fail(f"{stop}, and saved; continue with: {resume}", 128 + stop.signum)
    except trainer.Diverged as error:
        return _fail(f"{error}, with --learning-rate X and another --out", 1)
    except trainer.ProcessLost as error:
        _fail(f"another process is gone ({error}); once all have stopped, run: {resume}", 1)
        os._exit(1)  # leaving JAX in order would wait for the lost one
    if not first:
        return 0
    metrics, paths = demo.show(system, model, folder)
    _print_metrics(system.measured, metrics)
    if compare:
        print('\nspeed of backend "auto" against the same rollouts of plain JAX', flush=True)
        print('(backend "reference", which recomputes each step in the backward) ...', flush=True)
        ratios = demo.speedup(system, model, folder)
        for name, ratio in ratios.items():
            print(f"  {name}: {ratio:.1f} times faster")
    print(f"\nfiles in {folder}")
    for path in paths:
        print(f"  {path.relative_to(folder)}")
    print(f"\nnow try: nca run {folder} --steps 600 --damage circle --gif {folder / 'run.gif'}")
    return 0


def _split(args: argparse.Namespace) -> "Split | None":
    """Connect with the other processes, and lay the mesh out; None without --mesh."""
    if args.coordinator is not None and args.mesh is None:
        raise InputError("--coordinator: several processes need --mesh, as in --mesh data=2,x=4")
    if args.mesh is None:
        return None
    both = args.processes is not None and args.process_id is not None
    if args.coordinator not in (None, "auto") and not both:
        raise InputError(f"--coordinator {args.coordinator}: needs --processes and --process-id")

    from nca_models.training import split

    try:
        sizes = split.parse(args.mesh)
        if args.coordinator is not None:
            split.join(args.coordinator, args.processes, args.process_id)
        return split.make(sizes)
    except ValueError as error:
        raise InputError(f"--mesh: {error}") from error


def _estimate(request: run_folder.Request, split: "Split | None") -> int:
    """Say what a training will take; it is set up in a folder that is removed again."""
    _check_target(request.system, request.target)
    _check_backend(request.settings.get("backend"))
    with TemporaryDirectory() as folder:
        system = _open(Path(folder), request)

        from nca_models.training import estimate, trainer

        found = estimate.estimate(trainer.Trainer(system, split))
    print(f"{request.system}, preset {request.preset or 'small'}")
    for line in found.lines():
        print(f"  {line}")
    return 0 if found.seconds is not None else _fail("it does not fit into memory", 2)


def _print_metrics(measured: str, metrics: dict[str, float]) -> None:
    print(f"\n{measured}")
    for name, value in metrics.items():
        print(f"  {value:6.2f}  {name}")


def _eval(args: argparse.Namespace) -> int:
    run_folder.require(args.folder, args.system)
    _check_backend(args.backend)

    from nca_models import demo
    from nca_models.training import trainer

    system = run_folder.load(args.folder, args.backend)
    model = trainer.trained_model(system, args.folder)
    _print_metrics(system.measured, demo.measure(system, model, args.folder))
    return 0


def _sweep(args: argparse.Namespace) -> int:
    for texture in args.textures:
        _check_target(args.system, texture)
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out}: is a file; give a folder, which is made if absent")

    from nca_models import sweep
    from nca_models.training import trainer

    grid = sweep.Grid(
        textures=tuple(args.textures),
        channels=tuple(args.channels),
        hidden=tuple(args.hidden),
        seeds=args.seeds,
        preset=args.preset,
        steps=args.steps,
        vgg16=args.vgg16,
        together=args.together,
    )
    try:
        table = sweep.sweep(grid, args.out)
    except trainer.Interrupted as stop:
        return _fail(f"{stop}, and saved; the same command continues", 128 + stop.signum)
    print(table.read_text(encoding="utf-8"), end="")
    for path in sorted(args.out.glob("motion*.png")):
        print(path)
    return 0


def _open(folder: Path, request: run_folder.Request) -> "System":
    """Start or reopen the run in `folder`."""
    try:
        if run_folder.exists(folder):
            return run_folder.resume(folder, request)
        return run_folder.create(folder, request)
    except (data.DataError, run_folder.RunError):
        raise
    except (ValueError, TypeError) as error:  # an impossible setting
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written to ({error.strerror})") from error


def _check_new(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; give a folder, which is made if absent")
    if run_folder.exists(folder) and not resume:
        raise InputError(
            f"--out {folder}: holds a run already; add --resume to continue it, or choose "
            "another folder"
        )
    if resume and not run_folder.exists(folder) and not run_folder.interrupted(folder):
        raise InputError(f"--out {folder}: holds no run to resume; leave out --resume to start one")


def _check_target(system: str, target: str | None) -> None:
    """Refuse a bad file or folder now; an emoji may need the network, so that comes later."""
    if target is None:
        return
    if system in systems.LEARNS_DIGITS:
        if not Path(target).is_dir():
            raise InputError(f"--data-dir {target}: {system} wants a folder with MNIST's files")
    elif system in systems.LEARNS_TEXTURE:
        if target in textures.AT_HAND:
            return
        path = textures.find(target)
        if path is None:
            known = ", ".join(textures.AT_HAND)
            raise InputError(f"--target {target}: no such file, and not one of {known}")
        images.open_rgba(path)
    elif Path(target).exists() or not emoji.is_emoji(target):
        images.open_rgba(Path(target))


def _check_backend(name: str | None) -> None:
    if name in (None, "auto"):
        return
    import nca_kernels as nk

    rows = {row.name: row for row in nk.backends()}
    if name not in rows:
        raise InputError(f"--backend {name}: no such backend; choose auto, {', '.join(rows)}")
    if not rows[name].available:
        raise InputError(
            f"--backend {name}: not available here ({rows[name].reason}); leave it out, or see "
            "`nca doctor`"
        )


def _run(args: argparse.Namespace) -> int:
    outputs = {"gif": args.gif, "mp4": args.mp4, "png": args.png}
    for suffix, path in outputs.items():
        _check_output(suffix, path)
    damage_at = args.steps // 2 if args.damage_at is None else args.damage_at
    if args.damage_at is not None and args.damage_at > args.steps:
        raise InputError(f"--damage-at {damage_at}: is after the last step, --steps {args.steps}")
    if args.damage_at is not None and args.damage == "none":
        raise InputError(f"--damage-at {damage_at}: says when, so --damage must say what")
    if not run_folder.exists(args.folder):
        run_folder.load(args.folder)  # raises, before anything heavy
    _check_backend(args.backend)

    system = run_folder.load(args.folder, args.backend, args.size)

    from tqdm import tqdm

    from nca_models import filming, render
    from nca_models.training import trainer

    model = trainer.trained_model(system, args.folder)
    count = filming.number_of_frames(args.steps, args.every)
    bar, place = _in_tiles(args, model)
    if not any(outputs.values()):
        outputs["gif"] = args.folder / "run.gif"
    written = {suffix: path for suffix, path in outputs.items() if path is not None}
    scale = lambda frame: args.scale or render.scale_of(frame)
    smaller = lambda frame: render.scaled(frame, min(scale(frame), Fraction(1)))
    larger = lambda frame: render.scaled(frame, max(scale(frame), Fraction(1)))
    with place, bar or nullcontext():
        frames = system.frames(
            model,
            args.steps,
            every=args.every,
            damage=args.damage,
            damage_at=damage_at,
            seed=args.seed,
        )
        shown = frames if bar else tqdm(frames, total=count, desc="running", unit="frame")
        if list(written) == ["png"]:  # a few of the frames
            kept = set(render.spread(count))
            film: Any = [smaller(frame) for i, frame in enumerate(shown) if i in kept]
        else:  # frames go to disk as they come, unless several files want them
            film = map(smaller, shown)
            film = film if len(written) == 1 else list(film)
        for suffix in written.keys() - {"png"}:
            render.save_film(written[suffix], map(larger, film), args.fps)
        if "png" in written:
            render.save_png(written["png"], render.strip([larger(f) for f in film], gap=8))
    for path in written.values():
        print(path)
    return 0


def _in_tiles(args: argparse.Namespace, model: Any) -> tuple[Any, Any]:
    """Have a model run in tiles, if it is to: the bar of its progress, the place of its grids."""
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


def _bench(args: argparse.Namespace) -> int:
    """Start the suite, which is in the repository and not in the package."""
    import subprocess

    root = Path(__file__).parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise InputError(
            "nca bench needs the repository, which has the suite and its results: clone it and "
            "`pip install -e '.[models,test,peers]'` there"
        )
    if find_spec("pytest") is None:
        raise InputError("nca bench needs pytest: pip install 'nca-kernels[models,test,peers]'")
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", *args.arguments]
    suite = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    while True:
        try:
            return suite.wait()
        except KeyboardInterrupt:  # the suite has it too, and ends in order
            continue


_PACKAGES = ("nca-kernels", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")
_OPTIONAL = ("imageio-ffmpeg", "tensorboardX", "triton")


def _doctor(args: argparse.Namespace) -> int:
    import platform

    import jax

    import nca_kernels as nk

    print(f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs")
    print("\npackages")
    for name in _PACKAGES + _OPTIONAL:
        print(f"  {name:18} {_version(name)}")
    print(f"\ndevices, the default one being {jax.default_backend()}")
    for device in jax.devices():
        print(f"  {device}  {device.device_kind}")
    rows = nk.backends()
    print("\nbackends")
    for row in rows:
        print(f"  {row.name:10} {'available' if row.available else 'no: ' + row.reason}")
    chosen = [row.name for row in rows if row.auto]
    print(f'\n"auto" picks: {", ".join(chosen) or "nothing"}')
    return 0


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
