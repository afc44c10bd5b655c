"""Settings as options of `nca train`: each setting that names a flag, of all systems."""

import argparse
from dataclasses import Field, fields
from typing import Any

from nca_models import systems
from nca_models.cli.common import above_zero, whole

_PREFIX = "setting "  # of the options' names in the parsed arguments, apart from all others


def add_settings(group: Any) -> None:
    """Add the options to a group of a parser; a setting of several systems is a single option.

    Raises:
        InvalidSystem: a system's flag clashes with another one.
    """
    names = systems.names()
    declared: dict[str, dict[str, Field[Any]]] = {}  # setting -> system -> its declaration
    for system in names:
        for setting in fields(systems.settings(system)):
            if setting.metadata.get("flag"):
                declared.setdefault(setting.name, {})[system] = setting
    for name, declarations in declared.items():
        users = ", ".join(declarations)
        note = "" if len(declarations) == len(names) else f"; only for {users}"
        try:
            _add(group, name, list(declarations.values()), note)
        except (argparse.ArgumentError, ValueError) as error:
            raise systems.InvalidSystem(f"setting {name} of {users}: {error}") from error


def add_setting(parser: Any, name: str, flag: str, **options: Any) -> None:
    """Add an option for one setting; `options` are those of `add_argument`."""
    parser.add_argument(flag, dest=_PREFIX + name, **options)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings among parsed arguments; None where there was no option."""
    options = vars(args).items()
    return {
        name.removeprefix(_PREFIX): value for name, value in options if name.startswith(_PREFIX)
    }


def _add(group: Any, name: str, declarations: list[Field[Any]], note: str) -> None:
    """Add the option of a setting, which one or more systems declare."""
    first = declarations[0].metadata
    lowest = min(each.metadata["lowest"] for each in declarations)
    types = {"int": (whole(lowest), "N"), "float": (above_zero, "X"), "str": (str, None)}
    kinds = {(_type_name(each), each.metadata["flag"]) for each in declarations}
    if len(kinds) > 1:
        raise ValueError("the systems declare different types or flags")
    ((type_name, flag),) = kinds
    if type_name not in types:
        raise ValueError(f"{flag} cannot be of type {type_name}, only of {', '.join(types)}")
    parse, metavar = types[type_name]
    texts = dict.fromkeys(each.metadata["help"] for each in declarations)
    add_setting(
        group,
        name,
        flag,
        type=parse,
        metavar=first["metavar"] or metavar,
        choices=first["choices"],
        help=("; ".join(texts) + note).replace("%", "%%"),
    )


def _type_name(setting: Field[Any]) -> str:
    """The name of a setting's type, without `| None`."""
    name = setting.type.__name__ if isinstance(setting.type, type) else str(setting.type)
    return name.removesuffix(" | None")
