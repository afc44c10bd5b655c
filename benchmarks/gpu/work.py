"""The work of a child: the items of all stages, on the device of its process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

import nca_kernels as nk
from benchmarks.gpu import checks, timings, variants
from benchmarks.gpu.items import Asked, Facts, Item, Refused, Skipped
from benchmarks.measure import provenance
from nca_kernels.dispatch import BackendUnavailable
from tests.tools import triton_host

ITEMS: dict[str, Callable[[Asked], list[Item]]] = {
    "smoke": checks.smoke,
    "paths": checks.paths,
    "speed": timings.speed,
    "variants": variants.variants,
    "profile": timings.profile,
    "conformance": checks.conformance,
    "memory": timings.memory,
    "train": timings.train,
}
NO_GPU = (
    "no GPU: JAX runs on {}; make gpu needs a machine with one, and PYTHON=... naming the Python "
    "whose JAX sees it"
)


class DeviceWork:
    """``child.Work``, on whatever device JAX has here."""

    def __init__(self, asked: Asked) -> None:
        """Checks whether this machine can do what is asked.

        Raises:
            Refused: it has no GPU, or a backend is not there.
        """
        if jax.default_backend() != "gpu" and not asked.any_device:
            raise Refused(NO_GPU.format(jax.default_backend()))
        if triton_host.NAME in asked.backends:
            triton_host.register()
        self.asked = asked._replace(backends=_available(asked.backends))
        self._items: dict[str, list[Item]] = {}
        self._taken = _noted_kernels() if find_spec("triton") else {}

    def hello(self) -> Facts:
        facts = provenance("python -m benchmarks.gpu")
        unavailable = {b.name: b.reason for b in nk.backends() if not b.available}
        return {**facts, "backends": list(self.asked.backends), "unavailable": unavailable}

    def items(self, stage: str) -> list[Item]:
        if stage not in self._items:
            items = ITEMS[stage](self.asked)
            self._items[stage] = [replace(item, run=partial(covered, item)) for item in items]
        return self._items[stage]

    def kernels(self) -> Facts:
        from_cache = list(self.taken().values())
        return {"from_cache": sum(from_cache), "compiled": len(from_cache) - sum(from_cache)}

    def taken(self) -> dict[str, bool]:
        """By hash, whether each kernel since the last call was in Triton's cache."""
        taken = dict(self._taken)
        self._taken.clear()
        return taken

    def healthy(self) -> bool:
        try:
            return bool((jnp.ones(8) + 1).sum() == 16)
        except Exception:
            return False


def covered(item: Item) -> Iterator[Facts]:
    """Runs an item, and skips it if a backend does not cover the call."""
    try:
        yield from item.run()
    except BackendUnavailable as reason:
        raise Skipped(str(reason)) from reason


def _available(asked: tuple[str, ...]) -> tuple[str, ...]:
    """The backends that were asked for, or all that run here except the reference."""
    reasons = {b.name: b.reason for b in nk.backends()}
    for name in asked:
        if name not in reasons:
            raise Refused(f"there is no backend {name!r}: {', '.join(reasons)}")
        if reasons[name]:
            raise Refused(f"backend {name!r} cannot run here: {reasons[name]}")
    here = [name for name, reason in reasons.items() if not reason and name != "reference"]
    return asked or tuple(here)


def _noted_kernels() -> dict[str, bool]:
    """Records kernels as this process takes them from Triton's cache or compiles them."""
    from triton import knobs

    taken: dict[str, bool] = {}

    def note(*, metadata: Any, cache_hit: bool, **rest: Any) -> None:
        taken[metadata["hash"]] = cache_hit

    knobs.compilation.listener = note
    return taken
