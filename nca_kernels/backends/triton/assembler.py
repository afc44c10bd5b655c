"""Which ptxas assembles kernels: Triton writes PTX for its own, but JAX runs the one that it finds.

jax-triton hands JAX the PTX. A ptxas that is older than Triton's refuses its version, as CUDA 13.0
does that of Triton 3.9.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jax

OLDEST = (11, 8)  # that JAX takes: of an older one it looks on
# What Triton writes for, before and from Hopper or Blackwell on; the environment names another.
TOOLS = {"TRITON_PTXAS_PATH": "ptxas", "TRITON_PTXAS_BLACKWELL_PATH": "ptxas-blackwell"}


@cache
def agree() -> None:
    """Has Triton write what JAX's ptxas reads, in this process; if JAX has none, it gets Triton's.

    What the user's environment names stays.
    """
    import triton

    own = Path(triton.__file__).parent / "backends/nvidia/bin"
    found = next((path for path in _where_jax_looks() if _version(path) >= OLDEST), None)
    if found is None:
        os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{own}"
        found = own / "ptxas"
    for variable, name in TOOLS.items():
        if variable not in os.environ and _version(found) < _version(own / name):
            os.environ[variable] = str(found)


def _where_jax_looks() -> Iterator[Path]:
    """As XLA does: PATH, common places, NVIDIA's wheels beside JAX, the Conda environment."""
    roots = (Path("/usr/local/cuda"), Path("/opt/cuda"))
    wheels = Path(jax.__file__).parents[1] / "nvidia"
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield Path(folder, "ptxas")
    for root in (*roots, wheels / "cu13", wheels / "cuda_nvcc", Path(sys.prefix)):
        yield root / "bin/ptxas"


def _version(path: Path) -> tuple[int, ...]:
    """As (13, 0); () of what does not run."""
    from triton.knobs import NvidiaTool

    tool = NvidiaTool.from_path(str(path)) if shutil.which(path) else None
    return tuple(int(n) for n in tool.version.split(".")) if tool else ()
