"""The ops as Pallas kernels, lowered through Triton: for a GPU where Triton is not installed."""

from functools import partial

from nca_kernels.backends.pallas.engine import ENGINE
from nca_kernels.tiled.attention import backward as attention_backward
from nca_kernels.tiled.attention import forward as attention_forward
from nca_kernels.tiled.step import backward, forward

step = update = (partial(forward, ENGINE), partial(backward, ENGINE))
neighborhood_attention = (partial(attention_forward, ENGINE), partial(attention_backward, ENGINE))
