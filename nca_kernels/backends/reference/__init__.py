"""The ops as plain JAX: a convolution, ``jax.random.bernoulli`` and autodiff."""

from nca_kernels.backends.reference.plain_step import step as step
from nca_kernels.backends.reference.plain_step import update as update
