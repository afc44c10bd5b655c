"""The parent of `make gpu`: deadlines, deaths and files, with children that touch no device."""

import json
import os
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from benchmarks.gpu import runner
from benchmarks.gpu.items import Asked, Refused
from benchmarks.gpu.results import LOG, RunResults
from benchmarks.gpu.runner import Course, Machinery, Stage
from tests import ROOT

CHILD = """
import os, sys, time
from benchmarks.gpu.child import serve
from benchmarks.gpu.items import Item, Refused, Skipped

def fine():
    yield {"first": 1}
    yield {"second": 2}

def crashes():
    yield {"before": 1}
    print("CUDA_ERROR_ILLEGAL_ADDRESS", file=sys.stderr, flush=True)
    os.abort()

def hangs():
    yield {"before": 1}
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(1000)

def fails():
    yield {"before": 1}
    raise AssertionError("state: error ratio 1 > 1e-05")

def breaks():
    yield from ()
    Work.well = False
    raise RuntimeError("CUDA_ERROR")

def cannot():
    yield from ()
    raise Skipped("there is no ncu here")

def prints():
    print("not an answer")
    os.write(1, b"nor this")
    yield {"pid": os.getpid()}

def naps():
    time.sleep(0.1)
    yield {"pid": os.getpid()}

class Work:
    well = True
    def __init__(self, asked):
        if "nobody" in asked.backends:
            raise Refused("there is no backend nobody")
        if "dead" in asked.backends:
            sys.exit("no memory")
        if "first" in asked.backends:
            try:
                os.unlink(os.path.join(os.path.dirname(sys.argv[0]), "one"))
            except FileNotFoundError:
                sys.exit("no memory")
    def hello(self):
        return {"device": "fake", "backends": ["triton"]}
    def items(self, stage):
        if stage == "unlisted":
            raise KeyError("no such launch")
        if stage == "unlistable":
            os.abort()
        names = {"good": ["fine", "prints", "prints too"]}.get(stage, stage.split("-"))
        return [Item(name, globals()[name.split()[0]]) for name in names]
    def kernels(self):
        return {}
    def healthy(self):
        return self.well

sys.exit(serve(Work))
"""


