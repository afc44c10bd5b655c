"""The forward of the ops as Pallas kernels, for a GPU where Triton is not installed.

JAX brings Pallas, and lowers these kernels through the Triton that is built into it: nothing else
needs to be installed. A program works on whole blocks of cells, each of which it perceives, runs
through the MLP and updates, whether it fires and lives or not. Which cells live is plain JAX
afterwards. Where Triton is installed, the backend ``triton`` is the one to use.

The gradients are those of the backend ``xla``: the kernels save what its backward asks for (the
alive mask; of attention the log-sum-exp), and ``nca_kernels.backends`` puts the two together.

It refuses float64, arrays whose positions are beyond int32, and cells whose numbers do not fit a
program's registers and shared memory (their ``too_wide``). The widths of hidden layers have
no limit, but a hidden layer before another one is computed anew for every 64 units, or fewer, of
that one.

JAX 0.10 and 0.11 lower these kernels; as 0.10 would take Mosaic by default, they ask for Triton
explicitly. 0.11 says that Pallas' way through Triton is deprecated.
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
