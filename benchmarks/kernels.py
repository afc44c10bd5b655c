"""How long each GPU kernel of a call takes, from JAX's profiler."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

Kernels = dict[str, tuple[int, float]]  # by name: launches, seconds of them together


def profiled(run: Callable[[], Any]) -> Kernels:
    """The kernels of one call, slowest first; ``run`` is compiled, and waits for its result."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        return totals(jax.profiler.ProfileData.from_file(str(files[-1])))


def totals(profile: jax.profiler.ProfileData) -> Kernels:
    """The kernels of all GPUs, from the lines of their streams; other lines repeat those."""
    by_name: Kernels = {}
    for plane in profile.planes:
        for line in plane.lines if plane.name.startswith("/device:GPU") else ():
            for event in line.events if line.name.startswith("Stream") else ():
                launches, seconds = by_name.get(event.name, (0, 0.0))
                by_name[event.name] = launches + 1, seconds + 1e-9 * event.duration_ns
    return dict(sorted(by_name.items(), key=lambda item: -item[1][1]))
