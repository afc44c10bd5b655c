"""Set up before JAX and Triton are imported: eight host devices, Triton's interpreter."""

import os

import pytest

# Triton's kernels are interpreted here; what compiles them runs in processes of its own.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ.pop("NCA_BACKEND", None)
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()


@pytest.fixture(scope="module")
def quick_to_compile():
    """For modules whose time goes into compiling what then runs for milliseconds."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
