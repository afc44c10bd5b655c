"""What a step costs at least, per cell: floating-point operations, and bytes to and from memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from nca_kernels.rule import RuleParams


class Cost(NamedTuple):
    """The cost of one cell and one step; the backward's includes what it recomputes.

    Attributes:
        forward_flops, backward_flops: additions and multiplications, each one FLOP.
        forward_bytes, backward_bytes: the state read and written once; going back, the state and
            the cotangent read and a cotangent written.
    """

    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float

    @property
    def training_flops(self) -> float:
        """Forward and backward."""
        return self.forward_flops + self.backward_flops

    @property
    def training_bytes(self) -> float:
        """Forward and backward."""
        return self.forward_bytes + self.backward_bytes


def cost(params: RuleParams, dtype: Any = "float32", active: float = 1.0) -> Cost:
    """What :func:`nca_kernels.step` with these parameters costs at least, per cell.

    It counts the taps and the products of the layers, beside which the rest is small.

    Args:
        params: of the step, arrays or ``jax.ShapeDtypeStruct``; only their shapes matter.
        dtype: of the state.
        active: fraction of the cells whose MLP counts: 1 if all do (dense), the fire rate if only
            those that fire, less where cells are dead.

    Example:
        Growing NCA (C=16, 3 filters, hidden 128) at 1,024 x 1,024: ``nk.cost(params)
        .forward_flops * 1024**2`` is 18 GFLOP a step.
    """
    *kernel, fan_in, perception = np.shape(params.perception)
    channels = np.shape(params.layers[-1][0])[1]
    stencil = 2 * math.prod(kernel) * fan_in * perception
    widths = [np.shape(weight) for weight, _ in params.layers]
    macs = active * sum(n * m for n, m in widths)
    last = active * math.prod(widths[-1])
    state = channels * jnp.dtype(dtype).itemsize
    return Cost(
        forward_flops=stencil + 2 * macs,
        # It recomputes the perception and the hidden layers. Then come the gradients of each
        # layer's inputs and weights, and the transposed stencil.
        backward_flops=2 * stencil + 2 * (macs - last) + 4 * macs,
        forward_bytes=2 * state,
        backward_bytes=3 * state,
    )
