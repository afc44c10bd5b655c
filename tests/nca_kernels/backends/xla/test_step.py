"""The step of ``xla``, on the path of CPUs and on that of accelerators."""

from nca_kernels import dispatch
from nca_kernels.backends import xla
from nca_kernels.testing import CONFORMANCE
from tests.nca_kernels.backends.suite import StepSuite

ALL_AT_ONCE = "xla_all_at_once"


class TestStep(StepSuite):
    backend = "xla"


class TestStepAllAtOnce(StepSuite):
    """The code for accelerators, run on the CPU: all cells at once, and groups by vmap."""

    backend = ALL_AT_ONCE
    cases = CONFORMANCE[::3]  # only the choice of rows differs


dispatch.register(
    dispatch.Backend(
        name=ALL_AT_ONCE,
        summary="xla as lowered for a GPU",
        load=lambda op: tuple(
            lambda call, platform, *args, kernel=kernel: kernel(call, "cuda", *args)
            for kernel in getattr(xla, op)
        ),
        markers={"step": dispatch.markers("xla", "step")},
        covers=dispatch.covers("xla"),
    )
)
