"""The ops in C++ through XLA's foreign function interface: fused, only the work that counts."""

from collections.abc import Sequence
from typing import Any

from nca_kernels.backends.cpu import attention as _attention
from nca_kernels.backends.cpu import step as _step

step = update = (_step.forward, _step.backward)
neighborhood_attention = (_attention.forward, _attention.backward)


def unsupported(call: Any, avals: Sequence[Any]) -> str | None:
    """Why a call of any of the ops cannot run, or None."""
    op = _attention if call.op == "neighborhood_attention" else _step
    return op.unsupported(call, avals)
