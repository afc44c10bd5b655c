"""Calls Triton kernels from JAX: the one place that knows jax-triton and its versions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax

from nca_kernels.backends.triton.assembler import agree
from nca_kernels.backends.triton.constants import Constants
from nca_kernels.tiled.device import ARCHITECTURE, capability
from nca_kernels.tuning import Launch


def launch(
    kernel: Any,
    inputs: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    g: dict[str, Any],
    how: Launch,
    aliases: dict[int, int] | None = None,
) -> list[Any]:
    """Runs ``kernel(*inputs, *outputs, g)`` over the grid; returns the outputs.

    Args:
        aliases: inputs, by their index, that are written in place as outputs.
    """
    jax_triton = load()
    if not os.environ.get(ARCHITECTURE) and capability() > 0:
        agree()
    # 0.4 renamed the argument and takes the capability from the device alone.
    shapes: dict[str, Any] = {
        "out_type" if version(jax_triton) >= (0, 4) else "out_shape": list(outputs)
    }
    if os.environ.get(ARCHITECTURE) and version(jax_triton) < (0, 4):
        shapes["compute_capability"] = capability()

    def call(*inputs: Any) -> list[Any]:
        return jax_triton.triton_call(
            *inputs,
            kernel=kernel,
            grid=grid,
            num_warps=how.warps,
            num_stages=how.stages,
            enable_fp_fusion=True,
            input_output_aliases=aliases or {},
            g=Constants(g),
            **shapes,
        )

    call.__name__ = f"nca_triton_{kernel.fn.__name__}"  # shows in the lowered module
    return jax.jit(call)(*inputs)


def load() -> Any:
    """Imports jax-triton, which 0.3.1 does at the price of Triton's cache folder."""
    before = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    if os.environ.get("TRITON_CACHE_DIR") == "":
        del os.environ["TRITON_CACHE_DIR"]
        if before:
            os.environ["TRITON_CACHE_DIR"] = before
    return jax_triton


def version(package: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in package.__version__.split(".")[:2])


def missing() -> str | None:
    """Why kernels cannot be compiled in this process, or None."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set, and Triton compiles nothing then: unset it"
    try:
        import triton
    except ImportError:
        return "triton is not installed: pip install triton jax-triton"
    # Its own functions are what they were at its import, and jax-triton then cannot be imported.
    if not isinstance(triton.language.cdiv, triton.runtime.JITFunction):
        return "TRITON_INTERPRET was set when Triton was imported: start Python without it"
    try:
        load()
    except ImportError as error:
        if "GPU support" in str(error):
            return "jax-triton needs JAX with CUDA or ROCm: pip install 'jax[cuda13]'"
        return "jax_triton is not installed: pip install triton jax-triton"
    if not os.environ.get(ARCHITECTURE) and not _has_gpu():
        return f"there is no GPU: to compile for one, set {ARCHITECTURE}, as 90 for an H200"
    return None


def _has_gpu() -> bool:
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False
