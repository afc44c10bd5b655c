"""The ops as Triton kernels."""

from functools import partial

from nca_kernels.backends.triton.assembler import provide_ptxas
from nca_kernels.backends.triton.attention_calls import backward as attention_backward
from nca_kernels.backends.triton.attention_calls import forward as attention_forward
from nca_kernels.backends.triton.engine import ENGINE
from nca_kernels.backends.triton.step_calls import backward, forward

provide_ptxas()  # now, so that the environment of a process changes at no later time

step = update = (partial(forward, ENGINE), partial(backward, ENGINE))
neighborhood_attention = (partial(attention_forward, ENGINE), partial(attention_backward, ENGINE))
