"""The GPU that kernels are compiled for."""

from __future__ import annotations

import os

import jax

ARCHITECTURE = "NCA_CUDA_ARCH"  # compile for this compute capability (90, ...) without a GPU
# KB that a program may have, by compute capability, as CUDA's programming guide lists them; all
# others have 99. AMD's kernels keep in registers what NVIDIA's tensor cores read from there.
SHARED_MEMORY = {0: 163, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
SHARED_MEMORY |= {70: 96, 72: 96, 75: 64}


def capability() -> int:
    """The CUDA compute capability to compile for, as 90; 0 of a GPU that has none.

    Raises:
        ValueError: the environment names something else than a number.
    """
    named = os.environ.get(ARCHITECTURE)
    if named:
        if not named.isdigit():
            raise ValueError(f"{ARCHITECTURE} must be a compute capability, as 90, got {named!r}")
        return int(named)
    major, _, minor = str(getattr(jax.devices()[0], "compute_capability", "0")).partition(".")
    return 10 * int(major) + int(minor or 0) if major.isdigit() else 0


def is_hopper(capability: int) -> bool:
    """Tensor cores take 64 rows at a time, and one instruction rounds to TF32.

    So it is from Hopper on, but not with GeForce's Blackwell.
    """
    return 90 <= capability < 120


def has_tf32(capability: int) -> bool:
    """Whether tensor cores multiply TF32: those of NVIDIA's before Ampere do not."""
    return not 0 < capability < 80


def shared_memory(capability: int) -> int:
    """Bytes of shared memory that a program may have."""
    return SHARED_MEMORY.get(capability, 99) << 10
