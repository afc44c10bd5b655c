"""Chooses the version of PTX that kernels are written in: one that JAX's assembler reads.

JAX is handed PTX, and assembles it with the ptxas that it finds. A ptxas that is older than the
one that Triton brings may refuse what Triton writes by default: CUDA 13.0's refuses Triton 3.9's.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jax

OLDEST = (11, 8)  # JAX ignores an older ptxas


@cache
def ptx_version(capability: int) -> int | None:
    """The version to ask Triton's compiler for, as 90 for 9.0; None for its own choice.

    Args:
        capability: CUDA compute capability of the GPU, as 90, or 0.
    """
    if not capability:  # a GPU that has none takes no PTX
        return None
    from triton.backends.nvidia.compiler import get_ptxas, ptx_get_version

    of_jax = next((v for v in map(_version, _where_jax_looks()) if v >= OLDEST), None)
    of_triton = _version(Path(get_ptxas(capability).path))
    if of_jax is None or of_jax >= of_triton:
        return None
    return ptx_get_version(".".join(map(str, of_jax)))


def provide_ptxas() -> None:
    """Adds Triton's ptxas to the end of PATH if JAX has CUDA and would find no other."""
    from jaxlib import gpu_triton

    if not hasattr(gpu_triton, "TritonKernelCall"):
        return
    try:
        import triton
    except ImportError:
        return
    if not any(path.is_file() for path in _where_jax_looks()):
        folder = Path(triton.__file__).parent / "backends/nvidia/bin"
        os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{folder}"


def _where_jax_looks() -> Iterator[Path]:
    """Where XLA looks for ptxas: PATH, common places, NVIDIA's wheels beside JAX, Conda."""
    roots = (Path("/usr/local/cuda"), Path("/opt/cuda"))
    wheels = Path(jax.__file__).parents[1] / "nvidia"
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield Path(folder, "ptxas")
    for root in (*roots, wheels / "cu13", wheels / "cuda_nvcc", Path(sys.prefix)):
        yield root / "bin/ptxas"


def _version(path: Path) -> tuple[int, ...]:
    """The version of a ptxas, as (13, 0); () if it does not run."""
    from triton.knobs import NvidiaTool

    tool = NvidiaTool.from_path(str(path)) if shutil.which(path) else None
    return tuple(int(n) for n in tool.version.split(".")) if tool else ()
