"""The training log: CSV always, TensorBoard on request.

A row holds only what is the same in every run with the same seed, so that the log of a run that was
killed and resumed equals that of an uninterrupted run, byte for byte.
"""

import csv
import math
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from nca_models._files import write_text

_HEADER = "step,loss,log10_loss"


class Log(AbstractContextManager["Log"]):
    """The log of a run, a context manager."""

    def __init__(self, folder: Path, last_step: int, *, tensorboard: bool = False):
        """Open the log, and drop the rows after `last_step`.

        Raises:
            ImportError: `tensorboard`, but tensorboardX is not installed.
            ValueError: the log lacks rows up to `last_step`.
        """
        path = folder / "log.csv"
        _cut(path, last_step)
        self._file = path.open("a", buffering=1, encoding="utf-8")  # written line by line
        self._board = _board(folder / "tensorboard", last_step) if tensorboard else None

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, loss: float) -> None:
        """Add the loss of training step `step`, counted from 1."""
        self._file.write(f"{step},{loss:.9g},{log10(loss):.6f}\n")
        if self._board is not None:
            self._board.add_scalar("loss", loss, step)
            self._board.add_scalar("log10_loss", log10(loss), step)

    def flush(self) -> None:
        """Return when all rows are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()


def log10(value: float) -> float:
    """Return log10 of a loss; -inf for 0, NaN for NaN."""
    return -math.inf if value == 0 else math.log10(value)


def read(path: Path) -> tuple[list[int], list[float]]:
    """Return the steps and the losses in a `log.csv`."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]


def _cut(path: Path, last_step: int) -> None:
    """Rewrite the log at `path` with its header and its first `last_step` rows."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = lines[1 : last_step + 1]
    if len(rows) < last_step:
        raise ValueError(f"{path} has {len(rows)} rows, but the checkpoint is at step {last_step}")
    write_text(path, "\n".join([_HEADER, *rows]) + "\n")


def _board(folder: Path, last_step: int) -> Any:
    """A TensorBoard writer; steps after `last_step` in older event files are hidden."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard logs need `pip install tensorboardX`") from error
    # The suffix, because files of the same second would have the same name.
    suffix = f".{last_step}"
    return SummaryWriter(str(folder), purge_step=last_step + 1, filename_suffix=suffix)
