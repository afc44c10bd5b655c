"""The ops as plain JAX: a convolution or a gather, ``jax.random.bernoulli`` and autodiff."""

from nca_kernels.backends.reference.plain_attention import (
    neighborhood_attention as neighborhood_attention,
)
from nca_kernels.backends.reference.plain_step import step as step
from nca_kernels.backends.reference.plain_step import update as update
