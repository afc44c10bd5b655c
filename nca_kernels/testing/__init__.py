"""Cases, comparisons and conformance checks, for tests, benchmarks and authors of backends."""

from nca_kernels.testing.attention_conformance import ATTENTION_CHECKS
from nca_kernels.testing.cases import (
    ATTENTION,
    BENCHMARKS,
    CONFORMANCE,
    AttentionCase,
    Case,
    covered_cases,
)
from nca_kernels.testing.compare import assert_close, error_ratio, tolerance
from nca_kernels.testing.conformance import CHECKS, TRANSFORMATION_CHECKS
from nca_kernels.testing.equivalence import check_equivalent

__all__ = [
    "ATTENTION",
    "ATTENTION_CHECKS",
    "BENCHMARKS",
    "CHECKS",
    "CONFORMANCE",
    "TRANSFORMATION_CHECKS",
    "AttentionCase",
    "Case",
    "assert_close",
    "check_equivalent",
    "covered_cases",
    "error_ratio",
    "tolerance",
]
