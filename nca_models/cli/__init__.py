"""The command `nca`: train, demo, run, eval, sweep, bench, doctor; a module here for each.

Arguments are checked before JAX starts. Wrong input prints one line on stderr and exits with code
2. A disk that is full and a training that diverges or dies exit with 1, and a training that a
signal ends with 128 plus its number.
"""

import argparse
import os
import sys

from nca_models import _require, data, run_folder, systems
from nca_models.cli import bench, doctor, evaluate, run, sweep, train
from nca_models.cli.common import InputError, Parser, fail, fail_to_write

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
        sys.stdout.flush()  # here, so that an output that is full is told like any other file
        return code
    except (InputError, data.DataError, run_folder.RunError, systems.InvalidSystem) as error:
        return fail(error, 2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, and wants no message
        return 141
    except OSError as error:
        return _fail_to_write(error)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except RuntimeError as error:
        kernels = sys.modules.get("nca_kernels")
        if kernels is None or not isinstance(error, kernels.BackendUnavailable):
            raise
        return fail(" ".join(str(error).split()), 2)


def _fail_to_write(error: OSError) -> int:
    """Print what could not be written; if that is the output, Python must not try again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return fail_to_write(error)


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
