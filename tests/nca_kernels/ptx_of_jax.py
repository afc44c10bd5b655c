"""The PTX that jax-triton hands to JAX, where JAX finds the older of the ptxas that Triton brings.

Run as a program of its own: Triton compiles, which a process that interprets cannot. Prints JSON:
by kernel of Growing NCA, whether the code is that of ``nca_kernels.testing.triton_aot``, and what
the ptxas has against it, run as JAX does.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["NCA_CUDA_ARCH"] = "90"

import jax
import jax.numpy as jnp
import triton
from jax_triton import triton_lib

import nca_kernels as nk
from nca_kernels.backends.triton import assembler
from nca_kernels.testing import BENCHMARKS, triton_aot

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

handed: dict[str, str] = {}  # by kernel


def code(ptx: str) -> list[str]:
    """Instructions and declarations, without comments and what is for debuggers."""
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    end = next((i for i, line in enumerate(lines) if line.startswith(".section")), len(lines))
    return [line for line in lines[:end] if line and not line.startswith((".loc", ".file"))]


def complaint(ptx: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(TOOLS / "ptxas"), file.name, "-o", os.devnull, "-arch=sm_90a"]
        return subprocess.run(command, capture_output=True, text=True).stderr


def main() -> None:
    os.environ["PATH"] = str(TOOLS)
    assembler.agree()
    library = triton_lib.triton_kernel_call_lib
    kernel = library.TritonKernel

    def recorded(name, warps, ctas, shared, ptx, *rest):
        handed[name] = ptx
        return kernel(name, warps, ctas, shared, ptx, *rest)

    library.TritonKernel = recorded
    case = BENCHMARKS[0]
    params, state, key, _ = case.arguments()

    def loss(params, state):
        params = case.with_constant_taps(params)
        return jnp.sum(nk.step(case.rule, params, state, key, backend="triton"))

    training = jax.jit(jax.grad(loss, (0, 1)))
    training.trace(params, state).lower(lowering_platforms=("cuda",))
    counted = {job.name: triton_aot.ptx(job, "sm_90") for job in triton_aot.jobs(case, "sm_90")}
    found = {}
    for name, ptx in counted.items():
        found[name] = {"same": code(handed[name]) == code(ptx), "error": complaint(handed[name])}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
