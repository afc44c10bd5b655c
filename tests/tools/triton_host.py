"""Runs Triton kernels without a GPU: in Triton's interpreter, on NumPy arrays, under jit.

The backend ``triton_interpreted`` is the backend ``triton`` with its launches replaced by host
callbacks. The interpreter needs a process of its own: ``TRITON_INTERPRET=1`` has to be set before
Triton is imported, and nothing can be compiled then.

An access outside of the kernel's arrays raises an error, and so does a race (see ``races``). Memory
that was not written holds NaN.

The interpreter is corrected where it differs from a GPU: in products and casts of bfloat16, in
products of TF32, and in loops of dynamic length under newer NumPy. It is also made faster: by
itself it patches Triton's language anew for each call of a function.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from types import FunctionType, SimpleNamespace
from typing import Any

import jax
import ml_dtypes
import numpy as np

from nca_kernels import dispatch
from nca_kernels.backends.triton.configuration import product_precision
from nca_kernels.backends.triton.geometry import Sizes
from nca_kernels.backends.triton.launch import size_names
from nca_kernels.tuning import Launch
from tests.tools.races import Accesses, Extent, function_in

INTERPRET = "TRITON_INTERPRET"
NAME = "triton_interpreted"
KERNELS = "backends/triton"  # files that hold them
CALLBACK = "xla_ffi_python_cpu_callback"  # what a lowered launch shows


def register(
    name: str = NAME,
    summary: str = "the Triton kernels in Triton's interpreter",
    **changes: Any,
) -> None:
    """Adds the backend ``triton_interpreted`` to those of ``nca_kernels.dispatch``.

    Args:
        name, summary: of another backend that is added in its place.
        changes: fields of that backend's ``configuration.Engine``.
    """
    dispatch.register(
        dispatch.Backend(
            name=name,
            summary=summary,
            load=partial(_load, changes),
            platforms=("cpu",),
            missing=missing,
            covers=dispatch.covers("triton"),
            markers=dict.fromkeys(("step", "neighborhood_attention"), (CALLBACK,)),
        )
    )


def missing() -> str | None:
    if os.environ.get(INTERPRET) != "1":
        return f"set {INTERPRET}=1 before Triton is imported"
    return None


def _load(changes: dict[str, Any], op: str) -> Any:
    from nca_kernels.backends import triton

    # Each op is (partial(forward, engine), partial(backward, engine)).
    interpreted: dict[str, Any] = {
        "run_kernel": run_kernel,
        "fixed": small_tiles,
        "precision": nvidias,
    }
    engine = replace(triton.ENGINE, **interpreted | changes)
    return tuple(partial(kernel.func, engine) for kernel in getattr(triton, op))


def nvidias(precision: str, platform: str) -> str:
    """Products as NVIDIA's GPUs take them; by default those of this platform."""
    return product_precision(precision, platform if precision == "default" else "cuda")


def small_tiles(call: Any) -> Launch:
    """Tiles so small that small grids have several, and rows so few that tiles have several."""
    tile = {1: (1, 1, 32), 2: (1, 4, 16), 3: (4, 4, 16)}[call.num_spatial_dims]
    rows = {1: 16, 2: 32, 3: 256}[call.num_spatial_dims]
    # So that both ways run: weights in shared memory in 2-D alone, their gradients in registers in
    # 1-D alone, filters side by side and the state's gradient by tap in all but 3-D.
    return Launch(
        tile,
        rows,
        32,
        programs=3,
        weights_in_shared_memory=2**14 if call.num_spatial_dims == 2 else 0,
        side_by_side=0 if call.num_spatial_dims == 3 else 256,
        contributions_by_tap=0 if call.num_spatial_dims == 3 else 2**18,
        weight_gradients_in_registers=call.num_spatial_dims == 1,
    )


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
    """As ``backends.triton.launch.run_kernel``, in the interpreter."""
    told = {name: getattr(sizes, name) for name in size_names(kernel)} | {"config": config}
    run = partial(interpret, kernel, outputs, programs, told, 32 * launch.warps, aliases or {})
    return list(jax.pure_callback(run, list(outputs), *inputs))


_lock = threading.Lock()  # the interpreter's state is global
_accesses = Accesses([], 0)  # of the running launch


def interpret(
    kernel: Any,
    outputs: Sequence[jax.ShapeDtypeStruct],
    programs: int,
    told: dict[str, Any],
    threads: int,
    aliases: dict[int, int],
    *inputs: Any,
) -> list[np.ndarray]:
    """Runs ``kernel``, by so many programs and threads, on NumPy arrays; returns its outputs."""
    arrays = [np.array(a) for a in inputs]
    results = [np.full(o.shape, _rubbish(o.dtype), o.dtype) for o in outputs]
    for index, output in aliases.items():
        results[output] = arrays[index]
    global _accesses
    with _lock:
        _correct_interpreter()
        extents = [Extent(a.ctypes.data, a.size, a.itemsize) for a in (*arrays, *results)]
        _accesses = Accesses(extents, threads)
        kernel[(programs,)](*map(_Operand, [*arrays, *results]), **told)
    return results


