"""Results, on disk as soon as they are there: records, one a line, and summaries of them.

A record is a dict: ``stage``, ``item``, ``at`` (seconds since the start), ``found`` (facts),
``seconds``, and the fields of ``done`` that ``child`` lists. A record of a process that died has
``error`` and ``stderr``, the end of its standard error. A record of an item that was not done when
the time was over has ``cut_off``, with the reason; a run that goes on does the item again. A line
that is ``partial`` holds facts of an item that is not done yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.items import Facts
from nca_kernels.files import write_text

LOG = "results.jsonl"


class RunResults:
    """The records of a folder, with their provenance and what was left out.

    Attributes:
        about: command, commit, versions, device.
        records: by (stage, item), in the order in which they were added.
        left_out: for each stage that was not completed, the reason and the items.
    """

    def __init__(self, folder: Path, about: Facts, summarize: Callable[[RunResults], None]) -> None:
        """Reads the records that the folder has already, for a run that goes on.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder, self.about, self._summarize = folder, about, summarize
        self.records: dict[tuple[str, str], Facts] = {}
        self.left_out: list[Facts] = []
        self._log = folder / LOG
        for line in self._log.read_text().splitlines() if self._log.exists() else ():
            self._keep(line)
        known = [json.dumps(record) + "\n" for record in self.records.values()]
        write_text(self._log, "".join(known))  # without a last line that was cut off

    def _keep(self, line: str) -> None:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return
        if not record.get("partial"):
            self.records[record["stage"], record["item"]] = record

    def has(self, stage: str, item: str) -> bool:
        """Whether an item is done, with whatever outcome."""
        record = self.records.get((stage, item))
        return record is not None and "cut_off" not in record

    def of(self, stage: str) -> list[Facts]:
        """The records of a stage."""
        return [record for (name, _), record in self.records.items() if name == stage]

    def failed(self) -> list[Facts]:
        """The records of checks that failed."""
        return [record for record in self.records.values() if "error" in record]

    def add(self, record: Facts) -> None:
        """Writes a record, and the summaries anew."""
        self._write(record)
        if not record.get("partial"):
            self.records[record["stage"], record["item"]] = record
            self.summarize()

    def leave_out(self, stage: str, items: list[str], reason: str, stderr: str = "") -> None:
        """Notes items that are not done, with the output of a process that did not start."""
        facts = {"stage": stage, "items": items, "reason": reason}
        self.left_out.append({**facts, "stderr": stderr} if stderr else facts)
        self.summarize()

    def summarize(self) -> None:
        """Writes the summaries; never fails, as the log has all records anyway."""
        try:
            self._summarize(self)
        except Exception as error:
            self.about["not_summarized"] = f"{type(error).__name__}: {error}"

    def _write(self, record: Facts) -> None:
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
