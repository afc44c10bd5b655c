"""What a lowered gradient of Growing NCA hands to JAX, and what a second grid size compiles.

This is a program of its own because Triton compiles here, which it cannot do in a process that
interprets. It prints JSON: targets and API versions of the module's custom calls; for each kernel
whether its code is that of ``tests.tools.triton_aot``, and the complaints of an older ptxas; how
many kernels were compiled for each of two grid sizes; and the launch grids of a vmap over 70,000
members.
"""

import json
import os
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["NCA_CUDA_ARCH"] = "90"

import jax
import jax.numpy as jnp
import triton
from jaxlib import gpu_triton

import nca_kernels as nk
from nca_kernels.backends.triton import assembler, launch
from nca_kernels.backends.triton.launch import compile_kernel
from nca_kernels.testing import BENCHMARKS
from tests.tools import triton_aot

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CUSTOM_CALL = re.compile(r'custom_call_target="(\w+)".*?api_version=(\w+)')


def lowered(case):
    params, state, key, _ = case.arguments()

    def loss(params, state):
        params = case.with_constant_taps(params)
        return jnp.sum(nk.step(case.rule, params, state, key, backend="triton"))

    training = jax.jit(jax.grad(loss, (0, 1))).trace(params, state)
    return training.lower(lowering_platforms=("cuda",))


def grids_of_many_members(case) -> list[list[int]]:
    """The grid ``[x, y, z]`` of each launch of the forward."""
    grids, call = [], gpu_triton.TritonKernelCall

    def recorded(code, *grid_and_parameters):
        grids.append(list(grid_and_parameters[:3]))
        return call(code, *grid_and_parameters)

    gpu_triton.TritonKernelCall = recorded
    params, _, key, _ = case.arguments()
    states = jax.ShapeDtypeStruct((70_000, 4, 4, case.channels), "float32")
    step = jax.vmap(lambda state: nk.step(case.rule, params, state, key, backend="triton"))
    jax.jit(step).trace(states).lower(lowering_platforms=("cuda",))
    gpu_triton.TritonKernelCall = call
    return grids


def complaint(ptx: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(TOOLS / "ptxas"), file.name, "-o", os.devnull, "-arch=sm_90a"]
        return subprocess.run(command, capture_output=True, text=True).stderr


def main() -> None:
    handed: dict[str, str] = {}  # PTX by kernel
    kernel = gpu_triton.TritonKernel

    def recorded(name, warps, ctas, shared, ptx, *rest):
        handed[name] = ptx
        return kernel(name, warps, ctas, shared, ptx, *rest)

    gpu_triton.TritonKernel = recorded
    case = BENCHMARKS[0]
    module = lowered(case).compiler_ir(dialect="hlo").as_hlo_text()
    of_module = dict(handed)
    compiled = [compile_kernel.cache_info().misses]
    lowered(replace(case, grid=(56, 40), batch=(3,)))
    compiled.append(compile_kernel.cache_info().misses - compiled[0])
    grids = grids_of_many_members(case)
    counted = {job.name: triton_aot.ptx(job, "sm_90") for job in triton_aot.jobs(case, "sm_90")}
    same = {name: of_module[name] == ptx for name, ptx in counted.items()}
    # As on a machine where JAX finds the older of the two ptxas that Triton brings.
    os.environ["PATH"] = str(TOOLS)
    launch._ptx_version = lambda: assembler.ptx_version(90)
    handed.clear()
    jax.clear_caches()
    lowered(case)
    print(json.dumps({
        "calls": sorted(set(CUSTOM_CALL.findall(module))),
        "same": same,
        "complaints": {name: complaint(ptx) for name, ptx in handed.items()},
        "compiled": compiled,
        "grids": grids,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
