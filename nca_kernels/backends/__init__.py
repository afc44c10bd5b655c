"""The one list of backends, in the order in which "auto" prefers them, and what each covers.

A new value of an option goes into ``covers`` of the backends that do it right; the others refuse it
by name. The backend ``reference`` is plain JAX, knows every option, and has no such list.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

from nca_kernels.dispatch import EVERY, Backend, Covers, Values, register


def _loader(package: str) -> Callable[[str], Any]:
    """``load`` of a backend: imports its package when an op is first used."""
    return lambda op: getattr(import_module(f"nca_kernels.backends.{package}"), op)


def _forward_with_gradients_of_xla(package: str) -> Callable[[str], Any]:
    """``load`` of a backend that has no backward of its own: its ops are forwards."""
    return lambda op: (_loader(package)(op), _loader("xla")(op)[1])


def _ask(module: str, function: str) -> Callable[..., str | None]:
    """``missing``, or what is too wide for a backend, imported when first asked."""
    name = f"nca_kernels.backends.{module}"
    return lambda *args: getattr(import_module(name), function)(*args)


ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "elu", "leaky_relu", "identity")
RULE: dict[str, Values] = {
    "activation": ACTIVATIONS,
    "perception_activation": ACTIVATIONS,
    "padding": ("zeros", "circular", "replicate", "reflect"),
    "fire_rate": EVERY,
    "step_size": EVERY,
    "alive": (None, "Alive"),
    "precision": ("default", "float32", "tensorfloat32", "bfloat16"),
    "negative_slope": EVERY,
}
ALIVE: dict[str, Values] = {"channel": EVERY, "threshold": EVERY, "radius": EVERY}
ATTENTION: dict[str, Values] = {"radius": EVERY, "padding": ("zeros", "circular")}
COMMON = Covers(RULE, ALIVE, ATTENTION)  # what all of them do

for backend in (
    Backend(
        name="triton",
        summary="one fused Triton kernel a step, hand-written backward",
        load=_loader("triton"),
        platforms=("cuda", "rocm"),
        missing=_ask("triton.launch", "missing"),
        # A word of 16 cells is pooled in 32 lanes, which hold twice the radius on both sides.
        covers=replace(
            COMMON,
            alive=ALIVE | {"radius": (1, 2, 3, 4)},
            width=_ask("triton.engine", "too_wide"),
        ),
        markers={
            "step": ("@nca_triton_step_forward", "@nca_triton_step_backward"),
            "neighborhood_attention": (
                "@nca_triton_attention_forward",
                "@nca_triton_attention_backward_query",
            ),
        },
        custom_calls=("triton_kernel_call_ffi",),
    ),
    Backend(
        name="pallas",
        summary="a plain fused forward in Pallas, without Triton installed; gradients are xla's",
        load=_forward_with_gradients_of_xla("pallas"),
        platforms=("cuda", "rocm"),
        missing=_ask("pallas.cells", "missing"),
        covers=replace(COMMON, width=_ask("pallas", "too_wide")),
        markers={
            "step": ("nca_pallas_step", "@nca_xla_backward"),
            "neighborhood_attention": ("nca_pallas_attention", "@nca_xla_attention_backward"),
        },
        custom_calls=("__gpu$xla.gpu.triton",),
    ),
    Backend(
        name="cpu",
        summary="fused C++ through XLA's FFI: only cells that fire and live, on all cores",
        load=_loader("cpu"),
        platforms=("cpu",),
        missing=_ask("cpu.library", "missing"),
        covers=COMMON,
        markers={
            "step": ("@nca_cpu_step_forward", "@nca_cpu_step_backward"),
            "neighborhood_attention": (
                "@nca_cpu_attention_forward",
                "@nca_cpu_attention_backward",
            ),
        },
        custom_calls=tuple(
            f"nca_cpu_{op}_{kind}"
            for op in ("step", "attention")
            for kind in ("forward", "backward")
        ),
    ),
    Backend(
        name="xla",
        summary="fused by XLA: shifted slices and matrix products, hand-written backward",
        load=_loader("xla"),
        covers=replace(
            COMMON,
            dtypes=("float32", "bfloat16", "float64"),
            symbolic_batch=True,
        ),
        markers={
            "step": ("@nca_xla_forward", "@nca_xla_backward"),
            "neighborhood_attention": (
                "@nca_xla_attention_forward",
                "@nca_xla_attention_backward",
            ),
        },
    ),
    Backend(
        name="reference",
        summary="plain JAX convolutions and autodiff: slow, obvious, the oracle",
        load=_loader("reference"),
        markers={
            "step": ("stablehlo.convolution",),
            "neighborhood_attention": ("stablehlo.gather",),
        },
        plain=True,
    ),
):
    register(backend)
