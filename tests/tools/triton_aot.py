"""Compiles Triton kernels ahead of time, for GPUs that need not be there, and reads the result.

Not in a process that has ``TRITON_INTERPRET`` set: nothing compiles in one.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import nca_kernels as nk
from nca_kernels import dispatch
from nca_kernels.backends import COMMON
from nca_kernels.backends import triton as backend
from nca_kernels.backends.triton.constants import CompileTime
from nca_kernels.backends.triton.geometry import Sizes
from nca_kernels.backends.triton.launch import compile_kernel, options, types
from nca_kernels.testing.cases import AttentionCase, Case
from nca_kernels.tuning import Launch
from tests.tools.issue_slots import warp_instructions_a_cell

TARGETS: dict[str, tuple[str, Any, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TENSOR_CORES = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|v_mfma)")


@dataclass(frozen=True)
class Job:
    """One kernel as a call launches it."""

    case: str
    kernel: Any
    signature: tuple[str, ...]  # Triton's types of inputs and outputs
    config: Any  # a dataclass, what the kernel is compiled for
    sizes: Sizes  # of the call: what the kernel is not compiled for
    launch: Launch

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def jobs(
    case: Case | AttentionCase,
    target: str,
    device: str = "",
    fixed: Callable[[Any], Launch] | None = None,
    **changes: Any,
) -> list[Job]:
    """The kernels of a case, forward and backward, recorded as they would be launched.

    Args:
        device: whose packaged winners to take; without, launches are the heuristic's.
        fixed: a launch for every kernel instead.
        changes: fields of the kernels' configuration that are not to follow from the case.
    """
    recorded: list[Job] = []

    def record(
        kernel: Any,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        *,
        config: Any,
        sizes: Sizes,
        launch: Launch,
        **rest: Any,
    ) -> list[Any]:
        config = replace(config, **changes)
        recorded.append(Job(case.name, kernel, types(inputs, outputs), config, sizes, launch))
        return [jnp.zeros(o.shape, o.dtype) for o in outputs]

    engine = replace(
        backend.ENGINE,
        run_kernel=record,
        fixed=fixed,
        device=lambda: device,
        capability=lambda: TARGETS[target][1] if TARGETS[target][0] == "cuda" else 0,
    )
    platform = "cuda" if target.startswith("sm") else "rocm"

    def load(op: str) -> Any:
        forward, backward = (kernel.func for kernel in getattr(backend, op))
        return (
            lambda call, _, *args: forward(engine, call, platform, *args),
            lambda call, _, *args: backward(engine, call, platform, *args),
        )

    name, covers = "triton_recorded", replace(COMMON, alive=dispatch.covers("triton").alive)
    recorder = dispatch.Backend(name, summary="records launches", load=load, covers=covers)
    dispatch.register(recorder)
    jax.clear_caches()  # a lowering taken from the cache records nothing
    _lower_gradient(case, name)
    return list(dict.fromkeys(recorded))


def _lower_gradient(case: Case | AttentionCase, backend: str) -> None:
    """Lowers a case's value and gradients: of a step, or of an update where its name says so."""
    if isinstance(case, AttentionCase):
        arrays = case.arguments()

        def attend(q: Any, k: Any, v: Any) -> Any:
            out = nk.neighborhood_attention(
                q, k, v, case.radius, len(case.grid), backend, padding=case.padding
            )
            return jnp.sum(out.astype(jnp.float32))

        jax.jit(jax.value_and_grad(attend, (0, 1, 2))).lower(*arrays)
        return
    params, state, key, inputs = case.arguments()
    if case.name.startswith("update"):

        def updated(layers: Any, state: Any, perception: Any, inputs: Any) -> Any:
            dims = len(case.grid)
            out = nk.update(
                case.rule, layers, state, perception, key, inputs, backend, num_spatial_dims=dims
            )
            return jnp.sum(out)

        perception = jnp.zeros((*state.shape[:-1], case.perception_size))
        wanted = (0, 1, 2) if inputs is None else (0, 1, 2, 3)
        args = (params.layers, state, perception, inputs)
        jax.jit(jax.value_and_grad(updated, wanted)).lower(*args)
        return

    def loss(params: Any, state: Any, inputs: Any) -> Any:
        params = case.with_constant_taps(params)
        out = nk.step(case.rule, params, state, key, inputs, backend=backend)
        return jnp.sum(out.astype(jnp.float32))

    fun = jax.value_and_grad(loss, (0, 1, 2)[: 2 + bool(case.inputs)])
    jax.jit(fun).lower(params, state, inputs)


def compile_job(job: Job, target: str) -> dict[str, Any]:
    """Compiles for one of ``TARGETS``; what the kernel takes: registers, spills, shared memory."""
    compiled = _compiled(job, target)
    if target.startswith("gfx"):
        used = _amd_usage(compiled.asm)
    else:
        used = _nvidia_usage(compiled.asm, job)
    return {
        "case": job.case,
        "kernel": job.name,
        "target": target,
        "shared_bytes": compiled.metadata.shared,
        **used,
        "launch": asdict(job.launch),
    }


def ptx(job: Job, target: str) -> str:
    """What NVIDIA's assembler gets."""
    return str(_compiled(job, target).asm["ptx"])


def _compiled(job: Job, target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget(*TARGETS[target])
    return compile_kernel(
        job.kernel, job.signature, CompileTime(job.config), options(job.launch), gpu
    )


def _nvidia_usage(asm: Any, job: Job) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        code = _tool("nvdisasm", "-c", str(path))
    numbers = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    return {
        "registers": int(numbers["REG"]),
        "spill_bytes": int(numbers["STACK"]),
        **_instructions(code, r"\bBAR\.SYNC"),
        **_issued(code, job),
    }


def _issued(code: str, job: Job) -> dict[str, float]:
    issued = warp_instructions_a_cell(job.name, code, job.config, job.sizes, job.launch)
    return {} if issued is None else {"warp_instructions_a_cell": round(issued, 1)}


def _amd_usage(asm: Any) -> dict[str, Any]:
    code = asm["amdgcn"]
    numbers = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", code))
    return {
        "registers": int(numbers["vgpr_count"]),
        "spill_bytes": int(numbers["private_segment_fixed_size"]),
        **_instructions(code, r"\bs_barrier\b"),
    }


def _instructions(code: str, barrier: str) -> dict[str, Any]:
    tensor = Counter(TENSOR_CORES.findall(code))
    return {"tensor_instructions": dict(tensor), "barriers": len(re.findall(barrier, code))}


def _tool(name: str, *args: str) -> str:
    """A tool of the CUDA tool-kit that comes with Triton."""
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    run = subprocess.run(
        [str(folder / name), *args], capture_output=True, text=True, check=True, env=environment
    )
    return run.stdout
