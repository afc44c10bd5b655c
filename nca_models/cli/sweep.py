"""`nca sweep`: train a system with every combination of some settings' values, and compare."""

import argparse
from pathlib import Path

from nca_models import systems
from nca_models.cli.common import (
    Commands,
    check_backend,
    check_not_a_file,
    check_target,
    fail,
    fail_to_write,
    whole,
)
from nca_models.cli.settings import add_swept_settings, chosen


def add(commands: Commands) -> None:
    """Add the command."""
    sweep = commands.add_parser("sweep", help="train with many values of settings, and compare")
    sweep.add_argument("system", choices=systems.names(), help="what to train")
    sweep.add_argument(
        "--targets",
        "--textures",
        nargs="+",
        metavar="TARGET",
        help="what to learn, each as `nca train --target` takes it (default: as there)",
    )
    sweep.add_argument(
        "--preset",
        choices=systems.PRESET_NAMES,
        default="small",
        help="preset of all other settings (default: small)",
    )
    sweep.add_argument(
        "--seeds",
        type=whole(1),
        default=1,
        metavar="N",
        help="trainings of each combination (default: 1)",
    )
    sweep.add_argument(
        "--together",
        type=whole(1),
        metavar="N",
        help="how many models that differ only in seed and target train at once (default: as many "
        "as fit into memory)",
    )
    sweep.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="a sweep in it is continued"
    )
    add_swept_settings(
        sweep.add_argument_group("settings", "Every combination of the values is trained.")
    )
    sweep.set_defaults(run=_sweep)


def _sweep(args: argparse.Namespace) -> int:
    targets = args.targets or [systems.settings(args.system).default_target]
    for target in targets:
        check_target(args.system, target)
    check_not_a_file(args.out)
    settings = {name: tuple(values) for name, values in chosen(args).items()}
    for backend in settings.get("backend", ()):
        check_backend(backend)

    from nca_models import sweep
    from nca_models.training import trainer

    grid = sweep.Grid(
        system=args.system,
        targets=tuple(targets),
        settings=settings,
        seeds=args.seeds,
        preset=args.preset,
        together=args.together,
    )
    try:
        table, maps = sweep.sweep(grid, args.out)
    except trainer.Interrupted as stop:
        return fail(f"{stop}, and saved; the same command continues", 128 + stop.signum)
    except OSError as error:
        return fail_to_write(error, "the same command")
    print(table.read_text(encoding="utf-8"), end="")
    for path in maps:
        print(path)
    return 0
