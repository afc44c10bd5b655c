"""Items: what a child process finds out on a GPU, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

Facts = dict[str, Any]  # that can be written as JSON


class Skipped(Exception):
    """An item cannot be found out here; the message says why."""


class Refused(Exception):
    """The whole request cannot be met; the message says why, in a line."""


class Asked(NamedTuple):
    """What a parent asks of its children, told to them first.

    Attributes:
        backends: whose kernels, the first of them above all; empty for all that run here.
        tiny: sizes to try the command itself.
        any_device: whether JAX may run on something else than a GPU.
        out: folder for files of an item's own.
        device: whose packaged launches to compile for, when there is no device.
    """

    backends: tuple[str, ...] = ()
    tiny: bool = False
    any_device: bool = False
    out: str = ""
    device: str = ""


def listed(text: str, allowed: Collection[str], what: str = "--stages") -> list[str]:
    """The names in a text, separated by commas, in the order of ``allowed``.

    Raises:
        Refused: a name is not allowed.
    """
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in allowed]:
        raise Refused(f"{what}: there is no {', '.join(unknown)}, but {', '.join(allowed)}")
    return [name for name in allowed if name in names]


@dataclass(frozen=True)
class Item:
    """One thing to find out.

    Attributes:
        name: unique in its stage.
        run: yields facts as it finds them; they are put together. It raises what goes wrong:
            ``Skipped`` where nothing can be found out, anything else where a check fails.
        lower: lowers for CUDA, without a device, the programs of ``run`` that launch Triton
            kernels, whatever it raises on the way; None if there are none.
    """

    name: str
    run: Callable[[], Iterable[Facts]]
    lower: Callable[[], object] | None = None
