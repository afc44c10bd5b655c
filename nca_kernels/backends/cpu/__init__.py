"""The ops in C++ through XLA's foreign function interface: fused, only the work that counts."""

from nca_kernels.backends.cpu import attention
from nca_kernels.backends.cpu import step as step_calls

step = update = (step_calls.forward, step_calls.backward)
neighborhood_attention = (attention.forward, attention.backward)
