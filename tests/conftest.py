"""Set up before JAX and Triton are imported: eight host devices, Triton's interpreter."""

import os
from pathlib import Path

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


# What tells whether an install can be trusted, in under six minutes on two cores: the native
# kernels, the public operations, the drop-ins and the command line. The rest goes over every
# backend in interpreters, all shardings, whole trainings.
QUICK = {
    "test_architecture", "test_assembler", "test_attention", "test_cli", "test_compat_cax",
    "test_cost", "test_cpu", "test_data", "test_digits", "test_equivalence", "test_errors",
    "test_export", "test_fire_mask", "test_issue_slots", "test_lowering", "test_modules",
    "test_new_system", "test_perception", "test_pool_and_damage", "test_races", "test_readme",
    "test_render", "test_rollout", "test_shape", "test_tiled_rollout", "test_training",
    "test_tuning",
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the files that QUICK names")
    parser.addoption("--rest", action="store_true", help="all the others")


def pytest_collection_modifyitems(config, items):
    quick, rest = config.getoption("--quick"), config.getoption("--rest")
    if quick == rest:
        return
    left_out = [item for item in items if (Path(item.path).stem in QUICK) == rest]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
