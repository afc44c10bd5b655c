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


# What tells whether an install can be trusted, in under six minutes on two cores: the native
# kernels, the public operations, the drop-ins and the command line. The rest goes over every
# backend in interpreters, all shardings, whole trainings.
QUICK = (
    "tests/test_*.py",
    "nca_kernels/test_*.py",
    "backends/cpu/test_*.py",
    "backends/reference/test_plain_attention.py",
    "backends/test_lowering.py",
    "backends/triton/test_assembler.py",
    "backends/xla/test_attention.py",
    "nca_kernels/ops/test_rollout.py",
    "nca_kernels/ops/test_tiled_rollout.py",
    "nca_kernels/testing/test_equivalence.py",
    "nca_models/test_*.py",
    "nca_models/cli/test_*.py",
    "nca_models/compat/test_cax.py",
    "nca_models/data/test_*.py",
    "nca_models/systems/test_new_system.py",
    "nca_models/training/test_export_for_cuda.py",
    "nca_models/training/test_pool_and_damage.py",
    "tools/test_issue_slots.py",
    "tools/test_races.py",
)


def is_quick(path):
    return any(path.match(pattern) for pattern in QUICK)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the files of QUICK in tests/conftest.py")
    parser.addoption("--rest", action="store_true", help="all the others")


def pytest_collection_modifyitems(config, items):
    quick, rest = config.getoption("--quick"), config.getoption("--rest")
    if quick == rest:
        return
    left_out = [item for item in items if is_quick(item.path) == rest]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
