"""`nca train` and `nca demo`: train a system, write pictures and print measurements."""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nca_models import run_folder, systems
from nca_models.cli.common import (
    Commands,
    InputError,
    check_backend,
    check_not_a_file,
    check_target,
    command,
    fail,
    fail_to_write,
    path_word,
    print_metrics,
    whole,
)
from nca_models.cli.settings import add_setting, add_settings, chosen

if TYPE_CHECKING:
    from nca_models.training.split import Split

_EPILOG = """\
examples:
  {examples}

Ctrl-C saves a checkpoint and says how to resume; a run that was killed resumes as well, and ends
with the same bits as one left alone. DIR receives config.json, what is learned (such as
target.png), log.csv, checkpoints/ and, at the end, pictures. The column `unmoved` of log.csv
counts the steps for which the loss has not moved.
"""


def demo_system() -> str:
    """Return the name of the system that `nca demo` trains."""
    return systems.names("demo")[0]


def add(commands: Commands) -> None:
    """Add `nca train`."""
    names = systems.names()
    examples = [line for name in names for line in systems.settings(name).examples]
    train = commands.add_parser(
        "train",
        help="train a system",
        epilog=_EPILOG.format(examples="\n  ".join(examples)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("system", choices=names, help="what to train")
    train.add_argument(
        "--target", "--data-dir", metavar="FILE|EMOJI|DIR", help=f"what to learn: {_targets(names)}"
    )
    train.add_argument(
        "--preset", choices=systems.PRESET_NAMES, help="settings to start from (default: small)"
    )
    train.add_argument("--out", metavar="DIR", type=Path, help="folder of the run, made if absent")
    train.add_argument(
        "--estimate", action="store_true", help="only say what memory and time it will take"
    )
    _add_resume_and_tensorboard(train)
    settings = train.add_argument_group("settings", "The preset says those that are not given.")
    _add_devices(train)
    add_settings(settings)
    train.set_defaults(run=_train)


def add_demo(commands: Commands) -> None:
    """Add `nca demo`."""
    demo = commands.add_parser(
        "demo", help="train on the packaged picture and show what comes of it"
    )
    demo.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("nca-demo"), help="default: nca-demo"
    )
    text = "training steps (default: the preset's)"
    add_setting(demo, "num_train_steps", "--steps", type=whole(1), metavar="N", help=text)
    _add_resume_and_tensorboard(demo)
    split = dict.fromkeys(("mesh", "coordinator", "processes", "process_id"))
    demo.set_defaults(run=_demo, **split)


def _targets(names: list[str]) -> str:
    """What each system can learn, in one phrase for all systems that learn the same."""
    learners: dict[str, list[str]] = {}
    for name in names:
        if text := systems.settings(name).target_help:
            learners.setdefault(text, []).append(name)
    texts = (f"for {', '.join(users)}, {text}" for text, users in learners.items())
    return "; ".join(texts).replace("%", "%%")


def _add_resume_and_tensorboard(command: argparse.ArgumentParser) -> None:
    command.add_argument("--resume", action="store_true", help="continue the run in DIR")
    command.add_argument(
        "--tensorboard", action="store_true", help="log to DIR/tensorboard as well"
    )


def _add_devices(train: argparse.ArgumentParser) -> None:
    devices = train.add_argument_group("several devices")
    devices.add_argument(
        "--mesh",
        metavar="AXES",
        help="devices along the batch (data) and the dims of the grid (x, y, z), as in data=2,x=4",
    )
    devices.add_argument(
        "--coordinator",
        metavar="HOST:PORT|auto",
        help="address of the first of several processes; auto: as the cluster's environment says",
    )
    devices.add_argument("--processes", type=whole(1), metavar="N", help="number of processes")
    devices.add_argument(
        "--process-id", type=whole(0), metavar="I", help="number of this process, from 0"
    )


def _train(args: argparse.Namespace) -> int:
    request = run_folder.Request(args.system, args.preset, args.target, chosen(args))
    if args.estimate:
        return _estimate(request, _split(args))
    if args.out is None:
        raise InputError("--out is needed: the folder of the run; see `nca train --help`")
    resume = command("train", args.system, *_resuming(args))
    return _train_and_show(args, request, resume, compare=False)


def _demo(args: argparse.Namespace) -> int:
    request = run_folder.Request(demo_system(), None, None, chosen(args))
    return _train_and_show(args, request, command("demo", *_resuming(args)), compare=True)


def _resuming(args: argparse.Namespace) -> list[str]:
    """The options that continue a run as it was started."""
    words = ["--out", path_word(args.out), "--resume"]
    words += ["--tensorboard"] if args.tensorboard else []
    for option in ("--mesh", "--coordinator", "--processes", "--process-id"):
        value = getattr(args, option[2:].replace("-", "_"))
        words += [] if value is None else [option, str(value)]
    return words


def _estimate(request: run_folder.Request, split: "Split | None") -> int:
    """Print what a training will take; it is set up in a temporary folder."""
    check_target(request.system, request.target)
    check_backend(request.settings.get("backend"))
    with TemporaryDirectory() as folder:
        system = _open(Path(folder), request)

        from nca_models.training import estimate, trainer

        needs = estimate.estimate(trainer.Trainer(system, split))
    print(f"{request.system}, preset {request.preset or 'small'}")
    for line in needs.lines():
        print(f"  {line}")
    return 0 if needs.seconds is not None else fail("it does not fit into memory", 2)


def _train_and_show(
    args: argparse.Namespace, request: run_folder.Request, resume: str, *, compare: bool
) -> int:
    """Train, write pictures and print measurements."""
    folder: Path = args.out
    _check(args, request)
    split = _split(args)
    check_backend(request.settings.get("backend"))
    if run_folder.exists(folder):
        backend = run_folder.require(folder)["backend"]
        check_backend(backend, "a resumed run keeps its backend,")
    first = split is None or split.first_process
    if first:
        _open(folder, request)
    if split is not None:
        split.wait("the run's folder")
    system = run_folder.load(folder)

    from nca_models.training import diagnosis, trainer

    steps = system.config.num_train_steps
    if first:
        print(f"training {request.system} for {steps} steps, in {folder}", flush=True)
    try:
        model = trainer.train(system, folder, tensorboard=args.tensorboard, split=split)
    except trainer.Interrupted as stop:
        return fail(f"{stop}, and saved; continue with: {resume}", 128 + stop.signum)
    except trainer.Diverged as error:
        return fail(f"{error}, with --learning-rate X and another --out", 1)
    except OSError as error:
        return fail_to_write(error, resume)
    except trainer.ProcessLost as error:
        fail(f"another process is gone ({error}); once all have stopped, run: {resume}", 1)
        os._exit(1)  # an orderly exit of JAX would wait for the lost process
    if first:
        try:
            _show(system, model, folder, compare=compare)
        except OSError as error:
            return fail_to_write(error, resume)
        if ailment := diagnosis.diagnose(system, folder):
            code = fail(ailment.line, 1)
            return code if ailment.dead else 0
    return 0


def _show(system: systems.System, model: Any, folder: Path, *, compare: bool) -> None:
    """Write pictures; print metrics, the backends' speed (with `compare`) and the files."""
    from nca_models import demo

    metrics, paths = demo.show(system, model, folder)
    print_metrics(system.measured, metrics)
    if compare:
        print('\nspeed of backend "auto" against the same rollouts of plain JAX', flush=True)
        print('(backend "reference", which recomputes each step in the backward) ...', flush=True)
        ratios = demo.speedup(system, model, folder)
        for name, ratio in ratios.items():
            print(f"  {name}: {ratio:.1f} times faster")
    print(f"\nfiles in {folder}")
    for path in paths:
        print(f"  {path.relative_to(folder)}")
    place, film = path_word(folder), path_word(folder / "run.gif")
    options = ("--steps", 600, "--damage", "circle", "--gif", film)
    print(f"\nnow try: {command('run', place, *options)}")


def _check(args: argparse.Namespace, request: run_folder.Request) -> None:
    """Refuse impossible requests before JAX starts."""
    folder: Path = args.out
    check_not_a_file(folder)
    if run_folder.exists(folder) and not args.resume:
        raise InputError(
            f"--out {folder}: holds a run already; add --resume to continue it, or choose "
            "another folder"
        )
    if args.resume and not run_folder.exists(folder) and not run_folder.interrupted(folder):
        raise InputError(f"--out {folder}: holds no run to resume; leave out --resume to start one")
    check_target(request.system, request.target)
    if args.tensorboard and find_spec("tensorboardX") is None:
        raise InputError("--tensorboard needs `pip install tensorboardX`")


def _split(args: argparse.Namespace) -> "Split | None":
    """Connect with the other processes and make the mesh; return None without --mesh."""
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


def _open(folder: Path, request: run_folder.Request) -> systems.System:
    """Start or reopen the run in `folder`."""
    try:
        return run_folder.open_run(folder, request)
    except OSError as error:
        error.filename = f"--out {folder}"
        raise
