"""The training log: CSV always, TensorBoard on request.

The columns of the CSV are the training step, its loss, log10 of that, and `unmoved`: the number of
steps, up to this one, for which the loss has not moved. Where it grows, the training has died.

A row holds only what is the same in every run with the same seed, so that the log of a run that was
killed and resumed equals that of an uninterrupted run, byte for byte.
"""

import csv
import math
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from nca_models._files import reason, write_text
from nca_models.data import DataError

_HEADER = "step,loss,log10_loss,unmoved"
_RESOLUTION = 1e-6  # a loss that changes by less, as a share of it, has not moved


class Log(AbstractContextManager["Log"]):
    """The log of a run, a context manager.

    Attributes:
        unmoved: the number of steps, up to the last one, for which the loss has not moved.
    """

    def __init__(self, folder: Path, last_step: int, *, tensorboard: bool = False):
        """Open the log, and drop the rows after `last_step`.

        Raises:
            ImportError: `tensorboard`, but tensorboardX is not installed.
            DataError: the log lacks rows up to `last_step`, or is no log.
        """
        path = folder / "log.csv"
        self._loss, self.unmoved = _cut(path, last_step)
        self._file = path.open("a", buffering=1, encoding="utf-8")  # written line by line
        self._board = _Board(folder / "tensorboard", last_step) if tensorboard else None

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, loss: float) -> None:
        """Add the loss of training step `step`, counted from 1."""
        digits = f"{loss:.9g}"  # those of float32
        before, self._loss = self._loss, float(digits)
        still = self._loss != 0 and abs(self._loss - before) <= _RESOLUTION * abs(before)
        self.unmoved = self.unmoved + 1 if still else 0
        self._file.write(f"{step},{digits},{log10(loss):.6f},{self.unmoved}\n")
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
    """Return the steps and the losses in a `log.csv`.

    Raises:
        DataError: there is no such file, it is no log, or it has no rows.
    """
    rows = [(int(row["step"]), float(row["loss"])) for row in _rows(path)]
    steps, losses = zip(*rows, strict=True)
    return list(steps), list(losses)


def read_unmoved(path: Path) -> int:
    """Return `Log.unmoved` at the end of a `log.csv`; 0 if an older version wrote it.

    Raises:
        DataError: as `read`.
    """
    return int(_rows(path)[-1].get("unmoved") or 0)


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a log, at least one, whose steps, losses and other fields are numbers."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            int(row["step"]), float(row["loss"]), int(row.get("unmoved") or 0)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a training's log ({reason(error)})") from error
    if not rows:
        raise DataError(f"{path}: is a training's log without rows")
    return rows


def _cut(path: Path, last_step: int) -> tuple[float, int]:
    """Rewrite the log at `path` with its header and its first `last_step` rows.

    Return the last of their losses (NaN without rows), and for how many steps it has not moved.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as a training's log ({reason(error)})") from error
    rows = [row if row.count(",") > 2 else f"{row},0" for row in lines[1 : last_step + 1]]
    if len(rows) < last_step:
        raise DataError(
            f"{path} has {len(rows)} rows, but the checkpoint is at step {last_step}: restore the "
            "log, or remove the folder checkpoints to train from the start"
        )
    write_text(path, "\n".join([_HEADER, *rows]) + "\n")
    if not rows:
        return math.nan, 0
    try:
        _, loss, _, unmoved = rows[-1].split(",")
        return float(loss), int(unmoved)
    except ValueError as error:
        raise DataError(f"{path}: {rows[-1]!r} is no row of a training's log") from error


class _Board:
    """Event files of TensorBoard; steps after `last_step` in older files are hidden.

    They are written here and now. The thread of tensorboardX's `SummaryWriter` ends when the disk
    is full, and the training would wait for it for ever.
    """

    def __init__(self, folder: Path, last_step: int):
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError as error:
            raise ImportError("TensorBoard logs need `pip install tensorboardX`") from error
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # The suffix, because files of the same second would have the same name.
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{last_step}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(last_step + 1, session_log=start)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a value."""
        self._add(step, summary=self._summary(value=[{"tag": name, "simple_value": value}]))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))

    def flush(self) -> None:
        """Return when all values are in the file."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
