"""Runs Pallas kernels without a GPU: interpreted, as XLA's operations, under jit.

The backend ``pallas_interpreted`` is the backend ``pallas`` in that mode, with programs so small
that small grids have several. What a kernel reads outside of an array, where it should not, is NaN.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from nca_kernels import dispatch
from nca_kernels.backends import COMMON

NAME = "pallas_interpreted"
ROWS = 32  # of a program


def register() -> None:
    """Adds the backend ``pallas_interpreted``, for tests; see ``nca_kernels.dispatch``."""
    dispatch.register(
        dispatch.Backend(
            name=NAME,
            summary="the Pallas kernels in interpret mode",
            load=_load,
            platforms=("cpu",),
            covers=replace(COMMON, width=_too_wide),
            markers={
                "step": ("@interpreted_forward", "@nca_xla_backward"),
                "neighborhood_attention": (
                    "@interpreted_forward",
                    "@nca_xla_attention_backward",
                ),
            },
        )
    )


def _load(op: str) -> tuple[Any, Any]:
    from nca_kernels.backends import pallas, xla

    compiled = getattr(pallas, op)

    def forward(call: Any, platform: str, operands: Any) -> Any:
        def interpreted_forward(operands: Any) -> Any:
            return compiled(call, platform, operands, interpret=True, rows=ROWS)

        return jax.jit(interpreted_forward)(operands)  # a lowered module shows it by name

    return forward, getattr(xla, op)[1]


def _too_wide(call: Any, avals: Any) -> str | None:
    from nca_kernels.backends import pallas

    return pallas.too_wide(call, avals)
