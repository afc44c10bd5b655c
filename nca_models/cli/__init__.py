"""The command `nca`: train, demo, run, eval, sweep, bench, doctor; a module here for each.

Arguments are checked before JAX starts. Wrong input prints one line on stderr and exits with code
2, a training that diverges exits with 1, and one that a signal ends with 128 plus its number.
"""

import argparse
import sys

from nca_models import _require, data, run_folder, systems
from nca_models.cli import bench, doctor, evaluate, run, sweep, train
from nca_models.cli.common import InputError, Parser, fail

_require()
_ADDERS = (train.add, train.add_demo, run.add, evaluate.add, sweep.add, bench.add, doctor.add)
_EXAMPLES = """\
examples:
  nca demo   train on the packaged picture and show the result
  nca train {system} --target cat.png --out cat   grow any picture
  nca run cat --steps 400 --damage half --gif cat.gif
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code; `argv` is without the program's name."""
    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        return code
    except (InputError, data.DataError, run_folder.RunError, systems.InvalidSystem) as error:
        return fail(error, 2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, and wants no message
        return 141
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="nca",
        description="Train, run and look at neural cellular automata. `nca COMMAND --help` "
        "explains a command.",
        epilog=_EXAMPLES.format(system=train.demo_system()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for add in _ADDERS:
        add(commands)
    return parser
