"""Launch configurations of kernels: explicit > a device's winner > a heuristic.

Winners are files ``<device>.json``: packaged ones in ``nca_kernels/tuning/``, a user's own in
``NCA_TUNING_DIR`` (``~/.cache/nca-kernels/tuning`` if unset). Each maps a kernel and its problem
to a :class:`Launch`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from nca_kernels.files import write_json

PACKAGED = Path(__file__).parent / "tuning"
FOLDER = "NCA_TUNING_DIR"
TUNE = "NCA_TUNE"


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Args:
        tile: cells that a program works on at a time, (z, y, x); x a multiple of 16, all powers
            of two.
        rows: cells that go through the products at a time, a power of two from 16 on.
        block_h: hidden units at a time, a power of two from 16 on.
        programs: how many programs share the tiles of a call.
        warps, stages: of a program, as Triton counts them.
        registers: that a thread may use at most, so that more programs fit a multiprocessor; 0 for
            as many as the compiler takes.
        unroll: positions of the stencil in one turn of its loop.
        hoist_invariants: whether what a tile's blocks of rows have in common is computed once, and
            kept in registers.
        side_by_side: widest perception, in columns, whose filters go through products side by side
            as one block, instead of one by one.
        weights_in_shared_memory: most weights, as numbers, that a program keeps there, forward.
        contributions_by_tap: most contributions of a tile to the state, as numbers, that a program
            keeps tap by tap, backward. If there are more, or if taps are constant, it keeps the
            gradients of perceptions instead.
        weight_gradients_in_registers: whether a program keeps its gradients of the weights there,
            backward, where one block holds all hidden units.
    """

    tile: tuple[int, int, int] = (1, 16, 16)
    rows: int = 64
    block_h: int = 128
    programs: int = 264
    warps: int = 4
    stages: int = 2
    registers: int = 0
    unroll: int = 3
    hoist_invariants: bool = True
    side_by_side: int = 0
    weights_in_shared_memory: int = 0
    contributions_by_tap: int = 2**18
    weight_gradients_in_registers: bool = False


FIELDS = tuple(field.name for field in fields(Launch))


def user_folder() -> Path:
    """Where a user's own winners are."""
    folder = os.environ.get(FOLDER)
    return Path(folder) if folder else Path.home() / ".cache" / "nca-kernels" / "tuning"


def winner(device: str, kernel: str, problem: str) -> Launch | None:
    """The best known launch on ``device``: the user's, else the packaged one, else None.

    Raises:
        ValueError: as :func:`winner_of` does.
    """
    of_user = winner_of(user_folder(), device, kernel, problem)
    return of_user or winner_of(PACKAGED, device, kernel, problem)


def winner_of(folder: Path, device: str, kernel: str, problem: str) -> Launch | None:
    """What a folder's file for ``device`` has, or None.

    Raises:
        ValueError: the file's launch has a field that launches do not have.
    """
    path = folder / f"{file_name(device)}.json"
    entry = _read(path).get(kernel, {}).get(problem)
    if entry is None:
        return None
    if unknown := set(entry) - set(FIELDS):
        raise ValueError(
            f"{path} has a launch with {', '.join(sorted(unknown))}; launches have "
            f"{', '.join(FIELDS)}: remove the file, and tune again with {TUNE}=1"
        )
    return Launch(**{**entry, "tile": tuple(entry["tile"])})


def write_winner(device: str, kernel: str, problem: str, launch: Launch) -> Path:
    """Adds a winner to the user's file of the device, atomically; returns the file."""
    path = user_folder() / f"{file_name(device)}.json"
    content = {**_read(path)}
    content[kernel] = {**content.get(kernel, {}), problem: asdict(launch)}
    write_json(path, content, sort_keys=True)
    _read.cache_clear()
    return path


def file_name(device: str) -> str:
    """A device's name as JAX gives it, as a file's: ``NVIDIA H200`` to ``nvidia-h200``."""
    return device.lower().replace(" ", "-").replace("/", "-")


@cache
def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


# Launches that only a measurement can choose or reject: `make gpu` times them against the
# heuristic's. Each is to wait less for something, see docs/gpu.md.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "step_forward": {
        "three_programs": {"registers": 168, "programs": 396},
        "four_programs": {"registers": 128, "programs": 528, "hoist_invariants": False},
        "rows_128": {"rows": 128, "warps": 8, "programs": 132},
        # In 48 KB of shared memory, up to which JAX leaves the L1 cache its size.
        "weights_in_cache": {"weights_in_shared_memory": 0},
    },
    "step_backward": {
        "gradients_in_registers": {
            "weight_gradients_in_registers": True, "rows": 128, "warps": 8, "block_h": 128,
            "hoist_invariants": False, "programs": 132,
        },
        "rows_128": {
            "rows": 128, "warps": 8, "block_h": 128, "hoist_invariants": False, "programs": 132,
        },
        "block_128": {"block_h": 128, "hoist_invariants": False},
    },
}  # fmt: skip


def variants(kernel: str, heuristic: Launch) -> dict[str, Launch]:
    """Launches by name to be measured against the heuristic's, for kernels of Growing NCA's size.

    Args:
        kernel: ``step_forward`` or ``step_backward``.
    """
    named = {name: replace(heuristic, **change) for name, change in VARIANTS[kernel].items()}
    z, y, x = heuristic.tile
    small = replace(heuristic, tile=(z, max(y // 2, 1), x), programs=396)
    return named | {"half_tiles": small}


def candidates(heuristic: Launch, only: Collection[str] = FIELDS) -> list[Launch]:
    """The launches that tuning tries: the heuristic and its neighbours, one change at a time.

    Args:
        only: the fields that the kernels depend on.
    """
    _, y, x = heuristic.tile
    changes: list[dict[str, Any]] = [{}]
    changes += [{"rows": r} for r in (16, 32, 64, 128)]
    changes += [{"warps": w} for w in (2, 4, 8)]
    changes += [{"rows": 16 * w, "warps": w} for w in (4, 8)]
    changes += [{"stages": s} for s in (1, 2, 3)]
    changes += [{"programs": p} for p in (132, 264, 528, 1056)]
    changes += [{"unroll": u} for u in (1, 3, 9)]
    changes += [{"hoist_invariants": h} for h in (True, False)]
    changes += [
        {"hoist_invariants": False, "programs": p} for p in (396, 528)
    ]  # in fewer registers
    changes += [{"block_h": h} for h in (32, 64, 128)]
    changes += [{"side_by_side": j} for j in (0, 256)]
    changes += [{"contributions_by_tap": b} for b in (0, 2**18)]
    changes += [{"weights_in_shared_memory": h} for h in (0, 2**14)]
    changes += [change for kernel in VARIANTS.values() for change in kernel.values()]
    changes += [{"tile": (heuristic.tile[0], max(y // 2, 1), x)}]
    changes += [{"tile": (heuristic.tile[0], y * 2, x)}] if y > 1 else []
    changes = [change for change in changes if set(change) <= set(only)]
    return list(dict.fromkeys(replace(heuristic, **change) for change in changes))
