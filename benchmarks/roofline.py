"""The least work of a step, and the most that this device can do: the roofline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import nca_kernels as nk
from benchmarks.measure import interleaved
from nca_kernels.backends.cpu import library
from nca_kernels.testing import Case


class Work(NamedTuple):
    """The work of one cell-step: floating-point operations and bytes moved."""

    flops: float
    bytes: float


def work(case: Case, mode: str) -> Work:
    """Dense work (every cell fires): forward, or forward and backward with recomputation.

    The state is read and written once, and once more with its cotangent on the way back.
    """
    least = nk.cost(case.arguments().params, case.dtype)
    if mode == "forward":
        return Work(least.forward_flops, least.forward_bytes)
    return Work(least.training_flops, least.training_bytes)


class Peak(NamedTuple):
    """The rates of this device, as measured: FLOP/s by precision, bytes/s of a copy."""

    flops: dict[str, float]
    bytes: float

    def seconds(self, needed: Work, precision: str) -> float:
        """Seconds of one cell-step at the limit."""
        return max(needed.flops / self.flops[precision], needed.bytes / self.bytes)


def measure_peak(size: int = 8192, megabytes: int = 4096, rounds: int = 10) -> Peak:
    """Products of ``[size, size]`` and a copy of so many megabytes, best of ``rounds``."""
    key = jax.random.key(0)
    a = jax.random.normal(key, (size, size))
    flops = {}
    for name, dtype, precision in (
        ("float32", "float32", "highest"),
        ("tensorfloat32", "float32", "tensorfloat32"),
        ("bfloat16", "bfloat16", None),
    ):
        flops[name] = 2 * size**3 / best(_product(precision), a.astype(dtype), rounds)
    data = jnp.zeros((megabytes * 2**18,), jnp.float32)
    return Peak(flops, 2 * data.nbytes / best(jax.jit(lambda x: x + 1), data, rounds))


def _product(precision: str | None) -> Callable[[Any], Any]:
    return jax.jit(lambda a: jnp.dot(a, a, precision=precision))


def best(run: Callable[[Any], Any], argument: Any, rounds: int) -> float:
    """Seconds of the fastest of ``rounds`` calls."""
    times = interleaved({"": lambda: jax.block_until_ready(run(argument))}, rounds)
    return min(times[""])


def cpu_flops() -> float:
    """FLOP/s of this machine's processor now, all cores: multiply-adds in registers.

    Without the native kernels, what XLA's product reaches instead.
    """
    try:
        return max(library.peak_flops() for _ in range(5))
    except OSError:
        size = 2048
        return 2 * size**3 / best(_product("highest"), jnp.ones((size, size)), 5)


def tile_flops() -> float | None:
    """FLOP/s of float32 products in tile registers, where this processor has them (AMX)."""
    if library.missing() or "amx" not in library.instruction_sets():
        return None
    with library.using("amx"):
        return max(library.peak_flops() for _ in range(5))


def copy_bytes_per_second(megabytes: int = 512, rounds: int = 10) -> float:
    """Bytes read and written a second, by adding 1 to a large array in place."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    data, fastest = jnp.zeros((megabytes * 2**18,), jnp.float32), math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        data = jax.block_until_ready(add(data))
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * data.nbytes / fastest


def fraction(case: Case, mode: str, peak: Peak, precision: str, seconds_per_cell: float) -> float:
    """The share of the device's limit, counting every cell as if it fired."""
    reached = peak.seconds(work(case, mode), precision) / seconds_per_cell
    return reached if math.isfinite(reached) else 0.0
