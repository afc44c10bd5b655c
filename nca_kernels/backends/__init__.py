"""The one list of backends, in the order in which "auto" prefers them."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from nca_kernels.dispatch import Backend, register


def _loader(package: str) -> Callable[[str], Any]:
    """``load`` of a backend: imports its package when an op is first used."""
    return lambda op: getattr(import_module(f"nca_kernels.backends.{package}"), op)


for backend in (
    Backend(
        name="xla",
        summary="fused by XLA: shifted slices and matrix products, hand-written backward",
        load=_loader("xla"),
        markers=("@nca_xla_forward", "@nca_xla_backward"),
    ),
    Backend(
        name="reference",
        summary="plain JAX convolutions and autodiff: slow, obvious, the oracle",
        load=_loader("reference"),
        markers=("stablehlo.convolution",),
        plain=True,
    ),
):
    register(backend)
