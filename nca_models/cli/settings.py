"""The systems' settings as options of `nca train` and `nca sweep`."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import Field, fields
from typing import Any

from nca_models import systems
from nca_models.cli.common import number, or_none, whole
from nca_models.training.config import option, optional, type_name

_PREFIX = "setting "  # tells settings from other options in the parsed arguments
_Declarations = dict[str, Field[Any]]  # system -> how it declares a setting


def add_settings(group: Any) -> None:
    """Add the options of `nca train`: of each setting that names its flag.

    Raises:
        InvalidSystem: a system's flag clashes with another one.
    """
    for name, declarations in _declared().items():
        flagged = {s: each for s, each in declarations.items() if each.metadata.get("flag")}
        if not flagged:
            continue
        try:
            _add(group, name, flagged)
        except (argparse.ArgumentError, ValueError) as error:
            users = ", ".join(flagged)
            raise systems.InvalidSystem(f"setting {name} of {users}: {error}") from error


def add_swept_settings(group: Any) -> None:
    """Add the options of `nca sweep`, which take several values: of each setting but the seed.

    A setting that cannot be an option, or that two systems declare in different ways, has none.
    """
    for name, declarations in _declared().items():
        if name != "seed":
            with suppress(argparse.ArgumentError, ValueError):
                _add(group, name, declarations, several=True)


def add_setting(parser: Any, name: str, flag: str, **options: Any) -> None:
    """Add an option for one setting; `options` are those of `add_argument`."""
    parser.add_argument(flag, dest=_PREFIX + name, default=argparse.SUPPRESS, **options)


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings in parsed arguments: those whose options were given."""
    options = vars(args).items()
    return {
        name.removeprefix(_PREFIX): value for name, value in options if name.startswith(_PREFIX)
    }


def _declared() -> dict[str, _Declarations]:
    """All settings by name; a setting of several systems is a single option."""
    declared: dict[str, _Declarations] = {}
    for system in systems.names():
        for setting in fields(systems.settings(system)):
            declared.setdefault(setting.name, {})[system] = setting
    return declared


def _add(group: Any, name: str, declarations: _Declarations, *, several: bool = False) -> None:
    """Add the option of a setting, with one value or, if `several`, with any number of them.

    Raises:
        ValueError: the setting cannot be an option; the message says why.
    """
    each_metadata = [each.metadata for each in declarations.values()]
    lowest = min(metadata.get("lowest", 1) for metadata in each_metadata)
    types: dict[str, tuple[Callable[[str], Any], str | None]] = {
        "int": (whole(lowest), "N"),
        "float": (number(zero_allowed=lowest == 0), "X"),
        "str": (str, None),
    }
    kinds = {(type_name(each), option(each)) for each in declarations.values()}
    if len(kinds) > 1:
        raise ValueError("the systems declare different types or flags")
    ((kind, flag),) = kinds
    if kind not in types:
        raise ValueError(f"{flag} cannot be of type {kind}, only of {', '.join(types)}")
    parse, metavar = types[kind]
    if several and any(map(optional, declarations.values())):
        parse = or_none(parse)
    texts = dict.fromkeys(metadata.get("help", "") for metadata in each_metadata)
    everywhere = len(declarations) == len(systems.names())
    note = "" if everywhere else f"; only for {', '.join(declarations)}"
    add_setting(
        group,
        name,
        flag,
        type=parse,
        metavar=each_metadata[0].get("metavar") or metavar,
        choices=each_metadata[0].get("choices"),
        help=("; ".join(texts) + note).replace("%", "%%"),
        nargs="+" if several else None,
    )
