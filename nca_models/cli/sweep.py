"""`nca sweep`: train models of many widths and map their motion."""

import argparse
from pathlib import Path

from nca_models import systems
from nca_models.cli.common import Commands, check_not_a_file, check_target, fail, whole
from nca_models.data import textures


def add(commands: Commands) -> None:
    """Add the command."""
    sweep = commands.add_parser("sweep", help="train models of many widths and map their motion")
    sweep.add_argument("system", choices=systems.names("sweep"), help="what to train")
    for name, metavar, text in (
        ("channels", "C", "channels of the state"),
        ("hidden", "D", "widths of the hidden layer"),
    ):
        sweep.add_argument(
            f"--{name}", type=whole(3), nargs="+", required=True, metavar=metavar, help=text
        )
    sweep.add_argument(
        "--textures",
        nargs="+",
        default=[textures.AT_HAND[0]],
        metavar="FILE|NAME",
        help="image files, DTD/NAME as for `nca train`, brick (default), grass, gravel",
    )
    sweep.add_argument(
        "--preset",
        choices=systems.PRESET_NAMES,
        default="small",
        help="settings beside the widths (default: small)",
    )
    sweep.add_argument("--steps", type=whole(1), metavar="N", help="training steps of each model")
    sweep.add_argument(
        "--seeds", type=whole(1), default=1, metavar="N", help="trainings of each (default: 1)"
    )
    sweep.add_argument("--vgg16", metavar="FILE", help="as for `nca train`")
    sweep.add_argument(
        "--together",
        type=whole(1),
        metavar="N",
        help="models of the same widths that train at once (default: as many as fit into memory)",
    )
    sweep.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="a sweep in it is continued"
    )
    sweep.set_defaults(run=_sweep)


def _sweep(args: argparse.Namespace) -> int:
    for texture in args.textures:
        check_target(args.system, texture)
    check_not_a_file(args.out)

    from nca_models import sweep
    from nca_models.training import trainer

    grid = sweep.Grid(
        system=args.system,
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
        return fail(f"{stop}, and saved; the same command continues", 128 + stop.signum)
    print(table.read_text(encoding="utf-8"), end="")
    for path in sorted(args.out.glob("motion*.png")):
        print(path)
    return 0
