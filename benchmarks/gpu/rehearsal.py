"""A child that lowers in place of running: it compiles for CUDA on a machine without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from triton.runtime.cache import get_cache_manager

from benchmarks.gpu.child import serve
from benchmarks.gpu.items import Asked, Facts, Item
from benchmarks.gpu.work import DeviceWork
from nca_kernels import dispatch
from nca_kernels.backends import triton


class Rehearsal(DeviceWork):
    """``child.Work`` with those items that launch Triton kernels."""

    def __init__(self, asked: Asked) -> None:
        register_stand_in(asked.device)
        super().__init__(asked)

    def items(self, stage: str) -> list[Item]:
        return [item for item in super().items(stage) if item.lower]

    def kernels(self) -> Facts:
        """The folders in Triton's cache of all kernels that were compiled, now or before."""
        return {"folders": [Path(get_cache_manager(key).cache_dir).name for key in self.taken()]}

    def healthy(self) -> bool:
        return True


def register_stand_in(device: str) -> None:
    """Replaces ``triton`` by a backend that compiles its kernels for CUDA, and returns zeros."""

    def run_kernel(
        kernel: Any, inputs: Sequence[Any], outputs: Sequence[Any], **rest: Any
    ) -> list[Any]:
        run = lambda *arrays: triton.ENGINE.run_kernel(kernel, arrays, outputs, **rest)
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs]
        jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))
        return [jnp.zeros(o.shape, o.dtype) for o in outputs]

    def load(op: str) -> tuple[Callable, ...]:
        forward, backward = (partial(f.func, engine) for f in getattr(triton, op))
        return (
            lambda call, _, *args: forward(call, "cuda", *args),
            lambda call, _, *args: backward(call, "cuda", *args),
        )

    engine = replace(triton.ENGINE, run_kernel=run_kernel, device=lambda: device)
    dispatch.register(
        dispatch.Backend(
            "triton",
            summary="compiles what it is to launch",
            load=load,
            covers=dispatch.covers("triton"),
            markers=dict.fromkeys(("step", "neighborhood_attention"), ()),
        )
    )


if __name__ == "__main__":
    sys.exit(serve(Rehearsal))
