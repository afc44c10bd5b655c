"""`nca eval`: measure a trained system."""

import argparse
from pathlib import Path

from nca_models import run_folder, systems
from nca_models.cli.common import Commands, check_backend_of_run, print_metrics


def add(commands: Commands) -> None:
    """Add the command."""
    evaluate = commands.add_parser("eval", help="measure a trained system")
    evaluate.add_argument("system", choices=systems.names(), help="what was trained")
    evaluate.add_argument("folder", metavar="DIR", type=Path, help="folder of its run")
    evaluate.add_argument("--backend", metavar="NAME", help="default: the run's own")
    evaluate.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    settings = run_folder.require(args.folder, args.system)
    check_backend_of_run(args.backend, settings)

    from nca_models import demo
    from nca_models.training import trainer

    system = run_folder.load(args.folder, args.backend)
    model = trainer.trained_model(system, args.folder)
    print_metrics(system.measured, demo.measure(system, model, args.folder))
    return 0
