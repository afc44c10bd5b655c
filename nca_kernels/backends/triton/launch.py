"""Compiles Triton kernels and calls them from JAX, with all versions of both that are supported.

No release of jax-triton does. Version 0.3.1 lowers to a custom call of the old kind, which XLA does
not take into CUDA graphs, and does not use Triton's cache; 0.4 lowers as this module does, but
needs Triton 3.7 and fails with JAX 0.12.0. So kernels are compiled by ``triton.compile``, with its
cache and all of its options, and called through the target that JAX's own GPU plugins register for
Triton kernels, ``triton_kernel_call_ffi``.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from nca_kernels.backends.triton import assembler
from nca_kernels.backends.triton.constants import CompileTime
from nca_kernels.backends.triton.device import ARCHITECTURE, capability
from nca_kernels.backends.triton.geometry import Sizes
from nca_kernels.tuning import Launch

TARGET = "triton_kernel_call_ffi"  # what the lowered module calls
PREFIX = "nca_triton_"  # of the kernels' names in a lowered module
TYPES = {
    "float32": "*fp32",
    "bfloat16": "*bf16",
    "uint32": "*u32",
    "int32": "*i32",
    "bool": "*i1",
}
ALIGNED = 16  # bytes that the address of every array is a multiple of


def run_kernel(
    kernel: Any,
    inputs: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    programs: int,
    config: Any,
    sizes: Sizes,
    launch: Launch,
    aliases: dict[int, int] | None = None,
) -> list[Any]:
    """Runs ``kernel(*inputs, *outputs, *sizes, config)``; returns the outputs.

    Args:
        programs: how many run, those of all groups.
        config: a frozen dataclass, what the kernel is compiled for.
        sizes: of the call; the kernel gets those that it names as arguments.
        aliases: inputs, by their index, that are written in place as outputs.
    """
    from jaxlib import gpu_triton

    target = gpu_target()
    signature = types(inputs, outputs)
    compiled = compile_kernel(kernel, signature, CompileTime(config), options(launch), target)
    arrays = [gpu_triton.create_array_parameter(0, ALIGNED)] * (len(inputs) + len(outputs))
    told = (getattr(sizes, name) for name in size_names(kernel))
    numbers = [gpu_triton.create_scalar_parameter(number, "i32") for number in told]
    metadata = compiled.metadata
    code = gpu_triton.TritonKernel(
        metadata.name,
        metadata.num_warps,
        metadata.num_ctas,
        metadata.shared,
        _code(compiled, target),
        "",  # Triton's intermediate code, which nothing reads
        target.arch if target.backend == "cuda" else 0,
    )
    name = f"{PREFIX}{metadata.name}"  # shows in the lowered module
    call = gpu_triton.TritonKernelCall(code, programs, 1, 1, [*arrays, *numbers])
    opaque = zlib.compress(call.to_proto(name, b""))
    run = jax.ffi.ffi_call(TARGET, list(outputs), input_output_aliases=aliases)

    def named(*inputs: Any) -> Sequence[Any]:
        return run(*inputs, opaque=opaque)

    named.__name__ = name
    return list(jax.jit(named)(*inputs))


@cache
def compile_kernel(
    kernel: Any,
    signature: tuple[str, ...],
    config: CompileTime,
    options: tuple[tuple[str, Any], ...],
    target: Any,
) -> Any:
    """The compiled kernel, from Triton's cache if that has it; once a process.

    Args:
        signature: Triton's types of the arrays.
        options: of Triton's compiler.
        target: a ``triton.backends.compiler.GPUTarget``.

    Raises:
        RuntimeError: Triton's cache cannot be written.
    """
    import triton
    from triton.compiler import ASTSource

    sizes = size_names(kernel)
    arguments = (*signature, *("i32" for _ in sizes), "constexpr")
    aligned = {(i,): [["tt.divisibility", ALIGNED]] for i in range(len(signature))}
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(kernel.arg_names, arguments, strict=True)),
        constexprs={"config": config},
        attrs=aligned,
    )
    try:
        return triton.compile(source, target=target, options=dict(options))
    except OSError as error:
        raise RuntimeError(
            f"Triton cannot write its cache of compiled kernels ({error}): make room, or name "
            "another folder in the environment variable TRITON_CACHE_DIR"
        ) from error


def size_names(kernel: Any) -> list[str]:
    """The arguments of a kernel that are attributes of :class:`Sizes`: no arrays, no constant."""
    return [name for name in kernel.arg_names if name != "config" and not name.endswith("_ptr")]


def types(*arrays: Sequence[Any]) -> tuple[str, ...]:
    """Triton's types of arrays, as compiled for."""
    return tuple(TYPES[jnp.dtype(array.dtype).name] for group in arrays for array in group)


def options(launch: Launch) -> tuple[tuple[str, Any], ...]:
    """A launch as options of Triton's compiler."""
    chosen = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": True,
        "maxnreg": launch.registers or None,
        "ptx_version": _ptx_version(),
    }
    return tuple((name, value) for name, value in chosen.items() if value is not None)


def _ptx_version() -> int | None:
    """One that JAX assembles on this machine; Triton's own choice for any other machine."""
    return None if os.environ.get(ARCHITECTURE) else assembler.ptx_version(capability())


def gpu_target() -> Any:
    """The GPU to compile for, as Triton names it."""
    from jaxlib import gpu_triton
    from triton.backends.compiler import GPUTarget

    if capability():
        return GPUTarget("cuda", capability(), 32)
    return GPUTarget("hip", gpu_triton.get_arch_details(0).split(":")[0], 64)


def _code(compiled: Any, target: Any) -> str:
    """What JAX loads: PTX, or the path of a file with AMD's machine code."""
    if target.backend == "cuda":
        return str(compiled.asm["ptx"])
    return str(compiled.metadata_group[f"{compiled.metadata.name}.hsaco"])


def missing() -> str | None:
    """Why kernels cannot be compiled in this process, or None."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set, and Triton compiles nothing then: unset it"
    try:
        import triton
    except ImportError:
        return "triton is not installed: pip install triton"
    # Triton decides at its import whether its own functions are interpreted or can be compiled.
    if not isinstance(triton.language.cdiv, triton.runtime.JITFunction):
        return "TRITON_INTERPRET was set when Triton was imported: start Python without it"
    from jaxlib import gpu_triton

    if not hasattr(gpu_triton, "TritonKernelCall"):
        return "JAX has no GPU plugin, of CUDA or ROCm: pip install 'jax[cuda13]'"
    if not os.environ.get(ARCHITECTURE) and not _has_gpu():
        return f"there is no GPU: to compile for one, set {ARCHITECTURE}, as 90 for an H200"
    return None


def _has_gpu() -> bool:
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False
