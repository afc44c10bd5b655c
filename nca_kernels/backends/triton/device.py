"""The GPU that kernels are compiled for."""

from __future__ import annotations

import os

import jax

ARCHITECTURE = "NCA_CUDA_ARCH"  # compile for this compute capability (90, ...) without a GPU
# Shared memory that a program may have, in KB, by compute capability, as CUDA's programming guide
# lists it; GPUs that are not listed have 99. 0 stands for AMD's, whose kernels need less than that:
# they keep in registers what NVIDIA's tensor cores read from shared memory.
SHARED_MEMORY = {0: 163, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
SHARED_MEMORY |= {70: 96, 72: 96, 75: 64}


def capability() -> int:
    """The CUDA compute capability to compile for, as 90; 0 for a GPU that has none.

    Raises:
        ValueError: the environment variable is not a number.
    """
    named = os.environ.get(ARCHITECTURE)
    if named:
        if not named.isdigit():
            raise ValueError(f"{ARCHITECTURE} must be a compute capability, as 90, got {named!r}")
        return int(named)
    major, _, minor = str(getattr(jax.devices()[0], "compute_capability", "0")).partition(".")
    return 10 * int(major) + int(minor or 0) if major.isdigit() else 0


def has_64_row_products(capability: int) -> bool:
    """Whether tensor cores take 64 rows at a time, and one instruction rounds to TF32.

    Both are so from Hopper on, but not with GeForce's Blackwell.
    """
    return 90 <= capability < 120


def has_tf32(capability: int) -> bool:
    """Whether tensor cores multiply TF32: NVIDIA's before Ampere do not."""
    return not 0 < capability < 80


def shared_memory(capability: int) -> int:
    """Bytes of shared memory that a program may have."""
    return SHARED_MEMORY.get(capability, 99) << 10