def _rubbish(dtype: Any) -> Any:
    return np.nan if jax.numpy.issubdtype(dtype, np.floating) else dtype == np.bool_ or -1


class _Operand:
    """A NumPy array in the shape of what the interpreter knows: a tensor of PyTorch."""

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def dtype(self) -> Any:
        import triton.language as tl

        name = self.array.dtype.name
        return getattr(tl, "int1" if name == "bool" else name)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _Operand:
        return self

    def cpu(self) -> _Operand:
        return self

    def new_empty(self, *args: Any, **keywords: Any) -> _Operand:
        return _Operand(self.array)

    def set_(self, storage: _Operand, *args: Any) -> None:
        self.array = storage.array

    def copy_(self, other: _Operand) -> None:
        """Nothing to copy: the interpreter worked on this array itself."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def element_size(self) -> int:
        return self.array.itemsize


@cache
def _correct_interpreter() -> None:
    """Corrects the interpreter, once a process; the docstring of this file says where."""
    from triton.runtime import interpreter

    _correct_products(interpreter)
    _correct_casts(interpreter)
    _add_inline_assembly(interpreter)
    _let_tensors_be_lengths_of_loops(interpreter)
    _note_accesses(interpreter)
    _patch_language_once(interpreter)
    # As kernels are compiled: without checks of integers for overflow.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def _correct_products(interpreter: Any) -> None:
    """Products of bfloat16, which the interpreter keeps as integers, and of TF32, which cut off."""
    import triton.language as tl
    from triton._C.libtriton import ir

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    create_dot = builder.create_dot

    def widened(value: Any) -> Any:
        if value.dtype.scalar != tl.bfloat16:
            return value
        return handle(value.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)

    def cut_off(value: Any) -> Any:
        if value.dtype != tl.float32:
            return value
        bits = np.ascontiguousarray(value.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return handle(bits.view(np.float32), tl.float32)

    def true_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, *rest: Any) -> Any:
        a, b = widened(a), widened(b)
        if precision == ir.INPUT_PRECISION.TF32:
            a, b = cut_off(a), cut_off(b)
        return create_dot(self, a, b, acc, precision, *rest)

    builder.create_dot = true_dot


def _correct_casts(interpreter: Any) -> None:
    """Casts of float32 to bfloat16 round to the nearest; the interpreter's own cut off."""
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast = builder.cast_impl

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = source.data.astype(ml_dtypes.bfloat16)
            return handle(rounded.view(np.uint16), tl.bfloat16)
        return cast(self, source, target)

    builder.cast_impl = rounding_cast
    builder.create_fp_trunc = builder.create_fp_ext = rounding_cast


def _add_inline_assembly(interpreter: Any) -> None:
    """The only inline assembly of the kernels rounds the operands of TF32 products."""
    import triton.language as tl

    from nca_kernels.backends.triton import mlp

    def add_half(self: Any, asm: str, _: str, values: Any, *rest: Any) -> Any:
        assert asm == mlp._ADD_HALF.value, f"cannot run {asm}"
        x = np.ascontiguousarray(values[0].data)
        more = (x.view(np.uint32) + np.uint32(1 << 12)).view(np.float32)
        result = interpreter.TensorHandle(np.where(np.isfinite(x), more, x), tl.float32)
        return SimpleNamespace(get_result=lambda _: result)

    interpreter.InterpreterBuilder.create_inline_asm = add_half


def _let_tensors_be_lengths_of_loops(interpreter: Any) -> None:
    """The interpreter relies on arrays of one element being indices, which newer NumPy refuses."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_index


def _note_accesses(interpreter: Any) -> None:
    """Tells ``_accesses``, which finds races, of all loads, stores and barriers."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def program(builder: Any) -> int:
        (x, y, z), (size_x, size_y, _) = builder.grid_idx, builder.grid_dim
        return (z * size_y + y) * size_x + x

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        where = (program(self), function_in(KERNELS), pointers.data)
        _accesses.read(*where, mask.data.astype(bool))
        return load(self, pointers, mask, *rest)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        where = (program(self), function_in(KERNELS), pointers.data)
        _accesses.write(*where, mask.data.astype(bool), value.data)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = noted_load, noted_store
    builder.create_barrier = lambda self: _accesses.barrier()


def _patch_language_once(interpreter: Any) -> None:
    """Triton's language is patched once, not anew for each call of a function of a kernel."""
    import triton.language as tl

    patch_language = interpreter._patch_lang
    whole_language = FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})

    @cache
    def patch_for_good() -> None:
        patch_language(whole_language)

    def patch_once(fn: Any) -> Any:
        patch_for_good()
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = patch_once
