"""The ops as JAX code made for XLA: ``op = (forward, backward)`` for each op."""

from nca_kernels.backends.xla.fused_step import backward, forward

step = update = (forward, backward)
