"""The forward of the ops as Pallas kernels, for a GPU where Triton is not installed.

JAX brings Pallas, and lowers these kernels through the Triton that is built into it: nothing else
needs to be installed. A program works on a block of cells. It computes the perception, the MLP and
the update of every one of them, whether it fires and lives or not. Which cells live is computed in
plain JAX afterwards. Where Triton is installed, the backend ``triton`` is the one to use.

The gradients are those of the backend ``xla``: the kernels save what its backward asks for (the
alive mask, and the log-sum-exp for attention), and ``nca_kernels.backends`` joins the two.

It refuses float64, arrays with positions that int32 cannot hold, and cells with more numbers than
fit a program's registers and shared memory (``too_wide``). The widths of hidden layers have no
limit, but a hidden layer that another one follows is computed again for every 64 units (or fewer)
of that layer.

JAX 0.10 and 0.11 lower these kernels. They ask for Triton explicitly, since JAX 0.10 would use
Mosaic by default; JAX 0.11 warns that Pallas' lowering through Triton is deprecated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nca_kernels.backends.pallas import attention, fused_step
from nca_kernels.backends.pallas.cells import MOST_ELEMENTS

step = update = fused_step.forward
neighborhood_attention = attention.forward


def too_wide(call: Any, avals: Sequence[Any]) -> str | None:
    """Why these kernels cannot run a call of such shapes, or None."""
    largest = max(math.prod(aval.shape) for aval in avals)
    if largest > MOST_ELEMENTS:
        return f"it takes arrays of up to 2**31 - 2**10 elements, got {largest}"
    module = attention if call.op == "neighborhood_attention" else fused_step
    return module.too_wide(call.operands(avals))
