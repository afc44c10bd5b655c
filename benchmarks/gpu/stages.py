"""The stages, the most valuable first."""

from benchmarks.gpu.runner import Stage

# Nine minutes in all. A stage that is done early leaves its time to those after it.
STAGES = {
    "smoke": Stage(seconds=30, item_seconds=30),
    "paths": Stage(seconds=80, item_seconds=40, children=4),
    "speed": Stage(seconds=140, item_seconds=100),
    "variants": Stage(seconds=80, item_seconds=30),
    "profile": Stage(seconds=50, item_seconds=40),
    "conformance": Stage(seconds=80, item_seconds=40, children=8),
    "memory": Stage(seconds=40, item_seconds=30, fresh=True),
    "train": Stage(seconds=40, item_seconds=600),
}
