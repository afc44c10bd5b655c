"""Finds the compiled kernels and hands them to JAX."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

ENVIRONMENT = "NCA_CPU_LIBRARY"  # another build of the library, such as one with sanitizers
NAMES = ("libnca_cpu.so", "libnca_cpu.dylib")
HANDLERS = ("step_forward", "step_backward", "attention_forward", "attention_backward")
HOW_TO_GET_IT = (
    "install GCC or Clang (apt install g++, xcode-select --install), then "
    "pip install --force-reinstall --no-deps nca-kernels, or pip install . in a checkout"
)


def missing() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    try:
        load()
    except OSError as error:
        return f"{error}: {HOW_TO_GET_IT}"
    return None


@cache
def load() -> ctypes.CDLL:
    """The library, its handlers registered with JAX.

    Raises:
        OSError: if it was not built, or does not load here.
    """
    library = ctypes.CDLL(str(path()))
    if not all(hasattr(library, target(handler)) for handler in HANDLERS):
        raise OSError(f"{path()} was built for another version of nca-kernels")
    for handler in HANDLERS:
        capsule = jax.ffi.pycapsule(getattr(library, target(handler)))
        jax.ffi.register_ffi_target(target(handler), capsule, platform="cpu")
    library.nca_cpu_instruction_sets.restype = ctypes.c_char_p
    library.nca_cpu_multiply_add.restype = ctypes.c_double
    library.nca_cpu_multiply_add.argtypes = [ctypes.c_int64]
    library.nca_cpu_use.restype = ctypes.c_bool
    library.nca_cpu_use.argtypes = [ctypes.c_char_p]
    return library


def target(handler: str) -> str:
    """The name of a handler, in the library and in JAX."""
    return f"nca_cpu_{handler}"


def integers(values: Mapping[str, Any]) -> dict[str, np.ndarray | np.int64]:
    """Integers, or lists of them, as handlers take their attributes."""
    return {name: np.asarray(value, np.int64)[()] for name, value in values.items()}


def path() -> Path:
    """Where the library is: beside this file, or where an editable install has put it."""
    if os.environ.get(ENVIRONMENT):
        return Path(os.environ[ENVIRONMENT])
    here = Path(__file__).parent
    folders = [here]
    try:
        installed = metadata.distribution("nca-kernels")
        folders.append(Path(str(installed.locate_file(here.relative_to(here.parents[2])))))
    except metadata.PackageNotFoundError:
        pass
    for folder in folders:
        for name in NAMES:
            if (folder / name).exists():
                return folder / name
    raise OSError("the native kernels were not built when nca-kernels was installed")


def instruction_sets() -> tuple[str, ...]:
    """Those of amx, avx512, avx2 and portable that this machine can run, the best first."""
    return tuple(load().nca_cpu_instruction_sets().decode().split())


@contextmanager
def using(instruction_set: str) -> Iterator[None]:
    """Runs everything in this process with that instruction set while the context lasts.

    Outside such a context each call runs the best set, which is ``"amx"`` only where the products
    are large enough. JAX's calls return before they have run: wait for their results within the
    context.

    Raises:
        ValueError: this machine does not have that instruction set.
    """
    if not (instruction_set and load().nca_cpu_use(instruction_set.encode())):
        sets = ", ".join(instruction_sets())
        raise ValueError(f"instruction_set must be one of {sets} here, got {instruction_set!r}")
    try:
        yield
    finally:
        load().nca_cpu_use(b"")


def peak_flops(seconds: float = 0.2) -> float:
    """FLOP/s of multiply-adds in registers, on all cores at once: the limit of this machine now.

    Under ``using("amx")`` they are the FLOP/s that tile registers reach with products of float32.

    Args:
        seconds: about how long to measure.
    """
    multiply_add, threads = load().nca_cpu_multiply_add, os.cpu_count() or 1
    iterations = 1_000
    with ThreadPoolExecutor(threads) as pool:
        while True:
            start = time.perf_counter()
            flops = sum(pool.map(multiply_add, [iterations] * threads))
            taken = time.perf_counter() - start
            if taken > seconds / 2:
                return flops / taken
            iterations *= 4
