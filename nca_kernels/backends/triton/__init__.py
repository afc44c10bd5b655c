"""The ops as Triton kernels, called through jax-triton."""

from functools import partial

from nca_kernels.backends.triton.engine import ENGINE
from nca_kernels.tiled import attention
from nca_kernels.tiled import step as tiled_step

step = update = (partial(tiled_step.forward, ENGINE), partial(tiled_step.backward, ENGINE))
neighborhood_attention = (
    partial(attention.forward, ENGINE),
    partial(attention.backward, ENGINE),
)
