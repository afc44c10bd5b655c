"""How the Triton kernels are run: what tests and tools replace."""

from __future__ import annotations

from importlib import import_module

from nca_kernels.backends.triton.configuration import Engine, product_precision, too_wide_for_tiles
from nca_kernels.backends.triton.device import capability, has_tf32
from nca_kernels.backends.triton.launch import run_kernel


def _precision(precision: str, platform: str) -> str:
    """The precision of products on this GPU: NVIDIA's older ones have no TF32."""
    name = product_precision(precision, platform)
    return "ieee" if name.startswith("tf32") and not has_tf32(capability()) else name


ENGINE = Engine(
    name="triton",
    step_kernels=lambda: import_module("nca_kernels.backends.triton.step_kernels"),
    attention_kernels=lambda: import_module("nca_kernels.backends.triton.attention_kernels"),
    run_kernel=run_kernel,
    precision=_precision,
    capability=capability,
)
too_wide = too_wide_for_tiles
