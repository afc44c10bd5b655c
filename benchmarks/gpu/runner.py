"""The parent process: starts children, gives them items, and ends those that take too long.

A stage's items go to its children one at a time. A child that dies, of a CUDA error or of a crash,
is replaced, and so is one that is ended because its item took too long: that item's record has the
end of what the child said on standard error. The parent itself never touches the GPU.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from benchmarks.gpu.items import Asked, Facts, Refused
from benchmarks.gpu.results import RunResults

TAIL = 4000  # characters of the end of a dead child's standard error
START = 90.0  # seconds in which a child has to answer
LOSSES = 2  # processes of a stage that did nothing, after which no more are started
POLL = 0.05
OVER = "the time was over"
NONE_STARTS = "no process could be started"


class Stage(NamedTuple):
    """How many seconds a stage and each of its items may take, and on how many processes.

    Attributes:
        fresh: each item has a process of its own.
    """

    seconds: float
    item_seconds: float
    children: int = 1
    fresh: bool = False


class Machinery(NamedTuple):
    """The processes and the clock of a course; tests have their own.

    Attributes:
        command, environment: of a child.
        verb: what children do with items, "run" or "lower".
        clock: returns seconds.
        say: prints a line.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    verb: str = "run"
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = partial(print, flush=True)


class Child:
    """A child process, which is starting, idle, or at work on an item."""

    def __init__(self, machinery: Machinery, asked: Asked, inbox: queue.SimpleQueue) -> None:
        self._clock = machinery.clock
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, open as long as the child
        self.process = subprocess.Popen(
            machinery.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=machinery.environment,
            process_group=0,
        )
        self.started, self.item = False, ""
        self.since, self.found = self._clock(), Facts()
        threading.Thread(target=self._read, args=(inbox,), daemon=True).start()
        self.ask(asked._asdict())

    def _read(self, inbox: queue.SimpleQueue) -> None:
        for line in self.process.stdout or ():
            if line.endswith("\n"):  # otherwise it died while it wrote the line
                inbox.put((self, json.loads(line)))
        inbox.put((self, None))

    def ask(self, question: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead: its answers end, and that is noticed
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()

    def begin(self, verb: str, stage: str, item: str) -> None:
        self.item, self.since, self.found = item, self._clock(), Facts()
        self.ask({verb: [stage, item]})

    def end(self) -> str:
        """Ends it and all that it started; returns the end of its standard error."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - TAIL))
        return self._stderr.read().decode(errors="replace")

    def cause(self) -> str:
        """The cause of its death, in words."""
        code = self.process.wait()
        if code < 0:
            return f"its process died of {signal.Signals(-code).name}"
        return f"its process ended, with exit status {code}"


@dataclass
class Course:
    """A run through stages.

    Attributes:
        stages: the stages, in order.
        asked: what children are told.
        results: receive the records.
        end: the time, by the clock, at which all is over.
        only: text that names of items must contain.
        told: makes a record a line to print.
        begun: is told the number of items of each stage.
    """

    stages: Mapping[str, Stage]
    asked: Asked
    results: RunResults
    machinery: Machinery
    end: float
    only: str = ""
    told: Callable[[Facts], str] = lambda record: str(record["item"])
    begun: Callable[[int], None] = lambda items: None
    _children: list[Child] = field(default_factory=list)
    _inbox: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    _losses: int = 0
    _stage: str = ""

    def __post_init__(self) -> None:
        self._begin = self.machinery.clock()

    def run(self) -> None:
        """Runs all stages, and ends its children whatever happens.

        Raises:
            Refused: children cannot do what they are asked for.
        """
        try:
            for (name, stage), deadline in zip(self.stages.items(), self._deadlines(), strict=True):
                if self.machinery.clock() >= self.end:
                    self._leave_out(name, [], OVER)
                else:
                    self._run_stage(name, stage, deadline)
        finally:
            self._cut_off(self._children, "the run was interrupted")
            self.results.summarize()

    def _deadlines(self) -> list[float]:
        """The deadlines of the stages: time that one leaves over goes to those after it."""
        left = self.end - self._begin
        planned = sum(stage.seconds for stage in self.stages.values())
        stretch = max(1.0, left / planned) if planned < math.inf else 1.0
        ends = accumulate(stretch * stage.seconds for stage in self.stages.values())
        return [min(self._begin + end, self.end) for end in ends]

    def _run_stage(self, name: str, stage: Stage, deadline: float) -> None:
        self._stage, self._losses = name, 0
        self._cut_off(self._children[0 if stage.fresh else stage.children :])
        names = [n for n in self._names(deadline) if self.only in n]
        todo = deque(n for n in names if not self.results.has(name, n))
        until = f", until {deadline - self._begin:.0f} s" if deadline < math.inf else ""
        self._say(f"{name}: {len(todo)} of {len(names)} items{until}")
        self.begun(len(todo))
        over = OVER if deadline == self.end else "the stage's time was over"
        while self.machinery.clock() < deadline:
            self._hand_out(stage, todo)
            if todo and not self._children:
                over = NONE_STARTS
                break
            if not todo and not any(child.item for child in self._children):
                break
            self._listen(stage.fresh)
            self._end_late(stage.item_seconds)
        self._cut_off([c for c in self._children if c.item or stage.fresh or not c.started], over)
        if todo:
            self._leave_out(name, [*todo], over)

    def _names(self, deadline: float) -> list[str]:
        """The names of the stage's items, from a child; none if no child answers."""
        asked = None
        while self.machinery.clock() < deadline:
            if not self._children:
                self._start(1)
            if not self._children:
                return []
            if self._children[0].started and asked is not self._children[0]:
                asked = self._children[0]
                asked.ask({"list": self._stage})
            message = self._listen()
            if message and "items" in message:
                return list(message["items"])
            self._end_late()
        self._leave_out(self._stage, [], "its process did not answer in time")
        return []

    def _start(self, count: int) -> None:
        if self._losses < LOSSES:
            self._children += [Child(self.machinery, self.asked, self._inbox) for _ in range(count)]

    def _hand_out(self, stage: Stage, todo: deque[str]) -> None:
        """Gives items to idle children, and starts as many children as there is work for."""
        for child in self._children:
            if todo and child.started and not child.item:
                child.begin(self.machinery.verb, self._stage, todo.popleft())
        without = sum(not child.item for child in self._children)
        self._start(min(stage.children - len(self._children), len(todo) - without))

    def _listen(self, fresh: bool = False) -> Facts | None:
        """Waits a moment for a message of a child, and handles it."""
        try:
            child, message = self._inbox.get(timeout=POLL)
        except queue.Empty:
            return None
        if child not in self._children:  # ended meanwhile
            return None
        if message is None:
            self._died(child, child.cause())
        elif "refused" in message:
            raise Refused(message["refused"])
        elif "hello" in message:
            child.started = True
            self._introduce(message["hello"])
        elif "error" in message:
            self._leave_out(self._stage, [], message["error"], message["traceback"])
        elif "found" in message:
            child.found |= message["found"]
            self.results.add(self._record(child, found=message["found"], partial=True))
        elif "done" in message:
            done = message["done"]
            record = self._record(child, **done)
            if done.get("lost"):
                record["stderr"] = self._drop(child)
            elif fresh:
                self._drop(child)
            child.item = ""
            self._add(record)
        return message

    def _introduce(self, hello: Facts) -> None:
        if "device" not in self.results.about:
            self.results.about = hello | self.results.about
            self.results.summarize()
            self._say(f"{hello['device']}: {', '.join(hello['backends'])}")

    def _died(self, child: Child, why: str) -> None:
        """Records the death of a child, with its item if it had one."""
        stderr = self._drop(child)
        if child.item:
            self._add(self._record(child, error=why, stderr=stderr))
        else:
            self._losses += 1
            did = "had nothing to do" if child.started else "did not start"
            self._leave_out(self._stage, [], f"a process {did}: {why}", stderr or why)

    def _end_late(self, item_seconds: float = math.inf) -> None:
        now = self.machinery.clock()
        for child in list(self._children):
            most = START if not child.started else item_seconds if child.item else math.inf
            if now - child.since >= most:
                self._died(child, f"it took more than {most:.0f} s, and was ended")

    def _cut_off(self, children: list[Child], why: str = "") -> None:
        """Ends children, whatever they are doing."""
        for child in list(children):
            stderr = self._drop(child)
            if child.item:
                self._add(self._record(child, cut_off=why, stderr=stderr))

    def _drop(self, child: Child) -> str:
        self._children.remove(child)
        return child.end()

    def _record(self, child: Child, **facts: Any) -> Facts:
        seconds = round(self.machinery.clock() - child.since, 3)
        record = {"stage": self._stage, "item": child.item, "at": self._at()}
        return record | {"found": child.found, "seconds": seconds} | facts

    def _add(self, record: Facts) -> None:
        self.results.add(record)
        try:
            self._say(self.told(record))
        except Exception as error:  # only in the line: the record is there all the same
            self._say(f"{record['stage']}: {record['item']}: {error!r}")

    def _leave_out(self, stage: str, items: list[str], why: str, stderr: str = "") -> None:
        self.results.leave_out(stage, items, why, stderr)
        count = f"{len(items)} items left out: " if items else ""
        last = "".join(f"\n  {line}" for line in stderr.strip().splitlines()[-3:])
        self._say(f"{stage}: {count}{why}{last}")

    def _at(self) -> float:
        return round(self.machinery.clock() - self._begin, 2)

    def _say(self, line: str) -> None:
        if line:
            self.machinery.say(f"[{self._at():6.1f} s] {line}")