@pytest.fixture
def environment():
    """The environment of a child that imports the same modules as this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


@pytest.fixture
def course(tmp_path, environment, monkeypatch):
    """Makes a course through stages, which are named after their items."""
    monkeypatch.setattr(runner, "START", 1e9)  # clocks run fast
    script = tmp_path / "child.py"
    script.write_text(CHILD)

    def make(stages, *, end=60.0, clock=time.monotonic, backends=("triton",), only=""):
        results = RunResults(tmp_path / "out", {"commit": "c"}, lambda _: None)
        said = []
        machinery = Machinery([sys.executable, script], environment, clock=clock, say=said.append)
        asked = Asked(backends=backends)
        course = Course(stages, asked, results, machinery, clock() + end, only)
        course.said = said
        return course

    return make


def outcome(course, item):
    (record,) = (r for r in course.results.records.values() if r["item"] == item)
    return record


def test_items_are_found_out_and_written_down(course, tmp_path):
    going = course({"good": Stage(30, 10)})
    going.run()
    assert outcome(going, "fine")["found"] == {"first": 1, "second": 2}
    assert outcome(going, "prints")["found"]["pid"] == outcome(going, "prints too")["found"]["pid"]
    lines = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text().splitlines()]
    of_fine = [(line["found"], line.get("partial")) for line in lines if line["item"] == "fine"]
    assert of_fine == [
        ({"first": 1}, True),
        ({"second": 2}, True),
        ({"first": 1, "second": 2}, None),
    ]
    assert going.results.about["device"] == "fake"
    assert not going.results.failed()


def test_a_child_that_crashes_is_replaced(course):
    going = course({"crashes-fine": Stage(30, 10)})
    going.run()
    record = outcome(going, "crashes")
    assert record["error"] == "its process died of SIGABRT"
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in record["stderr"]
    assert record["found"] == {"before": 1}
    assert outcome(going, "fine")["found"] == {"first": 1, "second": 2}


def test_a_device_that_does_not_answer_any_more(course):
    going = course({"breaks-fine": Stage(30, 10)})
    going.run()
    record = outcome(going, "breaks")
    assert record["lost"]
    assert "stderr" in record
    assert "error" not in outcome(going, "fine")  # another process found it out


def test_a_check_that_fails_and_one_that_cannot_be_done(course):
    going = course({"fails-cannot-fine": Stage(30, 10)})
    going.run()
    assert outcome(going, "fails")["error"] == "AssertionError: state: error ratio 1 > 1e-05"
    assert "in fails" in outcome(going, "fails")["traceback"]
    assert outcome(going, "cannot")["skipped"] == "there is no ncu here"
    assert [record["item"] for record in going.results.failed()] == ["fails"]


def ticking(step):
    """A clock that advances by ``seconds`` whenever it is read."""
    ticks = count()
    return lambda: step * next(ticks)


def test_an_item_that_hangs_is_ended(course):
    going = course({"hangs-fine": Stage(400, 20)}, end=400, clock=ticking(0.5))
    going.run()
    record = outcome(going, "hangs")
    assert record["error"] == "it took more than 20 s, and was ended"
    assert "waiting" in record["stderr"]
    assert record["seconds"] >= 20
    assert "error" not in outcome(going, "fine")


def test_the_end_leaves_out_what_is_left(course):
    stages = {"fine-hangs-prints": Stage(1e6, 1e6), "good": Stage(1e6, 1e6)}
    going = course(stages, end=200, clock=ticking(2))
    going.run()
    assert "cut_off" not in outcome(going, "fine")
    assert outcome(going, "hangs")["cut_off"] == "the time was over"
    assert outcome(going, "hangs")["found"] == {"before": 1}
    left = [(entry["stage"], entry["items"]) for entry in going.results.left_out]
    assert left == [("fine-hangs-prints", ["prints"]), ("good", [])]
    assert "good: the time was over" in going.said[-1]


def test_a_stage_ends_and_leaves_its_rest_to_the_next(course):
    """The first stage is done early, and the second gets the time that it left."""
    stages = {"good": Stage(300, 1e6), "hangs": Stage(100, 1e6), "fine": Stage(600, 1e6)}
    going = course(stages, end=1000, clock=ticking(4))
    going.run()
    assert outcome(going, "hangs")["cut_off"] == "the stage's time was over"
    assert 400 <= outcome(going, "hangs")["at"] < 500
    assert [record["item"] for record in going.results.of("fine")] == ["fine"]


def test_several_children_share_a_stage_and_one_stays(course):
    names = [f"naps {i}" for i in range(12)]
    going = course({"-".join(names): Stage(30, 10, children=3), "good": Stage(30, 10)})
    going.run()
    pids = {outcome(going, name)["found"]["pid"] for name in names}
    assert 1 < len(pids) <= 3
    assert outcome(going, "prints")["found"]["pid"] in pids


def test_a_process_for_each_item(course):
    going = course({"good": Stage(30, 10, fresh=True)})
    going.run()
    assert len({outcome(going, n)["found"]["pid"] for n in ("prints", "prints too")}) == 2


def test_a_run_goes_on_where_it_was(course, tmp_path):
    course({"fine-hangs": Stage(1e6, 1e6)}, end=200, clock=ticking(4)).run()
    with (tmp_path / "out" / LOG).open("a") as log:
        log.write('{"stage": "fine-ha')  # as a process that is killed leaves it
    again = course({"fine-hangs": Stage(1e6, 20)}, end=1e6, clock=ticking(0.5))
    again.run()
    assert outcome(again, "hangs")["error"]  # tried again
    lines = (tmp_path / "out" / LOG).read_text().splitlines()
    assert sum(json.loads(line)["item"] == "fine" for line in lines) == 1  # not again, none torn


def test_only_some_items(course):
    going = course({"good": Stage(30, 10)}, only="too")
    going.run()
    assert [record["item"] for record in going.results.of("good")] == ["prints too"]


def test_children_that_do_not_start(course):
    going = course({"good": Stage(30, 10), "fine": Stage(30, 10)}, backends=("dead",))
    going.run()
    assert not going.results.records
    assert [left["stage"] for left in going.results.left_out] == ["good"] * 2 + ["fine"] * 2
    assert all("no memory" in left["stderr"] for left in going.results.left_out)


def test_stages_whose_items_cannot_be_listed(course):
    going = course({name: Stage(30, 10) for name in ("unlisted", "unlistable", "fine")})
    going.run()
    told = [(left["stage"], left["reason"]) for left in going.results.left_out]
    died = ("unlistable", "a process had nothing to do: its process died of SIGABRT")
    assert told == [("unlisted", "KeyError: 'no such launch'"), died, died]
    assert [record["item"] for record in going.results.records.values()] == ["fine"]


def test_processes_that_do_not_start_end_no_others(course, tmp_path):
    """Where some processes do not start, those that do go on."""
    (tmp_path / "one").touch()
    names = [f"naps {i}" for i in range(4)]
    going = course({"-".join(names): Stage(30, 10, children=3)}, backends=("first",))
    going.run()
    assert sorted(record["item"] for record in going.results.records.values()) == names
    assert 2 <= len(going.results.left_out) <= 4  # no more are started


def test_what_children_refuse(course):
    with pytest.raises(Refused, match="there is no backend nobody"):
        course({"good": Stage(30, 10)}, backends=("nobody",)).run()


PARENT = """
import os, sys
from pathlib import Path
from benchmarks.gpu.items import Asked
from benchmarks.gpu.results import RunResults
from benchmarks.gpu.runner import Course, Machinery, Stage

results = RunResults(Path(sys.argv[1]), {}, lambda _: None)
machinery = Machinery([sys.executable, sys.argv[2]], dict(os.environ))
Course({"prints-hangs": Stage(99, 99)}, Asked(), results, machinery, 1e9).run()
"""


def test_a_child_does_not_outlive_its_parent(tmp_path, environment):
    """When the parent is killed, the child ends, and so does what it is doing."""
    (tmp_path / "child.py").write_text(CHILD)
    arguments = [tmp_path / "out", tmp_path / "child.py"]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *arguments], env=environment)
    log = tmp_path / "out" / LOG
    waited_for(lambda: log.exists() and '"before"' in log.read_text())
    parent.kill()
    parent.wait()
    first = json.loads(log.read_text().splitlines()[0])
    waited_for(lambda: is_over(first["found"]["pid"]))


def waited_for(condition):
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("in vain")


def is_over(pid):
    """Whether a process has ended, also one that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True
