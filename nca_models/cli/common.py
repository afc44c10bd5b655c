"""What the commands share: errors, types of arguments, and checks of arguments."""

import argparse
import errno
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from nca_models import systems
from nca_models._files import reason

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(//|image/)")  # also data:image/png;base64,...
Commands = Any  # what `add_subparsers` returns, a class that argparse does not name


class InputError(Exception):
    """Wrong input; the message is one line that says what to do."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the error for `main` to print."""
        raise InputError(f"{message}; see `{self.prog} --help`")


def fail(message: object, code: int) -> int:
    """Print why the command fails, and return its exit code."""
    print(f"nca: {message}", file=sys.stderr)
    return code


# Errors that another argument would not avoid.
_MACHINE = (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENOMEM)


def fail_to_write(error: OSError, then: str = "") -> int:
    """Print that a file or folder could not be read or written, and return the exit code.

    `then` is the command that goes on once the cause is gone.
    """
    machine = error.errno in _MACHINE
    where = f"{error.filename}: " if error.filename else ""
    why = reason(error)
    full = any(os.strerror(number) in why for number in (errno.ENOSPC, errno.EDQUOT))
    cure = "make room there" if full else "mend that"
    if not machine:
        cure = "choose another place, or change its permissions"
    more = f", then continue with: {then}" if then else ""
    return fail(f"{where}{why}; {cure}{more}", 1 if machine else 2)


def command(*words: object) -> str:
    """Return the command `nca` with these arguments, so that a shell reads them."""
    texts = map(str, words)
    return shlex.join(["nca", *texts])


def path_word(path: Path) -> str:
    """Return a path as an argument, which must not look like an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def whole(lowest: int) -> Callable[[str], int]:
    """Return an argument type: whole numbers from `lowest`."""

    def parse(text: str) -> int:
        if text.removeprefix("-").isdecimal() and int(text) >= lowest:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")

    return parse


def number(*, zero_allowed: bool) -> Callable[[str], float]:
    """Return an argument type: finite numbers above 0, and 0 too if `zero_allowed`."""
    words = "of at least 0" if zero_allowed else "above 0"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and (value > 0 or (zero_allowed and value == 0)):
            return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {words}")

    return parse


def or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return an argument type: the word None, or what `parse` takes."""
    return lambda text: None if text == "None" else parse(text)


def scale(text: str) -> Fraction:
    """Parse an argument that is N or 1/N, for a whole number N."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value > 0 and 1 in (value.numerator, value.denominator):
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor one over one")


def check_target(system: str, target: str | None) -> None:
    """Refuse a target that the system cannot learn, before JAX starts."""
    if target is None:
        return
    config = systems.settings(system)
    if config.target_help and _ADDRESS.match(target) and not os.path.exists(target):
        raise InputError(
            f"--target {target[:80]}: addresses are not fetched: download it, and give the file"
        )
    try:
        config.check_target(system, target)
    except ValueError as error:
        raise InputError(str(error)) from error


def check_not_a_file(folder: Path) -> None:
    """Refuse a file where `--out` is to be a folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; give a folder, which is made if absent")


def check_backend(name: str | None, named_by: str = "--backend") -> None:
    """Refuse a backend that does not exist or is not available here.

    `named_by` says where the name comes from.
    """
    if name in (None, "auto"):
        return
    import nca_kernels as nk

    rows = {row.name: row for row in nk.backends()}
    if name not in rows:
        raise InputError(f"{named_by} {name}: no such backend; choose auto, {', '.join(rows)}")
    if not rows[name].available:
        raise InputError(
            f"{named_by} {name}: not available here ({rows[name].reason}); choose auto, or see "
            "`nca doctor`"
        )


def check_backend_of_run(name: str | None, settings: dict[str, Any]) -> None:
    """Refuse the backend of `--backend`, or else that of a run's settings, as `check_backend`."""
    if name is None:
        check_backend(settings["backend"], "without --backend NAME, that of the run is used,")
    check_backend(name)


def print_metrics(measured: str, metrics: dict[str, float]) -> None:
    """Print what a trained model measures."""
    print(f"\n{measured}")
    for name, value in metrics.items():
        print(f"  {value:6.2f}  {name}")
