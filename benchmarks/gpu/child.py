"""A child process: works through items, one at a time, as its parent asks. It uses the GPU.

Questions come on standard input, answers go to standard output, each a line of JSON::

    {backends, tiny, ...}      (``items.Asked``)   {hello: facts of this machine}, or {refused: why}
    {list: stage}                                  {items: [names]}, with error and traceback
                                                   where there are none for that
    {run: [stage, item]}                           {found: facts}, as often as there are any, then
                                                   {done: {seconds, kernels, ...}}
    {lower: [stage, item]}                         {done: {seconds, kernels, ...}}

``done`` has ``error`` and ``traceback`` if a check failed, ``skipped`` with the reason, and
``lost`` if the device does not answer any more; then the process ends. It also ends as soon as its
standard input does, whatever it is doing, so that it does not outlive its parent.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TextIO

from benchmarks.gpu.items import Asked, Facts, Item, Refused, Skipped

LINES, MOST = 3, 1500  # of an error, and characters of a traceback


class Work(Protocol):
    """What a child works on; see ``benchmarks.gpu.work``."""

    def hello(self) -> Facts:
        """Facts of this machine."""

    def items(self, stage: str) -> list[Item]:
        """What a stage consists of."""

    def kernels(self) -> Facts:
        """How many kernels came from Triton's cache since the last call, and how many did not."""

    def healthy(self) -> bool:
        """Whether the device still answers."""


def serve(start: Callable[[Asked], Work]) -> int:
    """Answers until standard input ends; ``start`` raises ``Refused`` to refuse all."""
    answers, questions = _answers(), _questions()
    asked = next(questions)
    try:
        work = start(Asked(**{**asked, "backends": tuple(asked["backends"])}))
    except Refused as refusal:
        answers(refused=str(refusal))
        return 2
    answers(hello=work.hello())
    for question in questions:
        if "list" in question:
            answers(**_listed(work, question["list"]))
            continue
        ((verb, (stage, name)),) = question.items()
        (item,) = (item for item in work.items(stage) if item.name == name)
        done = _do(work, item, verb, answers)
        answers(done=done)
        if done.get("lost"):
            return 3
    return 0


def _listed(work: Work, stage: str) -> Facts:
    try:
        return {"items": [item.name for item in work.items(stage)]}
    except Exception as error:
        return {"items": [], "error": told(error), "traceback": traceback.format_exc()[-MOST:]}


def _do(work: Work, item: Item, verb: str, answers: Callable[..., None]) -> Facts:
    start, done = time.perf_counter(), Facts()
    try:
        if verb == "run":
            for facts in item.run():
                answers(found=facts)
        elif item.lower is not None:
            item.lower()
    except Skipped as reason:
        done["skipped"] = str(reason)
    except Exception as error:
        done |= {"error": told(error), "traceback": traceback.format_exc()[-MOST:]}
        if not work.healthy():
            done["lost"] = True
    return {"seconds": round(time.perf_counter() - start, 3), "kernels": work.kernels(), **done}


def told(error: Exception) -> str:
    """An error as one line: its class and the first lines of its message."""
    said = " ".join([line for line in str(error).splitlines() if line.strip()][:LINES])
    return (said if isinstance(error, Skipped) else f"{type(error).__name__}: {said}")[:500]


def _answers() -> Callable[..., None]:
    """A function that writes answers; other standard output now goes to standard error."""
    stream: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(**message: Any) -> None:
        stream.write(json.dumps(message) + "\n")
        stream.flush()

    return answer


def _questions() -> Iterator[Any]:
    """Questions as they come, read by a thread that ends the process where they end."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(lines.get())


def main() -> int:
    from benchmarks.gpu.work import DeviceWork

    return serve(DeviceWork)


if __name__ == "__main__":
    sys.exit(main())
