"""What tests, benchmarks and the authors of backends share: cases, comparisons, conformance."""

from nca_kernels.testing.cases import BENCHMARKS, CONFORMANCE, Case
from nca_kernels.testing.compare import assert_close, error_ratio, tolerance
from nca_kernels.testing.conformance import CHECKS, TRANSFORMATION_CHECKS

__all__ = [
    "BENCHMARKS",
    "CHECKS",
    "CONFORMANCE",
    "TRANSFORMATION_CHECKS",
    "Case",
    "assert_close",
    "error_ratio",
    "tolerance",
]
