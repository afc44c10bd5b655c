"""What the commands share: errors, types of arguments, and checks of arguments."""

import argparse
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from nca_models import systems

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


def whole(lowest: int) -> Callable[[str], int]:
    """Return an argument type: whole numbers from `lowest`."""

    def parse(text: str) -> int:
        if text.removeprefix("-").isdecimal() and int(text) >= lowest:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")

    return parse


def above_zero(text: str) -> float:
    """Parse an argument that is a number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


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
    try:
        systems.settings(system).check_target(system, target)
    except ValueError as error:
        raise InputError(str(error)) from error


def check_not_a_file(folder: Path) -> None:
    """Refuse a file where `--out` is to be a folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; give a folder, which is made if absent")


def check_backend(name: str | None) -> None:
    """Refuse a backend that does not exist or is not available here."""
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


def print_metrics(measured: str, metrics: dict[str, float]) -> None:
    """Print what a trained model measures."""
    print(f"\n{measured}")
    for name, value in metrics.items():
        print(f"  {value:6.2f}  {name}")
