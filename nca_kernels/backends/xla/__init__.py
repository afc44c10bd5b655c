"""The ops as JAX code made for XLA: ``op = (forward, backward)`` for each op."""

from nca_kernels.backends.xla import attention, fused_step

step = update = (fused_step.forward, fused_step.backward)
neighborhood_attention = (attention.forward, attention.backward)
