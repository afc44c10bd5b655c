"""Runs Pallas kernels without a GPU, interpreted as XLA's operations, under jit.

The backend ``pallas_interpreted`` is the backend ``pallas`` in that mode. What a kernel wrongly
reads outside of an array is NaN.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from nca_kernels import dispatch
from nca_kernels.backends import COMMON

NAME = "pallas_interpreted"


def register() -> None:
    """Adds the backend ``pallas_interpreted`` to those of ``nca_kernels.dispatch``."""
    from nca_kernels.backends import pallas, xla

    def load(op: str) -> tuple[Any, Any]:
        def forward(call: Any, platform: str, operands: Any) -> Any:
            def interpreted_forward(operands: Any) -> Any:
                return getattr(pallas, op)(call, platform, operands, interpret=True)

            return jax.jit(interpreted_forward)(operands)  # a lowered module shows it by name

        return forward, getattr(xla, op)[1]

    dispatch.register(
        dispatch.Backend(
            name=NAME,
            summary="the Pallas kernels in interpret mode; gradients are xla's",
            load=load,
            platforms=("cpu",),
            covers=replace(COMMON, width=pallas.too_wide),
            markers={
                "step": ("@interpreted_forward", "@nca_xla_backward"),
                "neighborhood_attention": ("@interpreted_forward", "@nca_xla_attention_backward"),
            },
        )
    )
